"""A text that a flag names: a file, or - for stdin."""

from __future__ import annotations

import click

from ..errors import KogcError


def read_text(file: str) -> str:
    """The whole file; KogcError names it where it cannot be read, or is not UTF-8."""
    if not file:
        raise KogcError("the text's file is an empty name")
    try:
        with click.open_file(file, "rb") as stream:
            data: bytes = stream.read()
        return data.decode("utf-8")
    except OSError as error:
        raise KogcError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KogcError(f"{file}: not UTF-8 text") from None
