"""Skipped network calls: the whole network is computed only on some calls; on the others its output is reused or
forecast.

SADA and Spectrum skip calls like this, and TeaCache (arXiv 2411.19108) does so by a threshold instead of an interval.
Skipped calls cost almost nothing, so many of them fit into a budget. The schedule here is uniform. The cached value is
the input of the U-Net's output head, so reusing it reuses the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unet_caching.nest import WHOLE
from unet_caching.options import Method, MethodOptions, RunShape, ScheduledMethod, option
from unet_caching.schedules import uniform


class OutputMethod(ScheduledMethod):
    """Skipped network calls in a run."""
    system = "whole output"

    def __init__(self, interval: int, calls: int):
        self.full_steps = uniform(calls, interval)
        self.settings = {"full_steps": self.full_steps, "output": {"interval": interval}}
        self.name = [f"output_n{interval}"]
        self.summary = "the whole output reused"
        self.computed = {WHOLE: self.full_steps}


@dataclass(frozen=True)
class OutputOptions(MethodOptions):
    """How often the network is computed."""
    title = "caching (the whole output of the network; not in the papers)"
    rare = True
    output_interval: int = option(1, "one computed call in every N (default: 1, all)", metavar="N", least=1)

    def bind(self, shape: RunShape, others: Sequence[Method]) -> OutputMethod | None:
        if self.output_interval == 1:
            return None
        if others:
            raise ValueError("--output-interval skips whole calls: leave out the other caching options")
        return OutputMethod(self.output_interval, shape.calls)
