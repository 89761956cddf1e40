"""Errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One line that says what is wrong and what would be right. Commands print it and exit with 2."""


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """A context that turns the library's ValueErrors, which say what is wrong, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def one_line(error: BaseException | str) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
