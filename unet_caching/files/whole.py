"""Files that appear whole or not at all."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from unet_caching.errors import as_user_error


def check_replaceable(path: Path) -> None:
    """Raises ValueError for a path that is there and no regular file, like a device: it would be replaced."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: nothing is written there; name another")


def write_and_move(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, and move it there; on any failure nothing is left.

    Raises UserError where `check_replaceable` refuses the path.
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
