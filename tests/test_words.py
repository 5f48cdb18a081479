"""The templates: opposite facts give opposite sentences, each branch is rendered, and no text breaks out."""

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
import pytest
from conftest import altered
from handtimed import REASON, SECONDS, WIDE, benchmark
from jinja2 import FileSystemLoader, nodes

from transformnet_lib import Pipeline, Run, TrainConfig
from transformnet_lib.benchmarking import KNOWN, Measurements
from transformnet_lib.errors import ParameterError
from transformnet_lib.facts import Report, report_facts
from transformnet_lib.facts.learning import Change
from transformnet_lib.facts.study import Library, Rival, Size, StudyFacts
from transformnet_lib.measure import Estimate
from transformnet_lib.words import TEMPLATES, Words, environment
from transformnet_lib.words.filters import FILTERS, code, code_block, literal, plain

NAMES = sorted(path.name.removesuffix(".md.j2") for path in TEMPLATES.glob("*.md.j2") if path.name != "names.md.j2")
FIXED = ("network", "loss", "setup")  # have formulas
BLOCKS = {name: re.findall(r"{% block (\w+)", (TEMPLATES / f"{name}.md.j2").read_text()) for name in NAMES}


def pages(report: Report) -> dict[tuple[str, str], list[str]]:
    """All that the templates say of a report: by template and block, once for each thing it is said of."""
    say, found = Words(report), defaultdict(list)
    each_of = {
        "place": report.places, "table": report.table1, "study": report.studies,
        "run": [*report.seeded, *report.compared],
    }  # fmt: skip
    needs = {
        "results": "place", "wins": "place", "factors": "place", "table1": "table", "libraries": "study",
        "sizes": "study", "seeds": "run", "metrics": "run",
    }  # fmt: skip
    once = {"digits": 7, "column": "val_mse", "number": 1}
    for name, blocks in BLOCKS.items():
        for block in blocks:
            kind = needs.get(name) or {"libraries": "study", "sizes": "study"}.get(block if name == "headings" else "")
            for fact in each_of[kind] if kind else [None]:
                if (name == "seeds" and not fact.seeds) or (name == "metrics" and not fact.comparison):
                    continue
                facts = once | ({kind: fact} if kind else {})
                if name == "examples":
                    if not report.compared:
                        continue
                    facts |= {"comparison": report.compared[0].comparison, "compared": report.compared}
                    facts["example"] = report.compared[0].comparison.examples[0]
                if (name, block) == ("abstract", "alt") and not report.quickest:
                    continue
                found[name, block].append(say(name, block, **facts))
    for place in report.places:
        found["names", "combination"] += [str(say.names.combination(each)) for each in place.combinations]
    return found


def text_of(report: Report) -> str:
    return "\n\n".join(text for texts in pages(report).values() for text in texts)


@pytest.fixture
def report(run):
    """Answers a function that gives the report of the run as if it had been timed as `benchmark` says."""
    return lambda **options: report_facts([altered(run, benchmark={"measured": benchmark(**options)})])


def with_training(report: Report, **changes) -> Report:
    """The report as if its run had been trained to other facts."""
    run = report.runs[0]
    changed = replace(run, training=replace(run.training, **changes))
    return replace(report, runs=[changed], closest=changed, recipe=None)


def with_distance(report: Report, distance: str, *, preset: str = "paper", unchanged: bool = True) -> Report:
    run = report.runs[0]
    new = (
        replace(run.preset, name=preset) if not unchanged else replace(run.preset, name=preset, changes={}, limit=None)
    )
    changed = replace(run, preset=new, comparison=replace(run.comparison, distance=distance))
    closest = None if distance in ("no gradient", "undetermined") else changed
    return replace(report, runs=[changed], closest=closest, recipe=changed if preset == "paper" else None)


# Opposite facts give opposite sentences


