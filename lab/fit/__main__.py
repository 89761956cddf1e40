"""Fit a file to a model, or make a block schedule.

    python -m lab.fit changes         how much every residual changes from step to step
    python -m lab.fit block-schedule  when each residual is computed, from measured changes
    python -m lab.fit rhythm          a block schedule with the same steps for all residuals
    python -m lab.fit scale-shift     the scale and shift of residuals that a block schedule reuses
    python -m lab.fit adaptor         Clockwork's adaptor
    python -m lab.fit router          a learned block schedule (Learning-to-Cache)
    python -m lab.fit adaptive        the rule by which each image decides when to compute

Fits to runs have the sampling options of the model's sample command: --config FILE --help lists them. The network is
frozen. Each fit is judged on held-out seeds: OUT.KIND.json, beside the file, has the distances to the network without
caching, with paired 95 % intervals.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lab.fit.adaptive import AdaptiveFit
from lab.fit.adaptor import AdaptorFit
from lab.fit.block_schedule import block_schedule, rhythm
from lab.fit.changes import ChangesFit
from lab.fit.fit import Fit, check_out, check_runs, frozen, own_unet
from lab.fit.router import RouterFit
from lab.fit.scale_shift import ScaleShiftFit
from lab.fit.teacher import held_out_distances
from run import arguments, results
from run.cli import command
from run.families import Condition
from run.image_model import open_model
from run.machine import Machine
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import format_seeds, parse_seeds
from run.spec import NetworkOptions, SamplerOptions, parse_run
from run.weights import sha256
from unet_caching.errors import UserError, as_user_error
from unet_caching.options import required

FITS: Mapping[str, type[Fit]] = {"changes": ChangesFit, "scale-shift": ScaleShiftFit, "adaptor": AdaptorFit,
                                 "router": RouterFit, "adaptive": AdaptiveFit}
VERBS: Mapping[str, Callable[..., None]] = {"block-schedule": block_schedule, "rhythm": rhythm}


@dataclass(frozen=True)
class Runs:
    title: ClassVar[str] = "the runs"
    out: Path = required("file to write")
    seeds: str = required("seeds to fit to; none of the held-out ones")


@dataclass(frozen=True)
class Judging:
    title: ClassVar[str] = "the runs"
    held_out_seeds: str = required("seeds to judge on")


def fit(kind: str, words: list[str]) -> None:
    """Fit one of `FITS`, with the options of a command line."""
    started, cls = time.time(), FITS[kind]
    parts = None if cls.caching else (Condition, NetworkOptions, SamplerOptions)
    spec, what, runs, machine, *judging = parse_run(
        sys.modules[cls.__module__].__doc__, cls, Runs, Machine, *([Judging] if cls.judged else []), words=words,
        parts=parts, defaults={"seeds": cls.seeds} if cls.seeds else {}, prog=f"python -m lab.fit {kind}")
    check_out(runs.out, ".safetensors" if cls.file.has_tensors else ".json")
    seeds, held_out = parse_seeds(runs.seeds), parse_seeds(judging[0].held_out_seeds) if judging else []
    check_runs(machine, seeds=seeds, held_out_seeds=held_out)
    model = open_model(spec.open(), machine)
    with as_user_error():
        what.check(model)
        model.run.refuse_foreign(model.settings)
        model.check_seeds([*seeds, *held_out])
    model.load()
    model.run.refuse_foreign(model.settings)
    with frozen(own_unet(model)) as weights:
        made = what.fit(model, seeds, machine.batch_size)
    fitted_s = round(time.time() - started, 3)
    found = what.measure(model, made, held_out, machine.batch_size)
    made.save(runs.out)
    what.draw(model, made, seeds, runs.out)
    print(f"{runs.out}: {kind}, from {len(seeds)} seeds")
    if not cls.judged:
        return
    found = held_out_distances(model, what.arms(model, runs.out), held_out, machine.batch_size) | found
    report = runs.out.with_suffix(f".{kind.replace('-', '_')}.json")        # a schedule's file ends with .json itself
    hashes = {"checkpoint": model.settings["checkpoint_sha256"], "weights": weights, "file": sha256(runs.out)}
    details = {**made.notes, "held_out_seeds": format_seeds(held_out), "fitted_s": fitted_s}
    results.write(report, Result(kind, model.settings["model"], model.settings, len(held_out), found,
                                 hashes=hashes, provenance=provenance(model.device), details=details).stamped(started))
    print(table(found, held_out))
    print(f"{runs.out} and {report}")


def table(found: Mapping[str, Metric], held_out: list[int]) -> str:
    """A report as text."""
    return "\n".join([f"{len(held_out)} held-out seeds; distance to the network without caching, 95% intervals:",
                      *("{:32} {:.4f} [{:.4f}, {:.4f}]".format(name, *one.bounds) for name, one in found.items())])


@command
def main() -> None:
    kind, words = (sys.argv[1:] or [""])[0], sys.argv[2:]
    if kind in FITS:
        fit(kind, words)
    elif kind in VERBS:
        arguments.call(VERBS[kind], words, f"python -m lab.fit {kind}")
    elif kind in ("-h", "--help"):
        print(__doc__)
    else:
        raise UserError(f"name what to fit: {', '.join([*FITS, *VERBS])} (each has a --help)")


if __name__ == "__main__":
    main()
