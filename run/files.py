"""Where the repository is, whether a file has changed, and files that are written atomically."""

import glob
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from unet_caching.files.schema import readable
from unet_caching.files.whole import write_and_move

ROOT = Path(__file__).resolve().parent.parent       # of the repository


def stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change whenever a file changes: size, mtime, ctime, inode. The file is not read.

    Size and mtime are not enough: a copy keeps both, and two arrays of one shape may be written within one tick. No
    program can set ctime, which the system moves with every write.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then move it to `path`. A failure leaves nothing behind.

    Temporary files that a killed writer of `path` left behind are deleted.
    """
    remove_leftovers(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    write_and_move(path, write)


def remove_leftovers(temporaries: Iterable[Path]) -> None:
    """Delete the temporary files of `write_atomically` whose process on this machine has ended."""
    for path in temporaries:
        owner = re.fullmatch(rf".*\.{re.escape(socket.gethostname())}\.(\d+)\.tmp", path.name)
        if owner and not _alive(int(owner[1])):
            path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write readable JSON, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(readable(content) + "\n"))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
