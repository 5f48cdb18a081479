"""The two exporters: same numbers in both, nothing breaks out, nothing is lost."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from itertools import pairwise

import bs4
import nbformat
import pypdf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from transformnet_lib.export import ExportError, HTMLReportExporter, PDFReportExporter
from transformnet_lib.export.document import NUMBER, read, terminal
from transformnet_lib.export.html import TEMPLATES
from transformnet_lib.export.maths import literal, typst_maths

SCRIPT = (TEMPLATES / "report.js").read_text(encoding="utf-8")

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="60pt" height="40pt"><rect width="60" height="40"/></svg>'


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def display(data: dict, **metadata):
    return new_output("display_data", data, metadata=metadata)


def figure(label="fig-loss", caption="A caption.", alt="A falling line", **extra):
    shown = display({"image/svg+xml": SVG, "image/png": png()}, transformnet={"label": label, "alt": alt})
    return [shown, display({"text/markdown": caption}, transformnet={"caption": label})]


def table(label="tab-times", caption="Some times.", rows=3):
    cells = "".join(f"<tr><th>row{i}</th><td>{i}.5×</td></tr>" for i in range(rows))
    source = f"<table><thead><tr><th></th><th>speedup</th></tr></thead><tbody>{cells}</tbody></table>"
    shown = display({"text/html": source, "text/plain": "x"}, transformnet={"label": label})
    return [shown, display({"text/markdown": caption}, transformnet={"caption": label})]


def front(**fields):
    return code(display({"text/plain": "front"}, transformnet={"front": {"title": "A title", **fields}}), source="")


def code(*outputs, source="pass", tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def prose(text, *tags):
    return new_markdown_cell(text, metadata={"tags": list(tags)})


def notebook(*cells):
    return new_notebook(cells=list(cells), metadata={"language_info": {"name": "python"}})


def to_html(*cells) -> str:
    return HTMLReportExporter().from_notebook_node(notebook(*cells))[0]


def to_pdf(*cells) -> bytes:
    return PDFReportExporter().from_notebook_node(notebook(*cells))[0]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u200b", "").replace("\u00ad", ""))


def page_texts(pdf: bytes) -> list[str]:
    return [flat(page.extract_text()) for page in pypdf.PdfReader(io.BytesIO(pdf)).pages]


def both(*cells) -> tuple[str, str]:
    """Visible text of the HTML's <main>, and of the PDF."""
    soup = bs4.BeautifulSoup(to_html(*cells), "html.parser")
    return flat(soup.main.get_text()), " ".join(page_texts(to_pdf(*cells)))


REPORT = [
    front(author="A. Author", date="2026-11-23", subtitle="A subtitle"),
    prose("# A title"),
    prose("Half as long, $x^2$.", "abstract"),
    prose(
        "## First part\n\nSee [Figure](#fig-b), [Table](#tab-times), [Section](#Second-part), [Section](#extra),"
        " [here](#fig-loss), [](#tab-times) and [[2]](#ref-2).[^n]"
    ),
    code(*figure("fig-loss", "Loss, see [Figure](#fig-b)."), *figure("fig-b", "Other, $y_i$.")),
    prose("## Second part\n\n### Sub part\n\nText.[^n] [Section](#Sub-part)"),
    code(*table()),
    prose("## Extra\n\n### Deeper", "appendix"),
    prose("## Sources\n\n1. One.\n2. Two.\n\n[^n]: The note.", "references", "unnumbered"),
]


# ------------------------------------------------------------------------------ numbers and references


def test_references_resolve_alike_in_html_and_pdf():
    for text in both(*REPORT):
        assert "See Figure 2, Table 1, Section 2, Appendix A, here, Table 1 and [2]." in text
        assert "Figure 1: Loss, see Figure 2." in text
        assert "Figure 2: Other" in text and "Table 1: Some times." in text
        for heading in ("1 First part", "2 Second part", "2.1 Sub part", "A Extra", "A.1 Deeper", "Section 2.1"):
            assert heading in text
        assert not re.search(r"\d Sources", text)


def test_html_links_lead_somewhere():
    soup = bs4.BeautifulSoup(to_html(*REPORT), "html.parser")
    ids = [element["id"] for element in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in soup.find_all("a") if a["href"].startswith("#")}
    assert targets <= set(ids) and {"fig-b", "tab-times", "second-part", "ref-2", "fn-1", "fnref-1"} <= targets


