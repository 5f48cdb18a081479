"""Read a notebook into a small document model: title block, abstract, and a tree of nodes.

All numbering and every cross-reference is settled here, once, so that HTML and PDF cannot disagree. The writers
(`html.py`, `pdf.py`) only say how a node looks. Nothing is executed, fetched or written.

A node's text is always plain text (or TeX for maths): raw HTML in Markdown and in outputs never stays markup, it
becomes text. So a writer that quotes text correctly cannot be broken out of.
"""

import base64
import datetime
import html
import io
import json
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import bs4
import mistune
import PIL.Image

from .errors import ExportError

FLOATS = {"fig": "Figure", "tab": "Table"}  # label prefix → the word before the number
IMAGES = ("image/svg+xml", "image/png", "image/jpeg", "image/webp", "image/gif")  # best first: vectors print sharp
MARK = "\ue000"  # a private character that stands for a table while the text around it is gathered
# A link whose text ends in one of these words asks for a number: [Figure](#fig-x) → Figure 3.
NUMBERED_WORD = re.compile(r"(?:^|\s)(figures?|figs?\.|tables?|tabs?\.|sections?|secs?\.|appendix)$", re.IGNORECASE)
# "12.3×", "1e-05", "4.1 [3.9, 4.4] ms", "—": a number, perhaps with a short unit. One such column is right-aligned.
# Written so that each character fits in one place only: with overlapping parts a long cell would take hours.
NUMBER = re.compile(r"[^A-Za-z\d]*\d[^A-Za-z]*(?:[A-Za-z]{1,6}[^A-Za-z]*)?|[-+]?(nan|inf)|[-–—\s]*", re.IGNORECASE)
SHORT_TABLE = 12  # rows; up to here a table is kept on one page
MOST_COLUMNS = 1000  # of a table; more cannot be shown, and spans could ask for millions
PAGE_IDS = {"main", "abstract"}  # ids of report.html.j2's own elements
PROSE_COLUMN = 24  # characters: a column with a longer cell may wrap where its table is too wide
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
OVERPRINTED = re.compile(r"^[^\n]*\r(?=[^\n])", re.MULTILINE)  # what a progress bar wrote and then overwrote


# HTML in Markdown that says what Markdown cannot, or as well; all other stays text
PAIRS = {"sub": "sub", "sup": "sup", "b": "strong", "strong": "strong", "i": "emphasis", "em": "emphasis",
         "s": "strikethrough", "del": "strikethrough"}  # fmt: skip
ANCHOR = re.compile(r"<a\s+(?:id|name)=[\"']?([\w.:-]{1,80})[\"']?\s*/?>(?:\s*</a>)?", re.IGNORECASE)


@dataclass
class Node:
    """One piece of the document. `cell` is the 1-based position of its notebook cell, for messages.

    Inline kinds: text, codespan, emphasis, strong, strikethrough, sub, sup, linebreak, math, block_math (text: TeX),
    anchor (id), link (url), ref (target), footnote (number, first; children: its paragraphs), image.
    Block kinds: paragraph, heading (depth 1…, number, id), list (ordered, start, tight) of item, references of
    item (id, number), quote, rule, code (language), output (stream: stdout, stderr, error or result), block_math,
    figure (children: one image) and table (head, rows, align), both with caption and perhaps id and number.
    An image has mime, data (bytes), alt and perhaps width (CSS pixels).
    """

    kind: str
    children: list["Node"] = field(default_factory=list)
    text: str = ""
    cell: int = 0
    attrs: dict = field(default_factory=dict)

    def __getitem__(self, name):
        return self.attrs.get(name)

    def parts(self) -> Iterator["Node"]:
        """The nodes directly inside this one, in reading order."""
        if self.kind == "table":
            yield from self["caption"] or []
            for row in self["head"] + self["rows"]:
                yield from row
        yield from self.children
        if self.kind == "figure":
            yield from self["caption"] or []

    def walk(self) -> Iterator["Node"]:
        yield self
        for part in self.parts():
            yield from part.walk()


def plain(nodes: list[Node]) -> str:
    """The text of inline nodes without markup; maths as TeX, footnotes left out."""
    return "".join(node.text or plain(node.children) for node in nodes if node.kind != "footnote")


@dataclass
class Document:
    """A whole report; `abstract` and `body` are block nodes, `footnotes` the first mention of each note."""

    title: str
    subtitle: str | None = None
    authors: list[str] = field(default_factory=list)
    date: str | None = None
    language: str = "en"  # as HTML's lang
    labels: dict[str, str] = field(default_factory=dict)  # the page's own words: English → that language
    abstract: list[Node] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)
    footnotes: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        for block in [*self.abstract, *self.body]:
            yield from block.walk()

    def label(self, word: str) -> str:
        """One of the page's own words, such as Figure or Contents, in the document's language."""
        return self.labels.get(word, word)

    @property
    def headings(self) -> list[Node]:
        return [block for block in self.body if block.kind == "heading"]

    @property
    def numbered_words(self) -> set[str]:
        """Words of another language that stand before a number, as NUMBERED_WORD has the English ones."""
        return {self.label(word).lower() for word in ("Figure", "Figures", "Table", "Tables", "Section", "Appendix")}

    @property
    def day(self) -> datetime.date | None:
        """`date` where it is an ISO date, as in 2026-11-23."""
        try:
            return datetime.date.fromisoformat(self.date or "")
        except ValueError:
            return None


