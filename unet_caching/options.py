"""A caching method as programs know it: its options, and what comes of them once a run is known."""

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
    """A field of a dataclass of options, and what the command line says of it, where the field's name is its flag.

    more: least, the least that a number may be; flag, where that is not the field's name; word, for one that stands
    without a flag; one_of, a name that options share which exclude each other; anything else that argparse takes.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, **more})


def required(help: str, **more: Any) -> Any:
    """As `option`, for one that must be given."""
    return field(kw_only=True, metadata={"help": help, **more})


class RunShape(NamedTuple):
    """What methods need to know of a run."""
    steps: int              # how many schedules are made for
    calls: int              # how often the network is called, once more for PLMS
    num_branches: int       # skips of the U-Net
    branch: int             # the one that is cached unless the user says otherwise


class Method:
    """A method of caching in a run: its options, checked against it."""
    settings: Mapping[str, Any]         # for run.json, under `cache`
    name: Sequence[str] = ()            # what it adds to the name of a sample folder, in parts
    summary: str = ""                   # what the last line of a command says
    system: str = ""                    # what tables and legends call it, where its settings do not say
    online: bool = False                # whether what a call computes is only known when it runs
    files: Sequence[Fitted] = ()        # what was fitted, which belongs to one model

    def policy(self, device: torch.device | str, dtype: torch.dtype) -> Policy | None:
        """A fresh policy for one batch of a network on a device and in a dtype; None where the method has none."""
        raise NotImplementedError

    def extrapolate(self, forecast: Forecast, calls: int) -> None:
        """Forecast what is reused, from now on. calls: network calls of the run.

        Raises ValueError where the method cannot.
        """
        raise ValueError("--forecast is not for the other caching options")

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        """Refuse a U-Net that lacks what is cached, or has another number of channels there. Raises ValueError.

        channels: of all that its cache is asked for, by key.
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
    title: ClassVar[str] = "caching"    # what --help calls their group
    rare: ClassVar[bool] = False        # whether --help has them after all others

    def sampling(self) -> Mapping[str, Any]:
        """Settings of the sampler (sampler, steps, timesteps) that a run has unless its user says others, and the table
        of coefficients that goes with all of them.

        Raises ValueError for a file that cannot be read.
        """
        return {}

    def bind(self, shape: RunShape, others: Sequence[Method]) -> Method | None:
        """The method in a run; None where the options ask for nothing.

        others: the methods ahead of it in the same run. Raises ValueError for options that cannot be.
        """
        raise NotImplementedError
