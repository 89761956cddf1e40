"""What Block Caching's paper leaves open, decided by measurement on the small DDPM that is shipped here.

    python -m scripts.scale_shift_study             about ten minutes on one core; what is there is kept

20 DDIM steps, blocks of all kinds, half of the MACs. Ways to fit scale and shift (closed form or Adam, learning rate,
batch, weight of the identity, number of runs), and the direction of the paper's index t: whether a change belongs to
the later or to the earlier of its two steps. Every variant is judged on the same 64 held-out seeds, by the distance of
what sampling ends on to the uncached run. Writes results/block_caching/study/: table.md, and one JSON per variant.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from eval.block_changes import BlockChanges
from sampling.cli import command
from sampling.runs import write_atomically
from sampling.settings import UserError
from scripts.demo_report import markdown

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "block_caching" / "study"
RUN = ["--config", "configs/ddpm_emoji.yaml", "--steps", "20", "--device", "cpu", "--threads", "1"]
HELD_OUT = ["--held-out-seeds", "3000-3063"]
SEEDS = {16: "2000-2015", 64: "2000-2063", 256: "2000-2255"}
VARIANTS = {
    **{f"least squares, ridge {ridge:g}": ["least-squares", 64, "--ridge", f"{ridge:g}"] for ridge in (0, 0.01, 0.1)},
    **{f"least squares, {runs} runs": ["least-squares", runs] for runs in (16, 256)},
    **{f"Adam, learning rate {lr:g}": ["adam", 64, "--lr", f"{lr:g}", "--batch-size", "8"]
       for lr in (3e-4, 1e-3, 3e-3, 1e-2)},
    **{f"Adam, batch {size}": ["adam", 64, "--batch-size", str(size)] for size in (2, 32)},
    "Adam, 256 runs": ["adam", 256, "--batch-size", "8"],
}


def run(*words: str) -> None:
    """A verb of scripts.block_caching. Raises UserError where it fails."""
    words = ["-m", "scripts.block_caching", *words]
    print("python", *words, flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"this failed: python {' '.join(words)}")


def schedules() -> dict[str, Path]:
    """The same budget, with the change from one step to the next counted for the later one, and for the earlier one."""
    paths = {"later": OUT / "schedule.json", "earlier": OUT / "schedule_earlier.json"}
    changes = OUT / "changes.json"
    if not changes.is_file():
        run("measure", *RUN, "--seeds", "1000-1063", "--similar", "0", "--out", str(changes))
    for direction, path in paths.items():
        if not path.is_file():
            measured = BlockChanges.load(changes)
            if direction == "earlier":
                measured = replace(measured, residuals={
                    name: one | {"changes": [*one["changes"][1:], 0.0]} for name, one in measured.residuals.items()})
            used = OUT / f"changes_{direction}.json"
            measured.save(used)
            run("schedule", "--changes", str(used), "--kinds", "all", "--macs", "0.5", "--out", str(path))
            used.unlink()
    return paths


def trained(schedule: Path, name: str, method: str, runs: int, *options: str) -> dict:
    """The report of a variant, which is made where it is absent; the tensors are not kept."""
    path = OUT / f"{name}.safetensors"
    report = path.with_suffix(".scale_shift.json")
    if not report.is_file():
        run("train", *RUN, *HELD_OUT, "--seeds", SEEDS[runs], "--schedule", str(schedule), "--method", method, *options,
            "--out", str(path))
        path.unlink()
    return json.loads(report.read_text())


def line(label: str, one: dict) -> tuple[str, ...]:
    def shown(value: dict) -> str:
        return f"{value['mean']:.4f} [{value['interval'][0]:.4f}, {value['interval'][1]:.4f}]"
    return (label, shown(one["residuals"]["adjusted"]), shown(one["latents"]["adjusted"]),
            shown(one["latents"]["difference"]))


@command
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    paths = schedules()
    head = ("residuals: distance to computed", "final latents: distance to uncached", "difference to plain reuse")
    found = {label: trained(paths["later"], label.replace(", ", "_").replace(" ", "_").replace("Adam", "adam"), *how)
             for label, how in VARIANTS.items()}
    earlier = trained(paths["earlier"], "earlier", "least-squares", 64)
    plain = next(iter(found.values()))

    def as_plain(one: dict) -> dict:
        return {key: {"adjusted": one[key]["plain"], "difference": {"mean": 0, "interval": [0, 0]}}
                for key in ("residuals", "latents")}
    fits = [("fit", *head), line("none (plain reuse)", as_plain(plain)),
            *(line(label, one) for label, one in found.items())]
    index = [("a change counts for", *head), line("the later step, plain reuse", as_plain(plain)),
             line("the earlier step, plain reuse", as_plain(earlier))]
    text = "\n".join(["20 DDIM steps of the emoji DDPM, blocks of all kinds, half of the MACs; relative L2 distances,",
                      "means over 64 held-out seeds with 95 % intervals.", "", *markdown(fits), "", *markdown(index),
                      ""])
    write_atomically(OUT / "table.md", lambda temporary: temporary.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
