"""The exporters at their edges: real emitters, damaged and hostile notebooks, and what must not differ."""

import base64
import html
import io
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import bs4
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import PIL.Image
import pypdf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from test_export import SCRIPT
from traitlets.config import Config

from transformnet_lib import display as emitters
from transformnet_lib.export import ExportError, HTMLReportExporter, PDFReportExporter
from transformnet_lib.export.document import NUMBER, clean, read, terminal
from transformnet_lib.export.maths import mathml, typst_maths

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"><rect width="60" height="40"/></svg>'
EXPORTERS = [HTMLReportExporter, PDFReportExporter]


def shown(data: dict, ours: dict | None = None):
    return new_output("display_data", data, metadata={"transformnet": ours} if ours is not None else {})


def figure(label="fig-a", caption="Caption.", alt="Alt."):
    return [
        shown({"image/svg+xml": SVG}, {"label": label, "alt": alt}),
        shown({"text/markdown": caption}, {"caption": label}),
    ]


def frame(table: pd.DataFrame, **options):
    with pd.option_context("display.max_colwidth", None):  # else pandas itself cuts long texts
        return shown({"text/html": table.to_html(**options), "text/plain": "not this"})


def prose(text: str, *tags: str):
    return new_markdown_cell(text, metadata={"tags": list(tags)})


