"""Stopping in good order: what batch systems ask for before a time limit or a preemption.

SIGUSR1 or SIGTERM asks a command to finish and save the batch it is at; it exits with 75 (EX_TEMPFAIL: try again), and
the same command goes on. The same signal again stops it at once, as Ctrl-C does at any time (in training it is asked).
"""

import os
import signal
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_ECHO = 2.0         # seconds within which a signal that arrives twice is one: torchrun passes on what its processes get


class Stopped(Exception):
    """A command was asked to stop, and did. The message says what is there; commands print it and exit with 75."""


class StopRequest:
    """A context in which these signals set `asked`; a second one of a kind raises KeyboardInterrupt."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals, self.asked = signals or SIGNALS, False
        self._at: dict[int, float] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A command that was asked ends now; an echo must not change what it exits with.
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _receive(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.asked:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this batch; the same signal again stops at once\n")
        self.asked = True
        if now - self._at.setdefault(number, now) > _ECHO:
            raise KeyboardInterrupt
