"""The cost of a run, in multiply-accumulates of one row of the network's batch; see eval/cost/macs.py."""

from weakref import WeakKeyDictionary

from torch import nn

from eval.cost import bk_sdm
from eval.cost.macs import Costs, Macs, costs, mean
from run.families import example_inputs
from run.spec import TRACED, Run

_COUNTED: WeakKeyDictionary[nn.Module, Costs] = WeakKeyDictionary()
_OF_CALLS: WeakKeyDictionary[Run, list[Macs]] = WeakKeyDictionary()


def pruned(run: Run) -> str | None:
    """The size of the run's BK-SDM U-Net (base, small or tiny); None if the run has the config's U-Net."""
    if not getattr(run.spec.condition, "diffusers_unet", False):
        return None
    return run.checkpoint.name.split("-")[2]


def costs_of(run: Run) -> Costs:
    """The cost of a full call of the run's network, counted once for each model."""
    if run.unet not in _COUNTED:
        _COUNTED[run.unet] = costs(run.unet, example_inputs(run.config))
        TRACED.setdefault(run.unet, _COUNTED[run.unet].asked)
    return _COUNTED[run.unet]


def call_macs(run: Run) -> list[Macs]:
    """The MACs of every network call of an image, one row of the batch; counted once for each run."""
    if run not in _OF_CALLS:
        size = pruned(run)
        _OF_CALLS[run] = (costs_of(run).calls(run.caching.policy("meta"), run.calls) if size is None
                          else [bk_sdm.step_macs(size)] * run.calls)
    return _OF_CALLS[run]


def macs_per_step(run: Run, over: int | None = None) -> Macs:
    """The MACs per step as in the papers: the sum over the steps for one row, divided by `over` steps (default: all).

    As in the papers, the extra network call of PLMS is left out.
    """
    average = mean(call_macs(run)[:run.steps])
    return average if over is None else Macs(*(value * run.steps / over for value in average))


def macs_per_image(run: Run) -> Macs:
    """The MACs of all network calls of an image, both rows of guidance included."""
    return Macs(*(sum(values) * run.rows_per_image for values in zip(*call_macs(run), strict=True)))


def in_full_calls(run: Run) -> float:
    """The cost of an image, in full network calls by multiply-accumulates (hook)."""
    return macs_per_image(run).hook / (costs_of(run).full.hook * run.rows_per_image)
