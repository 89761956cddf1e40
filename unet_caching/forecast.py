"""Forecast: a cached step extrapolates its value by a polynomial through the last full steps.

The papers reuse the value of the last full step s_0, which is a polynomial of order 0 in time. A polynomial of order p
goes through the values F_0, F_1, ... of the last p + 1 full steps s_0 > s_1 > ..., with any spacing. Its variable is
the index of the network call. In Newton's form, with divided differences f[...] and a damping weight w_k per term:

    F(s) = F_0 + w_1 (s - s_0) f[s_0, s_1] + w_2 (s - s_0) (s - s_1) f[s_0, s_1, s_2] + ...

This costs no multiply-accumulates of the network, only a weighted sum, and one more kept value for each order. Deep
features change more slowly than the blocks around them. So this is the idea of two-step Adams-Bashforth for the slow
part of a two-rate system. The papers do not have it.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

# One weight for all terms and network calls; or for each network call one weight, or one weight per term.
Damping = float | Sequence[float] | Sequence[Sequence[float]]


def newton_terms(step: int, steps: Sequence[int]) -> list[list[float]]:
    """Newton's terms at `step` of the polynomial through the values of `steps`, the latest first.

    Entry [k - 1][j - 1] is the factor of F_j - F_0 in the term of order k = 1, 2, ...; the term of order 0 is F_0.
    """
    terms = []
    for k in range(1, len(steps)):
        reach = math.prod(step - s for s in steps[:k])
        terms.append([reach / math.prod(steps[j] - s for s in steps[:k + 1] if s != steps[j]) if j <= k else 0.0
                      for j in range(1, len(steps))])
    return terms


def forecast(latest: Tensor, older: Sequence[Tensor], weights: Tensor) -> Tensor:
    """latest + sum of weights[i] (older[i] - latest), i = 0, 1, ...

    weights: [len(older) or more], on the values' device and in their dtype; a tensor, so that a compiled or recorded
    network can use the weights of any step.
    """
    value = torch.lerp(latest, older[0], weights[0])
    for i, one in enumerate(older[1:], 1):
        value = torch.addcmul(value, one - latest, weights[i])
    return value


def usable(full_steps: Collection[int], calls: int | None = None) -> int:
    """The number of full steps before the last cached step. calls: network calls of the run; None: unknown."""
    if calls is None:
        return len(full_steps)
    last_cached = max((step for step in range(calls) if step not in full_steps), default=0)
    return sum(step < last_cached for step in full_steps)


def check_order(order: int, usable: int | None = None) -> None:
    """Raise a ValueError for an order that is not valid, or that needs more full steps than a schedule has.

    usable: full steps before the last cached one, of which an order needs one more than itself; None: unknown.
    """
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"the order of a forecast must be a whole number from 0 (reuse), got {order!r}")
    if order and usable is not None and order >= usable:
        raise ValueError(f"a forecast of order {order} needs {order + 1} full steps before a cached one, and this "
                         f"schedule has {usable}")


class Forecast:
    """The order of a forecast, and the damping of its terms.

    damping: 1 is the polynomial itself, 0 is reuse. Raises ValueError for an order that is not a whole number from 0,
    and for damping that is not finite or has a number of weights per step other than the order.
    """

    def __init__(self, order: int = 0, damping: Damping = 1.0):
        check_order(order)
        self.order, self.damping = order, damping
        for step in range(1 if isinstance(damping, int | float) else len(damping)):
            found = self._damping(step)
            if len(found) != order or not all(math.isfinite(weight) for weight in found):
                raise ValueError(f"damping must be finite numbers, one per step or as many as the order, {order}; got "
                                 f"{found}")

    def _damping(self, step: int) -> Sequence[float]:
        given = self.damping
        if not isinstance(given, int | float):
            if step >= len(given):
                raise ValueError(f"there is damping for {len(given)} network calls, and none for call {step}")
            given = given[step]
        return [given] * self.order if isinstance(given, int | float) else given

    def extrapolates(self, step: int) -> bool:
        """Whether the forecast differs from reuse at a network call, given enough full steps."""
        return any(self._damping(step))

    def weights(self, step: int, steps: Sequence[int]) -> list[float]:
        """The weights for `forecast` at `step` after the full steps `steps`, the latest first: as many as the order.

        Values that do not exist yet have weight 0, which lowers the order. Raises ValueError for a step without
        damping.
        """
        terms, damping = newton_terms(step, steps[:self.order + 1]), self._damping(step)
        found = [sum(w * term[j] for w, term in zip(damping, terms, strict=False)) for j in range(len(terms))]
        return found + [0.0] * (self.order - len(found))


def on_device(weights: object, like: Tensor) -> Tensor:
    """Numbers as a tensor with the device and dtype of another. The copy to a GPU does not wait for its kernels."""
    made = torch.tensor(weights, dtype=like.dtype)
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made.to(like.device)
