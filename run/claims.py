"""Which process samples which image: locks that the system drops when their process ends."""

import errno
import fcntl
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_TAKEN = (errno.EACCES, errno.EAGAIN)       # by another process


class Claims:
    """A context in which this process claims seeds; other processes with the same file see them as taken.

    A claim is a lock on one byte of an empty file, at the seed's number. On a file system without locks every seed is
    free: then two processes may make the same image, and nothing worse.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "Claims":
        self._file = open(self.path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()          # drops every claim

    def take(self, seeds: Iterable[int]) -> list[int]:
        """Claim the seeds that no other process has claimed; returns them."""
        return [seed for seed in seeds if self._lock(seed % 2 ** 62)]

    def holder(self, seed: int) -> int | None:
        """The number of the other process that has claimed a seed; None if there is none, or it is on another machine.
        """
        if sys.platform != "linux":
            return None
        layout = "hhqqi0q"              # struct flock: type, whence, start, length, process
        wanted = struct.pack(layout, fcntl.F_WRLCK, 0, seed % 2 ** 62, 1, 0)
        with suppress(OSError):
            kind, *_, process = struct.unpack(layout, fcntl.fcntl(self._file, fcntl.F_GETLK, wanted))
            return process if kind != fcntl.F_UNLCK and process > 0 else None
        return None

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            return error.errno not in _TAKEN
        return True


@contextmanager
def only_one(file: Path, byte: int = 0, waiting: str = "") -> Iterator[None]:
    """A context that one process at a time may be in, by a lock on a byte of an existing file. The others print
    `waiting` and wait.

    Nothing is written. Without locks in the file system, or with a read-only file, nobody waits.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            lock = stack.enter_context(open(file, "ab"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                if waiting:
                    print(waiting, flush=True)
                fcntl.lockf(lock, fcntl.LOCK_EX, 1, byte)
        yield