def test_a_footnote_used_twice_is_one_note():
    page, pdf = both(*REPORT)
    assert page.count("The note.") == 1 and pdf.count("The note.") == 1


def test_a_footnote_defined_twice_means_the_near_one():
    cells = [prose("one[^1]\n\n[^1]: note A"), prose("two[^1]\n\n[^1]: note B")]
    for text in both(*cells):
        assert "note A" in text and "note B" in text


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([prose("x"), prose("see [Figure](#fig-none)")], r"cell 2: nothing is labelled 'fig-none'"),
        ([code(*figure(), *figure())], "cell 1: the label fig-loss is used twice"),
        ([code(figure()[0])], "cell 1: fig-loss has no caption after it"),
        ([code(figure()[0], *figure("fig-b"))], "cell 1: fig-loss has no caption after it"),
        ([code(figure()[1])], "cell 1: caption for fig-loss, but no such"),
        ([code(*figure(alt=" "))], "cell 1: fig-loss has no alt text"),
        ([code(*figure("fig-a b"))], "a label is fig-… or tab-…"),
        ([code(display({"text/plain": "x"}, transformnet={"label": "tab-x"}))], "tab-x holds no table"),
        ([prose(r"$\nosuchcommand{x}$")], r"cell 1: cannot set the formula \$\\nosuchcommand"),
        ([prose("a"), prose(r"$\frac{a$")], r"cell 2: cannot set the formula \$\\frac{a\$"),
    ],
)
@pytest.mark.parametrize("export", [to_html, to_pdf])
def test_mistakes_are_one_line_and_name_the_cell(cells, message, export):
    with pytest.raises(ExportError, match=message) as caught:
        export(*cells)
    assert "\n" not in str(caught.value)


def test_hidden_cells_count_in_messages():
    with pytest.raises(ExportError, match="cell 2: "):
        to_html(prose("x", "hide"), prose("[Table](#tab-x)"))


@pytest.mark.parametrize("text", ["漢 in the text", "a 😀 there"])
def test_missing_glyph_names_character_and_cell(text):
    character = max(text)
    with pytest.raises(ExportError, match=rf"U\+{ord(character):04X}\), used in cell 2") as caught:
        to_pdf(prose("x"), prose(text))
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="title block"):
        to_pdf(front(subtitle=text))


def test_broken_image_names_the_cell():
    for data in (
        {"image/png": base64.b64encode(b"no image").decode()},
        {"image/png": "%%%"},
        {"image/svg+xml": "<svg"},
    ):
        for export in (to_html, to_pdf):
            with pytest.raises(ExportError, match="cell 2: "):
                export(prose("x"), code(display(data)))


# ------------------------------------------------------------------------------------------- title, tags


def test_title_block_replaces_the_leading_heading():
    for text in both(*REPORT):
        assert text.count("A title") == 1 and "A subtitle" in text and "A. Author" in text and "2026-11-23" in text
        assert text.index("Abstract") < text.index("Half as long") < text.index("First part")
    info = pypdf.PdfReader(io.BytesIO(to_pdf(*REPORT))).metadata
    assert info.title == "A title" and info.author == "A. Author" and info.creation_date.year == 2026


@pytest.mark.parametrize(
    ("cells", "title"),
    [([prose("# From a heading\n\nText")], "From a heading"), ([prose("Text")], "my notebook")],
)
def test_title_without_title_block(cells, title):
    document = read(notebook(*cells), name="my notebook")
    assert document.title == title and document.headings == []


def test_levels_that_skip_are_pulled_up():
    document = read(notebook(prose("# T\n\n#### Deep\n\n## Two\n\n###### Six")))
    assert [(h["depth"], h["number"]) for h in document.headings] == [(1, "1"), (1, "2"), (2, "2.1")]
    to_pdf(prose("###### Six\n\n# One\n\n### Three\n\n# One"))  # UA-1 refuses levels that skip


def test_tags_hide():
    cells = [
        code(new_output("stream", text="out_a"), source="src_a", tags=["hide"]),
        code(new_output("stream", text="out_b"), source="src_b", tags=["hide-input"]),
        code(new_output("stream", text="out_c"), source="src_c", tags=["hide-output"]),
        prose("prose_d", "hide"),
    ]
    for text in both(*cells):
        assert "out_b" in text and "src_c" in text
        assert not re.search("src_a|out_a|src_b|out_c|prose_d", text)


