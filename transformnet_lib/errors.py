"""The library's exceptions: one base class, so that a caller (and the command line) can catch them all.

A message says what was expected, what came, where, and what to do.
"""

MAX_CHARACTERS = 5000  # of a message; what a file from a stranger says may have millions


def one_line(text: object) -> str:
    """`text` on one line, without signs that a terminal obeys or that turn round what stands after them.

    File names, servers' answers and runs from strangers may hold any.
    """
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(str(text).split()))


class TransformnetError(Exception):
    """Base of every error this library raises on purpose. Its message is one line, whatever is quoted in it."""

    def __init__(self, message: object):
        text = str(message)
        super().__init__(one_line(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"))


class ParameterError(TransformnetError, ValueError):
    """A parameter is out of range, of the wrong type, or names something that does not exist."""


class DataError(TransformnetError):
    """Images are missing, unreadable, of mixed sizes, or not what their checksum says."""


class RunError(TransformnetError):
    """A run directory lacks a stage, is damaged, in use, of another format, or made with other parameters."""


class TrainingError(TransformnetError):
    """Training cannot go on, for example because the loss is not finite."""


class Interrupted(TransformnetError):
    """Somebody stopped the work (Ctrl-C, or Interrupt in JupyterLab); what is finished is kept."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: nothing went wrong, so the message will do."""
        return [str(self)]


class NotebookError(TransformnetError):
    """A notebook failed or did not run to its end."""