def code(*outputs, source="", tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def front(**fields):
    return code(shown({}, {"front": fields}))


def export(exporter, *cells, path=None, **metadata):
    resources = {"metadata": {"name": "notebook", "path": str(path)}} if path else None
    return exporter().from_notebook_node(new_notebook(cells=list(cells), metadata=metadata), resources)[0]


def page_of(*cells, **metadata) -> bs4.BeautifulSoup:
    return bs4.BeautifulSoup(export(HTMLReportExporter, *cells, **metadata), "html.parser")


def pdf_of(*cells, **metadata) -> pypdf.PdfReader:
    return pypdf.PdfReader(io.BytesIO(export(PDFReportExporter, *cells, **metadata)))


def texts(*cells, **metadata) -> tuple[str, str]:
    """What a reader sees of the page and of the PDF, spaces evened out."""
    page = page_of(*cells, **metadata).main.get_text(" ")
    pdf = " ".join(sheet.extract_text() for sheet in pdf_of(*cells, **metadata).pages)
    return tuple(re.sub(r"\s+", " ", text.replace("\u200b", "")) for text in (page, pdf))


def inert(page: bs4.BeautifulSoup, images: int):
    """Nothing in the page can run or fetch, and it holds `images` pictures, all inside it."""
    assert [script.get_text() for script in page("script")] == [SCRIPT]
    assert not page(["iframe", "object", "embed", "base", "form", "input", "svg"])
    assert [link["rel"] for link in page("link")] == [["icon"]]
    assert [i["src"][:5] for i in page("img")] == ["data:"] * images
    for element in page.find_all(True):
        assert not [name for name in element.attrs if name.startswith("on") or name in ("srcdoc", "srcset", "action")]
        for name in {"href", "src"} & set(element.attrs):
            own = r"#|https?://|mailto:" if element.name == "a" else "data:"
            assert re.match(own, element[name], re.IGNORECASE), (element.name, element[name])
    assert not re.search(r"url\(|@import", "".join(s.get_text() for s in page("style")))


# ------------------------------------------------------------------------------- what the notebooks emit


def emitted(monkeypatch, *calls) -> list:
    """The outputs that `transformnet_lib.display` makes when `calls` run."""
    outputs = []

    def display(shown, raw=False, metadata=None):
        data = shown if raw else {"text/markdown": shown.data}
        outputs.append(new_output("display_data", data, metadata=metadata or {}))

    monkeypatch.setattr(emitters, "display", display)
    for call in calls:
        call()
    return outputs


def test_emitters_and_exporters_agree(monkeypatch):
    drawn, ax = plt.subplots(figsize=(2, 1))
    ax.plot([1, 2])
    times = pd.DataFrame({"setting": ["<b>one</b>", "$2$"], "ms": ["1.5", None]})
    outputs = emitted(
        monkeypatch,
        lambda: emitters.show_front(title="A *title* & <i>", author="A. Author", date="2026-11-23"),
        lambda: emitters.show_text("As [Figure](#fig-line) and [Table](#tab-times) show, $x^2$."),
        lambda: emitters.show_figure(drawn, label="fig-line", caption="A *line*.", alt="It rises."),
        lambda: emitters.show_table(times, label="tab-times", caption="Times, as in [Table](#tab-times)."),
    )
    assert not plt.get_fignums()
    for text in texts(code(*outputs)):
        assert "As Figure 1 and Table 1 show" in text and "Figure 1: A line" in text
        assert "A *title* & <i>" in text and "A. Author" in text
        assert "<b>one</b>" in text and "$2$" in text and "–" in text
    assert page_of(code(*outputs)).img["src"].startswith("data:image/svg+xml")


def test_a_multiindex_keeps_all_names_and_values():
    index = pd.MultiIndex.from_product([["cpu", "cuda"], ["small", "large"]], names=["device", "size"])
    columns = pd.MultiIndex.from_product([["median", "spread"], ["ms", "images"]])
    table = pd.DataFrame(np.arange(16).reshape(4, 4) + 100, index=index, columns=columns)
    for text in texts(code(frame(table))):
        for word in ["cpu", "cuda", "device", "size", "median", "spread", *map(str, range(100, 116))]:
            assert word in text
        assert text.count("small") == 2 and "not this" not in text
    grid = page_of(code(frame(table))).table
    assert grid.find("th", string="median")["colspan"] == "2" and grid.find("th", string="cpu")["rowspan"] == "2"


@pytest.mark.parametrize("table", [pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame({"": [""]})])
def test_empty_frames_can_be_set(table):
    assert page_of(code(frame(table))).table and pdf_of(code(frame(table))).pages


def test_sixty_rows_keep_their_header_on_each_page():
    table = pd.DataFrame({"setting": [f"row{i}" for i in range(60)], "seconds": np.arange(60) / 7})
    outputs = [
        shown({"text/html": table.to_html(index=False)}, {"label": "tab-long"}),
        shown({"text/markdown": "All of them."}, {"caption": "tab-long"}),
    ]
    pages = [sheet.extract_text() for sheet in pdf_of(prose("# T\n\n" + "Text.\n\n" * 20), code(*outputs)).pages]
    holding = [page for page in pages if re.search(r"row\d", page)]
    assert len(holding) > 1 and all("setting" in page and "seconds" in page for page in holding)
    assert re.findall(r"row(\d+)", " ".join(pages)) == [str(i) for i in range(60)]
    assert len(page_of(code(*outputs)).tbody("tr")) == 60


def test_a_table_in_a_table_is_shown_once():
    source = "<table><tr><td>outer<table><tr><td>inner</td></tr></table></td></tr></table>"
    for text in texts(code(shown({"text/html": source}))):
        assert text.count("outer") == text.count("inner") == 1


# --------------------------------------------------------------------------------- what is shown and where


def test_hide_input_hides_all_source_and_no_output():
    cells = [code(new_output("stream", text="printed"), source="secret = 1"), prose("`code in prose`")]
    for text in texts(*cells, transformnet={"hide_input": True}):
        assert "secret" not in text and "printed" in text and "code in prose" in text
    for text in texts(*cells):
        assert "secret" in text


def test_exporting_leaves_the_notebook_as_it_was():
    notebook = new_notebook(cells=[code(source="x", tags=["hide"]), prose("y")], metadata={"transformnet": {}})
    notebook.metadata.transformnet.hide_input = True
    before = nbformat.writes(notebook)
    for exporter in EXPORTERS:
        exporter().from_notebook_node(notebook)
    assert nbformat.writes(notebook) == before


def test_abstract_with_a_heading_of_its_own():
    for text in texts(prose("# T"), prose("## Abstract\n\nIn short.\n\n### Why\n\nSo.", "abstract"), prose("## Next")):
        assert text.count("Abstract") == 1 and "In short." in text and "Why" in text and "1 Next" in text


def test_headings_named_like_parts_of_the_page_have_ids_of_their_own():
    page = page_of(prose("# T"), prose("x", "abstract"), prose("## Abstract\n\n## Main\n\n## fn-1\n\na[^1]\n\n[^1]: b"))
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids)) and len(page("h2")) == 4


