"""What all commands share: one clear line instead of a traceback, and exit codes."""

import errno
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from run import arguments
from run.files import ROOT
from run.stopping import Stopped
from unet_caching.errors import UserError, one_line

INTERRUPTED = 130       # as a shell reports Ctrl-C


def command(main: Callable[..., None]) -> Callable[[], None]:
    """Run `main` with the options that its parameters declare (`run.arguments.call`).

    A UserError exits with 2, an error of the disk or a file with 1, Ctrl-C with 130, a stop on request with 75
    (run/stopping.py), each with one line. Any other error is a defect of this program: it exits with 1 and one line
    that says where, or with a traceback if the environment variable TRACEBACK is set.
    """
    @functools.wraps(main)
    def run() -> None:
        try:
            arguments.call(main) if inspect.signature(main).parameters else main()
        except UserError as error:
            _exit(2, f"error: {one_line(error)}")
        except OSError as error:
            full = " (the disk is full; free some space and run the same command again)"
            _exit(1, f"error: {one_line(error)}{full if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}")
        except Stopped as stop:
            _exit(os.EX_TEMPFAIL, f"stopped: {stop}; the same command goes on")
        except KeyboardInterrupt:
            _exit(INTERRUPTED, "interrupted; the same command goes on from here")
        except Exception as error:
            if os.environ.get("TRACEBACK"):
                raise
            _exit(1, _defect(error) if not _of_memory(error) else
                  f"error: out of memory ({one_line(error)[:160]}): take fewer images at a time (--batch-size)")
    return run


def _of_memory(error: Exception) -> bool:
    """Whether the machine or its accelerator is out of memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in ("allocate memory", "out of memory"))


def _defect(error: Exception) -> str:
    """The line about an unexpected error: what, where, and what to do."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    place = f" at {Path(frames[-1].filename).relative_to(ROOT)}, line {frames[-1].lineno}" if frames else ""
    what = f"{type(error).__name__}: {one_line(error)[:300]}".rstrip(": ")
    return (f"error: {what}{place}: this is a defect of the program; please report it, with the output of the same "
            "command under TRACEBACK=1")


def warn(notes: Iterable[str]) -> None:
    """Print warnings about a result, a line each."""
    print("".join(f"warning: {note}\n" for note in notes), end="", file=sys.stderr, flush=True)


def _exit(code: int, line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    # Other threads may wait for the disk or the accelerator, and sys.exit would wait for them.
    sys.exit(code) if code != INTERRUPTED else os._exit(code)
