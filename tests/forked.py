"""A command as a process of its own without the seconds of its imports: a fork of this one, which has made them."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from conftest import main_of
from tqdm import tqdm

from run.folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def signal_at(seed: int, *numbers: int) -> Callable[[], None]:
    """For Forked's `before`: the process sends itself these signals when it has the image of a seed to write."""
    def before() -> None:
        save = RunFolder.save

        def saving(self: RunFolder, of: int, image: object) -> None:
            for number in numbers if of == seed else ():
                os.kill(os.getpid(), number)
            save(self, of, image)
        RunFolder.save = saving     # in the fork alone
    return before


class Forked:
    """`python -m MODULE ARGS`, or a function, running in a fork. Used with one thread, which a fork can carry on.

    env: variables on top of this process's. before: called first, in the fork.
    """

    def __init__(self, command: str | Callable[[], None], *args, log: Path, env: dict[str, str] | None = None,
                 before: Callable[[], None] = lambda: None):
        self.log = log
        main = main_of(command) if isinstance(command, str) else command
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid, self.returncode = os.fork(), None
        if not self.pid:
            self._run(main, [str(command), *map(str, args)], env or {}, before)

    def _run(self, main: Callable[[], None], argv: list[str], env: dict[str, str], before: Callable[[], None]) -> None:
        code = 1
        try:
            # Where tests run in the background they ignore interrupts, and so would the command.
            for number in SIGNALS:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # tqdm's own lock is shared with every other fork: one killed as it draws would stop them all for ever.
            tqdm.set_lock(threading.RLock())
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            faulthandler.enable(2)
            os.environ.update(env)
            sys.argv = argv
            before()
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode is None

    def send(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def wait(self, timeout: float = 180) -> int:
        """The exit code, negative for a signal. A process that takes longer is ended; the error says where it stood."""
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                self.send(signal.SIGABRT)
                self.wait()
                raise TimeoutError(f"no end after {timeout} s: {self.output}")
            time.sleep(0.003)
        return self.returncode

    @property
    def output(self) -> str:
        """What it wrote, errors included."""
        return self.log.read_text() if self.log.exists() else ""