def clean(text: str) -> str:
    """Text without what no page can show: control characters, lone surrogates, non-characters, byte order marks.

    >>> clean("a\\x00b\\ud800")
    'ab\\ufffd'
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufeff\ufffe\uffff]", "", text.replace("\r\n", "\n"))


def terminal(text: str) -> str:
    """What a terminal would show at the end: colours stripped, overwritten progress bars gone."""
    return clean(OVERPRINTED.sub("", ANSI.sub("", text).replace("\r\n", "\n"))).expandtabs(8).rstrip()


def fail(cell: int, message: str):
    raise ExportError(f"cell {cell}: {message}")


# ---------------------------------------------------------------------------------------------- Markdown


def _maths(md):
    """A mistune plugin: $…$, $$…$$ and \\begin{…}…\\end{…}. A dollar beside a space or digit is money."""
    block = (
        r"^ {0,3}\$\$(?P<display_tex>(?:(?!\n[ \t]*\n)[^$])+)\$\$[ \t]*(?:\n|$)"
        r"|^ {0,3}(?P<environment_tex>\\begin\{(?P<environment>[a-z]+\*?)\}[\s\S]+?\\end\{(?P=environment)\})"
        r"[ \t]*(?:\n|$)"
    )
    inline = (
        r"\$\$(?P<long_tex>(?:[^$\\`]|\\[\s\S])+?)\$\$"
        r"|\$(?![\s$])(?P<short_tex>(?:[^$\\`]|\\[\s\S])+?)(?<!\s)\$(?!\d)"
    )

    def parse_block(parser, match, state):
        state.append_token({"type": "block_math", "raw": match["display_tex"] or match["environment_tex"]})
        return match.end()

    def parse_inline(parser, match, state):
        kind = "block_math" if match["long_tex"] else "inline_math"
        state.append_token({"type": kind, "raw": match["long_tex"] or match["short_tex"]})
        return match.end()

    md.block.register("block_math", block, parse_block, before="list")
    md.inline.register("inline_math", inline, parse_inline, before="link")


class _Markdown:
    """Turns Markdown into nodes. Footnotes may be defined in another cell; a definition nearby wins."""

    def __init__(self, texts: list[str]):
        self.parser = mistune.create_markdown(
            renderer=None, plugins=["table", "footnotes", "strikethrough", "url", _maths]
        )
        self.definitions = {}
        for text in texts:
            self.definitions = self._defined(text) | self.definitions

    def _defined(self, text: str) -> dict[str, str]:
        state = self.parser.block.state_cls()
        state.process(text)
        self.parser.block.parse(state)
        return state.env.get("ref_footnotes", {})

    def blocks(self, text: str, cell: int, images) -> list[Node]:
        """Block nodes of `text`; `images(url, alt, cell)` makes the node for a Markdown image."""
        text = clean(text) + "\n"
        state = self.parser.block.state_cls()
        local = self._defined(text)
        state.env["ref_footnotes"] = {k: v for k, v in self.definitions.items() if k not in local}
        tokens, _ = self.parser.parse(text, state)
        self.cell, self.images, self.notes = cell, images, {}
        if tokens and tokens[-1]["type"] == "footnotes":
            notes = tokens.pop()["children"]
            self.notes = {note["attrs"]["key"]: self.nodes(note["children"]) for note in notes}
        return self.nodes(tokens)

    def nodes(self, tokens: list[dict], top=True) -> list[Node]:
        tokens = _paired([token for token in tokens if token["type"] not in ("blank_line", "footnotes")])
        made = (self.node(token, top) for token in tokens)
        return [node for node in made if node]

    def node(self, token: dict, top: bool) -> Node:
        kind, raw, attrs = token["type"], token.get("raw", ""), token.get("attrs") or {}

        def make(kind, text="", children=None, **attrs):
            return Node(kind, children or [], text, self.cell, attrs)

        def inside():
            return self.nodes(token.get("children", []), top=False)

        if kind == "text":
            return make("text", re.sub(r"\s+", " ", html.unescape(raw)))
        if kind in ("inline_html", "block_html"):
            raw = re.sub(r"<!--.*?-->", "", raw, flags=re.DOTALL)
            tag = raw.strip()
            if re.fullmatch(r"(</a>)?", tag, re.IGNORECASE):
                return None
            if match := ANCHOR.fullmatch(tag):
                return make("anchor", id=f"a-{match[1]}")
            if re.fullmatch(r"<br\s*/?>", tag, re.IGNORECASE):
                return make("linebreak")
        if kind == "paired":
            return make(token["kind"], children=inside())
        if kind in ("inline_html", "softbreak"):
            return make("text", raw or " ")
        if kind in ("emphasis", "strong", "strikethrough"):
            return make(kind, children=inside())
        if kind in ("codespan", "linebreak"):
            return make(kind, raw)
        if kind in ("inline_math", "block_math"):
            return make(kind.removeprefix("inline_"), raw.strip()) if raw.strip() else make("text", " ")
        if kind == "link":
            link = make("link", children=inside(), url=attrs["url"])
            notes = _flatten(link)
            if not plain(link.children).strip() and not attrs["url"].startswith("#"):  # `#…` gets word and number
                link.children.append(make("text", attrs["url"]))
            return make("span", children=[link, *notes]) if notes else link
        if kind == "image":
            return self.images(attrs["url"], plain(inside()), self.cell)
        if kind == "footnote_ref":
            if not (body := self.notes.get(raw)):
                fail(self.cell, f"the footnote [^{raw}] is mentioned inside another footnote")
            return make("footnote", children=body, key=raw)
        if kind in ("paragraph", "block_text"):
            return make("paragraph", children=inside())
        if kind == "heading" and top:
            return make("heading", children=inside(), level=attrs["level"])
        if kind == "heading":  # in a list or quotation it would tear the outline apart
            return make("paragraph", children=[make("strong", children=inside())])
        if kind == "block_html":
            return make("paragraph", children=[make("text", re.sub(r"\s+", " ", raw.strip()))])
        if kind == "block_code":
            return make("code", raw.rstrip("\n"), language=(attrs.get("info") or "").split(" ")[0])
        if kind == "block_quote":
            return make("quote", children=inside())
        if kind == "thematic_break":
            return make("rule")
        if kind == "list":
            first = attrs.get("start", 1)
            return make("list", children=inside(), tight=token["tight"], ordered=attrs["ordered"], start=first)
        if kind == "list_item":
            return make("item", children=inside())
        if kind == "table":
            head, *body = token["children"]
            rows = [row["children"] for part in body for row in part["children"]]
            aligns = [cell["attrs"]["align"] for cell in head["children"]]
            grid = [
                [make("cell", children=self.nodes(c["children"], False)) for c in r] for r in [head["children"], *rows]
            ]
            for row in grid[1:]:
                _as_group(row)
            return table(grid[:1], grid[1:], self.cell, aligns)
        raise ExportError(f"cell {self.cell}: no rule for Markdown of kind {kind!r}")


def _paired(tokens: list[dict]) -> list[dict]:
    """Tokens in which `<sub>`, what follows and `</sub>` are one, and so for each of PAIRS; others stay as they are."""
    made, opened = [], []
    for token in tokens:
        match = re.fullmatch(r"<(/?)(\w+)>", token.get("raw", "")) if token["type"] == "inline_html" else None
        name = match[2].lower() if match else ""
        if name in PAIRS and not match[1]:
            opened.append((name, len(made)))
        elif name in PAIRS and name in [other for other, _ in opened]:
            while (last := opened.pop())[0] != name:
                pass
            token = {"type": "paired", "kind": PAIRS[name], "children": made[last[1] + 1 :]}
            del made[last[1] :]
        made.append(token)
    return made


def _flatten(link: Node) -> list[Node]:
    """Make links inside a link text and take its footnotes out, to stand after it: links do not nest."""
    notes, kept = [], []
    for child in link.children:
        if child.kind == "link":
            child.kind = "span"
        if child.kind == "footnote":
            notes.append(child)
        else:
            notes += _flatten(child)
            kept.append(child)
    link.children = kept
    return notes


# ------------------------------------------------------------------------------------------------ tables


def table(head: list[list[Node]], rows: list[list[Node]], cell: int, aligns: list[str | None] = ()) -> Node:
    """A table node from rows of cell nodes (attrs: colspan, rowspan, header).

    Rows are padded and spans cut so that the cells tile a rectangle. Columns of numbers are right-aligned, unless
    `aligns` says "left", "right" or "center" for the column.
    """
    head_width, body_width = _tile(head), _tile(rows)
    width = max(head_width, body_width)
    for part in (head, rows):
        _tile(part, width)
    columns = [[c for row in rows for c in row if c["x"] == x and c["colspan"] == 1] for x in range(width)]
    texts = [[plain(c.children).strip() for c in column] for column in columns]
    align = [
        given or ("right" if any(map(str.strip, t)) and all(map(NUMBER.fullmatch, t)) else "left")
        for given, t in zip([*aligns, *[None] * width], texts, strict=False)
    ]
    return Node("table", cell=cell, attrs={"head": head, "rows": rows, "align": align, "caption": None})


def _as_group(row: list[Node]) -> None:
    """Make a row in which only the first cell says anything the heading of those below it: one cell, all columns wide.

    Markdown has no other way to say so.
    """
    first, *others = row
    if others and plain(first.children).strip() and not any(plain(cell.children).strip() for cell in others):
        first.attrs |= {"colspan": len(row), "header": True, "group": True}
        del row[1:]


def is_short(table: Node) -> bool:
    """Whether a table is kept on one page."""
    rows = table["head"] + table["rows"]
    return len(rows) <= SHORT_TABLE and sum(len(plain(cell.children)) for row in rows for cell in row) < 2000


def _tile(rows: list[list[Node]], width: int = 0) -> int:
    """Give every cell its column `x`, cut spans that overlap or stick out, pad to `width`; return the width."""
    taken = set()
    for y, row in enumerate(rows):
        x = 0
        for cell in row:
            while (x, y) in taken:
                x += 1
            if x >= MOST_COLUMNS:
                fail(cell.cell, f"a table has more than {MOST_COLUMNS} columns")
            colspan, rowspan = cell["colspan"] or 1, min(cell["rowspan"] or 1, len(rows) - y)
            colspan = next((n for n in range(1, colspan) if (x + n, y) in taken), colspan)
            taken |= {(x + i, y + j) for i in range(colspan) for j in range(rowspan)}
            cell.attrs |= {"x": x, "colspan": colspan, "rowspan": rowspan}
        for x in range(width):
            if (x, y) not in taken:
                row.append(Node("cell", attrs={"x": x, "colspan": 1, "rowspan": 1}))
                taken.add((x, y))
        row.sort(key=lambda cell: cell["x"])
    return max((x + 1 for x, _ in taken), default=0)


def not_shown(what: str, cell: int) -> Node:
    """A visible note in the place of what neither format can show."""
    text = Node("text", text=f"[{what} not shown]", cell=cell)
    return Node("paragraph", [Node("emphasis", [text], cell=cell)], cell=cell)


BLOCKS = ("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "pre", "blockquote", "br", "summary")
# In HTML; there is a note instead
NO_TEXT = ("img", "svg", "iframe", "video", "audio", "canvas", "object", "input", "embed", "progress", "meter")


def html_table(source: str, cell: int) -> list[Node]:
    """What an output's text/html shows, [] if it holds no table."""
    blocks = html_blocks(source, cell)
    return blocks if any(block.kind == "table" for block in blocks) else []


