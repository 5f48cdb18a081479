"""Where the files lie that come with the library and are no code: the notebooks and the reference runs."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource(folder: str) -> Path:
    """A folder of the project, named as in a clone; a wheel holds it inside the package, in `shipped/`."""
    shipped = PACKAGE / "shipped"
    return (shipped if shipped.exists() else PACKAGE.parent) / folder


NOTEBOOKS = resource("notebooks")
REFERENCE = resource("report/reference")  # runs
