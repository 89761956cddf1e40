"""The report on a machine: tables, a picture, and for each network a sentence with the best settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.cost.sides import INTERVALS, STEPS, name_of
from eval.tables.svg import Line, Mark, Plot, sheet
from eval.tables.text import markdown
from run.files import write_atomically
from run.results import Result
from unet_caching.schedules import uniform

HEAD = ["network", "batch", "dtype", "mode", "full step, s", "cached / full at branch 0, 1, 2", "the same, forecast",
        "by macs_fc", "branch", "N = 2, 3, 5: speed-up", "N by macs_fc", "as measured", "diffusers / ours, full",
        "pipeline / ours, cached", "helper / ours, cached", "helper / ours, N = 5"]

RUNS = ("uncached", *(f"N = {interval}" for interval in INTERVALS))


def ratio(steps: dict[str, Any], name: str) -> float | None:
    """A step's time as a fraction of a full step's, the median over the rounds; None if it was not timed."""
    return float(np.median(np.divide(steps[name]["rounds"], steps["full"]["rounds"]))) if name in steps else None


def full_steps(cached: float, interval: int) -> float:
    """The cost of a run, in full steps. cached: the cost of a cached step, as a fraction of a full one."""
    full = len(uniform(STEPS, interval))
    return full + (STEPS - full) * cached


class Times(NamedTuple):
    """The times of a network in a mode."""
    record: Result

    @property
    def steps(self) -> dict[str, Any]:
        """The steps of our network; for a video network, a pipeline's."""
        return self.record.times["sides"].get("ours") or self.record.times["sides"]["pipeline"]

    @property
    def usual(self) -> str:
        """The cached step of the papers' branch."""
        return name_of(self.record.settings["branch"])

    @property
    def name(self) -> str:
        settings = self.record.settings
        frames = [f"{settings['frames']} frames"] if "frames" in settings else []
        pixels = [f"{settings['resolution']} px"] if "resolution" in settings else []
        return ", ".join([str(self.record.model), *frames, *pixels])

    def macs(self, name: str) -> float | None:
        return self.record.times["expected"].get(name, {}).get("macs_fc")

    def over_ours(self, side: str, name: str) -> float | None:
        return self.record.times["sides"].get(side, {}).get(name, {}).get("over_ours")

    def speedup(self, interval: int) -> float:
        return STEPS / full_steps(ratio(self.steps, self.usual) or 1.0, interval)

    def seconds(self, side: str, interval: int) -> float | None:
        """The time of a run, by the times of its steps."""
        steps = self.record.times["sides"].get(side, {})
        cached = ratio(steps, self.usual) if "full" in steps else None
        return None if cached is None else steps["full"]["median"] * full_steps(cached, interval)

    @property
    def helper(self) -> float | None:
        """The package's run at N = 5, as a multiple of ours."""
        theirs, ours = self.seconds("helper", 5), self.steps["full"]["median"] * STEPS / self.speedup(5)
        return None if theirs is None else theirs / ours

    @property
    def rate(self) -> float:
        """Images per second at N = 3."""
        return self.record.settings["batch_size"] * self.speedup(3) / (STEPS * self.steps["full"]["median"])

    def row(self) -> list[str]:
        settings, runs = self.record.settings, self.record.times.get("runs", {})
        whole, *measured = (runs.get(name, {}).get("measured") for name in RUNS)
        branches = [name_of(branch) for branch in (0, 1, 2)]
        macs = self.macs(self.usual)
        return [self.name, *(str(settings[key]) for key in ("batch_size", "dtype", "mode")),
                f"{self.steps['full']['median']:.3g}",
                cells((ratio(self.steps, name) for name in branches), 3),
                cells((ratio(self.steps, f"{name}, order 1") for name in branches), 3),
                cells(map(self.macs, branches), 3), str(settings["branch"]),
                cells(map(self.speedup, INTERVALS), 2),
                "-" if macs is None else cells((STEPS / full_steps(macs, interval) for interval in INTERVALS), 2),
                cells((whole and whole / one for one in measured), 2),
                cells([self.over_ours("diffusers", "full")], 2), cells([self.over_ours("pipeline", self.usual)], 2),
                cells([self.over_ours("helper", self.usual)], 2), cells([self.helper], 2)]

    def sentence(self) -> str:
        """The settings of these times, for a network whose best they are."""
        settings, macs, helper = self.record.settings, self.macs(self.usual), self.helper
        by_macs = "" if macs is None else f" ({STEPS / full_steps(macs, 3):.2f} by macs_fc)"
        package = "" if helper is None else f"; the package's run with N = 5 takes {helper:.2f} times as long"
        return (f"**{self.name}**: {settings['dtype']}, {settings['mode']}, {settings['batch_size']} at a time. N = 3 "
                f"at branch {settings['branch']} is {self.speedup(3):.2f} times as fast as no caching{by_macs}, N = 5 "
                f"{self.speedup(5):.2f} times{package}.")

    def plot(self) -> Plot:
        """The speed-up over N."""
        ns = (1, *INTERVALS, 10)

        def line(name: str, cached: float | None) -> list[Line]:
            return [] if cached is None else [Line(name, [Mark(n, STEPS / full_steps(cached, n)) for n in ns])]

        helper = self.record.times["sides"].get("helper", {})
        settings = self.record.settings
        message = f"{self.name}: {self.speedup(3):.2f} times as fast with N = 3, {self.speedup(5):.2f} times with N = 5"
        return Plot(message, f"N ({settings['dtype']}, {settings['mode']})", "speed-up of 50 steps", [
            *line("by macs_fc", self.macs(self.usual)), *line("reuse", ratio(self.steps, self.usual)),
            *line("forecast", ratio(self.steps, f"{self.usual}, order 1")),
            *line("the package", ratio(helper, self.usual) if "full" in helper else None)])


