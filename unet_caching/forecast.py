"""Forecast: a cached step sees its value as a polynomial through the last full steps foretells it.

The papers reuse a value as it was on the last full step, s_0: a polynomial of order 0 in time. One of order p goes
through the values F_0, F_1, ... of the last p + 1 full steps s_0 > s_1 > ..., of whatever spacing, in the index of the
network call. In Newton's form, with divided differences f[...], and every term damped by a weight w_k:

    F(s) = F_0 + w_1 (s - s_0) f[s_0, s_1] + w_2 (s - s_0) (s - s_1) f[s_0, s_1, s_2] + ...

It costs no multiply-accumulates of the network, one weighted sum, and one more value to keep for each order. Deep
features change slowly beside the blocks around them, so that this is the two-step Adams-Bashforth idea for the slow
part of a two-rate system; it is not of the papers.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

# One weight for all terms and steps, or for each network call one for all terms or one per term.
Damping = float | Sequence[float] | Sequence[Sequence[float]]


def newton_terms(step: int, steps: Sequence[int]) -> list[list[float]]:
    """Newton's terms at `step` of the polynomial through the values of `steps`, the latest first.

    Entry [k - 1][j - 1] is what F_j - F_0 is multiplied by in the term of order k = 1, 2, ...; F_0 itself is order 0.
    """
    terms = []
    for k in range(1, len(steps)):
        reach = math.prod(step - s for s in steps[:k])
        terms.append([reach / math.prod(steps[j] - s for s in steps[:k + 1] if s != steps[j]) if j <= k else 0.0
                      for j in range(1, len(steps))])
    return terms


def forecast(latest: Tensor, older: Sequence[Tensor], weights: Tensor) -> Tensor:
    """latest + sum of weights[i] (older[i] - latest), i = 0, 1, ...

    weights: [len(older) or more], of the values' device and dtype; as a tensor, so that a compiled or recorded network
    takes those of any step.
    """
    value = torch.lerp(latest, older[0], weights[0])
    for i, one in enumerate(older[1:], 1):
        value = torch.addcmul(value, one - latest, weights[i])
    return value


def usable(full_steps: Collection[int], calls: int | None = None) -> int:
    """How many full steps there are before some cached one. calls: network calls of the run, where they are known."""
    if calls is None:
        return len(full_steps)
    last_cached = max((step for step in range(calls) if step not in full_steps), default=0)
    return sum(step < last_cached for step in full_steps)


def check_order(order: int, usable: int | None = None) -> None:
    """Refuse what is no order, or one that a schedule can never feed: it takes one more full step than the order.

    usable: full steps before some cached one, where they are known. Raises ValueError.
    """
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"the order of a forecast must be a whole number from 0 (reuse), got {order!r}")
    if order and usable is not None and order >= usable:
        raise ValueError(f"a forecast of order {order} needs {order + 1} full steps before a cached one, and this "
                         f"schedule has {usable}")


class Forecast:
    """An order, and how its terms are damped.

    damping: 1 is the polynomial itself, 0 is reuse. Raises ValueError for an order that is no whole number from 0, or
    damping that is not finite or not as much per step as the order.
    """

    def __init__(self, order: int = 0, damping: Damping = 1.0):
        check_order(order)
        self.order, self.damping = order, damping
        for step in range(1 if isinstance(damping, int | float) else len(damping)):
            found = self._damping(step)
            if len(found) != order or not all(math.isfinite(weight) for weight in found):
                raise ValueError(f"damping must be finite numbers, for a step one or as many as the order, {order}; "
                                 f"got {found}")

    def _damping(self, step: int) -> Sequence[float]:
        given = self.damping
        if not isinstance(given, int | float):
            if step >= len(given):
                raise ValueError(f"there is damping for {len(given)} network calls, and none for call {step}")
            given = given[step]
        return [given] * self.order if isinstance(given, int | float) else given

    def extrapolates(self, step: int) -> bool:
        """Whether it differs from reuse at a network call, given enough full steps."""
        return any(self._damping(step))

    def weights(self, step: int, steps: Sequence[int]) -> list[float]:
        """What `forecast` takes at `step` after full steps `steps`, the latest first: as many as the order.

        Zeros for values that there are not yet: the order is then the one that they allow. Raises ValueError for a
        step that has no damping.
        """
        terms, damping = newton_terms(step, steps[:self.order + 1]), self._damping(step)
        found = [sum(w * term[j] for w, term in zip(damping, terms, strict=False)) for j in range(len(terms))]
        return found + [0.0] * (self.order - len(found))


def on_device(weights: object, like: Tensor) -> Tensor:
    """Numbers as a tensor beside another, in its dtype. To a GPU it goes without waiting for what runs there."""
    made = torch.tensor(weights, dtype=like.dtype)
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made.to(like.device)
