"""The cache that keeps values: for each key, the network calls that compute it, and what replaces it on the others.

DeepCache keeps the result of one level, a plan the results of several levels, Block Caching residuals. All of them may
be in one cache. The network calls of a run are counted from 0.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from unet_caching.forecast import Forecast, check_order, forecast, on_device, usable
from unet_caching.policy import Policy

Adjustment = Mapping[Any, tuple[Tensor, Tensor]]            # key -> (scale, shift) of its channels
_WEIGHTS = "forecast weights"                               # beside the keys in `Keep.kept`


class Held:
    """The values of one key that are held between network calls."""

    def __init__(self, computed: Collection[int], forecast: Forecast, place: int):
        self.computed = frozenset(computed)     # the calls that compute the value
        self.forecast = forecast
        self.place = place                      # its row of `Keep.weights`
        self.reset()

    def reset(self) -> None:
        self.value: Tensor | None = None        # the latest value
        self.older: tuple[Tensor, ...] = ()     # the values before it, the latest first, at most `forecast.order`
        self.calls: tuple[int, ...] = ()        # the calls that computed all of these, the latest first

    def known(self, call: int, calls: tuple[int, ...]) -> tuple[int, ...]:
        """The calls that computed the values held at `call`, the latest first. calls: the same for the call before."""
        return calls if call not in self.computed or calls[:1] == (call,) else (call, *calls)[:self.forecast.order + 1]

    def before_computed(self, call: int) -> None:
        """Prepare for a call that computes the value. A repeated call replaces its value; an earlier one starts a run.
        """
        if self.calls and call < self.calls[0]:
            self.older, self.calls = (), ()
        if self.calls[:1] != (call,) and self.calls and self.value is not None:
            self.older = (self.value, *self.older)[:self.forecast.order]
        self.calls = self.known(call, self.calls)

    def before_reused(self, latest: Tensor) -> None:
        """Prepare for a call that reuses the value. Older values that do not exist yet are filled in, with weight 0, so
        that compiled networks see the same number of tensors on all such calls."""
        self.older += tuple(latest.detach() for _ in range(self.forecast.order - len(self.older)))


class Keep(Policy):
    """Compute the value of each key on the calls of its schedule; on all others reuse or forecast it.

    schedule: key -> the network calls that compute its value, with call 0. Other keys are always computed.
    forecasts: one for all keys, or one for each; `Forecast()` is reuse, as in the papers.
    adjust: for each call, the scale and shift of reused values: value * scale + shift, per channel.

    `unet(x, t, cache=cache.at(step))` runs network call `step`. Between calls one tensor is held for each key, and one
    more for each order of its forecast. Raises ValueError for a schedule without call 0, and for an order that needs
    more values than any key ever has; RuntimeError for a call that would reuse a value that was never computed.
    """

    def __init__(self, schedule: Mapping[Any, Collection[int]],
                 forecasts: Forecast | Mapping[Any, Forecast] = Forecast(),  # noqa: B008  it is not changed
                 adjust: Sequence[Adjustment] | None = None):
        for key, calls in schedule.items():
            if 0 not in calls:
                raise ValueError(f"the schedule of {_named(key)} must contain 0: the first call has nothing to reuse")
        if isinstance(forecasts, Forecast):
            check_order(forecasts.order, max(map(usable, schedule.values()), default=None))
            forecasts = dict.fromkeys(schedule, forecasts)
        self.adjust = adjust
        self.held = {key: Held(calls, forecasts[key], place) for place, (key, calls) in enumerate(schedule.items())}
        self.order = max((held.forecast.order for held in self.held.values()), default=0)
        self.reset()

    def reset(self) -> None:
        """Drop all values, after the last call of a batch."""
        self.step = 0
        self.reused: frozenset[Hashable] = frozenset()      # the keys that the call reuses
        self.weights: Tensor | None = None                  # of the call's forecasts, [keys, order]
        self.foreseen: dict[tuple, Tensor] = {}             # weights of later calls, by call and the calls before it
        self.adjustment: Adjustment = {}
        for held in self.held.values():
            held.reset()

    def owns(self, key: Hashable) -> bool:
        return key in self.held

    def at(self, step: int) -> "Keep":
        """Choose what the next network call does. This sets plain attributes, outside any compiled region."""
        self.step, reused = step, list[Hashable]()
        for key, held in self.held.items():
            if step in held.computed:
                held.before_computed(step)
                continue
            if held.value is None:
                raise RuntimeError(f"call {step} is to reuse {_named(key)}, which no call before it has computed, or "
                                   "which the U-Net does not have")
            reused.append(key)
            if held.forecast.order:
                held.before_reused(held.value)
        self.reused = frozenset(reused)
        self.adjustment = self.adjust[step] if self.adjust is not None else {}
        self.weights = self._weights(step) if self.order and self.reused else None
        return self

    def _weights(self, step: int) -> Tensor:
        """The weights of the call's forecasts. They are made on the CPU together with those of later calls and copied
        to the device at once, so that no later call waits for a copy."""
        key = step, *(held.calls for held in self.held.values())
        if key not in self.foreseen:
            rows = dict(self._foresee(step))
            value = next(held.value for held in self.held.values() if held.value is not None)
            made = on_device([*rows.values()], value)
            # Clones, because a view with another storage offset may make torch.compile compile again.
            self.foreseen = {key: row.clone() for key, row in zip(rows, made, strict=True)}
        return self.foreseen[key]

    def _foresee(self, step: int) -> Iterator[tuple[tuple, list[list[float]]]]:
        """The weights of this call and of later ones, up to where a run with this schedule may end."""
        planned = sorted({call for held in self.held.values() for call in held.computed})
        gap = max((later - sooner for sooner, later in pairwise(planned)), default=1)
        known = [(held, held.calls) for held in self.held.values()]
        for call in range(step, max(planned[-1] + gap, 2 * step + 8)):
            known = [(held, held.known(call, calls)) for held, calls in known]
            try:
                rows = [[] if call in held.computed else held.forecast.weights(call, calls) for held, calls in known]
            except ValueError:              # the call has no damping
                if call == step:
                    raise
                return
            yield (call, *(calls for _, calls in known)), [row + [0.0] * (self.order - len(row)) for row in rows]

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key in self.reused:
            return self.reuse(key)
        value = compute()
        if key in self.held:
            self.held[key].value = value
        return value

    def reuse(self, key: Hashable) -> Tensor:
        """The value of a key that is not computed on this call."""
        held = self.held[key]
        value = held.value
        assert value is not None                # `at` has checked it
        if self.weights is not None and held.forecast.order:
            value = forecast(value, held.older, self.weights[held.place])
        if key not in self.adjustment:
            return value
        scale, shift = (_like_channels(x, value) for x in self.adjustment[key])
        return value * scale + shift

    @property
    def pattern(self) -> Hashable:
        """Equal for calls that compute, keep, reuse and adjust the same keys."""
        orders = tuple((key, held.forecast.order) for key, held in self.held.items())
        return type(self).__name__, orders, self.reused, self._adjusted()

    def _adjusted(self) -> frozenset[Hashable]:
        return self.reused.intersection(self.adjustment)

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        """The tensors that a call reads and leaves: values by key, older ones by (key, age), (key, "scale") and
        (key, "shift"), and the weights of its forecasts. An assignment replaces the tensors.
        """
        found: dict[Hashable, Tensor] = {}
        for key, held in self.held.items():     # the oldest first: in fixed buffers each moves on before it is replaced
            found |= {(key, age): value for age, value in reversed([*enumerate(held.older, 1)])}
            if held.value is not None:
                found[key] = held.value
        for key in self._adjusted():
            found[key, "scale"], found[key, "shift"] = self.adjustment[key]
        return found if self.weights is None else found | {_WEIGHTS: self.weights}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        for key, held in self.held.items():
            held.value = values.get(key, held.value)
            held.older = tuple(values.get((key, age), value) for age, value in enumerate(held.older, 1))
        self.adjustment = {key: (values[key, "scale"], values[key, "shift"]) for key in self._adjusted()}
        self.weights = values.get(_WEIGHTS)


def joined(*caches: Keep) -> Keep:
    """One cache that does what several caches with different keys do. Only one of them may adjust."""
    held = {key: one for cache in caches for key, one in cache.held.items()}
    adjust = next((cache.adjust for cache in caches if cache.adjust is not None), None)
    return Keep({key: one.computed for key, one in held.items()}, {key: one.forecast for key, one in held.items()},
                adjust)


def _named(key: Hashable) -> str:
    return f"the level at branch {key}" if isinstance(key, int) else str(key)


def _like_channels(x: Tensor, value: Tensor) -> Tensor:
    """Reshape [..., channels] to multiply a feature map [batch, channels, h, w] or tokens [batch, tokens, channels]."""
    return x[..., None, None] if value.ndim == 4 else x[..., None, :]
