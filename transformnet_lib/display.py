"""What notebooks show, with what the exporters need to know of it.

Each function displays something in the notebook and notes, in the output's metadata under "transformnet", the label,
alt text or role by which `transformnet_lib.export` numbers and places it. Captions are Markdown and shown in the
notebook as well.
"""

import io
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display
from ipywidgets import Widget
from matplotlib.figure import Figure
from matplotlib.text import Text

from .errors import ParameterError, one_line
from .words.filters import literal, without_controls

NUMBERS = "application/json"
WIDGET = "application/vnd.jupyter.widget-view+json"


def show_text(markdown: str, *, widget: Widget | None = None) -> None:
    """Show prose, Markdown with `$…$` maths, if there is any; with `widget`, that where widgets run."""
    if widget is None:
        if markdown:
            display(Markdown(markdown))
    else:
        display({"text/markdown": markdown, "text/plain": markdown} | _view(widget), raw=True)


def show_figure(
    figure: Figure,
    *,
    label: str,
    caption: str,
    alt: str,
    count: int = 1,
    widget: Widget | None = None,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Show a Matplotlib figure with its caption, then close it. `label` starts with "fig-"; `alt` is Markdown too.

    One that holds several figures, as rows of a grid say, has `count` numbers: fig-x-1, fig-x-2, … are its parts. With
    `widget`, that is shown where widgets run, and the figure in exports, on GitHub and the like. `labels` are English
    words in the figure, and what to write in their place.
    """
    _translate(figure, labels or {})
    ours = {"label": label, "alt": alt} | ({"count": count} if count > 1 else {})
    display(_drawn(figure, label) | _view(widget), raw=True, metadata={"transformnet": ours})
    plt.close(figure)
    _show_caption(label, caption)


def show_picture(figure: Figure, *, alt: str, labels: Mapping[str, str] | None = None) -> None:
    """Show a Matplotlib figure that has neither number nor caption, then close it; `alt` is Markdown."""
    _translate(figure, labels or {})
    display(_drawn(figure, "picture"), raw=True, metadata={"transformnet": {"alt": alt}})
    plt.close(figure)


def show_live_figure(figure: Figure, *, label: str, caption: str, alt: str) -> Callable[[], None]:
    """As `show_figure`; call what it returns to show the figure again, in the same place, after drawing on it."""
    metadata = {"transformnet": {"label": label, "alt": alt}}
    shown = display(_drawn(figure, label), raw=True, metadata=metadata, display_id=True)
    plt.close(figure)
    _show_caption(label, caption)
    return lambda: shown.update(_drawn(figure, label), raw=True, metadata=metadata)


def show_table(table: str | pd.DataFrame, *, label: str, caption: str, widget: Widget | None = None) -> None:
    """Show a table, in Markdown or as its values are, with its caption. `label` starts with "tab-".

    With `widget`, that is shown where widgets run.
    """
    if isinstance(table, str):
        bundle = {"text/markdown": table, "text/plain": table}
    else:
        with pd.option_context("display.max_colwidth", None):  # else long texts are cut
            bundle = {
                "text/html": without_controls(table.to_html(index=False, border=0, na_rep="–")),
                "text/plain": without_controls(table.to_string(index=False, na_rep="–")),
            }
    display(bundle | _view(widget), raw=True, metadata={"transformnet": {"label": label}})
    _show_caption(label, caption)


def show_numbers(numbers: dict) -> None:
    """Show JSON values (JupyterLab: as a tree to open); `report.export` writes them beside the report."""
    display(
        {NUMBERS: numbers, "text/plain": "<numbers by name>"},
        raw=True,
        metadata={"transformnet": {"numbers": True}},
    )


def show_front(
    *, title: str, author: str, date: str, language: str = "en", labels: Mapping[str, str] | None = None
) -> None:
    """Show the title block; `date` as YYYY-MM-DD. Raises ParameterError for what is no text.

    `language` is the exported page's, as HTML's lang; `labels` its own words in that language ("Figure": "Abbildung").
    """
    for name, text in (("title", title), ("author", author)):
        if not isinstance(text, str):
            raise ParameterError(f"{name}: expected text, got {text!r}")
    title, author = one_line(title), one_line(author)
    front = {"title": title, "author": author, "date": date, "language": language, "labels": dict(labels or {})}
    byline = ", ".join(filter(None, [author, date]))
    display(
        {"text/markdown": f"# {literal(title)}\n\n{literal(byline)}", "text/plain": title},
        raw=True,
        metadata={"transformnet": {"front": front}},
    )


def _view(widget: Widget | None) -> dict[str, dict]:
    """A widget as one more form of an output: frontends that run widgets take it, all others the rest."""
    return {} if widget is None else {WIDGET: widget._repr_mimebundle_()[WIDGET]}


def _translate(figure: Figure, labels: Mapping[str, str]) -> None:
    """Replace words in a figure, the longest first."""
    for text in figure.findobj(Text) if labels else ():
        shown = text.get_text()
        for word in sorted(labels, key=len, reverse=True):
            shown = shown.replace(word, labels[word])
        text.set_text(shown)


def _drawn(figure: Figure, label: str) -> dict[str, str]:
    """The figure as an output of a notebook, by MIME type."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})  # without the date equal figures are equal bytes
    return {"image/svg+xml": svg.getvalue(), "text/plain": f"<figure {label}>"}


def _show_caption(label: str, caption: str) -> None:
    display({"text/markdown": caption, "text/plain": caption}, raw=True, metadata={"transformnet": {"caption": label}})
