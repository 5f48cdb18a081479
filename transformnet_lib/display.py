"""What notebooks show, with what the exporters need to know of it.

Each function displays something in the notebook and notes, in the output's metadata under "transformnet", the label,
alt text or role by which `transformnet_lib.export` numbers and places it. Captions are Markdown and shown in the
notebook as well.
"""

import io

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from .findings.text import escape


def show_text(markdown: str) -> None:
    """Show computed prose, Markdown with `$…$` maths."""
    display(Markdown(markdown))


def show_figure(figure: Figure, *, label: str, caption: str, alt: str) -> None:
    """Show a Matplotlib figure with its caption, then close it. `label` starts with "fig-"; `alt` is Markdown too."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})  # without the date equal figures are equal bytes
    plt.close(figure)
    bundle = {"image/svg+xml": svg.getvalue(), "text/plain": f"<figure {label}>"}
    display(bundle, raw=True, metadata={"transformnet": {"label": label, "alt": alt}})
    _show_caption(label, caption)


def show_table(table: pd.DataFrame, *, label: str, caption: str, index: bool = False) -> None:
    """Show a table with its caption; its values as they are, so format them first. `label` starts with "tab-"."""
    with pd.option_context("display.max_colwidth", None):  # else long texts are cut
        bundle = {
            "text/html": table.to_html(index=index, border=0, na_rep="–"),
            "text/plain": table.to_string(index=index, na_rep="–"),
        }
    display(bundle, raw=True, metadata={"transformnet": {"label": label}})
    _show_caption(label, caption)


def show_numbers(numbers: dict) -> None:
    """Show JSON values (JupyterLab: as a tree to open); `report.export` writes them beside the report."""
    display(
        {"application/json": numbers, "text/plain": "<numbers by name>"},
        raw=True,
        metadata={"transformnet": {"numbers": True}},
    )


def show_front(*, title: str, author: str, date: str) -> None:
    """Show the title block; `date` as YYYY-MM-DD."""
    front = {"title": title, "author": author, "date": date}
    byline = ", ".join(filter(None, [author, date]))
    display(
        {"text/markdown": f"# {escape(title)}\n\n{escape(byline)}", "text/plain": title},
        raw=True,
        metadata={"transformnet": {"front": front}},
    )


def _show_caption(label: str, caption: str) -> None:
    display({"text/markdown": caption, "text/plain": caption}, raw=True, metadata={"transformnet": {"caption": label}})