def cells(values: Any, digits: int) -> str:
    """Numbers, with a dash for a missing one; a single dash if all are missing."""
    found = ["-" if value is None else f"{value:.{digits}f}" for value in values]
    return ", ".join(found) if set(found) != {"-"} else "-"


def best(records: Sequence[Result]) -> list[Times]:
    """For each network, the settings with the most images per second."""
    found: dict[str, Times] = {}
    for times in map(Times, records):
        if times.usual in times.steps and (times.name not in found or found[times.name].rate < times.rate):
            found[times.name] = times
    return list(found.values())


def memory(records: Sequence[Result]) -> list[list[str]]:
    """The rows of peak memory besides the weights, if it was measured; head first."""
    rows = [["network", "batch", "dtype", "ours, without cache", "ours, cached", "the feature", "diffusers", "helper"]]
    for times in map(Times, records):
        if of := times.record.times["memory"]:
            ours = of.get("ours") or of["pipeline"]
            values = (ours["dense"], ours["run"], of["feature"], of["diffusers"]["dense"],
                      of.get("helper", {}).get("run"))
            rows.append([times.name, str(times.record.settings["batch_size"]), times.record.settings["dtype"],
                         *(cells([value and value / 1e6], 1) for value in values)])
    return rows


def operators(records: Sequence[Result]) -> list[list[str]]:
    """The rows of the host's work in cached steps, head first."""
    sides = ("ours", "pipeline", "helper")
    rows = [["network", "cached step", *(f"{side}: operators, kernels, functions" for side in sides)]]
    for record in records:
        counted = record.times["operators"]
        rows += [[str(record.model), name, *(cells(counted.get(side, {}).get(name, {}).values() or [None], 0)
                                            for side in sides)] for name in counted["pipeline"]]
    return rows


def report(records: Sequence[Result]) -> str:
    """The report in Markdown."""
    of = {kind: [record for record in records if record.kind == kind] for kind in ("checks", "speed", "operators")}
    where = records[-1].provenance
    lines = [f"# {where['device_name']}, {where['device']}; CPU threads: {where['threads']}", ""]
    if of["speed"]:
        lines += [*(f"- {times.sentence()}" for times in best(of["speed"])), "",
                  *markdown([HEAD, *(Times(record).row() for record in of["speed"])]), ""]
        if len(rows := memory(of["speed"])) > 1:
            lines += ["Peak memory beside the weights, MB of PyTorch's tensors:", "", *markdown(rows), ""]
    for record in of["checks"]:
        lines += [*markdown([["check", "", ""], *([one[key] for key in ("check", "state", "why")]
                                                  for one in record.times["checks"])]), ""]
    if of["operators"]:
        lines += ["What a cached step makes the host do:", "", *markdown(operators(of["operators"])), ""]
    return "\n".join(lines)


def write(records: Sequence[Result], folder: Path) -> str:
    """Write table.md and charts.svg of a machine. Returns the text of the table."""
    text = report(records)
    write_atomically(folder / "table.md", lambda path: path.write_text(text))
    if plots := [times.plot() for times in best([record for record in records if record.kind == "speed"])]:
        sheet(plots, folder / "charts.svg")
    return text
