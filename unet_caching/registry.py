"""The registry of caching methods.

The sample commands, MACs, throughput, studies, tables, graphs and diffusers pipelines know every method that is listed
here, by the fields of its options and by its `Method` (unet_caching/options.py).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from unet_caching.keep import Keep, joined
from unet_caching.methods.adaptive import AdaptiveOptions
from unet_caching.methods.block_caching import BlockCachingOptions
from unet_caching.methods.clockwork import ClockworkOptions
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.methods.forecast import ForecastOptions
from unet_caching.methods.output import OutputOptions
from unet_caching.methods.plan import PlanOptions
from unet_caching.options import Method, MethodOptions, RunShape
from unet_caching.policy import Policy

METHODS: tuple[type[MethodOptions], ...] = (DeepCacheOptions, BlockCachingOptions, PlanOptions, ClockworkOptions,
                                            AdaptiveOptions, OutputOptions, ForecastOptions)
Kind = TypeVar("Kind", bound=Method)


@dataclass(frozen=True)
class Methods:
    """The methods of one run; without any, the run does not cache."""
    methods: tuple[Method, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.methods)

    @property
    def settings(self) -> dict[str, Any]:
        """The entry `cache` of run.json."""
        found: dict[str, Any] = {"interval": 1}
        for method in self.methods:
            found |= method.settings
        return found

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Policy | None:
        """A fresh policy for one batch; None without caching. device, dtype: the network's."""
        found = (method.policy(device, dtype) for method in self.methods)
        policies = [policy for policy in found if policy is not None]
        if len(policies) < 2:
            return policies[0] if policies else None
        return joined(*(policy for policy in policies if isinstance(policy, Keep)))     # other policies are used alone

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError if a fitted file was not made for a run with these settings (`Fitted.check`)."""
        for method in self.methods:
            for file in method.files:
                file.check(settings)

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        """Raise a ValueError if the U-Net does not fit a method (`Method.check_network`)."""
        for method in self.methods:
            method.check_network(channels)

    def of(self, kind: type[Kind]) -> Kind | None:
        """The run's method of a class, or None."""
        return next((method for method in self.methods if isinstance(method, kind)), None)


def bind(options: Sequence[MethodOptions], shape: RunShape) -> Methods:
    """The methods that the options set in a run. Raises ValueError for options that do not go together."""
    found: list[Method] = []
    for one in sorted(options, key=lambda one: METHODS.index(type(one))):
        method = one.bind(shape, found)
        if method is not None:
            found.append(method)
    return Methods(tuple(found))


def options_by_name(values: Mapping[str, Any]) -> list[MethodOptions]:
    """The options of all methods, with some values by name. Raises ValueError for a name that no method has."""
    left = dict(values)
    found = [method(**{one.name: left.pop(one.name) for one in fields(method) if one.name in left})
             for method in METHODS]
    if left:
        known = ", ".join(one.name for method in METHODS for one in fields(method))
        raise ValueError(f"there is no option {', '.join(left)}: caching has {known}")
    return found