# ---------------------------------------------------------------------------------------------- outputs


def test_every_kind_of_output_is_shown():
    frame = (
        "<style>.x{}</style><table><thead><tr><th></th><th>val_mse</th></tr></thead>"
        "<tbody><tr><th>0</th><td>1.25</td></tr></tbody></table><p>1 rows × 1 columns</p>"
    )
    outputs = [
        new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m text\n"),
        new_output("stream", name="stderr", text="\r10%|# |\r100%|##|\n"),
        new_output("error", ename="ValueError", evalue="bad", traceback=["\x1b[0;31mValueError\x1b[0m: bad value"]),
        display({"text/markdown": "Some *prose*, $x^2$."}),
        display({"text/latex": r"$\displaystyle \alpha_1$", "text/plain": "latexplain"}),
        display({"text/html": frame, "text/plain": "frameplain"}),
        display({"text/html": "<b>bold</b>", "text/plain": "only plain"}),
        display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "widget plain"}),
        display({"image/png": png()}, **{"image/png": {"width": 4}}),
        display({"image/svg+xml": SVG}, alt="my own alt"),
        new_output("execute_result", {"text/plain": "'a result'"}, execution_count=1),
    ]
    page, pdf = both(code(*outputs, source="x = 1  # note"))
    for text in (page, pdf):
        for shown in ("x = 1 # note", "red text", "100%|##|", "ValueError: bad value", "Some prose", "only plain",
                      "widget plain", "'a result'", "val_mse", "1.25", "1 rows × 1 columns"):  # fmt: skip
            assert shown in text
        assert not re.search(r"10%\|# |\[31m|latexplain|frameplain|bold", text)
    soup = bs4.BeautifulSoup(to_html(code(*outputs)), "html.parser")
    assert [i["alt"] for i in soup.find_all("img")] == ["Output of code cell 1", "my own alt"]
    assert soup.find("math", attrs={"alttext": r"\displaystyle \alpha_1"})


def test_markdown_images_come_from_attachments_or_files_below_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "secret.png"):
        (tmp_path / name).write_bytes(base64.b64decode(png()))
    cell = prose("![one](attachment:x.png) ![two](a.png) ![three](../secret.png) ![four](https://example.org/x.png)")
    cell["attachments"] = {"x.png": {"image/png": png()}}
    resources = {"metadata": {"name": "n", "path": str(tmp_path / "in")}}
    page, _ = HTMLReportExporter().from_notebook_node(notebook(cell), resources)
    assert [i["alt"] for i in bs4.BeautifulSoup(page, "html.parser").find_all("img")] == ["one", "two"]
    assert "three" in page and "four" in page
    PDFReportExporter().from_notebook_node(notebook(cell), resources)


def test_terminal_text():
    assert terminal("\x1b[1;32mok\x1b[0m \r\nnext\r50%\r99%\n\x1b]0;title\x07end") == "ok \n99%\nend"


@pytest.mark.parametrize("text", ["12.3×", "—", "-1e-05", "3.1 [3.0, 3.2] ms", "50 %", "1,234", "NaN", "−0.5"])
def test_numbers_are_recognised(text):
    assert NUMBER.fullmatch(text)


@pytest.mark.parametrize("text", ["cuda:0", "two", "2 cores of a machine", "a1"])
def test_words_are_not_numbers(text):
    assert not NUMBER.fullmatch(text)


# ---------------------------------------------------------------------------------------------- tables


def test_long_table_repeats_its_header_and_loses_no_row():
    pages = page_texts(to_pdf(code(*table(rows=120), source="")))
    holding = [text for text in pages if re.search(r"row\d", text)]
    assert len(holding) > 1 and all("speedup" in text for text in holding)
    assert re.findall(r"row(\d+)", " ".join(pages)) == [str(i) for i in range(120)]


def test_caption_and_header_do_not_stand_alone():
    for lines in range(30, 44):  # the table begins ever nearer to the foot of the page
        filler = prose("\n\n".join(["line"] * lines) + "\n\n## Heading")
        for text in page_texts(to_pdf(filler, code(*table(rows=40), source=""))):
            assert ("Table 1" not in text) or "row0" in text
            assert ("Heading" not in text) or "row0" in text