def html_blocks(source: str, cell: int) -> list[Node]:
    """Tables, a paragraph for each other block of text, and notes for what is neither. Markup inside is dropped."""
    try:
        soup = bs4.BeautifulSoup(clean(source).replace(MARK, ""), "html.parser")
    except bs4.ParserRejectedMarkup:
        return []
    drawn = soup("script") and not soup("table")  # a table's script is what it can do besides
    for element in soup(["style", "script", "template"]):
        element.decompose()
    for name, sign in (("sup", "^"), ("sub", "_")):
        for element in soup(name):
            element.replace_with(f"{sign}{element.get_text()}")
    for text in soup.find_all(string=re.compile(MARK)):  # written as an entity
        text.replace_with(text.replace(MARK, ""))
    soup.smooth()

    def row(tr):
        cells = []
        for element in tr.find_all(["td", "th"], recursive=False):
            spans = {n: _span(element.get(n)) for n in ("colspan", "rowspan")}
            text = re.sub(r"\s+", " ", clean(element.get_text(" ", strip=True)))
            attrs = spans | {"header": element.name == "th"}
            cells.append(Node("cell", [Node("text", text=text, cell=cell)], cell=cell, attrs=attrs))
        return cells

    lost, tables = [name for name in NO_TEXT if soup(name)] + ["script"] * bool(drawn), []
    for element in [each for each in soup("table") if not each.find_parent("table")]:
        lines = [(tr, row(tr)) for tr in element.find_all("tr") if tr.find_parent("table") is element]
        lines = [(tr, cells) for tr, cells in lines if cells]
        head = [cells for tr, cells in lines if tr.find_parent("thead")]
        rows = [cells for tr, cells in lines if not tr.find_parent("thead")]
        caption = element.find("caption")
        text = caption.get_text(" ", strip=True) if caption else ""
        if head or rows:
            text += f"\n{MARK}{len(tables)}"
            tables.append(table(_one_header(head), rows, cell))
        element.replace_with(f"\n{text}\n")
    for element in soup(BLOCKS):
        element.insert_before("\n")
        element.insert_after("\n")
    blocks = []
    for line in soup.get_text().split("\n"):
        if line.startswith(MARK):
            blocks.append(tables[int(line[1:])])
        elif text := re.sub(r"\s+", " ", clean(line)).strip():
            blocks.append(Node("paragraph", [Node("text", text=text, cell=cell)], cell=cell))
    return blocks + [not_shown(f"{name} in HTML", cell) for name in lost]


