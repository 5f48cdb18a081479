"""Write a `Document` as one HTML page that needs nothing from elsewhere: no script, no font, no picture.

Its own script (`report.js`) is inside, the only one that its policy lets run; without it the page can be read as well.
Every piece of text passes through markupsafe, which escapes whatever is not already markup made here.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pygments
from markupsafe import Markup
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from . import maths
from .document import PROSE_COLUMN, Document, Node, is_short, plain

TEMPLATES = Path(__file__).parent / "templates"


def html(document: Document, beside: Sequence[str] = ()) -> str:
    """The report as a page, its head with links to the files `beside` it; equal documents give equal text.

    Raises ExportError for a formula that cannot be set.
    """
    writer = _Writer(document)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        document=document,
        beside=beside,
        policy=policy,
        script=Markup(script),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8") + writer.maths_css),
        abstract=writer.all(document.abstract),
        body=writer.all(document.body),
        contents=[(h, writer.heading_text(h, links=False)) for h in document.headings if h["depth"] <= 2],
        footnotes=[(note["number"], writer.all(note.children)) for note in document.footnotes],
    )


def element(name: str, content="", **attributes) -> Markup:
    """`<name …>content</name>`; text is escaped, attributes that are None or False are left out."""
    shown = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(shown), content)


class _Writer:
    """One method for each kind of node, returning markup."""

    def __init__(self, document: Document):
        formulas: dict[str, int] = {}
        for node in document.walk():
            if node.kind in ("math", "block_math"):
                formulas.setdefault(node.text, node.cell)
        self.label = document.label
        self.mathml, self.maths_css = maths.mathml(formulas)
        self.links = True

    def all(self, nodes: list[Node]) -> Markup:
        return Markup("").join(self.write(node) for node in nodes)

    def write(self, node: Node) -> Markup:
        return getattr(self, f"write_{node.kind}")(node)

    # ------------------------------------------------------------------------------------------ inline

    def write_text(self, node):
        return Markup("{}").format(node.text)

    def write_span(self, node):
        return self.all(node.children)

    def write_codespan(self, node):
        return element("code", node.text)

    def write_emphasis(self, node):
        return element("em", self.all(node.children))

    def write_strong(self, node):
        return element("strong", self.all(node.children))

    def write_strikethrough(self, node):
        return element("s", self.all(node.children))

    def write_sub(self, node):
        return element("sub", self.all(node.children))

    def write_sup(self, node):
        return element("sup", self.all(node.children))

    def write_anchor(self, node):
        return element("span", "", id=node["id"])

    def write_linebreak(self, node):
        return Markup("<br>")

    def write_math(self, node):
        return Markup(self.mathml[node.text, False])

    def write_block_math(self, node):
        # spans, since a formula on its own line may stand inside a paragraph
        return element("span", Markup(self.mathml[node.text, True]), class_="scroll formula", tabindex="0",
                       role="group", aria_label="Formula")  # fmt: skip

    def link(self, url, content, **attributes):
        return element("a", content, href=url, **attributes) if self.links else content

    def write_link(self, node):
        return self.link(node["url"], self.all(node.children))

    def write_ref(self, node):
        return self.link(f"#{node['target']}", self.all(node.children))

    def write_footnote(self, node):
        if not self.links:
            return Markup("")
        number = node["number"]
        back = f"fnref-{number}" if node["first"] else None
        return element("sup", self.link(f"#fn-{number}", number, id=back, role="doc-noteref",
                                        aria_label=f"Footnote {number}"))  # fmt: skip

    def write_image(self, node):
        data = f"data:{node['mime']};base64,{base64.b64encode(node['data']).decode()}"
        return Markup('<img src="{}" alt="{}"{}>').format(
            data, node["alt"], Markup(' width="{}"').format(round(node["width"])) if node["width"] else ""
        )

    # ------------------------------------------------------------------------------------------ blocks

    def write_paragraph(self, node):
        return element("p", self.all(node.children)) + Markup("\n")

    def heading_text(self, node, links=True):
        """Number and text; in the table of contents without links inside."""
        self.links = links
        number = element("span", node["number"], class_="number") + " " if node["number"] else ""
        text = Markup("{}{}").format(number, self.all(node.children))
        self.links = True
        return text

    def write_heading(self, node):
        return element(f"h{min(node['depth'] + 1, 6)}", self.heading_text(node), id=node["id"]) + Markup("\n")

    def write_list(self, node):
        start = node["start"] if node["ordered"] and node["start"] != 1 else None
        return element("ol" if node["ordered"] else "ul", self.items(node), start=start)

    def write_references(self, node):
        return element("ol", self.items(node), class_="references", start=node.children[0]["number"])

    def items(self, node):
        """Items of a tight list hold bare text, as Markdown has it."""
        made = []
        for item in node.children:
            first, rest = item.children[:1], item.children[1:]
            bare = node["tight"] and first and first[0].kind == "paragraph"
            inside = self.all(first[0].children) + self.all(rest) if bare else self.all(item.children)
            made.append(element("li", inside, id=item["id"]))
        return Markup("\n").join(made)

    def write_quote(self, node):
        return element("blockquote", self.all(node.children))

    def write_rule(self, node):
        return Markup("<hr>")

    def write_code(self, node):
        try:
            lexer = get_lexer_by_name(node["language"] or "text", stripnl=False)
            code = Markup(pygments.highlight(node.text, lexer, HtmlFormatter(nowrap=True)))  # escapes the text
        except ClassNotFound:
            code = node.text
        return element("pre", element("code", code), class_="code") + Markup("\n")

    def write_output(self, node):
        return element("pre", element("samp", node.text), class_=f"output {node['stream']}") + Markup("\n")

    def caption(self, node, word):
        label = element("strong", f"{word} {node['number']}:") + " " if node["number"] else ""
        return Markup("{}{}").format(label, self.all(node["caption"] or []))

    def write_figure(self, node):
        caption = (
            element("figcaption", self.caption(node, self.label("Figures" if (node["count"] or 1) > 1 else "Figure")))
            if node["caption"] is not None
            else ""
        )
        image = node.children[0]
        drawing = image["mime"] == "image/svg+xml" and b"<image" not in image["data"]  # no photograph in it
        card = element("div", self.write(image), class_="card drawing" if drawing else "card")
        return element("figure", Markup("{}{}").format(card, caption), id=node["id"]) + Markup("\n")

    def write_table(self, node):
        # A box in the caption: on a phone it keeps the screen's width where the table is wider and scrolls
        said = element("span", self.caption(node, self.label("Table")))
        caption = element("caption", said) if node["caption"] is not None else ""
        head = element("thead", self.rows(node["head"], node, head=True)) if node["head"] else ""
        groups = [[]]
        for row in node["rows"]:
            if row[0]["group"] and groups[-1]:
                groups.append([])
            groups[-1].append(row)
        body = Markup("\n").join(element("tbody", self.rows(group, node)) for group in groups)
        longest = [1] * len(node["align"])  # characters; prose wraps
        for cell in (c for row in node["head"] + node["rows"] for c in row if c["colspan"] == 1):
            longest[cell["x"]] = max(longest[cell["x"]], min(len(plain(cell.children)), PROSE_COLUMN))
        characters = sum(longest) + 2 * len(longest)  # with the space between columns; the print style scales by it
        style = f"--characters: {characters}"
        grid = element("table", Markup("{}{}{}").format(caption, head, body), style=style)
        name = f"{self.label('Table')} {node['number']}" if node["number"] else f"Table in cell {node.cell}"
        classes = "scroll table short" if is_short(node) else "scroll table"
        return element("div", grid, class_=classes, id=node["id"], tabindex="0", role="region",
                       aria_label=name) + Markup("\n")  # fmt: skip

    def rows(self, rows, table, head=False):
        return Markup("\n").join(element("tr", self.cells(row, table, head)) for row in rows)

    def cells(self, row, table, head):
        made = []
        for cell in row:
            wide, high, inside = cell["colspan"] > 1, cell["rowspan"] > 1, self.all(cell.children)
            header = (head or cell["header"]) and cell.children and cell.children[0].text != ""
            scope = ("col" if head else "row") + ("group" if (wide if head else high or cell["group"]) else "")
            align = "group" if cell["group"] else "center" if wide else table["align"][cell["x"]]
            prose = "prose" if len(plain(cell.children)) > PROSE_COLUMN and not wide else ""
            classes = " ".join(filter(None, [align if align != "left" else "", prose]))
            made.append(element(
                "th" if header else "td", element("span", inside) if cell["group"] else inside,
                scope=scope if header else None,
                colspan=cell["colspan"] if wide else None, rowspan=cell["rowspan"] if high else None,
                class_=classes or None,
            ))  # fmt: skip
        return Markup("").join(made)
