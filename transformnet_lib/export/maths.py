"""TeX formulas → Typst maths and MathML, by way of the tylax and typst wheels; nothing of a formula stays code.

Typst sets the formulas in the PDF and writes MathML for the HTML, so both show the same thing and a formula that
cannot be set fails in both.
"""

import re
from html import escape

import tylax
import typst

from .errors import ExportError

OPTIONS = tylax.L2TOptions(frac_to_slash=False, prefer_shorthands=False)
PLACEHOLDER = 0xE000  # private-use characters pass through tylax untouched; text is parked behind them
# tylax 0.3.8 hands the text of these on as Typst markup, or drops it: park it as a string instead.
TEXT_COMMANDS = {
    "text": "upright({})", "textrm": "upright({})", "textnormal": "upright({})", "mbox": "upright({})",
    "textbf": "bold(upright({}))", "textit": "italic({})", "emph": "italic({})", "texttt": "mono({})",
    "textsf": "sans({})", "operatorname": "op({})", "operatorname*": "op({}, limits: #true)",
}  # fmt: skip
# Commands that tylax 0.3.8 hands on as names unknown to Typst, drops or mistakes: the characters that they stand for.
SYMBOLS = dict(re.findall(r"(\w+) (\S+)", """
    And "&" Box □ Bumpeq ≎ Diamond ◊ Doteq ≑ Finv Ⅎ Game ⅁ Join ⋈ Lsh ↰ Rsh ↱ Vvdash ⊪ amalg ⨿ backepsilon ∍ barwedge ⊼
    between ≬ bumpeq ≏ cdotp ⋅ centerdot ⋅ circ ∘ circeq ≗ circledR ® circledS Ⓢ circlearrowleft ↺ circlearrowright ↻
    dashleftarrow ⇠ dashrightarrow ⇢ diagdown ╲ diagup ╱ diamond ⋄ doteqdot ≑ doublebarwedge ⩞ doublecap ⋒ doublecup ⋓
    eqcirc ≖ eqslantgtr ⪖ eqslantless ⪕ eth ð gggtr ⋙ gtreqqless ⪌ hbar ℏ hslash ℏ intercal ⊺ intop ∫ ldotp .
    lesseqqgtr ⪋ llless ⋘ mathellipsis … nVDash ⊯ ngeq ≱ nleq ≰ npreceq ⋠ nsubseteq ⊈ nsucceq ⋡ nsupseteq ⊉ owns ∋
    pitchfork ⋔ restriction ↾ shortmid ∣ shortparallel ∥ smallfrown ⌢ smallint ∫ smallsmile ⌣ sqcap ⊓ subseteqq ⫅
    subsetneq ⊊ subsetneqq ⫋ supseteqq ⫆ supsetneq ⊋ supsetneqq ⫌ surd "√" thickapprox ≈ thicksim ∼ triangleleft ◃
    impliedby ⟸ triangleq ≜ triangleright ▹ unlhd ⊴ unrhd ⊵ uplus ⊎ varkappa ϰ varpropto ∝ varvdots ⋮ veebar ⊻ wp ℘
""")) | {"nobreakspace": "~"}  # fmt: skip
# Characters that mean something to Typst or that tylax gets wrong: shown as themselves.
ESCAPED = {r"\&": "&", r"\_": "_", r"\#": "#", r"\$": "$", r"\%": "%", '"': '"', "`": "`", "#": "#", "@": "@"}


def literal(text: str) -> str:
    """`text` as a Typst string literal: nothing in it is ever code.

    >>> literal('a "b" \\\\ #c')
    '"a \\\\"b\\\\" \\\\\\\\ #c"'
    """
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '"' + re.sub("[\r\x0b\x0c\x85\u2028\u2029]", lambda m: f"\\u{{{ord(m[0]):x}}}", text) + '"'