@pytest.mark.parametrize(
    ("seconds", "told"),  # the pipeline takes 0.1 s in batches
    [(0.05, "2× [2, 2] as fast as"), (0.2, "0.5× [0.5, 0.5] as fast as"),
     (0.101, "as fast (within ±3 %: 0.99× [0.99, 0.99]) as"),
     (0.1 * WIDE, "neither clearly faster nor clearly slower (1× [0.87, 1.18]) than")],
)  # fmt: skip
def test_every_comparison_says_what_the_interval_shows(report, seconds, told):
    found = report(reference=seconds, fast=None)
    say = Words(found)
    for text in (say("abstract"), say("abstract", "short"), say("results", place=found.places[0]), say("conclusion")):
        assert f"{told} the pipeline in batches" in text, text
    assert ("Speed is no reason to use it." in say("conclusion")) is told.startswith(("0.5×", "as fast"))


@pytest.mark.parametrize(
    ("distance", "abstract", "conclusion"),
    [
        ("equal", "equals the pipeline: no pixel of 600 test images", "it is the pipeline.** `small`"),
        ("close", "looks right but is not: the worst pixel", "though the loss is small and the pictures look alike"),
        ("far", "does not reproduce the pipeline: the worst", "the pictures are visibly different"),
        ("no gradient", "learns nothing: at the random start its gradient is zero", "at the start the gradient was"),
        ("undetermined", "their colours do not determine the weights", "these images cannot tell.**"),
    ],
)
def test_the_abstract_and_the_conclusion_follow_the_measured_distance(report, distance, abstract, conclusion):
    say = Words(with_distance(report(), distance))
    assert abstract in say("abstract").replace("\n", " ") and conclusion in plain_dots(say("conclusion"))
    assert ("Train it well" in say("conclusion")) is (distance == "equal")


def plain_dots(markdown: str) -> str:
    return re.sub(r"\\(.)", r"\1", markdown)


def test_a_better_training_beside_the_recipe_is_told_with_it(report):
    found = with_distance(report(), "close")
    exact = with_distance(report(), "equal", preset="precise").runs[0]
    text = Words(replace(found, runs=[*found.runs, exact], closest=exact))("abstract")
    assert "looks right but is not" in text and "A better-conditioned training (`precise`) recovers the weights" in text
    close = with_distance(report(), "close", preset="precise", unchanged=False)
    assert "Trained with the preset `precise`, changed: batch\\_size 32" in Words(close)("abstract")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"error_kind": "rounding"}, "are the pipeline's to rounding"), ({"error_kind": "close"}, "are close to the pip"),
     ({"error_kind": "far"}, "are not the pipeline's"), ({"no_gradient": True}, "the gradient is zero"),
     ({"negative": ["blue"]}, "A negative blue weight is implausible")],
)  # fmt: skip
def test_weights_are_judged_in_words(report, change, told):
    assert told in Words(with_training(report(), **change))("weights")
    assert ("implausible" in Words(with_training(report(), **change))("weights")) is ("negative" in change)


def test_the_stopping_rule_that_was_applied_is_said(report):
    def text(**changes) -> str:
        return Words(with_training(report(), **changes))("stopping").replace("\n", " ")

    plain_rule = TrainConfig(device="cpu")
    assert "by at least 0.0001 below" in text(config=plain_rule) and "fallen to 0" not in text(config=plain_rule)
    assert "(counted once the learning rate has fallen to 0)" in text()
    assert "falls below the best so far" in text(config=replace(plain_rule, min_delta=0.0))
    assert "It stopped after 5 epochs" in text(epochs=5) and "ended at the limit of 30" in text(epochs=30)
    assert "improved by less than `min_delta`" in text(val_mse=2.0, lowest_val_mse=1.0)
    assert "is the lowest of all epochs" in text(val_mse=1.0, lowest_val_mse=1.0)


@pytest.mark.parametrize(
    ("factor", "told"),
    [(1.5, "costs time"), (1.0, "makes no difference"), (0.5, "saves time"), (WIDE, "may or may not matter")],
)
def test_whether_shuffle_matters_in_words(report, factor, told):
    found = report(reference=lambda s: 0.2 * (factor if s.shuffle else 1), fast=None)
    assert f"`shuffle` {told} for the paper's method" in Words(found)("effects")
    assert f"| {told} |" in Words(found)("effects", "table")


