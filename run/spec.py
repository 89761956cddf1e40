"""A run as a value. All that decides the image of a seed is in a RunSpec: its options, defaults, checks and names are
said here and in the dataclasses that it is made of, and nowhere else.

    RunSpec.of("configs/ddpm_cifar10.yaml", interval=5, branch=2).open().settings
"""

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from run import arguments
from run.families import (
    Condition,
    Config,
    Family,
    build,
    example_inputs,
    families,
    family_named_by,
    find_config,
    load_config,
)
from run.files import stamp
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.deepcache import PlannedDeepCache
from unet_caching.nest import NestedUNet
from unet_caching.options import MethodOptions, RunShape, option
from unet_caching.registry import METHODS, CachePlan, plan
from unet_caching.samplers.ddim import is_listed
from unet_caching.samplers.samplers import (
    SAMPLERS,
    SAMPLERS_HELP,
    TIMESTEPS,
    TIMESTEPS_HELP,
    Sampler,
    num_calls,
    timesteps_for,
)
from unet_caching.trace import Asked, positions, reused, trace

MOST_STEPS, MOST_GUIDANCE = 10_000, 1000
_TRACED: WeakKeyDictionary[NestedUNet, list[Asked]] = WeakKeyDictionary()      # what a call asks its cache for
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SamplerOptions:
    """The sampler's settings; what is not given is the config's."""
    title: ClassVar[str] = "the sampler (defaults: the config's, which are the paper's)"
    sampler: str | None = option(None, SAMPLERS_HELP, choices=SAMPLERS)
    steps: int | None = option(None, "network calls per image; plms makes one more")
    timesteps: str | None = option(None, TIMESTEPS_HELP, metavar="SPACING")
    eta: float | None = option(None, "ddim: 0 = deterministic, 1 = the variance of DDPM")


@dataclass(frozen=True)
class NetworkOptions:
    """The weights, and their number format."""
    title: ClassVar[str] = "the network"
    checkpoint: Path | None = option(None, "weights, instead of the config's")
    dtype: str = option("fp32", "of the network; the sampler is fp32 (default: fp32)", choices=tuple(DTYPES))