def test_a_figure_may_be_called_like_a_heading():
    figures = code(*figure(), *figure("fig-b"))
    for text in texts(prose("## fig-b"), figures, prose("See [Figure](#fig-b) in [Section](#sec-fig-b).")):
        assert "See Figure 2 in Section 1" in text


def test_below_an_unnumbered_section_nothing_is_numbered():
    cells = [prose("# T\n\n## One"), prose("### Bare", "unnumbered"), prose("#### Below\n\n### Next\n\n#### Last")]
    headings = read(new_notebook(cells=cells)).headings
    assert [h["number"] for h in headings] == ["1", None, None, "1.1", "1.1.1"]


@pytest.mark.parametrize("levels", [(6, 1, 4), (3, 6, 2), (1, 5), (2, 4, 6, 1)])
def test_skipped_levels_make_valid_files(levels):
    cells = [prose("\n\n".join(f"{'#' * level} Heading {level}\n\ntext" for level in levels))]
    found = [int(h.name[1]) for h in page_of(*cells).find_all(re.compile("^h[1-6]$"))]
    assert found[0] == 1 and all(b <= a + 1 for a, b in pairwise(found))
    assert pdf_of(*cells).pages


def test_links_do_not_nest():
    for text in ("[![alt](https://a.org/x.png)](https://b.org)", "[a[^1] *b[^1]*](https://b.org)\n\n[^1]: note"):
        page = page_of(prose(text))
        assert page.find("a", href="https://b.org") and not [a for a in page("a") if a.find_parent("a")]
        assert pdf_of(prose(text)).pages
    assert page.find(id="fn-1").get_text().startswith("note")


def test_a_link_without_text_shows_its_address():
    assert page_of(prose("[](https://b.org)")).find("a", href="https://b.org").get_text() == "https://b.org"


def test_a_footnote_in_a_footnote_is_refused():
    for exporter in EXPORTERS:
        with pytest.raises(ExportError, match=r"cell 2: the footnote \[\^2\] is mentioned inside another"):
            export(exporter, prose("x"), prose("a[^1]\n\n[^1]: b[^2]\n\n[^2]: c"))


def test_entities_in_code_stay_as_typed():
    for text in texts(prose("`a &lt; b` and c &lt; d")):
        assert "a &lt; b" in text and "c < d" in text


