"""Which network calls of a run are full steps: sorted lists of indices that start with 0.

Step 0 is the first network call, at the highest noise level. Each rule makes ceil(num_steps / interval) full steps;
`released_ldm` may make fewer.
"""

import math
from collections.abc import Callable
from numbers import Integral

import numpy as np

# The arguments of each rule after the number of steps and the interval.
RULES: dict[str, tuple[str, ...]] = {"uniform": (), "centered": ("center", "power"), "released-ldm": ("power",)}


def check_settings(rule: str, interval: int, center: int | None = None, power: float | None = None) -> None:
    """Raise a ValueError for settings that are wrong for any number of steps."""
    if rule not in RULES:
        raise ValueError(f"unknown schedule {rule!r}: choose from {', '.join(RULES)}")
    for name, value in (("center", center), ("power", power)):
        if (value is not None) != (name in RULES[rule]):
            raise ValueError(f"schedule {rule} {'needs a' if value is None else 'takes no'} {name}")
    for name, value, least in (("interval", interval, 1), ("center", center, 0)):
        if value is not None and not (isinstance(value, Integral) and value >= least):
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
    if power is not None:
        _check_power(power)


def _check_power(power: float) -> None:
    # Smaller and much larger powers leave only the ends of a run; and the search in `centered` goes down by 0.02.
    if not 0.1 <= power <= 100:
        raise ValueError(f"power must be a number from 0.1 to 100, got {power}")


def full_steps(rule: str, num_steps: int, interval: int, center: int | None = None,
               power: float | None = None) -> list[int]:
    """The full steps of a rule of RULES. Raises ValueError for settings that the rule does not take."""
    check_settings(rule, interval, center, power)
    makers: dict[str, Callable[..., list[int]]] = {"uniform": uniform, "centered": centered,
                                                   "released-ldm": released_ldm}
    given = {"center": center, "power": power}
    return makers[rule](num_steps, interval, **{name: given[name] for name in RULES[rule]})


def _check(num_steps: int, interval: int, power: float = 2.0) -> int:
    """Check the arguments that all rules share, and return ceil(num_steps / interval)."""
    if num_steps < 1:
        raise ValueError(f"the number of steps must be 1 or more, got {num_steps}")
    if not 1 <= interval <= num_steps:
        raise ValueError(f"interval must be from 1 (no caching) to the number of steps ({num_steps}), got {interval}")
    _check_power(power)
    return math.ceil(num_steps / interval)


def uniform(num_steps: int, interval: int) -> list[int]:
    """Every `interval`-th step from the first on (DeepCache, Section 3.3, 1:N inference).

    Raises ValueError unless 1 <= interval <= num_steps.
    """
    _check(num_steps, interval)
    return list(range(0, num_steps, interval))


def centered(num_steps: int, interval: int, center: int, power: float) -> list[int]:
    """More full steps around step `center`, thinning out with `power` (DeepCache, Section 3.3, non-uniform 1:N).

    Gives exactly the steps of the released code (github horseee/DeepCache, 1691a3a). Raises ValueError for an interval
    outside 1..num_steps, a center outside 0..num_steps - 1, or settings for which the search below finds no schedule.
    """
    num_full = _check(num_steps, interval, power)
    if not 0 <= center < num_steps:
        raise ValueError(f"center must be a step from 0 to {num_steps - 1}, got {center}")
    if interval == 1:
        return list(range(num_steps))
    tried = power
    while True:
        # The root of the negative end point is the complex principal value, c^(1/p) e^(i pi/p). So the points between
        # the ends lie on a line in the complex plane, and the steps are the real part of their power. A real power that
        # keeps the sign would give other steps, and the paper's tables depend on these.
        low = np.complex128(-center) ** (1 / tried) if center else np.complex128(0)
        high = (num_steps - center) ** (1 / tried)
        points = low + (high - low) * np.arange(num_full + 1) / num_full
        offsets = sorted({int(offset) for offset in (points ** tried).real.astype(np.int32)})
        steps = sorted({0, *(offset + center for offset in offsets[1:-1])})
        if len(steps) == num_full:
            return steps
        tried -= 0.02           # the released search; for the paper's T=50 N=2 c=20 p=1.3 it ends at 1.2
        if tried <= 1:
            raise ValueError(f"no schedule of {num_full} full steps in {num_steps} has center {center} and power "
                             f"{power}: choose another center, a higher power, or a longer interval")


def released_ldm(num_steps: int, interval: int, power: float) -> list[int]:
    """The rule of the released LDM code: dense at the start, without a center (github horseee/DeepCache, 1691a3a).

    It drops repeated steps, so there may be fewer than ceil(num_steps / interval) full steps.
    Raises ValueError unless 1 <= interval <= num_steps.
    """
    num_full = _check(num_steps, interval, power)
    points = np.linspace(0, num_steps ** (1 / power), num_full + 1) ** power
    return [int(step) for step in np.unique(points.astype(np.int32))[:-1]]
