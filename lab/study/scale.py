"""What all tables of the papers cost on 1, 8 and 64 GPUs, in files, and in bytes: the tables of docs/scale.md.

    python -m scripts.scale             print them
    python -m scripts.scale --write     put them into docs/scale.md
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from eval.cost.runs import macs_per_image, pruned
from eval.metrics.inception import DIMS
from eval.tables.paper import tables
from eval.tables.render import Found, speed_of
from eval.tables.rows import of_table, printed_values
from eval.tables.text import markdown
from lab.study.arms import Arm, of_row
from run import results
from run.cli import command
from run.files import ROOT, write_atomically
from run.spec import Run
from unet_caching.errors import UserError
from unet_caching.files.block_schedule import PlannedBlocks
from unet_caching.samplers.samplers import num_calls

PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- python -m scripts.scale --write -->", "<!-- end of scripts.scale -->"
GPUS = {"DeepCache": "RTX 2080", "Block Caching": "A100"}       # that the papers' images per second are of
FLEETS = (1, 8, 64)
HOW = ("printed", "same work", "by calls")


class Rate(NamedTuple):
    """Images per second of a run on a paper's GPU. how: one of HOW."""
    images_per_second: float
    gpu: str
    how: str


class Planned(NamedTuple):
    """A sample folder that some table asks for; table: the first that does."""
    table: str
    arm: Arm
    rate: Rate | None


def work(run: Run) -> tuple:
    """What decides the time of an image: equal for runs whose schedules differ only in where the full steps lie."""
    blocks = run.caching.of(PlannedBlocks)
    return (run.config.name, run.sampler_name, pruned(run), run.full_calls, run.calls,
            run.deepcache and run.deepcache.branch, blocks and blocks.schedule.sha256)


def rate_of(run: Run, printed: Mapping[str, list], runs: Mapping[str, Run]) -> Rate | None:
    """The papers' images per second for a run, printed or derived; None where they tell nothing of it.

    printed: of the model (eval.tables.rows.printed_values). runs: those of the model by the same names.
    """
    def found(name: str, how: str, factor: float = 1) -> Rate | None:
        return next((Rate(factor * float(numbers["throughput"]), GPUS[table.paper], how)
                     for table, _, numbers in printed.get(name, []) if "throughput" in numbers), None)

    def uncached(other: Run) -> bool:
        return (not other.caching and not pruned(other) and other.sampler_name == run.sampler_name
                and other.steps == run.config.sampler.steps)

    same = (found(name, "same work") for name, other in runs.items() if work(other) == work(run))
    whole = num_calls(run.sampler_name, run.config.sampler.steps)
    scaled = (found(name, "by calls", whole / run.calls) for name, other in runs.items()
              if uncached(other) and not run.caching and not pruned(run))
    return next(filter(None, (found(run.name, "printed"), *same, *scaled)), None)


def all_runs() -> list[Planned]:
    """The runs of all tables, none twice."""
    found: dict[Path, tuple[str, Arm]] = {}
    for table in tables().values():
        for row in [] if table.schedules else of_table(table).rows:
            arm = of_row(row, table)
            found.setdefault(arm.folder, (table.name, arm))
    models: dict[str, dict[str, Run]] = {}
    for _, arm in found.values():
        models.setdefault(arm.run.config.name, {})[arm.run.name] = arm.run
    return [Planned(name, arm, rate_of(arm.run, printed_values(arm.run.config.name), models[arm.run.config.name]))
            for name, arm in found.values()]


def petamacs(runs: Sequence[Planned]) -> float:
    return sum(run.arm.images * macs_per_image(run.arm.run).hook for run in runs) / 1e15


def hours(runs: Sequence[Planned]) -> float:
    """On one of the papers' GPUs, of those runs that have a rate."""
    return sum(run.arm.images / run.rate.images_per_second for run in runs if run.rate) / 3600


def shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def time_table(runs: Sequence[Planned]) -> list[str]:
    """A line per table; a run that several tables ask for is counted in the first."""
    lines = [("table", "runs", "images", "PMACs", "the paper's GPU", *(f"hours on {n}" for n in FLEETS),
              "rates: " + ", ".join(HOW), "no rate")]
    groups = [(name, [run for run in runs if run.table == name]) for name in dict.fromkeys(run.table for run in runs)]
    groups += [(f"all, {gpu}", [run for run in runs if run.rate and run.rate.gpu == gpu]) for gpu in GPUS.values()]
    for name, some in groups:
        rated = [run.rate for run in some if run.rate]
        counts = ", ".join(str(sum(rate.how == how for rate in rated)) for how in HOW)
        lines.append((name, str(len(some)), f"{sum(run.arm.images for run in some):,}", shown(petamacs(some)),
                      ", ".join(sorted({rate.gpu for rate in rated})) or "-",
                      *(shown(hours(some) / n) if rated else "-" for n in FLEETS), counts if rated else "-",
                      str(len(some) - len(rated)) if len(some) > len(rated) else ""))
    return markdown(lines)


