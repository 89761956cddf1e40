"""Where the repository is, whether a file has changed, and JSON for people."""

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
    """What changes whenever a file does, without reading it.

    Size and time of modification are kept by copying, and are equal for arrays of one shape that were written at once;
    but no program sets a file's time of change (ctime, the third), which the system moves with every write.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, and move it there; on any failure nothing is left.

    What a writer of the same file that was killed has left is removed.
    """
    remove_leftovers(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    write_and_move(path, write)


def remove_leftovers(temporaries: Iterable[Path]) -> None:
    """Delete those temporary files of `write_atomically` whose process, on this machine, is no more."""
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
