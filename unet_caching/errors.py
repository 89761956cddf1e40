"""Errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What was wrong and what would be right, in one line. Commands print it and exit with 2."""


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Raise the ValueErrors of rooms that know no user, which say what was wrong, as UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def one_line(error: BaseException | str) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