def test_carriage_returns_and_colours_as_on_a_terminal():
    assert terminal("0%\r 50%\r100%\n\x1b[1;31mred\x1b[0m\x1b[K\r\nend\r") == "100%\nred\nend"


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([shown({"text/plain": "x"}, "text")], "'transformnet' must be a mapping"),
        ([shown({}, {"front": "text"})], "'transformnet' must be a mapping"),
        ([shown({"image/svg+xml": SVG}, {"label": 5, "alt": 3})], "a label is fig-… or tab-…"),
        (figure(alt="\x00"), "fig-a has no alt text"),
        (figure(caption="# A heading"), "the caption of fig-a must be plain paragraphs"),
        (figure(caption="  "), "the caption of fig-a must be plain paragraphs"),
        ([shown({"image/png": "é"})], "is not valid base64"),
        ([shown({"image/png": base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0").decode()})], "image/png cannot be read"),
        ([shown({"image/svg+xml": "<svg"})], "image/svg.xml cannot be read"),
        ([shown({"text/latex": r"$\nosuchthing{x}$"})], "cannot set the formula"),
        ([shown({"text/html": "<table>" + "<tr><td rowspan=999 colspan=999>" * 9})], "more than 1000 columns"),
    ],
)
def test_a_damaged_output_is_named_by_its_cell(exporter, outputs, message):
    with pytest.raises(ExportError, match=f"^cell 2: .*{message}") as caught:
        export(exporter, prose("x"), code(*outputs))
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_an_image_that_typst_refuses_is_named_by_its_cell():
    good = code(shown({"image/svg+xml": SVG}))
    for svg in (SVG.replace('width="60"', 'width="0"', 1), SVG.replace("<rect", '<image href="http://a.org/x.png"')):
        with pytest.raises(ExportError, match=r"^cell 3: Typst cannot read an image/svg\+xml"):
            export(PDFReportExporter, prose("x"), good, code(shown({"image/svg+xml": svg})))


def test_a_private_character_is_named():
    with pytest.raises(ExportError, match=r"U\+E000, used in cell 2"):
        export(PDFReportExporter, prose("x"), prose("a\ue000b"))


def test_a_formula_too_deep_for_mathml_is_named_by_its_cell():
    with pytest.raises(ExportError, match=r"^cell 2: cannot set the formula"):
        export(HTMLReportExporter, prose("$x$"), prose("$" + r"\sqrt{" * 200 + "x" + "}" * 200 + "$"))


def test_a_crash_of_the_formula_translator_is_an_export_error():
    with pytest.raises(ExportError, match="crashed"):
        typst_maths("%\\right\n_\\limits//\n\n&#0;\\char`\\end{align}")


@pytest.mark.parametrize("name", ["a%00b.png", "a" * 400 + ".png", "../secret.png", "/etc/passwd", "none.png", "."])
def test_an_image_file_that_is_not_there_is_its_alt_text(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    cell = prose(f"![the alt]({name})")
    page = bs4.BeautifulSoup(export(HTMLReportExporter, cell, path=tmp_path / "in"), "html.parser")
    assert "the alt" in page.main.get_text() and not page("img")
    assert export(PDFReportExporter, cell, path=tmp_path / "in")


# ------------------------------------------------------------------------------------------- hostile text

PIECES = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</style>", "]]>", "<!--", '#include "x"', "#{", "$",
    "$$", "\\", "\\begin{cases}", "'", '"', '");', "`", "```", "\n\n", "![x](http://a.b/c.png)", "[^1]", "|", "&#0;",
    "[x](javascript:1)", "😀", "שלום", "عربي", "\u202e", "\u200d", "\ufeff", "\x00", "\x1b[31m", "\r", "\ud800",
    "\ue000", "{{ x }}", "{% x %}", "word ", "5",
]  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), min_size=1, max_size=6).map("".join)
PLACES = {
    "title": lambda t: [front(title=t, author=t, subtitle=t, date=t), prose("x")],
    "Markdown": lambda t: [prose(t), code(shown({"text/markdown": "> " + t})), prose("a[^n]\n\n[^n]: " + t)],
    "code": lambda t: [code(new_output("stream", text=t), shown({"text/plain": t}), source=t)],
    "caption": lambda t: [code(*figure(caption="c " + t, alt="a " + t))],
    "table": lambda t: [code(frame(pd.DataFrame({t: [t, "b"], "ok": ["ok", t]})))],
    "HTML": lambda t: [code(shown({"text/html": f"<table><tr><td>{t}</td></tr></table>{t}", "text/plain": t}))],
    "LaTeX": lambda t: [code(shown({"text/latex": f"${t}$", "text/plain": t})), prose(f"${t}$")],
    "tags": lambda t: [prose("## " + t, "abstract"), prose("1. " + t, "references"), prose("## " + t, "appendix")],
}


@pytest.mark.parametrize("place", PLACES)
@given(text=hostile)
@example("<script>alert(1)</script>#include $ \\ ' \" ` 😀 שלום \x00\ud800\ufeff")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_a_hostile_string_is_text_or_an_export_error(place, text):
    cells = PLACES[place](text)
    try:
        inert(page_of(*cells), images=1 if place == "caption" else 0)
    except ExportError as error:
        assert "\n" not in str(error)
    try:
        assert pdf_of(*cells).trailer["/Root"]["/MarkInfo"]["/Marked"]
    except ExportError as error:
        assert "\n" not in str(error)


