"""Interval x branch x forecast of a model in one table: exact MACs of every branch beside the times that were measured.

    python -m eval.throughput --config configs/sdxl.yaml --branch 0 1 2 --forecast 0 1 --dtype bf16 --batch-size 1 \\
        --threads 1 --repeats 1 --warmup 1 --out results/throughput/sdxl_bf16_cpu.json
    python -m eval.throughput grid results/throughput/sdxl_bf16_cpu.json        in Markdown; a dash: not measured

MACs are of the whole network without weights, whatever was measured. A forecast has those of reuse.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from caching.schedules import uniform
from eval.cost.macs import Macs, average, branch_macs, giga
from eval.tables.text import markdown
from runs import results
from runs.errors import UserError
from runs.families import at_resolution, build, example_inputs, load_config
from runs.results import Result


def rows(measured: Result, full: Macs, cached: Mapping[int, Macs]) -> list[list[str]]:
    """The cells of the table, head first: a line for each branch.

    measured: what `eval.throughput` wrote of a model. full, cached: the MACs of its full step, and of a cached one at
    each branch. Speed-ups are by macs_fc, by the time of reuse, and by that of each forecast.
    """
    times = {(row["branch"], row["forecast"]): row["ratio"] for row in measured.times["branches"]}
    speedups = {(row["branch"], row["forecast"], row["interval"]): row["speedup"] for row in measured.times["runs"]}
    orders = sorted({order for _, order in times})
    intervals = sorted({interval for *_, interval in speedups})
    steps = measured.times["runs"][0]["steps"]
    kinds = ["reuse" if order == 0 else f"order {order}" for order in orders]
    found = [["branch", "MACs of a cached step, G", "cached / full by macs", "by macs_fc",
              *(f"by time, {kind}" for kind in kinds),
              *(f"N = {interval}: macs_fc, {', '.join(kinds)}" for interval in intervals)]]
    for branch, macs in cached.items():
        ratios = [f"{macs.hook / full.hook:.3f}", f"{macs.fc / full.fc:.3f}",
                  *(_cell(times.get((branch, order)), 3) for order in orders)]
        gains = [[full.fc / average(full, macs, uniform(steps, interval), steps).fc,
                  *(speedups.get((branch, order, interval)) for order in orders)] for interval in intervals]
        found.append([str(branch), f"{giga(macs.hook):.2f}", *ratios,
                      *(", ".join(_cell(gain, 2) for gain in of) for of in gains)])
    return found


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(measured: Result, full: Macs, cached: Mapping[int, Macs]) -> str:
    """The table of `rows` in Markdown."""
    return "\n".join(markdown(rows(measured, full, cached)))


def run(words: Sequence[str]) -> None:
    """`eval.throughput grid` with these options. Raises UserError."""
    parser = argparse.ArgumentParser(prog="eval.throughput grid", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=Path, metavar="FILE", help="what eval.throughput wrote with --out")
    measured = results.read(parser.parse_args(words).times)
    if not measured.times.get("branches"):
        raise UserError("grid is of the times of full and cached steps: eval.throughput --config C --out FILE")
    config = load_config(str(measured.model))
    if "resolution" in measured.settings:
        config = at_resolution(config, measured.settings["resolution"])
    unet = build(config)
    print(table(measured, *branch_macs(unet, example_inputs(config), range(unet.num_branches))))
