"""Write a `Document` as PDF: Typst source, compiled by the typst wheel. Tagged (PDF/UA-1, PDF/A-2a), reproducible.

The source is Typst *code*, and whatever comes from the notebook stands in it as a string literal, never as markup.
"""

import datetime
import re
import tempfile
from pathlib import Path

import typst

from . import maths
from .document import PROSE_COLUMN, Document, Node, is_short, plain
from .errors import ExportError
from .maths import literal

TEMPLATE = Path(__file__).parent / "templates" / "report.typ"
STANDARDS = ["a-2a", "ua-1"]
NO_DATE = datetime.date(2000, 1, 1)  # of the PDF's metadata where the report has none: the clock would change bytes
LONG_WORD = 60  # characters; longer words get places to break, or they would run off the page
LONG_HEADER = 1500  # characters; a header never breaks, so one that could fill a page is set as rows
SUFFIX = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif"}


def pdf(document: Document) -> bytes:
    """The report as PDF bytes; equal documents give equal bytes.

    Raises ExportError naming the cell for a formula that cannot be set, an image that cannot be read or a character
    that no embedded font has.
    """
    writer = _Writer(document)
    main = writer.source()
    day = document.day or NO_DATE
    noon = datetime.datetime(day.year, day.month, day.day, 12, tzinfo=datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:  # all that Typst may read
        for name, data in writer.images.items():
            Path(folder, name).write_bytes(data)
        Path(folder, "main.typ").write_text(main, encoding="utf-8")
        try:
            return typst.compile(
                str(Path(folder, "main.typ")), root=folder, format="pdf", ignore_system_fonts=True,
                timestamp=noon, pdf_standards=STANDARDS,
            )  # fmt: skip
        except typst.TypstError as error:
            raise writer.explain(error) from None


def _breakable(text: str) -> str:
    """Put zero-width spaces into words longer than LONG_WORD."""
    return re.sub(rf"\S{{{LONG_WORD},}}", lambda m: re.sub(r"(.{10})(?=.)", "\\1\u200b", m[0]), text)


class _Writer:
    """Collects the source. One method for each kind of node, returning a Typst expression."""

    def __init__(self, document: Document):
        self.document = document
        self.images: dict[str, bytes] = {}
        self.formulas: dict[str, int] = {}
        for node in document.walk():
            if node.kind in ("math", "block_math"):
                self.formulas.setdefault(node.text, node.cell)
        self.numbers = {tex: f"m{index}" for index, tex in enumerate(self.formulas)}

    def source(self) -> str:
        """Template, then formulas, then the title block, then one line for each block of the body."""
        self.head = TEMPLATE.read_text(encoding="utf-8").splitlines()
        document, day = self.document, self.document.day
        title = document.title if len(document.title) <= 90 else document.title[:88].rsplit(" ", 1)[0] + " …"
        fields = {
            "title": self.string(document.title), "short": self.string(title),
            "subtitle": self.string(document.subtitle) if document.subtitle else "none",
            "authors": f"({''.join(self.string(a) + ',' for a in document.authors)})",
            "date": self.string(document.date) if document.date else "none",
            "day": f"datetime(year: {day.year}, month: {day.month}, day: {day.day})" if day else "auto",
            "language": self.string(document.language.split("-")[0]),
            "abstract-heading": self.string(document.label("Abstract")),
            "abstract": self.all(document.abstract) if document.abstract else "none",
        }  # fmt: skip
        call = "#show: report.with(" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + ")"
        body = [f"#{self.write(block)}" for block in document.body]
        return "\n".join([*self.head, *maths.definitions(self.formulas), call, *body])

    def explain(self, error: typst.TypstError) -> ExportError:
        """Typst's complaint in one line, with the cell it is about."""
        if found := maths.located(error, self.formulas, first_line=len(self.head) + 1):
            return found
        if glyph := re.search(r'text `?"(.+?)"`? could not be displayed', error.message):
            text = re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: chr(int(m[1], 16)), glyph[1])
            where = self.cell_with(text)
            return ExportError(f"no font in the PDF has {text!r} (U+{ord(text[0]):04X}), {where}")
        if private := re.search(r'codepoint `?"\\u\{([0-9a-f]+)\}"', error.message):
            text = chr(int(private[1], 16))
            return ExportError(f"a PDF may not hold the character U+{ord(text):04X}, {self.cell_with(text)}")
        if image := self.bad_image():
            return image
        line = re.search(r"\.typ:(\d+):", error.diagnostic)
        index = int(line[1]) - len(self.head) - len(self.formulas) - 2 if line else -1
        body = self.document.body
        where = f"cell {body[index].cell}: " if 0 <= index < len(body) else ""
        return ExportError(f"{where}Typst could not set this: {' '.join(error.message.split())[:300]}")

    def bad_image(self) -> ExportError | None:
        """The first image that Typst cannot read: its own message does not say which."""
        for node in self.document.walk():
            if node.kind == "image":
                form = SUFFIX[node["mime"]]
                with tempfile.TemporaryDirectory() as folder:
                    Path(folder, "image").write_bytes(node["data"])
                    Path(folder, "main.typ").write_text(f'#image("image", format: "{form}")', encoding="utf-8")
                    try:
                        typst.compile(str(Path(folder, "main.typ")), root=folder, format="pdf")
                    except typst.TypstError as error:
                        why = " ".join(error.message.split())
                        return ExportError(f"cell {node.cell}: Typst cannot read an {node['mime']}: {why[:200]}")
        return None

    def cell_with(self, text: str) -> str:
        titles = [self.document.title, self.document.subtitle, self.document.date, *self.document.authors]
        if any(text[0] in (title or "") for title in titles):
            return "used in the title block"
        cell = next((node.cell for node in self.document.walk() if text[0] in node.text), None)
        return f"used in cell {cell}" if cell else "place unknown"

    # ------------------------------------------------------------------------------------ small pieces

    def string(self, text: str) -> str:
        return literal(_breakable(text))

    def all(self, nodes: list[Node]) -> str:
        return "{" + "; ".join(map(self.write, nodes)) + "}" if nodes else "[]"

    def write(self, node: Node) -> str:
        return getattr(self, f"write_{node.kind}")(node)

    # ------------------------------------------------------------------------------------------ inline

    def write_text(self, node):
        return self.string(node.text)

    def write_span(self, node):
        return self.all(node.children)

    def write_codespan(self, node):
        return f"raw({self.string(node.text)})"

    def write_emphasis(self, node):
        return f"emph({self.all(node.children)})"

    def write_strong(self, node):
        return f"strong({self.all(node.children)})"

    def write_strikethrough(self, node):
        return f"strike({self.all(node.children)})"

    def write_sub(self, node):
        return f"sub({self.all(node.children)})"

    def write_sup(self, node):
        return f"super({self.all(node.children)})"

    def write_anchor(self, node):
        return f"[#metadata(none)#label({literal(node['id'])})]"

    def write_linebreak(self, node):
        return "linebreak()"

    def write_math(self, node, block="false"):
        return f"math.equation(block: {block}, alt: {literal(node.text)}, {self.numbers[node.text]})"

    def write_block_math(self, node):
        return self.write_math(node, "true")

    def write_link(self, node):
        return f"link({literal(node['url'])}, {self.all(node.children)})"

    def write_ref(self, node):
        return f"link(label({literal(node['target'])}), {self.all(node.children)})"

    def write_footnote(self, node):
        number = f"numbering: _ => {literal(str(node['number']))}"
        if not node["first"]:
            return f"footnote({number}, label({literal(self.note(node))}))"
        return f"[#footnote({number}, {self.tight(node)})#label({literal(self.note(node))})]"

    def note(self, node):
        return f"fn-{node['number']}"

    def write_image(self, node):
        name = f"image-{len(self.images)}.{SUFFIX[node['mime']]}"
        self.images[name] = node["data"]
        width = f"{node['width'] * 0.75}pt" if node["width"] else "auto"  # CSS pixels
        return f"box(fitted({literal(name)}, {literal(node['alt'])}, width: {width}))"

    # ------------------------------------------------------------------------------------------ blocks

    def write_paragraph(self, node):
        return f"par({self.all(node.children)})"

    def write_heading(self, node):
        number = f"{literal(node['number'] + chr(0x2002))}; " if node["number"] else ""
        inside = f"{{{number}{self.all(node.children)}}}"
        return f"[#heading(level: {node['depth']}, {inside})#label({literal(node['id'])})]"

    def write_list(self, node):
        kind = "enum" if node["ordered"] else "list"
        items = ", ".join(f"{kind}.item({self.tight(item)})" for item in node.children)
        start = f"start: {node['start']}, " if node["ordered"] else ""
        return f"{kind}({start}tight: {str(bool(node['tight'])).lower()}, {items})"

    def tight(self, item):
        """Paragraphs of a tight list are bare text, else Typst would space them as paragraphs."""
        if len(item.children) and item.children[0].kind == "paragraph":
            first, *rest = item.children
            return self.all([Node("span", first.children), *rest])
        return self.all(item.children)

    def write_references(self, node):
        items = ", ".join(
            f"enum.item({{[#metadata(none)#label({literal(item['id'])})]; {self.tight(item)}}})"
            for item in node.children
        )
        return f'enum(numbering: "[1]", start: {node.children[0]["number"]}, tight: false, {items})'

    def write_quote(self, node):
        return f"quote(block: true, {self.all(node.children)})"

    def write_rule(self, node):
        return "rule()"

    def write_code(self, node):
        language = f", lang: {literal(node['language'])}" if node["language"] else ""
        return f"code-block(raw({self.string(node.text)}, block: true{language}))"

    def write_output(self, node):
        colour = ', colour: rgb("#b3261e")' if node["stream"] in ("error", "stderr") else ""
        return f"output-block(raw({self.string(node.text)}, block: true){colour})"

    def caption(self, node, word):
        number = node["number"]
        label = f"strong({literal(f'{word} {number}:')}); {literal(' ')}; " if number else ""
        return f"{{{label}{self.all(node['caption'])}}}" if node["caption"] is not None else "none"

    def labelled(self, node, expression):
        return f"[#{expression}#label({literal(node['id'])})]" if node["id"] else expression

    def write_figure(self, node):
        """A figure stays on one page, unless its caption alone could fill one; a large one, of several, floats."""
        several = (node["count"] or 1) > 1
        long, floats = (str(each).lower() for each in (len(plain(node["caption"] or [])) > 1500, several))
        caption = self.caption(node, self.document.label("Figures" if several else "Figure"))
        image = self.write(node.children[0])
        return self.labelled(node, f"shown-figure({image}, caption: {caption}, breakable: {long}, float: {floats})")

    def write_table(self, node):
        rows = node["head"] + node["rows"]
        longest = [[1, 1] for _ in node["align"]]  # per column, in characters: cell, word
        for cell in (c for row in rows for c in row if c["colspan"] == 1):
            text = _breakable(plain(cell.children))
            words = [len(word) for word in re.split(r"[\s\u200b-]", text)]
            old = longest[cell["x"]]
            longest[cell["x"]] = [max(old[0], len(text)), max(old[1], *words)]
        weights = ", ".join(f"{min(cell, 200)}fr" if cell > PROSE_COLUMN else "auto" for cell, _ in longest)
        needed = sum(max(word, 12) if cell > PROSE_COLUMN else cell for cell, word in longest)
        least = (needed + len(longest)) / (sum(cell for cell, _ in longest) + len(longest))
        head, body = node["head"], node["rows"]
        if sum(len(plain(c.children)) for row in head for c in row) > LONG_HEADER:
            head, body = [], rows
        rules = ", ".join(
            f"({y + 1}, {c['x']}, {c['x'] + c['colspan']})"
            for y, row in enumerate(head[:-1]) for c in row if c["colspan"] > 1
        )  # fmt: skip
        align = ", ".join(node["align"])
        table = (
            f"fitted-table(({align},), ({weights},), {least:.4f}, ({self.cells(head, node)}), "
            f"({rules + ',' if rules else ''}), ({self.cells(body, node)}))"
        )
        caption, breakable = self.caption(node, self.document.label("Table")), str(not is_short(node)).lower()
        return self.labelled(node, f"shown-table({table}, caption: {caption}, breakable: {breakable})")

    def cells(self, rows, table):
        made = []
        for number, row in enumerate(rows):
            if row[0]["group"] and number:
                made.append("table.hline(stroke: 0.4pt),")
            for cell in row:
                align = "left" if cell["group"] else "center" if cell["colspan"] > 1 else table["align"][cell["x"]]
                spans = f"colspan: {cell['colspan']}, rowspan: {cell['rowspan']}, align: {align}, "
                inside = self.all(cell.children)
                made.append(f"table.cell({spans}{f'emph({inside})' if cell['group'] else inside}),")
        return " ".join(made)
