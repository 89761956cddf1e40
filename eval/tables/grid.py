"""Interval x branch x forecast of a model in one table: exact MACs of every branch beside the times that were measured.

    python -m eval.throughput --config configs/sdxl.yaml --branch 0 1 2 --forecast 0 1 --dtype bf16 --batch-size 1 \\
        --threads 1 --repeats 1 --warmup 1 --out results/throughput/sdxl_bf16_cpu.json
    python -m eval.throughput grid results/throughput/sdxl_bf16_cpu.json        in Markdown; a dash: not measured
    python -m eval.throughput grid results/throughput/compare/sd_v15_b1_bf16_eager_cpu.json     by one branch's times

MACs are of the whole network without weights, whatever was measured. A forecast has those of reuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eval.cost.macs import Macs, branch_macs, giga
from eval.cost.timing import Times
from eval.tables.text import markdown
from run import results
from run.families import at_resolution, build, example_inputs, load_config
from run.results import Result
from unet_caching.errors import UserError
from unet_caching.options import required
from unet_caching.schedules import uniform


def rows(measured: Result, full: Macs, cached: Mapping[int, Macs]) -> list[list[str]]:
    """The cells of the table, head first: a line for each branch.

    measured: what `eval.throughput` wrote of a model. full, cached: the MACs of its full step, and of a cached one at
    each branch. Speed-ups are by macs_fc, by the time of reuse, and by that of each forecast.
    """
    ratios = _ratios(measured)
    orders = sorted({0, 1} | {order for _, order in ratios})
    runs = measured.times.get("runs", [{"interval": interval, "steps": 50} for interval in (2, 3, 5, 10)])
    intervals, steps = sorted({run["interval"] for run in runs} - {1}), runs[0]["steps"]
    kinds = ["reuse" if order == 0 else f"order {order}" for order in orders]
    found = [["branch", "MACs of a cached step, G", "cached / full by macs", "by macs_fc",
              *(f"by time, {kind}" for kind in kinds),
              *(f"N = {interval}: macs_fc, {', '.join(kinds)}" for interval in intervals)]]
    for branch, macs in cached.items():
        timed = [ratios.get((branch, order)) for order in orders]
        cells = [f"{giga(macs.hook):.2f}", f"{macs.hook / full.hook:.3f}", *(
            _cell(ratio, 3) for ratio in (macs.fc / full.fc, *timed))]
        for interval in intervals:
            k = len(uniform(steps, interval))
            cells.append(", ".join(_cell(None if ratio is None else steps / (k + (steps - k) * ratio), 2)
                                   for ratio in (macs.fc / full.fc, *timed)))
        found.append([str(branch), *cells])
    return found


def _ratios(measured: Result) -> dict[tuple[int, int], float]:
    """The time of a cached step as a fraction of a full one's, by branch and order of the forecast."""
    if "sides" in measured.times:           # of eval.throughput compare
        return {(measured.settings["branch"], 0): measured.times["sides"]["ours"]["cached_over_full"]}
    timed = Times.of(measured).kinds.items() if measured.times.get("runs", [{}])[0].get("interval") else ()
    return {(int(kind.reused[0]), kind.order): ratio for kind, (_, ratio) in timed if kind.reused}


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(measured: Result, full: Macs, cached: Mapping[int, Macs]) -> str:
    """The table of `rows` in Markdown."""
    return "\n".join(markdown(rows(measured, full, cached)))


@dataclass(frozen=True)
class File:
    times: Path = required("what eval.throughput wrote with --out, or compare", word=True, metavar="FILE")


def run(options: File) -> None:
    measured = results.read(options.times)
    if not _ratios(measured):
        raise UserError("grid is of the times of full and cached steps: eval.throughput --config C --out FILE")
    config = load_config(str(measured.model))
    if "resolution" in measured.settings:
        config = at_resolution(config, measured.settings["resolution"])
    unet = build(config)
    print(table(measured, *branch_macs(unet, example_inputs(config), range(unet.num_branches))))
