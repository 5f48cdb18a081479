"""The one error of this package."""


class ExportError(Exception):
    """A notebook cannot be turned into HTML or PDF. The message is one line, whatever it quotes from the notebook."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        # A terminal obeys some signs that cannot be seen
        super().__init__("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line))
