"""Stop on request, as batch systems ask for before a time limit or a preemption.

After SIGUSR1 or SIGTERM a command finishes and saves its batch, and exits with 75 (EX_TEMPFAIL: try again). The same
command then goes on. A second signal of the same kind stops it at once, as Ctrl-C always does (but in training Ctrl-C
is a request, too).
"""

import os
import signal
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_ECHO = 2.0         # seconds within which a repeated signal counts as one: torchrun passes signals on to its processes


class Stopped(Exception):
    """A command stopped on request. The message says what is finished; commands print it and exit with 75."""


class StopRequest:
    """A context in which these signals set `asked`. A second signal of the same kind raises KeyboardInterrupt."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals, self.asked = signals or SIGNALS, False
        self._at: dict[int, float] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A command that was asked to stop ends now; an echo must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _receive(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.asked:
            # Not print: the signal may have interrupted one.
            os.write(2, b"\nstopping after this batch; the same signal again stops at once\n")
        self.asked = True
        if now - self._at.setdefault(number, now) > _ECHO:
            raise KeyboardInterrupt