def measured_table(runs: Sequence[Planned], measured: Found) -> list[str]:
    """What our own measured step times say, per model."""
    lines = [("model", "runs timed", "device", "years on one of it")]
    for model in dict.fromkeys(run.arm.run.config.name for run in runs):
        some = [(run, speed_of(measured, run.arm.run, 1)) for run in runs if run.arm.run.config.name == model]
        timed = [(run, speed) for run, speed in some if speed]
        where = timed[0][1].result.provenance if timed else {}
        device = where and (f"{where['device_name']}, {where['threads']} thread" if where["device"] == "cpu"
                            else where["device_name"])
        years = sum(run.arm.images / speed.images_per_second for run, speed in timed) / (365.25 * 24 * 3600)
        lines.append((model, f"{len(timed)} of {len(some)}", device or "-", shown(years) if timed else "-"))
    return markdown(lines)


def disk_table(runs: Sequence[Planned]) -> list[str]:
    """Files and bytes of the sample folders of each model."""
    lines: list[tuple[str, ...]] = [("model", "runs", "images", "pixels of an image", "PNG files, all runs",
                                     "GB at most", "npz, GB", "features, GB")]
    total = [0.0] * 5
    for model in dict.fromkeys(run.arm.run.config.name for run in runs):
        some = [run.arm for run in runs if run.arm.run.config.name == model]
        images, pixels = sum(arm.images for arm in some), some[0].pixels
        npz = sum(arm.images for arm in some if arm.npz) * pixels
        kept = {"adm": sum(DIMS.values()), "fid": DIMS["pool"], "clip_score": 0}
        features = sum(arm.images * 4 * kept[arm.kind] for arm in some)
        numbers = (len(some), images, images * pixels, npz, features)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        each = ", ".join(f"{n:,}" for n in sorted({arm.images for arm in some}))
        lines.append((model, str(len(some)), each, f"{pixels:,} bytes", f"{images:,}",
                      *(shown(n / 1e9) if n else "-" for n in numbers[2:])))
    lines.append(("all", f"{total[0]:.0f}", "", "", f"{total[1]:,.0f}", *(shown(n / 1e9) for n in total[2:])))
    return markdown(lines)


def inception_macs() -> int:
    """Of one image, counted on the meta device in the convention `macs_fc` of eval.macs."""
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import Inception3
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()(torch.zeros(1, 3, 299, 299))
    return counter.get_total_flops() // 2


def evaluator_table(runs: Sequence[Planned]) -> list[str]:
    """Inception's work beside that of sampling, for the cheapest run of each model that it judges."""
    macs = inception_macs()
    lines = [("model", "its cheapest run", "G MACs of an image: sampling", "Inception", "Inception / sampling")]
    judged = [run.arm.run for run in runs if run.arm.kind in ("adm", "fid")
              and run.arm.run.caching.of(PlannedBlocks) is None]
    for model in dict.fromkeys(run.config.name for run in judged):
        cheapest = min((run for run in judged if run.config.name == model), key=lambda run: macs_per_image(run).fc)
        sampling = macs_per_image(cheapest).fc
        lines.append((model, cheapest.name, shown(sampling / 1e9), shown(macs / 1e9), f"{macs / sampling:.2%}"))
    return markdown(lines)


def page_tables(measured: Found) -> str:
    """The part of docs/scale.md that this program writes."""
    runs = all_runs()
    parts = [("GPU hours", time_table(runs)), ("Time, by our own measured step times", measured_table(runs, measured)),
             ("Files and bytes", disk_table(runs)), ("The evaluator's work", evaluator_table(runs))]
    return "\n".join(line for title, lines in parts for line in (f"**{title}**", "", *lines, ""))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where measured step times are")
    args = parser.parse_args()
    if not args.results.is_dir():
        raise UserError(f"no folder {args.results}")
    text = page_tables(list(results.read_all(args.results)))
    if not args.write:
        print(text)
        return
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE} has lost its marks: {BEGIN} and {END}")
    write_atomically(PAGE, lambda path: path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}"))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