def test_a_formula_does_not_end_its_own_attribute():
    tex = r'\text{"><img src=x onerror=alert(1)><b title="} + \text{\#include}'
    page = page_of(prose(f"a ${tex}$ and\n\n$${tex}$$"))
    inert(page, images=0)
    assert [m["alttext"] for m in page("math")] == [tex, tex] and not page("b")
    assert pdf_of(prose(f"a ${tex}$")).pages


@pytest.mark.parametrize("place", ["title", "code", "caption", "table"])
def test_a_hostile_string_that_fonts_can_show_is_shown(place):
    text = "<script>alert(1)</script> #include x"
    for found in texts(*PLACES[place](text)):
        assert text in found


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_ten_kilobytes_can_be_set(place):
    page, pdf = texts(*PLACES[place]("word " * 2000))
    assert page.count("word") >= 2000 and page.count("word") % 2000 == 0
    assert pdf.count("word") >= page.count("word")  # the title's beginning is repeated on each page


@pytest.mark.parametrize("source", ["<th>{}</th>", "<td>{}</td>"])
def test_ten_kilobytes_in_a_cell_are_not_cut_off(source):
    table = f"<table><thead><tr>{source.format('word ' * 2000)}</tr></thead><tr><td>end</td></tr></table>"
    reader = pdf_of(code(shown({"text/html": table})))
    heights = []
    for page in reader.pages:
        page.extract_text(visitor_text=lambda t, cm, tm, font, size: heights.append((t, tm[5] * cm[3] + cm[5])))
    assert sum(text.count("word") for text, _ in heights) == 2000
    assert min(height for text, height in heights if "word" in text) > 60  # points, above the page number


def test_a_long_word_in_a_cell_wraps_and_does_not_shrink_the_type():
    table = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tr><td>" + "w" * 3000 + "</td><td>zz</td></tr></table>"
    sizes = []

    def visit(text, cm, tm, font, size):
        if "w" in text:
            sizes.append(abs(size * tm[3] * cm[3]))

    for page in pdf_of(code(shown({"text/html": table}))).pages:
        page.extract_text(visitor_text=visit)
    assert sizes and min(sizes) > 7  # points


def test_numbers_are_told_from_words_in_linear_time():
    words = ["1" * 10_000 + "abcdefgh", "-" * 10_000 + "x", "1 " * 5_000 + "abcdefgh"]
    script = (
        "import sys; from transformnet_lib.export.document import NUMBER; print(*map(NUMBER.fullmatch, sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=30)
    assert done.stdout == "None None None\n"
    assert NUMBER.fullmatch("1" * 10_000 + " ms")


def test_clean_removes_only_what_cannot_be_shown():
    assert clean("a\tb\nc\r\nd é 😀 שלום \ud83d\ude00") == "a\tb\nc\nd é 😀 שלום 😀"
    assert clean("\x00\x1b\x7f\x9f\ufeff\uffffa\ud800") == "a\ufffd"


def test_a_title_of_nothing_falls_back_to_the_file_name():
    for title in ("\x00", " ", None):
        assert pdf_of(front(title=title, author="\x01", date=" "), path="/tmp").metadata.title
        assert read(new_notebook(cells=[front(title=title)]), name="file").title == "file"


def test_authors_may_be_one_several_or_odd():
    for author, wanted in (("A", ["A"]), (["A", "B"], ["A", "B"]), (7, ["7"]), (["", "A"], ["A"]), (None, [])):
        assert read(new_notebook(cells=[front(title="T", author=author)])).authors == wanted


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    cells = [front(title="T", author="A", date="2026-11-23"), prose("## H\n\n$x^2$[^1] [Figure](#fig-a)\n\n[^1]: n"),
             code(*figure(), frame(pd.DataFrame({"a": [1]})), source="x = 1")]  # fmt: skip
    path = tmp_path / "nb.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    script = (
        "import sys, hashlib; from transformnet_lib.export import *\n"
        "for exporter in (HTMLReportExporter, PDFReportExporter):\n"
        "    made = exporter().from_filename(sys.argv[1])[0]\n"
        "    print(hashlib.sha256(made if isinstance(made, bytes) else made.encode()).hexdigest())"
    )
    digests = set()
    for seed in "12":  # of the hashes that order sets
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC+{seed}"}
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
        digests.add(done.stdout)
    assert len(digests) == 1 and len(set(digests.pop().split())) == 2


