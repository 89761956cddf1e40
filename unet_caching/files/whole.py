"""Files that appear whole or not at all."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from unet_caching.errors import as_user_error


def check_replaceable(path: Path) -> None:
    """Raise a ValueError for an existing path that is not a regular file, like a device, which would be replaced."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: nothing is written there; name another")


def write_and_move(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then move it to `path`. A failure leaves nothing behind.

    Raises UserError for a path that `check_replaceable` refuses.
    """
    with as_user_error():
        check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
