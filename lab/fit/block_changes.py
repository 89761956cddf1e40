"""The measurements that Block Caching's schedules are made from: how much each residual of a run changes and costs.

`python -m scripts.block_caching measure` writes it as JSON; schedules need nothing else, no weights either.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from eval.cost.macs import Macs, average, schedule_macs
from run.files import write_json
from unet_caching.errors import UserError
from unet_caching.files.block_schedule import BlockSchedule
from unet_caching.files.schema import check, read_json
from unet_caching.methods.block_cache import KINDS, outside
from unet_caching.methods.deepcache import PlannedDeepCache

FORMAT = 1


@dataclass
class BlockChanges:
    """The changes of all residuals of a run, with the MACs of one network call and one row.

    run, calls, measured: as in `unet_caching.files.block_schedule.BlockSchedule`.
    residuals: name -> {"kind", "changes" (of each call from the one before), "macs" [hook, fc]}.
    macs_full: of a full call. macs_cached: of DeepCache's cached call at each branch.
    """
    run: dict
    calls: int
    measured: dict
    residuals: dict[str, dict]
    macs_full: list[float]
    macs_cached: list[list[float]]

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, {"kind": "block changes", "format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "BlockChanges":
        """Read a file. Raises UserError where it is missing or damaged."""
        if not Path(path).is_file():
            raise UserError(f"no measured changes {path}: python -m scripts.block_caching measure makes them")
        try:
            content = read_json(path)
            known = content if isinstance(content, dict) else {}
            if (known.get("kind"), known.get("format")) != ("block changes", FORMAT):
                raise UserError(f"{path} holds no block changes of format {FORMAT}")
            check({key: value for key, value in content.items() if key not in ("kind", "format")}, cls, path)
            for name, one in content["residuals"].items():
                check(one, _Residual, f"{path}, {name},")
        except ValueError as error:
            raise UserError(str(error)) from None
        changes = cls(**{field.name: content[field.name] for field in fields(cls)})
        wrong = [name for name, one in changes.residuals.items() if len(one["changes"]) != changes.calls]
        if wrong:
            raise UserError(f"{path} is damaged: {wrong[0]} does not have a change for each of {changes.calls} calls")
        return changes

    def of_kinds(self, kinds: str) -> dict[str, list[float]]:
        """The changes of the residuals of `methods.block_cache.KINDS`. Raises UserError where there are none."""
        if kinds not in KINDS:
            raise UserError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
        wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
        found = {name: one["changes"] for name, one in self.residuals.items() if one["kind"] in wanted}
        if not found:
            raise UserError(f"{self.run['model']} has no {kinds} blocks that could be cached")
        return found


@dataclass
class _Residual:
    """What is known of one residual."""
    kind: str
    changes: list[float]
    macs: list[float]


def threshold_schedule(changes: Sequence[float], delta: float) -> list[int]:
    """The steps at which a block is computed: at 0, and whenever its change since the last time exceeds delta.

    changes[t]: from step t - 1 to step t; changes[0] is not looked at. delta 0 computes every step.
    Raises ValueError for a negative delta or changes that are not finite.
    """
    if not delta >= 0:
        raise ValueError(f"delta must be 0 or more, got {delta}")
    steps, total = [0], 0.0
    for t in range(1, len(changes)):
        total += changes[t]
        if not 0 <= total < float("inf"):
            raise ValueError(f"the change of step {t} is {changes[t]}: changes are finite and not negative")
        if total > delta or delta == 0:
            steps.append(t)
            total = 0.0
    return steps


class ScheduleMaker:
    """Schedules of the residuals of some kind, at any threshold, and what a run costs with them.

    level: DeepCache in the same run, if any: only the blocks outside its level have a schedule then.
    """

    def __init__(self, changes: BlockChanges, kinds: str, level: PlannedDeepCache | None = None):
        self.changes, self.kinds = changes, kinds
        self.measured = changes.of_kinds(kinds)
        self.full = self.base = Macs(*changes.macs_full)
        if level is not None:
            self.measured = {name: self.measured[name]
                             for name in outside(self.measured, len(changes.macs_cached), level.branch)}
            if not self.measured:
                raise UserError(f"no {kinds} blocks lie outside the level that DeepCache reuses at branch "
                                f"{level.branch}")
            self.base = average(self.full, Macs(*changes.macs_cached[level.branch]), level.full_steps, changes.calls)
        self.residuals = {name: Macs(*changes.residuals[name]["macs"]) for name in self.measured}

    def blocks(self, delta: float) -> dict[str, list[int]]:
        """The steps that compute each residual, by its name."""
        return {name: threshold_schedule(values, delta) for name, values in self.measured.items()}

    def macs(self, blocks: dict[str, list[int]]) -> Macs:
        """The MACs per network call and row of a run with these blocks, and with DeepCache where it is there.

        They are exact: the blocks outside DeepCache's level are asked for in full and in cached steps alike.
        """
        return schedule_macs(self.base, self.residuals, blocks, self.changes.calls)

    def delta_for(self, fraction: float) -> float:
        """The smallest threshold at which a run costs at most this fraction of an uncached one's MACs (hook).

        The larger the threshold, the later each block is computed again: the cost never rises with it, so that it is
        found by bisection. Raises UserError for a fraction that no threshold reaches.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"the MACs must be a fraction from 0 to 1 of those without caching, got {fraction:g}")

        def cost(delta: float) -> float:
            return self.macs(self.blocks(delta)).hook / self.full.hook

        low, high = 0.0, max(sum(values[1:]) for values in self.measured.values())
        if cost(low) <= fraction:
            return low
        if cost(high) > fraction:
            raise UserError(f"{self.kinds} blocks, each computed once, leave {cost(high):.4f} of the MACs: "
                            f"{fraction:g} cannot be reached; take more kinds of blocks, or a larger fraction")
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(middle) <= fraction else (middle, high)
        return high

    def make(self, delta: float) -> BlockSchedule:
        """The schedule at a threshold. Raises UserError for a negative one."""
        try:
            blocks = self.blocks(delta)
        except ValueError as error:
            raise UserError(str(error)) from None
        return BlockSchedule(self.changes.run, self.changes.calls, self.kinds, delta, blocks, self.changes.measured,
                             schedule_macs(self.full, self.residuals, blocks, self.changes.calls)._asdict(),
                             self.full._asdict())


def summary(schedule: BlockSchedule) -> Iterable[str]:
    """A schedule as lines of text."""
    run, calls = schedule.run, schedule.calls
    computed = sum(map(len, schedule.blocks.values()))
    rule = "given" if schedule.delta is None else f"delta {schedule.delta:.6g}"
    yield f"{run['model']}, {run['sampler']} {run['steps']} steps ({run['timesteps']}), {schedule.kinds} blocks, {rule}"
    yield f"computed: {computed} of {calls * len(schedule.blocks)} times"
    for name, steps in schedule.blocks.items():
        yield f"  {name:44} {len(steps):4} of {calls}: {' '.join(map(str, steps))}"
    for key, what in (("hook", "MACs, papers' convention"), ("fc", "MACs with attention")):
        one, full = schedule.macs[key], schedule.macs_full[key]
        yield f"{what:26} {one / 1e9:.4f} of {full / 1e9:.4f} G per step: {one / full:.4f}, speed-up {full / one:.2f}x"
