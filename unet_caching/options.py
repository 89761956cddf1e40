"""A caching method as programs know it: its options, and what comes of them once a run is known."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from unet_caching.forecast import Damping
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
    """What methods need to know of a run.

    steps: how many schedules are made for. calls: how often the network is called, once more for PLMS. num_branches:
    skips of the U-Net. branch: the one that is cached unless the user says otherwise.
    """
    steps: int
    calls: int
    num_branches: int
    branch: int


class Planned:
    """A method's options, checked against a run.

    settings: for run.json, under `cache`; those of the first method stand there bare, others under their name.
    name: what it adds to the name of a sample folder, in parts. summary: the same for the last line of a command.
    system: what tables and legends call it, where its settings do not say. online: whether what a call computes is
    only known when it runs. fitted: whether it is of a file that belongs to one model.
    """
    settings: Mapping[str, Any]
    name: Sequence[str] = ()
    summary: str = ""
    system: str = ""
    online: bool = False
    fitted: bool = False

    def policy(self, device: torch.device | str, dtype: torch.dtype) -> Policy | None:
        """A fresh policy for one batch of a network on a device and in a dtype; None where the method has none."""
        raise NotImplementedError

    def extrapolate(self, order: int, damping: Damping, calls: int) -> None:
        """Forecast what is reused, from now on (`unet_caching.forecast`). calls: network calls of the run.

        Raises ValueError where the method cannot.
        """
        raise ValueError("--forecast is not for the other caching options")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run that what was fitted was not made for; settings that are not known yet may be left out.

        Raises ValueError that says what differs.
        """

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        """Refuse a U-Net that lacks what is cached, or has another number of channels there. Raises ValueError.

        channels: of all that its cache is asked for, by key.
        """


@dataclass(frozen=True)
class MethodOptions:
    """The options of one method; subclasses add their fields by `option`. title: what --help calls their group."""
    title: ClassVar[str] = "caching"

    def sampling(self) -> Mapping[str, Any]:
        """Settings of the sampler (sampler, steps, timesteps) that a run has unless its user says others.

        Raises ValueError for a file that cannot be read.
        """
        return {}

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> Planned | None:
        """Check the options against a run; None where they ask for nothing.

        before: what the methods ahead of it do in the same run. Raises ValueError.
        """
        raise NotImplementedError
