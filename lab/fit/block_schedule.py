"""Make block schedules (Block Caching, arXiv 2312.03209): when each residual of a run is computed.

    python -m lab.fit block-schedule --changes changes.json --kinds all --macs 0.5 --out half.json
    python -m lab.fit rhythm --config configs/sd_v15.yaml --steps 20 --computed 0,5,9,13,17 --out rhythm.json

block-schedule: from measured changes and a threshold or a budget of MACs; with --interval only for the blocks outside
the level that DeepCache reuses. rhythm: the same steps for all residuals; it needs no weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.cost.macs import Macs, mean, schedule_macs
from eval.cost.runs import costs_of
from lab.fit.block_plots import schedule_chart
from lab.fit.changes import BlockChanges
from lab.fit.fit import bisected, check_out
from run.seeds import parse_seeds
from run.spec import Run, RunSpec, SamplerOptions
from unet_caching.errors import UserError, as_user_error
from unet_caching.methods.block_caching import KINDS, BlockSchedule, outside, residual_names
from unet_caching.methods.deepcache import DeepCacheMethod, DeepCacheOptions
from unet_caching.options import RunShape, option, required

PAPERS_DELTA = 0.5          # the paper's, for LDM-512


def threshold_schedule(changes: Sequence[float], delta: float) -> list[int]:
    """The steps that compute a block: step 0, and every step at which its change since the last one exceeds delta.

    changes[t]: from step t - 1 to step t; changes[0] is ignored. With delta 0, every step computes.
    Raises ValueError for a negative delta or changes that are not finite.
    """
    if not delta >= 0:
        raise ValueError(f"delta must be 0 or more, got {delta}")
    steps, total = [0], 0.0
    for t in range(1, len(changes)):
        total += changes[t]
        if not 0 <= total < float("inf"):
            raise ValueError(f"the change of step {t} must be finite and not negative, got {changes[t]}")
        if total > delta or delta == 0:
            steps.append(t)
            total = 0.0
    return steps


class ScheduleMaker:
    """Schedules of the residuals of some kind, at any threshold, and the cost of a run with them.

    level: DeepCache in the same run, if any; then only the blocks outside its level have a schedule.
    """

    def __init__(self, changes: BlockChanges, kinds: str, level: DeepCacheMethod | None = None):
        self.changes, self.kinds = changes, kinds
        self.measured = changes.of_kinds(kinds)
        self.full = self.base = Macs(*changes.macs_full)
        if level is not None:
            self.measured = {name: self.measured[name]
                             for name in outside(self.measured, len(changes.macs_cached), level.branch)}
            if not self.measured:
                raise UserError(f"no {kinds} blocks lie outside the level that DeepCache reuses at branch "
                                f"{level.branch}")
            full, cached = len(level.full_steps), Macs(*changes.macs_cached[level.branch])
            self.base = mean([self.full] * full + [cached] * (changes.calls - full))
        self.residuals = {name: Macs(*changes.residuals[name].macs) for name in self.measured}

    def blocks(self, delta: float) -> dict[str, list[int]]:
        """The steps that compute each residual, by its name. Raises UserError for a negative threshold."""
        with as_user_error():
            return {name: threshold_schedule(values, delta) for name, values in self.measured.items()}

    def macs(self, blocks: dict[str, list[int]]) -> Macs:
        """The MACs per network call and row of a run with these blocks, and with DeepCache if there is any.

        They are exact: full and cached steps alike ask the cache for the blocks outside DeepCache's level.
        """
        return schedule_macs(self.base, self.residuals, blocks, self.changes.calls)

    def delta_for(self, fraction: float) -> float:
        """The smallest threshold at which a run costs at most this fraction of an uncached one's MACs (hook).

        The cost never rises with the threshold: each block is computed later. Raises UserError for a fraction that no
        threshold reaches.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"the MACs must be a fraction from 0 to 1 of the uncached ones, got {fraction:g}")

        def cost(delta: float) -> float:
            return self.macs(self.blocks(delta)).hook / self.full.hook

        low, high = 0.0, max(sum(values[1:]) for values in self.measured.values())
        if cost(low) <= fraction:
            return low
        if cost(high) > fraction:
            raise UserError(f"{self.kinds} blocks, each computed once, leave {cost(high):.4f} of the MACs: "
                            f"{fraction:g} cannot be reached; take more kinds of blocks, or a larger fraction")
        return bisected(lambda delta: cost(delta) <= fraction, high, low)

    def make(self, delta: float) -> BlockSchedule:
        """The schedule at a threshold. Raises UserError for a negative one."""
        blocks = self.blocks(delta)
        macs = schedule_macs(self.full, self.residuals, blocks, self.changes.calls)
        return BlockSchedule(self.changes.made_for, self.changes.calls, self.kinds, delta, blocks, macs._asdict(),
                             self.full._asdict(), notes=self.changes.notes)