@pytest.mark.parametrize(
    ("one", "told"),
    [(2.0, "makes it slower, as the paper"), (0.5, "helps, against"), (1, "no difference"), (WIDE, "helps stays open")],
)
def test_whether_workers_help_in_words(report, one, told):
    found = report(workers=(0, 1), reference=lambda s: 0.2 * (one if s.num_workers else 1))
    assert told in Words(found)("effects").partition("`num_workers`")[2]


def test_a_claim_is_said_with_its_numbers(report):
    table = Words(report(reference=lambda s: 32 / s.batch_size))("claims", "table")
    assert "cpu: 0.5× to 8× by the medians; faster in 8 and slower in 4 of 12 settings | does not hold |" in table
    assert "not measured on CUDA | not tested here |" in Words(report())("claims", "table")


def test_another_geometry_is_said_and_its_steps(run):
    for pipeline, told in ((Pipeline((64, 64), False, False), "convert to grey)"), (Pipeline(), "flip both ways)")):
        say = Words(report_facts([altered(run, train={"pipeline": pipeline})]))
        assert told in say("abstract")
        assert ("compare only in their ratios" in say("abstract")) is (pipeline != Pipeline())
        assert ("**Flip**" in say("network")) is pipeline.hflip


# What is missing, and what is hostile


def failing_in(part: str, *methods: str) -> dict:
    return {name: lambda s, name=name: REASON if s.part == part else SECONDS[name] for name in methods}


@pytest.mark.parametrize(
    "options",
    [
        {"parts": ["best", "one thread"]}, {"parts": ["sweep", "workers"]}, {"parts": ["sweep", "small", "best"]},
        *({method: REASON} for method in ("sequential", "batched", "reference", "fast", "resize")),
        *(failing_in(part, "sequential", "batched", "grayscale") for part in ("small", "best", "factors")),
        failing_in("best", "reference", "fast", "copy"),
        dict.fromkeys(SECONDS, REASON),
    ],
)  # fmt: skip
def test_whatever_is_missing_the_rest_is_said(report, options):
    found = report(small=(8,), workers=(0, 1), **options)
    for (name, block), texts in pages(found).items():
        for text in texts if name not in FIXED else []:
            assert not re.search(r"\bnan\b|\bNone\b|\binf\b| [.,;]|\(\)|\S  \S|: \.", text), (name, block, text)
    assert ("The model was not timed." in Words(found)("abstract")) is (found.quickest is None)


HOSTILE = "<script>|`*$x$\u202e"


def test_hostile_texts_stay_literal(run):
    environment = run.benchmark.environment.model_copy(update={"cpu": HOSTILE})
    measured = benchmark(others=(HOSTILE,), reference=lambda s: f"not measured: {HOSTILE}" if s.shuffle else 0.2)
    hostile = altered(run, label=HOSTILE, benchmark={"measured": measured, "environment": environment})
    shown = pages(report_facts([hostile])).items()
    text = "\n\n".join(each for (name, _), texts in shown for each in texts if name not in FIXED)
    assert text.count(literal(HOSTILE)) > 5 and text.count(code(HOSTILE)) > 5
    text = text.replace(literal(HOSTILE), "").replace(code(HOSTILE), "")
    assert not re.search(r"<|script|\$x|\u202e", text.partition("```sh")[0])


def test_a_block_of_code_keeps_its_spaces_and_no_controls():
    assert code_block("a 'b  c' \\\n  \u05d0\x1b") == "```sh\na 'b  c' \\\n  \u05d0\ufffd\n```"


@pytest.mark.parametrize("shown", [code, literal])
def test_what_a_run_says_turns_no_text_around_it(shown):
    assert shown("a\u202eb\x1b") == shown("a\ufffdb\ufffd")
    assert "\u2068\u05d0 3\u2069" in shown("\u05d0 3")  # Hebrew is isolated
    assert "\u2068" not in shown("caf\u00e9 3")


def test_a_sentence_for_the_terminal_has_no_marks():
    assert plain(f"of {code('a b')} {literal('(x) 1.5*')},\nso") == "of a b (x) 1.5*, so"


# Templates of one's own


