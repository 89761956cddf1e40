"""A caching method as programs know it: its options, and the method that they give in a run."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from unet_caching.files.fitted import Fitted
from unet_caching.forecast import Forecast, check_order, usable
from unet_caching.keep import Keep
from unet_caching.policy import Policy

Value = TypeVar("Value")


def option(default: Value, help: str, choices: Sequence[str] = (), metavar: str | None = None, **more: Any) -> Value:
    """A field of a dataclass of options, with its --help. The field's name is its flag on the command line.

    more: least, the least value of a number; flag, if it is not the field's name; word, for an option without a flag;
    one_of, the name of a group of options that exclude each other; any other argument of argparse.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, **more})


def required(help: str, **more: Any) -> Any:
    """An `option` that must be given."""
    return field(kw_only=True, metadata={"help": help, **more})


class RunShape(NamedTuple):
    """What methods need to know of a run."""
    steps: int              # the number of steps, which schedules are made for
    calls: int              # the number of network calls: for PLMS one more
    num_branches: int       # skip connections of the U-Net
    branch: int             # the default of --branch


class Method:
    """A caching method in a run. Its options have been checked."""
    settings: Mapping[str, Any]         # for run.json, under `cache`
    name: Sequence[str] = ()            # its parts of a sample folder's name
    summary: str = ""                   # its part of a command's last line
    system: str = ""                    # its name in tables and legends, if its settings do not say
    online: bool = False                # whether it is decided during the run what a call computes
    files: Sequence[Fitted] = ()        # its fitted files, which belong to one model

    def policy(self, device: torch.device | str, dtype: torch.dtype) -> Policy | None:
        """A fresh policy for one batch of a network on a device and in a dtype; None if the method has none."""
        raise NotImplementedError

    def extrapolate(self, forecast: Forecast, calls: int) -> None:
        """Forecast the values that the method reuses. calls: network calls of the run.

        Raises ValueError if the method cannot.
        """
        raise ValueError("--forecast is not for the other caching options")

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        """Raise a ValueError if a U-Net lacks a cached value, or it has another number of channels.

        channels: of all values that a cache may keep, by key.
        """


class ScheduledMethod(Method):
    """A method that keeps values on a schedule, as `Keep` does, and may forecast them."""
    computed: Mapping[Any, Collection[int]]         # key -> the network calls that compute its value
    forecast = Forecast()

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Keep:
        return Keep(self.computed, self.forecast)

    def extrapolate(self, forecast: Forecast, calls: int) -> None:
        check_order(forecast.order, max((usable(steps, calls) for steps in self.computed.values()), default=None))
        self.forecast = forecast


@dataclass(frozen=True)
class MethodOptions:
    """The options of one method; subclasses add their fields by `option`."""
    title: ClassVar[str] = "caching"    # the title of their group in --help
    rare: ClassVar[bool] = False        # whether --help lists them last

    def sampling(self) -> Mapping[str, Any]:
        """The run's defaults of sampler, steps and timesteps, and the table of coefficients that belongs to all three.

        Raises ValueError for a file that cannot be read.
        """
        return {}

    def bind(self, shape: RunShape, others: Sequence[Method]) -> Method | None:
        """The method in a run; None if the options leave it off.

        others: the run's methods before this one. Raises ValueError for options that are not possible.
        """
        raise NotImplementedError
