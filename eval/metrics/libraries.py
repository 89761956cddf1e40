"""Libraries that only one metric needs. The others work without them."""

from collections.abc import Iterator
from contextlib import contextmanager

from unet_caching.errors import UserError, one_line


@contextmanager
def needed(package: str) -> Iterator[None]:
    """Raise UserError if an import inside the block fails. package: its name for pip."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{package} is not installed ({error.name} is missing): pip install {package}") from None
    except Exception as error:      # a library that breaks while it is imported may raise anything
        raise UserError(f"{package} does not load here: {type(error).__name__}: {one_line(error)[:200]}") from None
