"""Runs the missing arms of a study, in one process or in several, which may stop and go on at any time."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from eval.cost.runs import macs_per_image
from eval.tables.arms import Arm
from lab.study.bench import Bench
from run.claims import Claims
from run.files import ROOT
from unet_caching.errors import UserError

Pair = tuple[Bench, Arm]
_SAMPLING = 0.8         # sampling's share of an arm's time, for small models, to estimate the time left
_WAIT = 0.5             # seconds between looks at the work of other processes
TELL, GIVE_UP = 60, 3600    # seconds without news until a message says who is waited for, and until giving up


def carry_out(pairs: Sequence[Pair], claims: Path, wait: bool = True) -> None:
    """Sample and measure what is missing, arm by arm, except for arms that another process has claimed.

    Processes that run the same study at the same time take other arms. claims: a file of locks. wait: until everything
    is done; else arms that need images from other processes are left to those. Raises UserError if other processes make
    no progress with the arms that they have claimed.
    """
    claims.parent.mkdir(parents=True, exist_ok=True)
    waiting = [*enumerate(pairs, 1)]
    with Claims(claims) as own:
        patience = Patience(own)
        while waiting := [(number, pair) for number, pair in waiting if not pair[0].complete(pair[1])]:
            progress = False
            for number, (bench, arm) in waiting:
                if bench.complete(arm) or not own.take([claim_of(arm)]):
                    continue
                print(f"[{number}/{len(pairs)}] {arm.run.config.name}: {arm.label}", flush=True)
                progress = bench.run(arm) or progress
            if not progress and not wait:
                return
            if not progress:
                patience.wait([arm for _, (_, arm) in waiting])


def claim_of(arm: Arm) -> int:
    """The number of an arm in a file of locks, the same in all processes."""
    return int.from_bytes(hashlib.sha256(f"{arm.name} {arm.records.name}".encode()).digest()[:7])


class Patience:
    """Waits for the arms that other processes have claimed, prints their names, and gives up if nothing happens."""

    def __init__(self, claims: Claims):
        self.claims = claims
        self.there: object = None           # the images at the last look
        self.since = self.told = time.monotonic()

    def wait(self, arms: Sequence[Arm]) -> None:
        """Wait a little. arms: the incomplete ones. Raises UserError if nothing new came for too long."""
        now, there = time.monotonic(), [(arm.name, arm.present) for arm in arms]
        if there != self.there:
            self.there, self.since, self.told = there, now, now
        whom = "; ".join(f"{arm.run.config.name}: {arm.label} ({self._holder(arm)})" for arm in arms)
        if now - self.since > GIVE_UP:
            raise UserError(f"other processes made nothing new in {GIVE_UP / 60:.0f} minutes: {whom}; if one of them "
                            "hangs, end it, and run the same command again")
        if now - self.told > TELL:
            self.told = now
            print(f"waiting for {whom}, nothing new in {(now - self.since) / 60:.0f} minutes", flush=True)
        time.sleep(_WAIT)

    def _holder(self, arm: Arm) -> str:
        holder = self.claims.holder(claim_of(arm))
        return f"process {holder}" if holder else "a process elsewhere, or images of others"


def supervise(pairs: Sequence[Pair], words: Sequence[str], jobs: int, done: Callable[[], object]) -> None:
    """Run a study in `jobs` processes with one thread each; this process estimates the time left, by MACs.

    For a small network that is quicker than one process with all threads. words: the command that runs the study.
    Raises UserError if one of the processes fails.
    """
    costs = {id(arm): macs_per_image(arm.run).hook * arm.images for _, arm in pairs}
    seen: set[int] = set()

    def work() -> int:
        """The G MACs that are done. Images count for most of an arm's MACs, its measures for the rest."""
        return round(sum(costs[id(arm)] * (1 if id(arm) in seen else _SAMPLING * arm.present / arm.images)
                         for _, arm in pairs) / 1e9)

    with workers(words, jobs) as processes, tqdm(
            total=round(sum(costs.values()) / 1e9), initial=work(), smoothing=0, mininterval=0.5 if sys.stderr.isatty()
            else 15, bar_format="{desc}{percentage:3.0f}% |{bar:20}| {elapsed} gone, about {remaining} left") as bar:
        while len(seen) < len(pairs):
            ended = all(process.poll() is not None for process in processes)
            now = {id(arm) for bench, arm in pairs if id(arm) in seen or bench.complete(arm)}
            if now != seen:
                seen |= now
                done()
            bar.update(max(0, work() - bar.n))
            if failed := [process for process in processes if process.poll()]:
                raise UserError(f"a process failed with exit code {failed[0].returncode}; to run it by itself: "
                                f"python {' '.join(words)}")
            if ended and len(seen) < len(pairs):
                raise UserError("some arms are not measured: run the same command again")
            time.sleep(_WAIT)


@contextmanager
def workers(words: Sequence[str], count: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that run a command, and end with this one."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    found = [subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdin=subprocess.PIPE,
                              stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield found
    finally:
        for process in found:
            assert process.stdin is not None        # asked for
            process.stdin.close()                   # which ends it
            process.wait()


def end_with_parent() -> None:
    """End this process once the one that started it is no more: when stdin is closed."""
    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)      # not sys.stdin.read: its lock would be missed when the interpreter ends
        os._exit(0)             # images and records appear whole or not at all, and the same command goes on
    threading.Thread(target=wait, daemon=True).start()
