"""A caching policy decides, over the network calls of a run, which values are computed and which are reused."""

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from torch import Tensor


class Policy(Protocol):
    """The whole protocol, and its base class: one that computes everything and keeps nothing.

    `unet(x, t, cache=policy.at(step))` runs network call `step`; `reset()` comes after the last call of a batch.
    A policy of one's own overrides `__call__`, and what else its settings need:

    - `at` chooses what the next call does. It sets plain attributes, outside any compiled region.
    - `owns` tells which keys it may keep; where several policies share a run each is asked for its own keys only.
    - `kept` are the tensors that it holds between calls. CUDA graphs read and write them in buffers of their own:
      to assign to it puts other tensors in their places.
    - `pattern` is equal for calls that compute, keep and reuse the same keys, so that one recording serves them all.
      None (the default) means that this is not known: such calls are never recorded.
    """

    def at(self, step: int) -> "Policy":
        """What network call `step` is given as its cache."""
        return self

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The value of `key`, computed or not."""
        return compute()

    def reset(self) -> None:
        """Let go of all values."""
        return None

    def owns(self, key: Hashable) -> bool:
        """Whether this policy may keep the value of `key`."""
        return True

    @property
    def pattern(self) -> Hashable | None:
        """What the next call does, as far as its recording goes; None where that is not known."""
        return None

    @property
    def kept(self) -> Mapping[Hashable, Tensor]:
        """The tensors that are held between calls, by names of the policy's own."""
        return {}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        return None