@dataclass(frozen=True)
class RunSpec:
    """One run of a model of a family (run/families.py). config: a file of configs/, or another of their kind.

    Options that are not given are the config's, which are the paper's.
    """
    family: str
    config: Path
    network: NetworkOptions = NetworkOptions()
    condition: Condition = Condition()
    sampler: SamplerOptions = SamplerOptions()
    caching: tuple[MethodOptions, ...] = field(default_factory=lambda: tuple(method() for method in METHODS))

    @classmethod
    def of(cls, config: Path | str, **options: Any) -> "RunSpec":
        """A run of a config with options by name. Raises UserError for one that the model does not have."""
        family = family_named_by(config)
        return cls(family.name, Path(config), condition=family.condition()).having(**options)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The dataclasses of its options, in the order of the command line."""
        return self.condition, self.network, self.sampler, *self.caching

    def having(self, **options: Any) -> "RunSpec":
        """The same run with some options changed; paths may be text. Raises UserError."""
        def changed(part: Any) -> Any:
            own = {name: arguments.typed(type(part), name, options.pop(name)) for name in list(options)
                   if name in arguments.names(part)}
            return replace(part, **own)

        found = RunSpec(self.family, self.config, changed(self.network), changed(self.condition), changed(self.sampler),
                        tuple(changed(part) for part in self.caching))
        if options:
            known = ", ".join(name for part in self.parts for name in arguments.names(part))
            raise UserError(f"{self.config} has no option {', '.join(options)}: there are {known}")
        return found

    def given(self) -> dict[str, Any]:
        """The options that are not as they are by default, by name."""
        return {name: value for part in self.parts for name, value in arguments.given(part).items()}

    def words(self) -> list[str]:
        """The options of the sample command that make this run."""
        return ["--config", str(self.config), *arguments.words(self.given(), families()[self.family].flags)]

    def open(self) -> "Run":
        """Read the config, and check the run as far as that goes without weights. Raises UserError."""
        return Run(self)


class Run:
    """A RunSpec together with the config of its model, and what follows from both.

    Raises UserError for options that do not go together. caching: its methods, checked. unet: on the meta device.
    """

    def __init__(self, spec: RunSpec):
        self.spec = spec
        self.family: Family = families()[spec.family]
        file = find_config(spec.config)
        self.config, self.unet = _open(spec.family, file, *stamp(file))
        defaults = self.config.sampler
        self.default_sampler: str = getattr(defaults, "sampler", "ddim")
        chosen = _chosen_sampling(spec)
        self.sampler_name: str = chosen.get("sampler", self.default_sampler)
        with as_user_error():
            self.timesteps: str = chosen.get("timesteps") or timesteps_for(self.sampler_name, defaults.timesteps)
        own = is_listed(self.timesteps)
        if not own and self.timesteps not in TIMESTEPS:
            raise UserError(f"--timesteps must be one of {', '.join(TIMESTEPS)}, or a list like 999,750,400,120, got "
                            f"{self.timesteps[:40]!r}")
        self.steps: int = chosen.get("steps", self.timesteps.count(",") + 1 if own else defaults.steps)
        given = getattr(spec.condition, "guidance", None)
        self.guidance: float = getattr(defaults, "guidance", 1.0) if given is None else given
        if not 0 <= self.guidance <= MOST_GUIDANCE:         # beyond, numbers overflow and images are noise
            raise UserError(f"--guidance must be from 0 to {MOST_GUIDANCE}, got {self.guidance:g}")
        if spec.network.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {spec.network.dtype!r}")
        if not 1 <= self.steps <= MOST_STEPS:
            _ = self.sampler        # which says how many it takes
            raise UserError(f"--steps must be from 1 to {MOST_STEPS}, got {self.steps}")
        with as_user_error():
            self.caching: CachePlan = plan(spec.caching, RunShape(self.steps, self.calls, self.unet.num_branches,
                                                                  defaults.branch))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.network.dtype]

    @property
    def checkpoint(self) -> Path:
        """The path of the weights."""
        return self.spec.network.checkpoint or Path(self.config.checkpoint)

    @property
    def calls(self) -> int:
        """Network calls per image."""
        return num_calls(self.sampler_name, self.steps)

    @property
    def rows_per_image(self) -> int:
        """Rows of the network's batch: 2 with classifier-free guidance, else 1."""
        return 1 if self.guidance == 1 else 2

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler with its settings. Raises UserError where they do not go together."""
        with as_user_error():
            return Sampler(self.sampler_name, self.steps, self.timesteps, self.eta, self.config.diffusion)

    @property
    def eta(self) -> float:
        if self.spec.sampler.eta is not None:
            return self.spec.sampler.eta
        return getattr(self.config.sampler, "eta", 0.0) if self.sampler_name == "ddim" else 0.0

    @property
    def told(self) -> dict[str, Any]:
        """What run.json of its images says, as far as that is known without weights, prompts and device."""
        guided = {"guidance": self.guidance} if hasattr(self.config.sampler, "guidance") else {}
        return {"model": self.config.name, "sampler": self.sampler_name, "steps": self.steps,
                "dtype": self.spec.network.dtype, "timesteps": self.timesteps, "eta": self.eta, **guided,
                "cache": self.caching.settings}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that run.json of its images says, as far as it is known without weights; the caching aside.

        Raises UserError where sampler, size or prompts cannot be.
        """
        return {"model": self.config.name, **self.family.settings(self), **self.sampler.settings,
                "dtype": self.spec.network.dtype}

    @cached_property
    def fingerprint(self) -> str:
        """By which pipelines know the U-Net (`unet_caching.files.fitted.fingerprint`)."""
        x, _, *context = example_inputs(self.config)
        return fingerprint(self.unet, x.shape[1], context[0].shape[-1] if context else None)

    @property
    def deepcache(self) -> PlannedDeepCache | None:
        """DeepCache in this run, or None."""
        return self.caching.of(PlannedDeepCache)

    @cached_property
    def reused(self) -> list[frozenset[Hashable]]:
        """What each network call of an image reuses, by the keys of its caching; nothing where it is a full one."""
        policy = self.caching.policy("meta", self.dtype)
        return [frozenset()] * self.calls if policy is None else list(reused(self.asked, policy, self.calls))

    @property
    def asked(self) -> list[Asked]:
        """What a network call asks its cache for, traced once for each U-Net."""
        if self.unet not in _TRACED:
            inputs = example_inputs(self.config)
            _TRACED[self.unet] = trace(lambda cache: self.unet(*inputs, cache=cache))
        return _TRACED[self.unet]

    @property
    def full_calls(self) -> int:
        """The network calls of an image that run all levels of the U-Net."""
        return sum(not any(isinstance(key, int) for key in keys) for keys in self.reused)

    def refuse_foreign(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings, as far as they are known, that the caching was not fitted to. Raises UserError."""
        with as_user_error():
            self.caching.check(settings)
            if self.caching:
                self.caching.check_network(self._channels())

    def _channels(self) -> dict[Hashable, int]:
        """How many channels each value has that the U-Net asks a cache for, by its key."""
        return {key: one.shape[1 if len(one.shape) == 4 else -1] for key, one in positions(self.asked).items()}

    @property
    def name(self) -> str:
        """The sample folder's name: uncached, steps59, uniform_n5, parti_centered_n5_c10_p1.5, uniform_n10_zeroed."""
        defaults = self.config.sampler
        first, last = self.spec.condition.name()
        weights, usual = self.spec.network.checkpoint, timesteps_for(self.sampler_name, defaults.timesteps)
        parts = [*([weights.name] if weights else []),
                 *(part for method in self.caching.methods for part in method.name),
                 *([self.sampler_name] if self.sampler_name != self.default_sampler else []),
                 *([f"steps{self.steps}"] if self.steps != defaults.steps else []),
                 *([_short(self.timesteps)] if self.timesteps != usual else []), *last]
        return "_".join([*first, *(parts or ["uncached"])])


def _chosen_sampling(spec: RunSpec) -> dict[str, Any]:
    """The sampler's settings that do not come from the config: the user's, then those of what was fitted to a run.

    Raises UserError for a file that cannot be read.
    """
    with as_user_error():
        fitted = {name: value for method in spec.caching for name, value in method.sampling().items()}
    return fitted | arguments.given(spec.sampler)


def _short(timesteps: str) -> str:
    """A spacing's name; of a list of timesteps, a digest."""
    return f"times{hashlib.sha256(timesteps.encode()).hexdigest()[:8]}" if is_listed(timesteps) else timesteps


@cache
def _open(family: str, path: Path, *seen: int) -> tuple[Config, NestedUNet]:
    """The config and the U-Net of a model: the same for all its runs, as long as its file does not change."""
    config = load_config(path, families()[family])
    return config, build(config)