def test_somebodys_own_templates_take_the_place_of_those_shipped(report, tmp_path):
    (tmp_path / "loss.md.j2").write_text("{% block text %}## Verlust\n{{ runs[0].label|code }}{% endblock %}")
    say = Words(report(), tmp_path)
    assert say("loss") == "## Verlust\n`small`" and say("network") == Words(report())("network")
    (tmp_path / "names.md.j2").write_text(
        (TEMPLATES / "names.md.j2").read_text().replace("the fast method", "die schnelle Art")
    )
    assert "die schnelle Art is fastest with" in Words(report(), tmp_path)("results", place=report().places[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% block text %}{{ rnus }}{% endblock %}", "words: loss.md.j2, line 1: 'rnus' is undefined"),
     ("{% block text %}{{ paper_seconds }}{% endblock %}", "0.7399 is written without a filter"),
     ("{% block text %}{{ runs[0].lable }}{% endblock %}", "has no attribute 'lable'"),
     ("{% block text %}{% endif %}", "words: loss.md.j2, line 1: "), ("", "there is no block 'text'"),
     ("{% block text %}{{ 'a'|time }}{% endblock %}", "line 1: AttributeError: 'str' object has no attribute 'median'"),
     ("{% block text %}\n\n{{ 1 / 0 }}{% endblock %}", "loss.md.j2, line 3: ZeroDivisionError: division by zero")],
)  # fmt: skip
def test_a_mistake_in_a_template_is_one_line(report, tmp_path, template, message):
    (tmp_path / "loss.md.j2").write_text(template)
    with pytest.raises(ParameterError) as caught:
        Words(report(), tmp_path)("loss")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_none_or_holds_a_template_that_nobody_reads_is_refused(report, tmp_path):
    with pytest.raises(ParameterError, match=r"words: expected a folder of templates, got .*none"):
        Words(report(), tmp_path / "none")
    with pytest.raises(ParameterError, match=r"words: expected a folder of templates, got 5, which is none"):
        Words(report(), 5)
    (tmp_path / "los.md.j2").write_text("")
    with pytest.raises(ParameterError, match=r"los\.md\.j2: no template has this name; there are abstract"):
        Words(report(), tmp_path)


# Every branch


def studied() -> list[StudyFacts]:
    """Studies that differ in all that is said of them."""
    one, far = Estimate(1.0, 0.9, 1.1, 9), Estimate(3.0, 2.9, 3.1, 9)

    def library(name: str, levels: float | None, reason: str = "") -> Library:
        return Library(name, "cpu", None if reason else one, None if reason else one, far, levels, reason)

    ours, same, other = library("TransformNet, fast", 0.0), library("Pillow", 0.2), library("OpenCV", 12.0)
    off, copy, absent = library("TransformNet, fast", 17.7), library("copy", None), library("Kornia", None, "absent")
    alone = replace(copy, speedup=None)  # torchvision image by image has failed
    sizes = [Size("fast", 10, one, 1.0, power, growth) for power, growth in
             ((None, ""), (0.5, "less"), (1.0, "proportional"), (2.0, "more"))]  # fmt: skip
    table = pd.DataFrame()
    return [
        StudyFacts(
            "small", 10, [ours, same, copy, alone], [Rival("cpu", same, ours, [same])], sizes[:1], table, {10: 5.0}
        ),
        StudyFacts(
            "b", 10, [off, other, absent], [Rival("cuda:1", other, off, [other])], sizes, table, {1: 5.0, 2: 6.0}
        ),
    ]