def _span(value: str | None) -> int:
    return min(max(int(value), 1), 1000) if re.fullmatch("[0-9]{1,9}", value or "") else 1


def _one_header(head: list[list[Node]]) -> list[list[Node]]:
    """Merge pandas' row of index names into the row of column names above, where the two do not collide."""
    if len(head) < 2 or len(head[-1]) != len(head[-2]):
        return head
    pairs = [(plain(a.children), plain(b.children)) for a, b in zip(head[-2], head[-1], strict=True)]
    if any(a and b for a, b in pairs):
        return head
    return [*head[:-2], [b if plain(b.children) else a for a, b in zip(head[-2], head[-1], strict=True)]]


# ---------------------------------------------------------------------------------------------- notebook


class _Reader:
    """Walks the cells once and collects blocks; `resolve` then numbers them."""

    def __init__(self, notebook, folder: Path | None):
        self.notebook, self.folder = notebook, folder
        self.front: dict = {}
        self.abstract: list[Node] = []
        self.body: list[Node] = []
        self.references = 0
        self.markdown = _Markdown([clean(text) + "\n" for text in _markdown_texts(notebook)])
        info = notebook.metadata.get("language_info", {})
        self.language = clean(str(info.get("name", "python")))

    def read(self):
        for position, cell in enumerate(self.notebook.cells, 1):
            number = cell.metadata.get("transformnet_cell", position)
            self.attachments = cell.get("attachments", {})
            if cell.cell_type == "markdown":
                self.prose(cell.source, number, cell.metadata)
            elif cell.cell_type == "code":
                if cell.source.strip() and not cell.metadata.get("transient", {}).get("remove_source"):
                    source = clean(cell.source).expandtabs(4).strip("\n")
                    self.body.append(Node("code", text=source, cell=number, attrs={"language": self.language}))
                self.outputs(cell, number)
            elif cell.cell_type == "raw" and cell.source.strip():  # for one of nbconvert's formats, or for none
                form = cell.metadata.get("raw_mimetype") or cell.metadata.get("format")
                if form:
                    self.body.append(not_shown(f"raw cell of type {clean(str(form))}", number))
                else:
                    self.monospace(cell.source, number, "result")

    def prose(self, text: str, cell: int, metadata):
        tags = set(metadata.get("tags", []))
        blocks = self.markdown.blocks(text, cell, self.image_link)
        for block in blocks:
            if block.kind == "heading":
                block.attrs |= {"appendix": "appendix" in tags, "unnumbered": "unnumbered" in tags}
            elif block.kind == "list" and block["ordered"] and "references" in tags:
                block.kind = "references"
                for item in block.children:
                    self.references += 1
                    item.attrs["id"] = f"ref-{self.references}"
                    item.attrs["number"] = self.references
        if "abstract" in tags:  # its heading is made by the writers; others would stand outside the outline
            for block in blocks:
                if block.kind == "heading":
                    block.kind, block.children = "paragraph", [Node("strong", block.children, cell=cell)]
            if blocks and plain(blocks[0].children).strip().lower() == "abstract":
                del blocks[0]
        (self.abstract if "abstract" in tags else self.body).extend(blocks)

    def place(self, cell) -> list[Node]:
        """What the outputs of a cell belong to."""
        return self.abstract if "abstract" in cell.metadata.get("tags", []) else self.body

    def outputs(self, cell, number: int):
        waiting = None  # the labelled figure or table whose caption must come next
        for output in cell.outputs:
            ours = output.get("metadata", {}).get("transformnet", {})
            if not isinstance(ours, dict) or not isinstance(ours.get("front", {}), dict):
                fail(number, f"metadata 'transformnet' must be a mapping, got {ours!r:.80}")
            if waiting and ours.get("caption") != waiting["id"]:
                fail(number, f"{waiting['id']} has no caption after it")
            if "front" in ours:
                self.front = ours["front"]
            elif "caption" in ours:
                if not waiting:
                    fail(number, f"caption for {ours['caption']}, but no such figure or table before it")
                paragraphs = self.markdown.blocks(output.data.get("text/markdown", ""), number, self.image_link)
                if not paragraphs or any(p.kind != "paragraph" for p in paragraphs):
                    fail(number, f"the caption of {waiting['id']} must be plain paragraphs of Markdown")
                space = Node("text", text=" ", cell=number)
                waiting.attrs["caption"] = [n for p in paragraphs for n in (space, *p.children)][1:]
                waiting = None
            elif "label" in ours:
                waiting = self.labelled(output, ours, number)
                self.body.append(waiting)
            elif "alt" in ours:
                self.place(cell).append(self.unlabelled(output, ours, number))
            else:
                self.output(output, number, cell.metadata)
        if waiting:
            fail(number, f"{waiting['id']} has no caption after it")

    def labelled(self, output, ours: dict, cell: int) -> Node:
        label, alt = str(ours["label"]), self.plain_text(str(ours.get("alt") or ""), cell)
        if not re.fullmatch(r"(fig|tab)-[\w-]+", label):
            fail(cell, f"a label is fig-… or tab-… in letters, digits and hyphens, got {label!r}")
        data = output.get("data", {})
        if label.startswith("fig"):
            node = self.image(output, cell, alt)
            if not node:
                fail(cell, f"{label} holds no image ({', '.join(IMAGES)})")
            if not alt:
                fail(cell, f"{label} has no alt text")
            several = ours.get("count", 1)
            if type(several) is not int or several < 1:
                fail(cell, f"{label}: count is how many figures it holds, a whole number from 1, got {several!r}")
            node = Node("figure", [node], cell=cell, attrs={"caption": None, "count": several})
        else:
            blocks = html_table(data.get("text/html", ""), cell)
            blocks += self.markdown.blocks(data.get("text/markdown", ""), cell, self.image_link)
            node = next((block for block in blocks if block.kind == "table"), None)
            if not node:
                fail(cell, f"{label} holds no table (text/html or text/markdown)")
        node.attrs["id"] = label
        return node

    def unlabelled(self, output, ours, cell: int) -> Node:
        """A figure that has no number and nothing refers to, such as a picture beside the abstract."""
        alt = self.plain_text(str(ours["alt"]), cell)
        node = self.image(output, cell, alt)
        if not node or not alt:
            fail(cell, f"a figure without a label needs an image ({', '.join(IMAGES)}) and an alt text")
        return Node("figure", [node], cell=cell, attrs={"caption": None})

    def plain_text(self, markdown: str, cell: int) -> str:
        """What `markdown` says without its markup, on one line."""
        blocks = self.markdown.blocks(markdown, cell, self.image_link)
        return " ".join(" ".join(plain([block]) for block in blocks).split())

    def output(self, output, cell: int, metadata):
        """Append one output without a label, in the best form a page can hold."""
        if output.output_type == "stream":
            return self.monospace(output.text, cell, output.name)
        if output.output_type == "error":
            text = "\n".join(output.traceback) or f"{output.ename}: {output.evalue}"
            return self.monospace(text, cell, "error")
        data = output.data
        text = data.get("text/plain", "")
        if image := self.image(output, cell, None):
            self.body.append(Node("figure", [image], cell=cell, attrs={"caption": None}))
        elif "text/markdown" in data:
            self.prose(data["text/markdown"], cell, metadata)
        elif tables := html_table(data.get("text/html", ""), cell):
            self.body.extend(tables)
        elif tex := _display_maths(clean(data.get("text/latex", ""))):
            self.body.append(Node("block_math", text=tex, cell=cell))
        elif text and (len(data) == 1 or not re.fullmatch(r"<.*>", text.strip(), re.DOTALL)):
            self.monospace(text, cell, "result")
        elif blocks := html_blocks(data.get("text/html", ""), cell):  # the text is no more than an object's name
            self.body.extend(blocks)
        elif "application/json" in data:
            text = clean(json.dumps(data["application/json"], indent=1, ensure_ascii=False))
            self.body.append(Node("code", text=text, cell=cell, attrs={"language": "json"}))
        elif others := [form for form in data if form != "text/plain"]:
            self.body.append(not_shown(f"output of type {clean(others[0])}", cell))

    def monospace(self, text: str, cell: int, stream: str):
        if text := terminal(text):
            self.body.append(Node("output", text=text, cell=cell, attrs={"stream": stream}))

    def image(self, output, cell: int, alt: str | None) -> Node | None:
        """The best image of an output's bundle as a node, or None if it has none."""
        data, metadata = output.get("data", {}), output.get("metadata", {})
        mime = next((m for m in IMAGES if m in data), None)
        if not mime:
            return None
        raw = _image_bytes(mime, data[mime], cell)
        hints = metadata.get(mime) if isinstance(metadata.get(mime), dict) else {}
        width = hints.get("width") if isinstance(hints.get("width"), int | float) else None
        alt = clean(str(alt or metadata.get("alt") or "")).strip() or f"Output of code cell {cell}"
        return Node("image", cell=cell, attrs={"mime": mime, "data": raw, "alt": alt, "width": width})

    def image_link(self, url: str, alt: str, cell: int) -> Node:
        """A Markdown image: an attachment, a data: URI, or a file beside the notebook; else its alt text."""
        mime, data = None, None
        if url.startswith("attachment:"):
            bundle = self.attachments.get(unquote(url.removeprefix("attachment:")), {})
            mime = next((m for m in IMAGES if m in bundle), None)
            data = _image_bytes(mime, bundle[mime], cell) if mime else None
        elif match := re.match(r"data:(image/(?:png|jpeg|webp|gif));base64,(.*)", unquote(url), re.DOTALL):
            mime, data = match[1], _image_bytes(match[1], match[2], cell)
        elif self.folder and not re.match(r"[a-z][a-z0-9+.-]*:|/", url, re.IGNORECASE):
            mime, data = self.file(unquote(url), cell)
        if data is None or mime not in IMAGES:
            return Node("link", [Node("text", text=alt or "image", cell=cell)], cell=cell, attrs={"url": url})
        alt = alt.strip() or f"Image in cell {cell}"
        return Node("image", cell=cell, attrs={"mime": mime, "data": data, "alt": alt, "width": None})

    def file(self, name: str, cell: int) -> tuple[str | None, bytes | None]:
        """Type and bytes of an image below the notebook's folder; None for what is not there or not an image."""
        mime = mimetypes.guess_type(name)[0]
        try:
            path = (self.folder / name).resolve()
            if mime in IMAGES and path.is_relative_to(self.folder.resolve()) and path.is_file():
                return mime, _checked(mime, path.read_bytes(), cell)
        except (OSError, ValueError):  # too long, a null character, not readable
            pass
        return None, None


