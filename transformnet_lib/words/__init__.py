"""What the report and the notebooks say: Markdown templates (`*.md.j2`), read and edited as prose.

A template says facts (`transformnet_lib.facts`) and nothing else: every condition is a named fact, every number goes
through a filter (`filters.py`), and what a run or a user may say is shown literally. Its blocks are its text, tables,
captions and alt texts. Somebody's own templates, one or all, take the place of those here.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..errors import ParameterError, one_line
from ..facts import Report
from . import filters

TEMPLATES = Path(__file__).parent


class Words:
    """The templates of a folder, and those shipped for all that it lacks; all know the facts of `report` by name.

    Raises ParameterError for a folder that is not there or holds a file that is no template's name, which would never
    be read.
    """

    def __init__(self, report: Report, folder: str | Path = ""):
        loaders = [jinja2.FileSystemLoader(TEMPLATES)]
        if folder:
            check_folder(folder)
            loaders.insert(0, jinja2.FileSystemLoader(folder))
        self.environment = environment(jinja2.ChoiceLoader(loaders))
        self.facts = {name: getattr(report, name) for name in dir(report) if not name.startswith("_")}
        with _errors("names"):
            self.names = self.environment.get_template("names.md.j2").module  # whose macros all others know
        self.environment.globals |= vars(self.names)

    def __call__(self, name: str, block: str = "text", **facts: object) -> str:
        """A block of the template `name`, as Markdown; `facts` are known this time only.

        Raises ParameterError, in one line, for a template that names a fact that does not exist or cannot be read.
        """
        with _errors(name):
            template = self.environment.get_template(f"{name}.md.j2")
            if block not in template.blocks:
                raise jinja2.TemplateRuntimeError(f"there is no block {block!r}")
            return "".join(template.blocks[block](template.new_context(self.facts | facts))).strip()


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """A template's error in one line, with its file and, where Jinja tells, its line."""
    try:
        yield
    except Exception as error:  # anything, by what somebody wrote
        file, line = _place(error) or (f"{name}.md.j2", getattr(error, "lineno", None))
        place = f"{file}, line {line}" if line else file
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise ParameterError(
            f"words: {place}: {kind}{one_line(error)}"
        ) from None  # IPython cannot follow into templates


def _place(error: Exception) -> tuple[str, int] | None:
    """The template and line in which `error` arose; None if it could not even be compiled."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        template = frame.f_globals.get("__jinja_template__")
        if template is not None:
            return Path(template.filename).name, template.get_corresponding_lineno(number)
    return None


def environment(loader: jinja2.BaseLoader) -> jinja2.Environment:
    """Where templates live: undefined names are errors, and text that no filter made is shown literally."""
    made = jinja2.Environment(
        loader=loader,
        autoescape=True,  # so that what macros and filters made, `Markup`, is told from plain text
        finalize=_literally,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    made.filters |= filters.FILTERS
    return made


def _literally(value: object) -> object:
    """What `{{ value }}` puts into Markdown."""
    if isinstance(value, Markup | jinja2.Undefined):
        return value
    if isinstance(value, bool | float) or value is None:
        raise jinja2.TemplateRuntimeError(f"{value!r} is written without a filter")
    return Markup(f"{value:,}") if isinstance(value, int) else filters.literal(value)


def check_folder(folder: object) -> None:
    """ParameterError for what is no folder, or holds a file that is no template's name."""
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        shown = str(folder) if isinstance(folder, Path) else folder
        raise ParameterError(f"words: expected a folder of templates, got {shown!r}, which is none")
    folder = Path(folder)
    known = {path.name for path in TEMPLATES.glob("*.md.j2")}
    if unknown := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise ParameterError(
            f"words: {folder / unknown[0]}: no template has this name; there are {', '.join(sorted(known))}"
        )
