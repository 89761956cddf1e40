"""What Block Caching's paper leaves open, decided by measurement on the small DDPM that is shipped here.

    python -m scripts.scale_shift_study             about ten minutes on one core; what is there is kept

20 DDIM steps, blocks of all kinds, half of the MACs: ways to fit scale and shift (closed form or Adam, learning rate,
batch, weight of the identity, number of runs), each judged on the same 64 held-out seeds. And the direction of the
paper's index t, whether a change belongs to the later or to the earlier of its two steps: there, and with the schedules
of checkpoints/block_caching/ (DDPM 100 steps, LDM 50). The measure is the distance of what sampling ends on to the
uncached run. Writes results/block_caching/study/: table.md, and a JSON per variant.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.metrics.intervals import mean_estimate
from eval.tables.text import markdown
from lab.fit.block_changes import BlockChanges, ScheduleMaker
from lab.fit.scale_shift import relative_distance
from lab.fit.train_scale_shift import metric_name
from lab.study.block_caching_demo import FILES, make
from run import results
from run.cli import command
from run.files import ROOT, write_atomically
from run.machine import Machine
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import in_batches
from run.spec import RunSpec
from unet_caching.methods.block_cache import BlockCache

OUT = Path("results/block_caching/study")
RUN = [*RunSpec.of("configs/ddpm_emoji.yaml", steps=20).words(), "--device", "cpu", "--threads", "1"]
HELD_OUT = range(3000, 3064)
DIRECTIONS = "later", "earlier", "earlier minus later"
SEEDS = {16: "2000-2015", 64: "2000-2063", 256: "2000-2255"}
VARIANTS: dict[str, tuple[str, int, list[str]]] = {      # method, runs to learn from, options of `train`
    **{f"least squares, ridge {ridge:g}": ("least-squares", 64, ["--ridge", f"{ridge:g}"]) for ridge in (0, 0.01, 0.1)},
    **{f"least squares, {runs} runs": ("least-squares", runs, []) for runs in (16, 256)},
    **{f"Adam, learning rate {lr:g}": ("adam", 64, ["--lr", f"{lr:g}", "--batch-size", "8"])
       for lr in (3e-4, 1e-3, 3e-3, 1e-2)},
    **{f"Adam, batch {size}": ("adam", 64, ["--batch-size", str(size)]) for size in (2, 32)},
    "Adam, 256 runs": ("adam", 256, ["--batch-size", "8"]),
}


def schedule() -> Path:
    """Of 20 steps, half of the MACs."""
    changes, path = FILES / "ddpm_20_changes.json", FILES / "ddpm_20_half.json"
    if not (ROOT / changes).is_file():
        make(["measure", *RUN, "--seeds", "1000-1063", "--similar", "0"], changes)
    if not (ROOT / path).is_file():
        make(["schedule", "--changes", str(changes), "--kinds", "all", "--macs", "0.5"], path)
    return path


def directions(changes: BlockChanges, config: str, steps: int, fraction: float) -> Result:
    """Distances of plain reuse at equal MACs, with every change counted for the later, and for the earlier step."""
    started, run = time.time(), RunSpec.of(config, steps=steps).open()
    model = run.family.open(run, Machine(device="cpu", threads=1))
    model.load()
    shifted = replace(changes, residuals={name: one | {"changes": [*one["changes"][1:], 0.0]}
                                          for name, one in changes.residuals.items()})
    found: dict[str, list[float]] = {"later": [], "earlier": []}
    for seeds in tqdm(in_batches(HELD_OUT, 16), desc=f"{config} {fraction}", unit="batch"):
        exact = model.latents(seeds)
        for direction, measured in (("later", changes), ("earlier", shifted)):
            maker = ScheduleMaker(measured, "all")
            blocks = maker.blocks(maker.delta_for(fraction))
            found[direction] += relative_distance(model.latents(seeds, BlockCache(blocks)), exact).tolist()
    later, earlier = (np.array(found[key]) for key in ("later", "earlier"))
    metrics = {metric_name("latents", direction): Metric.of(mean_estimate(values))
               for direction, values in zip(DIRECTIONS, (later, earlier, earlier - later), strict=True)}
    return Result("index direction", model.settings["model"], model.settings, len(HELD_OUT), metrics,
                  hashes={"checkpoint": model.settings["checkpoint_sha256"]}, provenance=provenance("cpu"),
                  details={"config": config, "fraction_of_macs": fraction, "held_out_seeds": _words(HELD_OUT)}
                  ).stamped(started)


def trained(schedule: Path, name: str, method: str, runs: int, options: list[str]) -> Result:
    """The report of a variant, which is made where it is absent; the tensors are not kept."""
    path = OUT / f"{name}.safetensors"
    report = ROOT / path.with_suffix(".scale_shift.json")
    if not report.is_file():
        make(["train", *RUN, "--held-out-seeds", _words(HELD_OUT), "--seeds", SEEDS[runs], "--schedule", str(schedule),
              "--method", method, *options], path)
        (ROOT / path).unlink()
    return results.read(report)


def _words(seeds: range) -> str:
    return f"{seeds.start}-{seeds.stop - 1}"


def shown(result: Result, measure: str, arm: str) -> str:
    """A mean with its interval."""
    return "{:.4f} [{:.4f}, {:.4f}]".format(*result.metrics[metric_name(measure, arm)].bounds)


def fits() -> list[tuple[str, ...]]:
    """The table of ways to fit."""
    path = schedule()
    rows: list[tuple[str, ...]] = [("fit", "residuals: distance to computed", "final latents: distance to uncached",
                                    "difference to plain reuse")]
    for label, how in VARIANTS.items():
        one = trained(path, label.replace(", ", "_").replace(" ", "_").replace("Adam", "adam"), *how)
        if len(rows) == 1:
            rows.append(("none (plain reuse)", shown(one, "residuals", "plain"), shown(one, "latents", "plain"), "-"))
        rows.append((label, shown(one, "residuals", "adjusted"), shown(one, "latents", "adjusted"),
                     shown(one, "latents", "adjusted minus plain")))
    return rows


def index() -> list[tuple[str, ...]]:
    """The table of the directions of the index."""
    rows: list[tuple[str, ...]] = [("model", "MACs", "counted for the later step", "for the earlier step",
                                    "difference")]
    for name, changes, steps, fraction in (("ddpm", "ddpm_20", 20, 0.5), *(
            (name, name, steps, fraction) for name, steps in (("ddpm", 100), ("ldm", 50)) for fraction in (0.5, 0.3))):
        report = ROOT / OUT / f"direction_{name}_{steps}_{round(100 * fraction)}.json"
        if not report.is_file():
            measured = BlockChanges.load(ROOT / FILES / f"{changes}_changes.json")
            results.write(report, directions(measured, f"configs/{name}_emoji.yaml", steps, fraction))
        one = results.read(report)
        rows.append((f"{name}_emoji, {steps} steps", f"{fraction:g}",
                     *(shown(one, "latents", direction) for direction in DIRECTIONS)))
    return rows


@command
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    text = "\n".join(["Relative L2 distances, means over 64 held-out seeds with 95 % intervals.", "",
                      "Scale and shift: 20 DDIM steps of the emoji DDPM, blocks of all kinds, half of the MACs.", "",
                      *markdown(fits()), "",
                      "The direction of the index: final latents to uncached, plain reuse, blocks of all kinds.", "",
                      *markdown(index()), ""])
    write_atomically(ROOT / OUT / "table.md", lambda temporary: temporary.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