def _image_bytes(mime: str, data: str, cell: int) -> bytes:
    """The file's bytes; a notebook holds SVG as text (as an attachment: base64) and other images as base64."""
    try:
        raw = clean(data).encode() if data.lstrip().startswith("<") else base64.b64decode(data)
    except ValueError:
        fail(cell, f"an {mime} is not valid base64")
    return _checked(mime, raw, cell)


def _checked(mime: str, data: bytes, cell: int) -> bytes:
    """`data`, if it is an image: later no message could name the cell."""
    try:
        if mime == IMAGES[0]:
            ElementTree.fromstring(data)
        else:
            formats = ["PNG", "JPEG", "WEBP", "GIF"]
            PIL.Image.open(io.BytesIO(data), formats=formats).verify()
            if (picture := PIL.Image.open(io.BytesIO(data), formats=formats)).mode == "CMYK":  # Typst reads none
                picture.convert("RGB").save(converted := io.BytesIO(), "JPEG", quality=95)
                return converted.getvalue()
    except PIL.UnidentifiedImageError:
        fail(cell, f"an {mime} cannot be read: it does not begin like one")
    except Exception as error:  # Pillow also raises SyntaxError, struct.error, DecompressionBombError …
        fail(cell, f"an {mime} cannot be read: {' '.join(str(error).split())}")
    return data