def test_wide_table_keeps_every_column_on_the_page():
    names = [f"column{i}" for i in range(25)]
    head = "".join(f"<th>{n}</th>" for n in names)
    source = f"<table><thead><tr>{head}</tr></thead><tr>{'<td>0.12345</td>' * 25}</tr></table>"
    page = pypdf.PdfReader(io.BytesIO(to_pdf(code(display({"text/html": source}))))).pages[0]
    places = []

    def note(text, cm, tm, font, size):
        if text.strip() in names:
            places.append(
                (tm[4] * cm[0] + cm[4], abs(size * tm[0] * cm[0]) * 0.4 * len(text.strip()))
            )  # x, at least so wide

    page.extract_text(visitor_text=note)
    assert len(places) == len(names)
    right_edges = [x for x, _ in places[1:]] + [float(page.mediabox.width) - 60]
    assert all(x > 0 and x + width < edge for (x, width), edge in zip(places, right_edges, strict=True))


def test_spans_and_index_names_become_one_rectangle():
    source = (
        "<table><thead><tr><th></th><th></th><th colspan=2>batch</th></tr>"
        "<tr><th></th><th></th><th>16</th><th>256</th></tr><tr><th>device</th><th>path</th><th></th><th></th></tr>"
        "</thead><tbody><tr><th rowspan=2>cpu</th><th>a</th><td>1</td><td>2</td></tr>"
        "<tr><th>b</th><td>3</td></tr></tbody></table>"
    )
    node = next(b for b in read(notebook(code(display({"text/html": source})))).body if b.kind == "table")
    assert [[c["x"] for c in row] for row in node["head"]] == [[0, 1, 2], [0, 1, 2, 3]]
    assert [[c["x"] for c in row] for row in node["rows"]] == [[0, 1, 2, 3], [1, 2, 3]]
    assert node["align"] == ["left", "left", "right", "right"]
    page = bs4.BeautifulSoup(to_html(code(display({"text/html": source}))), "html.parser")
    assert page.find("th", string="batch")["scope"] == "colgroup" and page.find("th", string="cpu")["rowspan"] == "2"
    assert page.find("th", string="b")["scope"] == "row"


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_spans_can_be_set(rows):
    body = "".join("<tr>" + "".join(f"<td colspan={a} rowspan={b}>x" for a, b in row) + "</tr>" for row in rows)
    cells = [code(display({"text/html": f"<table>{body}</table>", "text/plain": "plain"}))]
    assert to_html(*cells) and to_pdf(*cells)


# ----------------------------------------------------------------------------------------------- maths

FORMULAS = {
    r"\textbf{MSE}": "bold",
    r"\texttt{val\_mse}": "val_mse",
    r"a \& b": '"&"',
    r"\mathrm{val\_mse}": '"_"',
    r"\left\{ x \right\}": "{ x }",
    r"\Bigl( x \Bigr)": "(x)",
    r"\text{a #include \$ x}": '"a #include $ x"',
    r"\operatorname{clamp}_0^1": 'op("clamp")',
    r"\begin{align} a &= b \\ c &= d \end{align}": "a & = b",
    r"\begin{cases} 1 & x > 0 \\ 0 & \text{else} \end{cases}": "quad",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": "mat(",
    r'"quoted" # `code` @x': '"#"',
    r"\hat y \in \mathbb{R}^3 \pm 10^{-4}\,\mathrm{ms}": "hat(y)",
}


@pytest.mark.parametrize(("tex", "part"), FORMULAS.items())
def test_tex_becomes_typst(tex, part):
    assert part in typst_maths(tex)


def test_formulas_can_be_set_in_both():
    cells = [prose("\n\n".join(f"$${tex}$$" for tex in FORMULAS))]
    soup = bs4.BeautifulSoup(to_html(*cells), "html.parser")
    assert [m["alttext"] for m in soup.find_all("math")] == list(FORMULAS)
    assert all(m.get_text(strip=True) for m in soup.find_all("math"))
    assert "val_mse" in soup.main.get_text()
    assert to_pdf(*cells)


@pytest.mark.parametrize("tex", [r"\href{javascript:alert(1)}{x}", r"\textcolor{red}{x}", r"\hspace{1cm}"])
def test_commands_that_would_need_code_are_refused(tex):
    with pytest.raises(ExportError, match="no counterpart"):
        typst_maths(tex)


def test_money_and_code_are_not_maths():
    page, pdf = both(prose("It costs $5 and $6, \\$7, `$x$`.\n\n    $$ code $$\n\n```\n$y$\n```"))
    for text in (page, pdf):
        assert all(part in text for part in ("$5 and $6, $7, $x$.", "$$ code $$", "$y$"))


# --------------------------------------------------------------------------------------- hostile strings

HOSTILE = ["<script>alert(1)</script>", '#include "x"', '"); #panic("x', "$x$", "\\", "${", "*_`", "]]", "</style>",
           "]{", "שלום", "\u202egnp", "\x00\x1b[0m", "\ud800", "&lt;b&gt;", "javascript:alert(1)", "a" * 10_000,
           "{{ 7*7 }}", "{% x %}", "//", "/*", "\u2028", "[x](javascript:1)", "![x](http://a.b/c)",
           "\\text{$}", "<img src=x onerror=y>", "[^1]", "| a |\n|--|", "\\begin{x}", "#" * 9, "@a", "~"]  # fmt: skip
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=6).map("".join)