def test_an_export_error_leaves_no_file(tmp_path):
    path = tmp_path / "nb.ipynb"
    nbformat.write(new_notebook(cells=[prose("[Figure](#fig-none)")]), path)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "transformnet-html", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and "cell 1: nothing is labelled 'fig-none'" in done.stderr
    assert not (tmp_path / "nb.html").exists()


def test_an_empty_notebook_is_a_titled_tagged_page():
    assert page_of().h1.get_text() and pdf_of().trailer["/Root"]["/MarkInfo"]["/Marked"]


@pytest.mark.parametrize("date", ["0001-01-01", "1900-02-28", "9999-12-31", "2026-W47-1", "23 November 2026"])
def test_any_date_can_be_shown(date):
    for text in texts(front(title="T", date=date)):
        assert date in text


# ------------------------------------------------------------------------- nothing is lost without a word


def gif() -> str:
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 3)).save(file, "GIF")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"text/html": "<div>one <b>two</b></div><p>three</p>", "text/plain": "<HTML object>"}, ["one two", "three"]),
        ({"text/html": "<p>before</p><table><caption>said</caption><tr><td>1</td></tr></table>after"},
         ["before", "said", "1", "after"]),
        ({"text/html": "<table><tr><td>1<img src='x'></td></tr></table>"}, ["1", "[img in HTML not shown]"]),
        ({"text/html": "<script>x</script>", "text/plain": "<Thing at 0x1>"}, ["[script in HTML not shown]"]),
        ({"text/html": "<p>Chart</p><progress value=3></progress><script>draw()</script>", "text/plain": "<Chart>"},
         ["Chart", "[progress in HTML not shown]", "[script in HTML not shown]"]),
        ({"text/html": "<p>10<sup>-3</sup> &#xe000;abc</p>", "text/plain": "<HTML>"}, ["10^-3 abc"]),
        ({"application/x+json": {"data": []}}, ["[output of type application/x+json not shown]"]),
        ({"application/json": {"a": [1]}, "text/plain": "<IPython.core.display.JSON object>"}, ['"a"']),
        ({"text/plain": "<Thing at 0x1>"}, ["<Thing at 0x1>"]),
        ({"text/latex": r"\begin{align*}a &= 1\\ b &= 2\end{align*}", "text/plain": "<Latex>"}, ["𝑎", "2"]),
    ],
)  # fmt: skip
def test_each_output_is_set_or_named(data, expected):
    for text in texts(code(shown(data))):
        at = 0
        for part in expected:
            assert part in text[at:], (part, text)
            at = text.index(part, at)


def test_text_between_comments_is_kept():
    cell = new_markdown_cell("<!-- start -->IMPORTANT<!-- end -->\n\n<!-- a --> second\n\nthird <!-- b --> fourth")
    for text in texts(cell):
        assert re.search(r"IMPORTANT\s+second\s+third\s+fourth", text) and "<!--" not in text


def test_a_jpeg_for_printers_is_shown():
    file = io.BytesIO()
    PIL.Image.new("CMYK", (30, 30), (255, 0, 0, 0)).save(file, "JPEG")
    cell = code(shown({"image/jpeg": base64.b64encode(file.getvalue()).decode()}))
    data = page_of(cell).find("img")["src"].removeprefix("data:image/jpeg;base64,")
    assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((9, 9))[2] > 200  # cyan
    pdf_of(cell)


def test_an_anchor_named_like_a_heading_keeps_its_name():
    page = page_of(new_markdown_cell('# T\n\n## A x\n\n<a id="x"></a>Text. [](#x)'))
    assert len(page.find_all(id="a-x")) == 1 and page.find("h2", id="a-x-1")