def _markdown_texts(notebook) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
        for output in cell.get("outputs", []):
            if text := output.get("data", {}).get("text/markdown"):
                yield text


def _display_maths(latex: str) -> str | None:
    """TeX of a text/latex output that is one formula (as SymPy's is); None for other LaTeX, for example a tabular."""
    environment = r"\\begin\{((?:align|gather|equation|multline)\*?)\}.*\\end\{\1\}"
    if re.fullmatch(environment, latex.strip(), re.DOTALL):
        return latex.strip()
    match = re.fullmatch(r"(\$\$?|\\\[)(.+?)(\$\$?|\\\])", latex.strip(), re.DOTALL)
    return match[2].strip() if match and "$" not in match[2].replace(r"\$", "") else None


# --------------------------------------------------------------------------------- numbers and references


def _number_headings(headings: list[Node], taken: set[str]):
    """Set depth (1…), number ("2.1", "A", or None) and id of each heading, none of them `taken`; levels that skip are
    pulled up."""
    shift = 1 if any(h["level"] > 1 for h in headings) and all(h["level"] > 1 for h in headings) else 0
    depth, counts, seen = 0, [0, 0, 0], taken | set(PAGE_IDS)
    letters = 0
    top = None  # number of the section that we are in, None in an unnumbered one
    for heading in headings:
        depth = min(heading["level"] - shift, depth + 1)
        number = None
        if depth == 1:
            if heading["unnumbered"]:
                top = None
            elif heading["appendix"]:
                top, letters = _letters(letters), letters + 1
            else:
                counts[0] += 1
                top = str(counts[0])
            counts[1:] = [0, 0]
            number = top
        elif depth <= 3 and top and not heading["unnumbered"]:
            counts[depth - 1] += 1
            counts[depth:] = [0] * (3 - depth)
            if all(counts[1:depth]):  # else it stands below an unnumbered one
                number = ".".join([top, *map(str, counts[1:depth])])
        slug = re.sub(r"[^\w-]", "", plain(heading.children).lower().replace(" ", "-")) or "section"
        if slug.startswith(("fig-", "tab-", "ref-", "fn")):
            slug = f"sec-{slug}"
        unique = next(s for s in chain([slug], (f"{slug}-{n}" for n in count(1))) if s not in seen)
        seen.add(unique)
        heading.attrs |= {"depth": depth, "number": number, "id": unique}