def hostile_cells(text):
    safe = {"text/markdown": "Caption."}
    return [
        code(display({"text/plain": "x"}, transformnet={"front": {"title": "T" + text, "author": text}})),
        prose(text),
        prose("## H " + text.replace("\n", " ") + "\n\n- " + text + "\n\n> " + text),
        code(new_output("stream", text=text), display({"text/plain": text}), source=text),
        code(display({"text/html": f"<table><tr><td>{text}</td></tr></table>", "text/plain": text})),
        code(
            display({"image/svg+xml": SVG}, transformnet={"label": "fig-a", "alt": "alt " + text}),
            display(safe, transformnet={"caption": "fig-a"}),
        ),
        code(display({"text/markdown": "$" + text + "$"})),
    ]


@given(hostile)
@example("<script>alert(1)</script>$x$ #include \\")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_string_breaks_out(text):
    cells = hostile_cells(text)
    try:
        page = to_html(*cells)
    except ExportError as error:
        assert "\n" not in str(error)
    else:
        assert_page_is_inert(page)
    try:
        assert to_pdf(*cells).startswith(b"%PDF")
    except ExportError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"); #panic("x', "#include \\ $", "שלום", "{{ 7*7 }}"])
def test_hostile_text_is_shown_as_it_is(text):
    cells = [front(author=text), code(new_output("stream", text=text), source="")]
    page, pdf = both(*cells)
    assert page.count(text) == 2
    if text.isascii():
        assert pdf.count(text) == 2


def test_ten_kilobytes_without_a_space_stay_on_the_page():
    text = "x" * 10_000
    for cell in (prose(text), prose(f"`{text}`"), code(new_output("stream", text=text), source="")):
        reader = pypdf.PdfReader(io.BytesIO(to_pdf(cell)))
        assert sum(page.extract_text().count("x") for page in reader.pages) == 10_000
        width = max(len(line) for page in reader.pages for line in page.extract_text().splitlines())
        assert width < 200  # characters in a line


def test_literal_keeps_everything_inside_the_quotes():
    assert literal('"#{x}\\\n\u2028') == '"\\"#{x}\\\\\\n\\u{2028}"'


# ----------------------------------------------------------------------------------- the files themselves


def assert_page_is_inert(page: str):
    """Nothing in the page can run or ask a host for anything."""
    soup = bs4.BeautifulSoup(page, "html.parser")
    assert [script.get_text() for script in soup("script")] == [SCRIPT]  # which the policy names
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not soup(["iframe", "object", "embed", "base", "form"])
    for element in soup.find_all(True):
        for name, value in element.attrs.items():
            assert not name.startswith("on")
            if name == "href" and element.name == "a":
                assert re.match(r"#|https?://|mailto:", value, re.IGNORECASE)
            elif name in ("src", "href", "srcset", "data", "poster", "xlink:href", "action", "style"):
                assert re.fullmatch(r"data:\S*|--characters: \d+", value)
    css = "".join(style.get_text() for style in soup("style"))
    assert "url(" not in css and "@import" not in css


def test_page_is_inert():
    assert_page_is_inert(to_html(*REPORT, prose("[a](https://example.org) [b](javascript:x) <https://example.org>")))


def test_rebuilding_gives_the_same_bytes():
    assert to_html(*REPORT) == to_html(*REPORT)
    assert to_pdf(*REPORT) == to_pdf(*REPORT)
    for pdf, year in ((to_pdf(*REPORT), 2026), (to_pdf(prose("no date")), 2000)):  # never the clock's
        info = pypdf.PdfReader(io.BytesIO(pdf)).metadata
        assert info.creation_date.year == year and info.modification_date.year == year