def test_a_gif_is_a_picture():
    cell = code(shown({"image/gif": gif(), "text/plain": "<Image>"}))
    assert page_of(cell).find("img")["src"].startswith("data:image/gif;base64,")
    assert len(pdf_of(cell).pages) == 1


def test_raw_cells_are_set_or_named():
    cells = [new_raw_cell("as it is"), new_raw_cell("\\LaTeX", metadata={"raw_mimetype": "text/latex"})]
    for text in texts(*cells):
        assert "as it is" in text and "[raw cell of type text/latex not shown]" in text and "LaTeX" not in text


def test_small_html_in_markdown_is_what_it_says_and_other_html_is_text():
    source = "H<sub>2</sub>O, x<sup>*n*</sup><br>next <!-- unseen --><b>bold <i>both</i></b> <sub>open <u>u</u>"
    main = page_of(new_markdown_cell(source)).main
    assert [each.get_text() for each in main(["sub", "strong", "br"])] == ["2", "", "bold both"]
    assert main.find("sup").find("em").get_text() == "n" and "unseen" not in main.get_text()
    assert "<sub>open <u>u</u>" in main.get_text()
    assert "<!--" not in texts(new_markdown_cell("a\n\n<!-- unseen\n\nstill -->\n\nb"))[0]


def test_anchors_of_ones_own_are_where_links_lead():
    page = page_of(
        new_markdown_cell('<a id="mine"></a>Text. [Back](#mine), [](#mine)\n\n<a name="other"></a>\n\nMore [x](#other)')
    )
    links = {link.get_text(): link["href"] for link in page.main("a")}
    assert links == {"Back": "#a-mine", "here": "#a-mine", "x": "#a-other"}
    assert page.find(id="a-mine") and page.find(id="a-other")
    pdf_of(new_markdown_cell('<a id="mine"></a>Text. [Back](#mine)'))


@pytest.mark.parametrize(
    "tex",
    [r"\left( a \middle| b \right)", r"{\bf x} + {\rm d}y", r"\begin{alignat}{2} a &= 1 & b &= 2 \end{alignat}",
     r"\begin{aligned}[t] a &= 1 \end{aligned}", r"a \xrightarrow[n]{d} b", r"\frac{a,b}{2}", r"\underline{x}",
     r"\begin{pmatrix} a,b & c \end{pmatrix}", r"f(x; y), \sqrt{1{,}5}", r"\begin{rcases} a \\[4pt] b \end{rcases}"],
)  # fmt: skip
def test_formulas_that_tylax_alone_would_lose_are_set(tex):
    page = page_of(new_markdown_cell(f"$${tex}$$"))
    shown = page.find("math").get_text()
    assert shown.strip() and "pt" not in shown
    assert shown.count(",") == tex.count(",") and shown.count(";") == tex.count(";")
    assert len(page.find_all("mtr")) in (0, 1 + tex.count(r"\\"))
    pdf_of(new_markdown_cell(f"$${tex}$$"))


def test_every_symbol_of_tex_is_one_character():
    names = (Path(__file__).parent / "tex_symbols.txt").read_text(encoding="utf-8").split()  # as KaTeX 0.19 has them
    made, _ = mathml({rf"a \{name} b": 1 for name in names})
    lost = []
    for name in names:
        inside = re.sub("<[^>]*>|\ufe0e", "", made[rf"a \{name} b", False])
        if len(html.unescape(inside)) != 3:
            lost.append((name, inside))
    assert len(names) > 400 and not lost


def test_no_input_leaves_the_code_out():
    config = Config({"TemplateExporter": {"exclude_input": True}})
    notebook = new_notebook(cells=[new_code_cell("secret = 1", outputs=[new_output("stream", text="told")])])
    page, _ = HTMLReportExporter(config=config).from_notebook_node(notebook)
    assert "told" in page and "secret" not in bs4.BeautifulSoup(page, "html.parser").main.get_text()