def typst_maths(tex: str) -> str:
    """Typst maths source for one TeX formula without its dollars. Raises ExportError where that would need code.

    >>> typst_maths(r"\\frac{1}{n}")
    'frac(1, n)'
    """
    parked = []

    def park(code: str) -> str:
        parked.append(code)
        return f" {chr(PLACEHOLDER + len(parked) - 1)} "

    def text_command(match):
        plain = re.sub(r"\\(?:text[a-z]*|emph|mbox)\s*\{([^{}]*)\}", r"\1", match[2])  # the outer one's style is set
        plain = re.sub(r"\\([&_#$%{} ])", r"\1", plain).replace(r"\,", "\u2009").replace("~", "\u00a0")
        return "{" + park(TEXT_COMMANDS[match[1]].format(literal(plain))) + "}"

    if re.search("[\ue000-\uf8ff]", tex):
        raise ExportError("private-use characters are not allowed in maths")
    # Typst scales brackets itself; tylax would drop the bracket together with the command
    tex = re.sub(r"\\(?:[bB]igg?[lrm]?|middle|nonumber|notag|label\{[^{}]*\})(?![A-Za-z])", "", tex)
    tex = re.sub(r"\\(begin|end)\{alignat(\*?)\}(\{\d+\})?", r"\\\1{align\2}", tex)
    tex = re.sub(r"\\(begin|end)\{(align|gather|equation|multline)\*\}", r"\\\1{\2}", tex)  # none has a number here
    tex = re.sub(r"(\\begin\{(?:aligned|gathered)\})\[[tbc]\]", r"\1", tex)
    tex = re.sub(r"\{\\(bf|it|rm|sf|tt|cal)(?![A-Za-z])\s*([^{}]*)\}", r"\\math\1{\2}", tex)
    over = r"\\overset{\3}{\\underset{\2}{\\long\1arrow}}"
    tex = re.sub(r"\\x(right|left)arrow\[([^\]]*)\]\{([^{}]*)\}", over, tex)
    tex = re.sub(r"\\(check|mathring)(?![A-Za-z])", lambda m: rf"\overset{{{'ˇ' if m[1] == 'check' else '˚'}}}", tex)
    tex = re.sub(r"\\mathscr(?![A-Za-z])", r"\\mathcal", tex)
    if re.search(r"\\[bx]?cancel(?![A-Za-z])", tex):
        raise ExportError("a line through a formula cannot be shown in the page")
    tex = re.sub(r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\ ", tex)  # a row's distance from the next
    reverse = r"\begin{rcases}" in tex
    if reverse and r"\begin{cases}" in tex:
        raise ExportError("cases and rcases together have no counterpart")
    tex = tex.replace("{rcases}", "{cases}")
    names = "|".join(map(re.escape, sorted(TEXT_COMMANDS, key=len, reverse=True)))
    tex = re.sub(rf"\\({names})\s*\{{((?:[^{{}}\\]|\\.|\{{[^{{}}]*\}})*)\}}", text_command, tex)
    tex = re.sub(rf"\\({'|'.join(SYMBOLS)})(?![A-Za-z])", lambda m: park(SYMBOLS[m[1]]), tex)
    # Between arguments of Typst's functions a bare comma or semicolon would be another separator
    tex = tex.replace("{,}", park(literal(",")))
    tex = re.sub(r"(?<!\\)[,;]", lambda m: park(f'class("punctuation", {literal(m[0])})'), tex)
    tex = tex.replace(r"\{", r"\lbrace ").replace(r"\}", r"\rbrace ")
    escaped = "|".join(re.escape(key) for key in ESCAPED)
    tex = re.sub(rf"\\\\|{escaped}", lambda m: park(literal(ESCAPED[m[0]])) if m[0] in ESCAPED else m[0], tex)
    try:
        code = tylax.latex_to_typst(tex, options=OPTIONS).strip()
    except BaseException as error:  # a Rust panic is no Exception, and its class has no importable name
        if type(error).__name__ != "PanicException":
            raise
        raise ExportError("the translation to Typst crashed on it") from None
    if match := re.fullmatch(r"\$ (.*) \$", code, re.DOTALL):  # an environment such as align
        code = match[1]
    code = re.sub(r"/\*.*?\*/", " ", code, flags=re.DOTALL)
    code = re.sub(r"cases\((?:[^()]|\([^()]*\))*\)", lambda m: m[0].replace(" & ", " & quad "), code)  # as TeX has it
    code = re.sub(r"#underline\[([^\[\]#]*)\]", r"underline(\1)", code)
    code = code.replace("cases(", "cases(reverse: #true, ") if reverse else code
    if re.search(
        r"[#$`\"]|//|/\*", re.sub(r'"[^"]*"|#(?:none|true)\b', "", code)
    ):  # but for those that tylax itself writes
        raise ExportError("a command in it has no counterpart in Typst")
    return re.sub("[\ue000-\uf8ff]", lambda m: parked[ord(m[0]) - PLACEHOLDER], code)


def definitions(formulas: dict[str, int]) -> list[str]:
    """Typst lines `#let m0 = …`, one for each formula (TeX → cell, for messages), in order.

    Each is evaluated from a string, which can neither end early nor read files.
    """
    lines = []
    for index, (tex, cell) in enumerate(formulas.items()):
        try:
            lines.append(f'#let m{index} = eval({literal(typst_maths(tex))}, mode: "math")')
        except ExportError as error:
            raise formula_error(tex, cell, str(error)) from None
    return lines


def formula_error(tex: str, cell: int, why: str) -> ExportError:
    short = " ".join(tex.split())
    return ExportError(f"cell {cell}: cannot set the formula ${short[:80]}{'…' * (len(short) > 80)}$: {why}")


def mathml(formulas: dict[str, int]) -> tuple[dict[tuple[str, bool], str], str]:
    """MathML of each formula (TeX → cell) by (TeX, is display), and the CSS that Typst wants beside it."""
    if not formulas:
        return {}, ""
    lines = definitions(formulas)
    wanted = [(tex, block) for tex in formulas for block in (False, True)]
    index = {tex: i for i, tex in enumerate(formulas)}
    shown = [f"#math.equation(block: {str(block).lower()}, m{index[tex]})" for tex, block in wanted]
    source = "\n".join([*lines, *shown]).encode()
    try:
        page = typst.compile(source, format="html", ignore_system_fonts=True).decode()
    except typst.TypstError as error:
        if found := located(error, formulas):
            raise found from None
        if len(formulas) == 1:
            raise formula_error(*next(iter(formulas.items())), error.message) from None
        for tex, cell in formulas.items():
            mathml({tex: cell})  # raises for the one at fault
        raise ExportError(f"cannot set the formulas: {error.message}") from None
    found = re.findall(r"<math(?: [^>]*)?>(.*?)</math>", page, re.DOTALL)
    if len(found) != len(wanted):
        raise ExportError(f"expected {len(wanted)} formulas as MathML, Typst wrote {len(found)}")
    made = {}
    for (tex, block), inner in zip(wanted, found, strict=True):
        display = "block" if block else "inline"
        made[tex, block] = f'<math display="{display}" alttext="{escape(tex)}">{inner}</math>'
    css = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    return made, css[1] if css else ""


def located(error: typst.TypstError, formulas: dict[str, int], first_line: int = 1) -> ExportError | None:
    """The error of one formula if `error` arose in its definition, these starting at `first_line`; else None."""
    line = re.search(r"\.typ:(\d+):", error.diagnostic)
    number = int(line[1]) - first_line if line else -1
    if 0 <= number < len(formulas):
        return formula_error(*list(formulas.items())[number], error.message)
    return None