def test_pdf_is_tagged_and_claims_its_standards():
    root = pypdf.PdfReader(io.BytesIO(to_pdf(*REPORT))).trailer["/Root"]
    xmp = root["/Metadata"].get_data().decode()
    assert root["/MarkInfo"]["/Marked"] and root["/Lang"] == "en"
    assert re.search(r"pdfuaid:part>1<", xmp) and re.search(r"pdfaid:part>2<", xmp)


def test_html_structure():
    soup = bs4.BeautifulSoup(to_html(*REPORT), "html.parser")
    assert soup.html["lang"] == "en" and len(soup("h1")) == 1 and soup.main and soup.find("a", class_="skip")
    assert all(i.get("alt") for i in soup("img")) and all(f.figcaption for f in soup("figure"))
    assert soup.table.caption and soup.table.find_parent(tabindex="0")
    levels = [int(h.name[1]) for h in soup.find_all(re.compile(r"h\d"))]
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_text_has_enough_contrast():
    """WCAG AA: 4.5 : 1 for every colour of text on the page and on panels, light and dark."""
    css = bs4.BeautifulSoup(to_html(prose("x")), "html.parser").style.get_text()
    blocks = re.findall(r":root[^{},]*\{(.*?)\}", css, re.S)
    schemes = [colours for block in blocks if "page" in (colours := dict(re.findall(r"--([\w-]+): (#\w+)", block)))]
    assert len(schemes) == 4  # light, dark, dark by choice, print
    assert schemes[1] == schemes[2]

    def luminance(colour):
        colour = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for scheme in schemes:
        for ground in ("page", "panel"):
            for ink in ("text", "soft", "link", "keyword", "string", "comment", "digit", "name"):
                high, low = sorted([luminance(scheme[ground]), luminance(scheme[ink])], reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


@pytest.mark.slow
def test_nbconvert_knows_both(tmp_path):
    path = tmp_path / "nb.ipynb"
    nbformat.write(notebook(*REPORT), path)
    for target, name in (("transformnet-html", "nb.html"), ("transformnet-pdf", "nb.pdf")):
        command = [sys.executable, "-m", "nbconvert", "--to", target, str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert (tmp_path / name).stat().st_size > 1000
    assert json.loads(path.read_text())["cells"]


def test_a_figure_that_holds_several_has_a_number_for_each():
    shown, caption = figure("fig-grid")
    shown.metadata["transformnet"]["count"] = 3
    links = "[Figure](#fig-grid-2), [Figures](#fig-grid) and [Figure](#fig-b)"
    for text in both(code(shown, caption), code(*figure("fig-b")), prose(links)):
        assert "Figures 1–3: A caption." in text and "Figure 4: A caption." in text
        assert "Figure 2, Figures 1–3 and Figure 4" in text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_figure_without_a_label_has_no_number_and_may_stand_in_the_abstract():
    picture = code(display({"image/svg+xml": SVG}, transformnet={"alt": "A picture"}), tags=["abstract"])
    page = bs4.BeautifulSoup(to_html(picture, code(*figure())), "html.parser")
    abstract = page.find("section", class_="abstract")
    assert abstract.find("img")["alt"] == "A picture" and not abstract.find("figcaption")
    assert page.find("figcaption").get_text() == "Figure 1: A caption."
    for wrong in ({"text/plain": "x"}, {"image/svg+xml": SVG}):
        with pytest.raises(ExportError, match=r"cell 1: a figure without a label needs an image .* alt text"):
            to_html(code(display(wrong, transformnet={"alt": "" if "image/svg+xml" in wrong else "A picture"})))


def test_a_row_with_one_cell_heads_those_below_it():
    source = "| a | b |\n|--:|--:|\n| first | |\n| 1 | 2 |\n| second | |\n| 3 | 4 |"
    bodies = bs4.BeautifulSoup(to_html(prose(source)), "html.parser").find("table").find_all("tbody")
    assert [body.find("th", scope="rowgroup").get_text() for body in bodies] == ["first", "second"]
    assert [cell.get_text() for cell in bodies[1].find_all("td")] == ["3", "4"]
    assert bodies[0].find("th")["colspan"] == "2"