def _letters(index: int) -> str:
    """0 → A, 25 → Z, 26 → AA."""
    return chr(65 + index) if index < 26 else _letters(index // 26 - 1) + chr(65 + index % 26)


def _targets(document: Document) -> dict[str, tuple[str, str, str | None]]:
    """What a link may point to: key → (id, word, number). Numbers labelled figures and tables on the way."""
    targets, counts = {}, dict.fromkeys(FLOATS.values(), 0)
    for node in document.walk():
        if node.kind in ("figure", "table") and node["id"]:
            kind, several = FLOATS[node["id"][:3]], node["count"] or 1
            first, last = counts[kind] + 1, counts[kind] + several
            counts[kind] = last
            word, words = document.label(kind), document.label(f"{kind}s")
            node.attrs["number"] = str(first) if several == 1 else f"{first}–{last}"
            # One that holds several has a number for each, and one for all: fig-x is Figures 1–5, fig-x-2 Figure 2
            labels = {node["id"]: (node["id"], words if several > 1 else word, node["number"])}
            labels |= {
                f"{node['id']}-{k + 1}": (node["id"], word, str(first + k)) for k in range(several) if several > 1
            }
            for label, target in labels.items():
                if label in targets:
                    fail(node.cell, f"the label {label} is used twice")
                targets[label] = target
        elif node.kind == "anchor" and node["id"].removeprefix("a-") not in targets:
            targets[node["id"].removeprefix("a-")] = (node["id"], "here", "")
        elif node.kind == "anchor":  # the label is taken
            node.kind = "span"
        elif node.kind == "item" and node["id"]:
            targets[node["id"]] = (node["id"], document.label("Reference"), str(node["number"]))
    for heading in document.headings:
        word = document.label("Appendix" if heading["number"] and heading["number"][0].isalpha() else "Section")
        jupyter = plain(heading.children).lower().replace(" ", "-")
        for key in (heading["id"], jupyter):
            targets.setdefault(key, (heading["id"], word, heading["number"] or plain(heading.children)))
    return targets


def _resolve(document: Document):
    _number_headings(document.headings, {node["id"] for node in document.walk() if node.kind == "anchor"})
    targets = _targets(document)
    notes: dict[tuple, Node] = {}
    for node in list(document.walk()):
        if node.kind == "link":
            _resolve_link(node, targets, document)
        elif node.kind == "footnote":
            key = (node["key"], plain([c for block in node.children for c in block.walk()]))
            first = key not in notes
            notes.setdefault(key, node)
            node.attrs |= {"first": first, "number": len(notes) if first else notes[key]["number"]}
    document.footnotes = list(notes.values())


def _resolve_link(node: Node, targets: dict, document: Document):
    """Make a link inside the document a `ref`; keep http(s) and mailto; drop any other target."""
    url = node["url"]
    if not url.startswith("#"):
        if not re.match(r"(https?://[^/\s]|mailto:\S)", url, re.IGNORECASE):
            node.kind = "span"
        return
    wanted = unquote(url[1:])
    target = targets.get(wanted) or targets.get(wanted.lower())
    if not target:
        fail(node.cell, f"nothing is labelled {wanted!r} (figures, tables, sections and references were searched)")
    identifier, word, number = target
    text = plain(node.children).strip()
    node.kind, node.attrs = "ref", {"target": identifier}
    last = text.rsplit(maxsplit=1)[-1:]
    section = document.label("Section").lower()
    if not text or (word == document.label("Appendix") and text.lower() == section):
        node.children = [Node("text", text=f"{word}\N{NO-BREAK SPACE}{number}".strip(), cell=node.cell)]
    elif NUMBERED_WORD.search(text) or (last and last[0].lower() in document.numbered_words):
        node.children = [*node.children, Node("text", text=f"\N{NO-BREAK SPACE}{number}", cell=node.cell)]


def read(notebook, *, name: str = "Notebook", folder: Path | None = None) -> Document:
    """Read a notebook (nbformat 4) into a `Document` with all numbers and references settled.

    `name` is the title of last resort; Markdown images are looked for below `folder`. Raises ExportError, naming the
    cell, for an unknown or repeated label, a missing caption or a figure without alt text.
    """
    reader = _Reader(notebook, folder)
    reader.read()
    front, body = dict(reader.front), reader.body
    headings = [block for block in body if block.kind == "heading" and block["level"] == 1]
    if front and body and body[0] in headings[:1]:
        body.remove(headings[0])  # the title block says it already
    elif not front and headings:
        front["title"] = plain(headings[0].children)
        body.remove(headings[0])
    titles = (_line(t) for t in (front.get("title"), notebook.metadata.get("title"), name, "Notebook") if t)
    author, labels = front.get("author") or [], front.get("labels")
    document = Document(
        title=next(filter(None, titles)),
        subtitle=_line(front.get("subtitle") or "") or None,
        authors=list(filter(None, map(_line, author if isinstance(author, list) else [author]))),
        date=_line(front.get("date") or "") or None,
        language=_line(front.get("language") or "") or "en",
        labels={_line(word): _line(other) for word, other in labels.items()} if isinstance(labels, dict) else {},
        abstract=reader.abstract,
        body=body,
    )
    _resolve(document)
    return document


def _line(value) -> str:
    return re.sub(r"\s+", " ", clean(str(value))).strip()