def scenarios(run: Run) -> list[Report]:
    """Reports that differ in all that is said of them."""

    def timed(label: str = "small", **options) -> Run:
        return altered(run, label=label, benchmark={"measured": benchmark(**options)})

    full = {"small": (8,), "workers": (0, 1, 2), "others": (KNOWN, "a")}
    base = report_facts([timed(**full)])
    settings, rounds = run.benchmark.measured.settings, run.benchmark.measured.rounds
    again = Measurements(settings, pd.concat([rounds, rounds[rounds["round"] == 2].assign(attempt=2)]))
    odd = timed(
        devices=("cpu", "cuda:1", "cuda"), small=(8,), workers=(0, 1),
        reference=lambda s: WIDE * 0.1 if s.batch_size == 16 else 3.0 if s.shuffle else 0.08,
        fast=lambda s: REASON if s.part == "best" else 2.0 if s.batch_size == 16 else 0.01,
        copy=REASON, convolution=0.01,
    )  # fmt: skip
    bare = altered(run, label="bare", benchmark=None, compare=None)
    seeds = pd.DataFrame({"preset": ["paper"] * 2 + ["precise"], "seed": [0, 1, 0], "weight_error": [0.1, 0.3, 1e-7],
                          "val_mse": 1e-4, "best_epoch": 3, "seconds": 1.0})  # fmt: skip

    def seeded(*stuck: bool) -> Run:
        stage = run.train.model_copy(
            update={"table": seeds.assign(no_gradient=list(stuck)), "parameters": {"seeds": [0, 1]}}
        )
        return run.model_copy(update={"seeds": stage})

    ablated = replace(base.runs[0], seeds=report_facts([seeded(False, False, False)]).runs[0].seeds, changes=[
        Change("lr", 1e-9, 10, False), Change("min_delta", 0.1, 10, False), Change("whiten", 0.1, 10, True)
    ], unchanged_error=None)  # fmt: skip
    in_vain = replace(ablated, changes=ablated.changes[1:], unchanged_error=0.2)
    grey = altered(run, label="grey", train={"least_squares": None})
    folder = run.train.images.model_copy(update={"source": "folder:/x"})
    cifar = run.train.images.model_copy(update={"source": "cifar10"})
    config = TrainConfig(device="cpu", epochs=2, min_delta=0.0)
    short = altered(run, label="short", train={"history": run.train.history.head(2), "best_epoch": 1})
    found = [
        replace(base, runs=[ablated]), replace(base, runs=[in_vain]),
        base, report_facts([altered(run, benchmark={"measured": again})]), report_facts([odd]),
        report_facts([timed(), timed("other", devices=("cuda",), graph=REASON, fast=lambda s: 0.02 * WIDE)]),
        report_facts([timed(**dict.fromkeys(SECONDS, REASON)), bare]), report_facts([timed(sequential=REASON)]),
        report_facts([timed(batched=REASON, convolution=REASON, parts=["sweep", "best"])]),
        report_facts([timed(reference=0.3, fast=0.2, workers=(0, 1, 2))]), report_facts([bare]),
        report_facts([timed(workers=(0, 1), reference=lambda s: 0.2 * (WIDE if s.num_workers else 1))]),
        report_facts([timed(workers=(0, 1), reference=lambda s: 0.2 * (0.5 if s.num_workers else 1))]),
        report_facts([timed(workers=(0, 1), reference=0.1, fast=lambda s: 0.1 if s.weights else 0.05)]),
        report_facts([timed(workers=(0, 1), reference=lambda s: 0.2 * (2 if s.num_workers else 1))]),
        report_facts([seeded(False, True, False)]), report_facts([seeded(True, True, False)]),
        report_facts([seeded(False, False, False), altered(seeded(False, False, True), label="more")]),
        report_facts([grey, altered(run, label="cifar", train={"images": cifar, "config": config})]),
        report_facts([altered(run, label="own", train={"images": folder})]), report_facts([short]),
        report_facts([short.model_copy(update={"shipped": True, "label": "came"}), altered(run, label="third"), run]),
        replace(base, studies=studied()), replace(base, studies=studied()[:1]),
        *(with_distance(base, kind) for kind in ("equal", "close", "far", "no gradient", "undetermined")),
        *(with_distance(base, kind, preset="precise", unchanged=False) for kind in ("equal", "close", "far")),
        with_distance(base, "close", unchanged=False),
        *(with_training(base, error_kind=kind) for kind in ("rounding", "close", "far")),
        with_training(base, no_gradient=True), with_training(base, val_mse=2.0, lowest_val_mse=1.0),
        with_training(base, epochs=30, negative=["blue"]), with_training(base, negative=["red", "blue"], config=config),
    ]  # fmt: skip
    whole = run.train.images.model_copy(update={"request": run.train.images.request.model_copy(update={"limit": None})})
    history = pd.concat([run.train.history.head(1)] * 3)
    of_paper = {"config": TrainConfig(device="cpu"), "images": whole, "history": history, "best_epoch": 1}
    recipe = altered(run, label="recipe", train=of_paper)
    other = replace(run.train.least_squares, weights=(0.3, 0.6, 0.1))
    threads = run.benchmark.environment.model_copy(update={"threads": 2})
    quick = altered(timed(**full), benchmark={"environment": threads, "measured": benchmark(**full)})
    busy = benchmark(reference=0.1, fast=0.1)
    busy = Measurements(busy.settings, busy.rounds.assign(stolen_seconds=busy.rounds["seconds"]))
    found += [
        report_facts([quick]), report_facts([altered(run, benchmark={"measured": busy})]),
        *(report_facts([altered(run, benchmark={"measured": found, "origin": "least squares"})])
          for found in (benchmark(), benchmark(fast=lambda s: REASON if s.part == "best" else 0.01))),
        report_facts([timed(fast=lambda s: 0.05 if s.drop_last else 0.01)]),
        report_facts([timed(fast=0.1 * WIDE)]), report_facts([timed(fast=0.2)]),
        with_training(base, val_mse=1.0, lowest_val_mse=1.0), report_facts([timed(fast=None)]),
        report_facts([recipe, altered(recipe, label="grey", train={"least_squares": None})]),
        report_facts([altered(recipe, label="changed", train={"config": TrainConfig(device="cpu", min_delta=0.5)})]),
        report_facts([altered(run, label="few", train={"config": TrainConfig(device="cpu")})]),
        report_facts([run, altered(run, label="other", train={"least_squares": other})]),
        report_facts([timed(devices=("cuda",), graph=0.018, pinned=0.017, fast=0.016)]),
        report_facts([timed(**failing_in("best", "sequential", "batched"))]), report_facts([grey]),
        report_facts([timed(reference=lambda s: 0.05 if s.shuffle and s.drop_last and s.batch_size == 64 else 0.9)]),
        report_facts([timed(fast=lambda s: f"not measured: {s.name}" if s.shuffle else 0.02)]),
    ]  # fmt: skip
    for hflip, vflip in ((True, False), (False, True), (False, False)):
        found.append(report_facts([altered(run, train={"pipeline": Pipeline(hflip=hflip, vflip=vflip)})]))
    continued = replace(base, stages=[replace(stage, sittings=3) for stage in base.stages])
    negative = with_distance(with_training(base, negative=["blue"]), "close")
    overlap = replace(base.runs[0], comparison=replace(base.runs[0].comparison, in_training=3))
    uneven = replace(base.runs[0], comparison=replace(base.runs[0].comparison, evenly_spaced=False))
    return [*found, continued, negative, replace(base, runs=[uneven]), replace(base, runs=[overlap])]


