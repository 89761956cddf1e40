"""Block Caching (arXiv 2312.03209): reuse single residuals, each on a schedule derived from how much it changes.

Instead of being reused as they are, they can be forecast (unet_caching/forecast.py), which is not of the paper.

The paper measures L1rel(i, t) = |C_i(t) - C_i(t - 1)|_1 / |C_i(t)|_1 of each block's residual C_i from step to step
and keeps a value until the sum of these changes since it was computed exceeds a threshold delta.
Steps count in the order in which they run, 0 at the highest noise level; the change of step t is that from step t - 1.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from unet_caching.forecast import Damping, Forecast, History, check_order, forecast, on_device, usable
from unet_caching.policy import Policy

KINDS = ("transformer", "attention", "resnet", "all")
_WEIGHTS = "forecast weights"                           # beside the names of residuals in `BlockCache.kept`
Adjustment = Mapping[str, tuple[Tensor, Tensor]]        # residual -> (scale, shift) of its channels


def residual_names(unet: nn.Module, kinds: str = "transformer") -> list[str]:
    """The residuals of a U-Net under which a cache knows them, in the order of its modules.

    kinds: 'transformer' (as in the paper: spatial transformers, DDPM's attention blocks), 'attention' (the self- and
    cross-attentions inside transformers alone), 'resnet' or 'all' (transformers and ResNet blocks).
    Raises ValueError for any other kind, or when the U-Net has none of it.
    """
    if kinds not in KINDS:
        raise ValueError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
    wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
    names = [name for name, module in unet.named_modules() if getattr(module, "kind", None) in wanted]
    if not names:
        raise ValueError(f"this U-Net has no {kinds} blocks that could be cached")
    return names


class BlockCache(Policy):
    """Compute each residual on its own steps, reuse it on all others.

    schedule: for each residual that is cached, the steps that compute it; 0 must be one. Others are always computed.
    adjust: for each step, what to do to the values that it reuses: value * scale + shift, per channel
    (see `lab/fit/scale_shift.py`); None reuses them as they are.
    forecast: the order of the polynomial through the last values of each residual, which takes the place of the last
    one; 0 is reuse, as in the paper. damping: of the forecast, for all network calls or for each.

    `unet(x, t, cache=cache.at(step))` runs step `step`. Between steps one tensor per cached residual is held, and one
    more for each order. Raises ValueError for a schedule without step 0, or an order that it can feed to no residual;
    RuntimeError for a step that would reuse what was never computed.
    """

    def __init__(self, schedule: Mapping[str, Collection[int]], adjust: Sequence[Adjustment] | None = None,
                 forecast: int = 0, damping: Damping = 1.0):
        for key, steps in schedule.items():
            if 0 not in steps:
                raise ValueError(f"the schedule of {key} must contain 0: the first step has nothing to reuse")
        check_order(forecast, max(map(usable, schedule.values()), default=None))
        self.schedule = {key: frozenset(steps) for key, steps in schedule.items()}
        self.adjust = adjust
        self.forecast = Forecast(forecast, damping)
        self.histories = {key: History(forecast) for key in schedule}
        self.places = {key: place for place, key in enumerate(schedule)}        # in `weights`
        self.reset()

    def reset(self) -> None:
        """Let go of all values, after the last step of a batch."""
        self.values: dict[Hashable, Tensor] = {}
        self.weights: Tensor | None = None              # [residuals, order]
        self.reused: frozenset[str] = frozenset()
        self.adjustment: Adjustment = {}
        for history in self.histories.values():
            history.reset()

    def owns(self, key: Hashable) -> bool:
        return key in self.schedule

    def at(self, step: int) -> "BlockCache":
        """Choose what the next network call reuses: plain values and tensors, set outside any compiled region."""
        self.step = step
        self.reused = frozenset(key for key, steps in self.schedule.items() if step not in steps)
        self.adjustment = self.adjust[step] if self.adjust is not None else {}
        absent = self.reused - self.values.keys()
        if absent:
            raise RuntimeError(f"step {step} is to reuse {min(absent)}, which has not been computed since the start")
        if self.forecast.order:
            self._look_ahead(step)
        return self

    def _look_ahead(self, step: int) -> None:
        """Move the values of residuals that are computed anew into their histories; weigh those of the others."""
        for key, history in self.histories.items():
            if key in self.reused:
                history.before_cached(self.values[key])
            else:
                history.before_full(step, self.values.get(key))
        self.weights = None
        if self.reused:
            rows = [self.forecast.weights(step, history.steps) for history in self.histories.values()]
            self.weights = on_device(rows, self.values[min(self.reused)])

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key in self.reused:
            return self.reuse(key)
        value = compute()
        if key in self.schedule:
            self.values[key] = value
        return value

    @property
    def pattern(self) -> Hashable:
        """Equal for steps that compute, keep, reuse and adjust the same."""
        return frozenset(self.schedule), self.reused, self.forecast.order, self._adjusted()

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        """What a step reads and leaves, by key: values, under (key, what) scales and shifts, weights of a forecast.

        To assign to it puts other tensors in its place.
        """
        found: dict[Hashable, Tensor] = {}
        for key, history in self.histories.items():
            found |= history.kept(key)
        found |= self.values
        for key in self._adjusted():
            found[key, "scale"], found[key, "shift"] = self.adjustment[key]
        return found if self.weights is None else found | {_WEIGHTS: self.weights}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        self.values = {key: value for key, value in values.items() if key in self.schedule}
        self.adjustment = {key: (values[key, "scale"], values[key, "shift"]) for key in self._adjusted()}
        self.weights = values.get(_WEIGHTS)
        for key, history in self.histories.items():
            history.put(key, values)

    def _adjusted(self) -> frozenset[str]:
        """The residuals that this step adjusts."""
        return self.reused.intersection(self.adjustment)

    def reuse(self, key: str) -> Tensor:
        """What stands in for a residual that is not computed."""
        value = self.values[key]
        if self.weights is not None:
            value = forecast(value, self.histories[key].older, self.weights[self.places[key]])
        if key not in self.adjustment:
            return value
        scale, shift = (like_channels(x, value) for x in self.adjustment[key])
        return value * scale + shift


def like_channels(x: Tensor, value: Tensor) -> Tensor:
    """[..., channels] shaped to multiply a feature map [batch, channels, h, w] or tokens [batch, tokens, channels]."""
    return x[..., None, None] if value.ndim == 4 else x[..., None, :]


def outside(names: Iterable[str], num_branches: int, branch: int) -> list[str]:
    """Those of the residuals that run on a cached step of DeepCache at `branch`: in blocks 0..branch of either side."""
    def runs(name: str) -> bool:
        side, index, *_ = name.split(".")
        skip = {"input_blocks": int(index), "output_blocks": num_branches - 1 - int(index)}.get(side)
        return skip is not None and skip <= branch

    return [name for name in names if runs(name)]