@dataclass(frozen=True)
class ScheduleOptions:
    out: Path = required("JSON to write")
    kinds: str = option("transformer", "the kind of blocks to cache (default: %(default)s, as in the paper)",
                        choices=KINDS)


@dataclass(frozen=True)
class FromChanges(ScheduleOptions):
    """A schedule from measured changes."""
    changes: Path = required("the file from lab.fit changes")
    delta: float | None = option(None, f"the threshold (default: {PAPERS_DELTA}, the paper's)", one_of="aim")
    macs: float | None = option(None, "the smallest threshold that leaves at most this fraction of the MACs",
                                one_of="aim")
    speedup: float | None = option(None, "the same as --macs 1/SPEEDUP", one_of="aim", least=1)


@dataclass(frozen=True)
class Rhythm(ScheduleOptions):
    """A schedule with the same steps for all residuals."""
    config: Path = required("configs/*.yaml")
    computed: str = required("steps that compute, like 0,5,9,13,17; the first must be 0", metavar="STEPS")


def block_schedule(options: FromChanges, deepcache: DeepCacheOptions) -> None:
    """Make a schedule from measured changes: OUT.json and a chart."""
    check_out(options.out, ".json")
    with as_user_error():
        changes = BlockChanges.load(options.changes)
        shape = RunShape(changes.made_for["steps"], changes.calls, len(changes.macs_cached), 0)
        level = deepcache.bind(shape, ())
    if level is not None and deepcache.branch is None:
        raise UserError("--interval needs --branch here: add it")
    maker = ScheduleMaker(changes, options.kinds, level)
    fraction = options.macs if options.speedup is None else 1 / options.speedup
    delta = PAPERS_DELTA if options.delta is None else options.delta
    schedule = maker.make(delta if fraction is None else maker.delta_for(fraction))
    write(schedule, options.out)
    if level is not None:
        cost = maker.macs(schedule.blocks)
        print(f"with DeepCache, {len(level.full_steps)} full steps, branch {level.branch}: "
              f"{cost.hook / maker.full.hook:.4f} of the MACs ({cost.fc / maker.full.fc:.4f} with attention)")


def rhythm(options: Rhythm, sampling: SamplerOptions) -> None:
    """Make a schedule with the same steps for all residuals, for any weights: OUT.json and a chart."""
    check_out(options.out, ".json")
    run = RunSpec.of(options.config, **vars(sampling)).open()
    steps = sorted(parse_seeds(options.computed, "--computed"))
    if steps[0] != 0 or steps[-1] >= run.calls:
        raise UserError(f"--computed must contain 0 and stay below the {run.calls} network calls, got "
                        f"{options.computed}")
    with as_user_error():
        blocks = {name: steps for name in residual_names(run.unet, options.kinds)}
    write(schedule_of(run, None, options.kinds, blocks, {"rhythm": "given, not measured"}), options.out)


def schedule_of(run: Run, checkpoint_sha256: str | None, kinds: str, blocks: dict[str, list[int]],
                notes: dict[str, Any]) -> BlockSchedule:
    """A schedule with given steps, without a threshold. checkpoint_sha256: of the weights; None: for any weights."""
    costs = costs_of(run)
    macs = schedule_macs(costs.full, {name: costs.values[name] for name in blocks}, blocks, run.calls)
    return BlockSchedule(run.made_for(checkpoint_sha256), run.calls, kinds, None, blocks, macs._asdict(),
                         costs.full._asdict(), notes=notes)


def write(schedule: BlockSchedule, path: Path) -> None:
    """Write a schedule and its chart, and print it."""
    schedule.save(path)
    schedule_chart(schedule.blocks, schedule.calls, path.with_suffix(".png"))
    print("\n".join([*summary(schedule), f"{path} and {path.with_suffix('.png')}"]))


def summary(schedule: BlockSchedule) -> Iterable[str]:
    """A schedule as lines of text."""
    run, calls = schedule.made_for, schedule.calls
    computed = sum(map(len, schedule.blocks.values()))
    rule = "given" if schedule.delta is None else f"delta {schedule.delta:.6g}"
    yield f"{run['model']}, {run['sampler']} {run['steps']} steps ({run['timesteps']}), {schedule.kinds} blocks, {rule}"
    yield f"computed: {computed} of {calls * len(schedule.blocks)} times"
    for name, steps in schedule.blocks.items():
        yield f"  {name:44} {len(steps):4} of {calls}: {' '.join(map(str, steps))}"
    for key, what in (("hook", "MACs, papers' convention"), ("fc", "MACs with attention")):
        one, full = schedule.macs[key], schedule.macs_full[key]
        yield f"{what:26} {one / 1e9:.4f} of {full / 1e9:.4f} G per step: {one / full:.4f}, speed-up {full / one:.2f}x"