def test_every_branch_of_every_template_is_rendered_both_ways(run, monkeypatch):
    outcomes: dict[str, set[bool]] = {}

    class Traced(jinja2.Environment):
        """Notes for each condition in a template whether it was true and false."""

        def _parse(self, source, name, filename):
            tree = super()._parse(source, name, filename)
            lines = source.splitlines()
            for node in tree.find_all((nodes.If, nodes.CondExpr)):
                key = f"{Path(filename or '').name}:{node.lineno}: {lines[node.lineno - 1].strip()[:70]}"
                key += f" #{sum(each.startswith(key) for each in outcomes)}"
                outcomes[key] = set()
                node.test = nodes.Filter(node.test, "seen", [nodes.Const(key)], [], None, None)
            return tree

    monkeypatch.setattr("transformnet_lib.words.jinja2.Environment", Traced)
    monkeypatch.setattr("transformnet_lib.words.environment", cache(lambda _: environment(FileSystemLoader(TEMPLATES))))
    note = lambda value, key: outcomes.setdefault(key, set()).add(bool(value)) or value  # noqa: E731
    monkeypatch.setitem(FILTERS, "seen", note)
    found: dict[str, set[bool]] = defaultdict(set)
    for report in scenarios(run):
        text_of(report)
        for key, seen in outcomes.items():
            found[key] |= seen
        outcomes.clear()
    once = [f"{key}: only {seen or 'never seen'}" for key, seen in found.items() if len(seen) < 2]
    assert len(found) > 100 and not once, "\n".join(once)
