"""A run as a value. A RunSpec holds everything that decides the image of a seed. Its options, defaults, checks and
names stand only here and in the dataclasses that it consists of. Opened, it is a Run.

    RunSpec.of("configs/ddpm_cifar10.yaml", interval=5, branch=2).open().settings
    Run.of_folder("samples/cifar10_n5").calls
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from run import arguments
from run.families import Condition, Config, Family, build, example_inputs, families, family_named_by, find_config
from run.files import ROOT, stamp
from run.folder import differences, read_run
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.deepcache import DeepCacheMethod, DeepCacheOptions
from unet_caching.options import MethodOptions, RunShape, option, required
from unet_caching.registry import METHODS, Methods, bind
from unet_caching.samplers.samplers import (
    SAMPLERS,
    SAMPLERS_HELP,
    TIMESTEPS,
    TIMESTEPS_HELP,
    Sampler,
    timesteps_for,
)
from unet_caching.samplers.timesteps import is_listed
from unet_caching.trace import Asked, positions, reused, trace
from unet_caching.unet import NestedUNet

MOST_STEPS, MOST_GUIDANCE = 10_000, 1000
TRACED: WeakKeyDictionary[NestedUNet, list[Asked]] = WeakKeyDictionary()      # the values that a call may keep
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BRIEF = ("model", "sampler", "steps", "dtype", "timesteps", "eta", "guidance", "cache")


@dataclass(frozen=True)
class ConfigFile:
    """The model of a command."""
    title: ClassVar[str] = "the model"
    config: Path = required("configs/*.yaml; brings more options", metavar="FILE")


@dataclass(frozen=True)
class SamplerOptions:
    """The sampler's settings; None: the config's."""
    title: ClassVar[str] = "the sampler (defaults: the paper's)"
    sampler: str | None = option(None, SAMPLERS_HELP, choices=SAMPLERS, metavar="NAME")
    steps: int | None = option(None, "network calls per image; plms makes one more")
    timesteps: str | None = option(None, TIMESTEPS_HELP, metavar="SPACING")
    eta: float | None = option(None, "ddim: 0 = deterministic, 1 = the variance of DDPM")


@dataclass(frozen=True)
class NetworkOptions:
    """The weights and their number format."""
    title: ClassVar[str] = "the network"
    checkpoint: Path | None = option(None, "weights, instead of the config's")
    ema: str | None = option(None, "take the EMA weights (default: yes; CompVis' files: no)", choices=("yes", "no"))
    dtype: str = option("fp32", "of the network (default: fp32)", choices=tuple(DTYPES))


@dataclass(frozen=True)
class RunSpec:
    """One run of a model of a family (run/families.py). The defaults are the config's, which are the paper's."""
    family: str
    config: Path                    # a file of configs/, or a similar one
    network: NetworkOptions = NetworkOptions()
    condition: Condition = Condition()
    sampler: SamplerOptions = SamplerOptions()
    caching: tuple[MethodOptions, ...] = field(default_factory=lambda: tuple(method() for method in METHODS))

    @classmethod
    def of(cls, config: Path | str, family: str | None = None, **options: Any) -> "RunSpec":
        """A run of a config, with options by name. Raises UserError for an option that the model does not have.

        family: the config's family; None: the one that the config's name begins with.
        """
        known = families()[family] if family else family_named_by(config)
        return cls(known.name, Path(config), condition=known.condition()).having(**options)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The dataclasses of its options, in the order of the command line."""
        return self.condition, self.network, self.sampler, *self.caching

    def having(self, **options: Any) -> "RunSpec":
        """The run with some options changed; paths may be text. Raises UserError."""
        known = [name for part in self.parts for name in arguments.names(part)]
        if unknown := options.keys() - set(known):
            raise UserError(f"{self.config} has no option {', '.join(sorted(unknown))}: it has {', '.join(known)}")

        def changed(part: Any) -> Any:
            own = {name: arguments.typed(type(part), name, value) for name, value in options.items()
                   if name in arguments.names(part)}
            return replace(part, **own)

        condition, network, sampler, *caching = map(changed, self.parts)
        return replace(self, condition=condition, network=network, sampler=sampler, caching=tuple(caching))

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {name: value for part in self.parts for name, value in arguments.given(part).items()}

    def words(self) -> list[str]:
        """The options of the sample command that make this run."""
        return ["--config", str(self.config), *arguments.words(self.options, families()[self.family].flags)]

    def to_json(self) -> dict[str, Any]:
        """What run.json keeps to open the run again. Paths in the repository are relative to it."""
        options = {name: _portable(value) if isinstance(value, Path) else value for name, value in self.options.items()}
        return {"family": self.family, "config": _portable(find_config(self.config)), "options": options}

    def open(self) -> "Run":
        """Read the config, and check the run as far as possible without weights. Raises UserError."""
        return Run(self)


class Run:
    """A RunSpec with the config of its model, and what follows from both.

    Raises UserError for options that do not go together.
    """

    def __init__(self, spec: RunSpec):
        self.spec = spec
        self.family: Family = families()[spec.family]
        file = find_config(spec.config)
        self.config, self.unet = _open(spec.family, file, *stamp(file))     # the U-Net on the meta device
        spec.condition.check(self.config)
        usual, own = self.config.sampler.guidance, getattr(spec.condition, "guidance", None)
        self.guidance: float = own if own is not None else 1.0 if usual is None else usual
        if not 0 <= self.guidance <= MOST_GUIDANCE:         # above, numbers overflow and images are noise
            raise UserError(f"--guidance must be from 0 to {MOST_GUIDANCE}, got {self.guidance:g}")
        if spec.network.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {spec.network.dtype!r}")
        if spec.network.ema not in (None, "yes", "no"):
            raise UserError(f"--ema must be yes or no, got {spec.network.ema!r}")
        self.sampler = _sampler(spec, self.config)
        with as_user_error():
            shape = RunShape(self.steps, self.calls, self.unet.num_branches, self.config.sampler.branch)
            self.caching: Methods = bind(spec.caching, shape)

    @classmethod
    def of_folder(cls, folder: Path | str) -> "Run":
        """The run of a sample folder. Raises UserError if its options no longer give the folder's settings."""
        content = read_run(Path(folder))
        kept = content.get("run")
        if kept is None:        # a folder from before run.json kept the options
            return cls.of_settings(content["settings"])
        return RunSpec.of(kept["config"], kept["family"], **kept["options"]).open()._checked(content["settings"])

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Run":
        """The run with these settings, without caching or with DeepCache. Raises UserError for other caching."""
        cache = settings.get("cache") or {}
        names = (*arguments.names(SamplerOptions), "dtype", "guidance")
        options = {name: settings[name] for name in names if name in settings}
        options |= {name: cache[name] for name in arguments.names(DeepCacheOptions) if name in cache}
        return RunSpec.of(str(settings.get("model")), **options).open()._checked(settings)

    def _checked(self, settings: Mapping[str, Any]) -> "Run":
        """Return the run itself. Raises UserError if the settings are another run's."""
        ours = self.brief
        if unlike := differences({key: settings.get(key) for key in ours}, json.loads(json.dumps(ours))):
            raise UserError(f"{self.spec.config} now gives another run: {'; '.join(unlike)}")
        return self

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def calls(self) -> int:
        """Network calls per image."""
        return self.sampler.calls

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.network.dtype]

    @property
    def checkpoint(self) -> Path:
        """The path of the weights."""
        return self.spec.network.checkpoint or Path(self.config.checkpoint)

    @property
    def weights(self) -> dict[str, Any]:
        """Which weights of the checkpoint the run takes, if not the default ones: keywords of the family's `load_unet`
        and `checkpoint_sha256`.
        """
        network, condition = self.spec.network, self.spec.condition
        own = {name: getattr(condition, name, None) for name in ("unet", "vae")}
        own["ema"] = None if network.ema is None else network.ema == "yes"
        return {name: value for name, value in own.items() if value is not None}

    @property
    def rows_per_image(self) -> int:
        """Rows of the network's batch: 2 with classifier-free guidance, else 1."""
        return 1 if self.guidance == 1 else 2

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as run.json says it, as far as this is known without weights.

        Raises UserError for prompts that cannot be read; a missing prompts file is left out.
        """
        guided = {} if self.config.sampler.guidance is None else {"guidance": self.guidance}
        return {"model": self.config.name, **self.spec.condition.settings(self.config), **guided,
                **self.sampler.settings, "dtype": self.spec.network.dtype, "cache": self.caching.settings}

    @property
    def brief(self) -> dict[str, Any]:
        """The settings that distinguish runs of one model on the same seeds."""
        return {key: value for key, value in self.settings.items() if key in BRIEF}

    @cached_property
    def fingerprint(self) -> str:
        """The U-Net's fingerprint, which pipelines check (`unet_caching.files.fitted.fingerprint`)."""
        x, _, *context = example_inputs(self.config)
        return fingerprint(self.unet, x.shape[1], context[0].shape[-1] if context else None)

    @property
    def deepcache(self) -> DeepCacheMethod | None:
        """DeepCache in this run, or None."""
        return self.caching.of(DeepCacheMethod)

    @cached_property
    def reused(self) -> list[frozenset[Hashable]]:
        """The keys of the values that each network call of an image reuses; a full call reuses none."""
        policy = self.caching.policy("meta", self.dtype)
        return [frozenset()] * self.calls if policy is None else list(reused(self.trace, policy, self.calls))

    @property
    def trace(self) -> list[Asked]:
        """The values that a network call may keep, traced once for each U-Net."""
        if self.unet not in TRACED:
            inputs = example_inputs(self.config)
            TRACED[self.unet] = trace(lambda cache: self.unet(*inputs, cache=cache))
        return TRACED[self.unet]

    @property
    def full_calls(self) -> int:
        """The network calls of an image that run all levels of the U-Net."""
        return sum(not any(isinstance(key, int) for key in keys) for keys in self.reused)

    def made_for(self, checkpoint_sha256: str | None = None) -> dict[str, Any]:
        """What a fitted file says of this run (`Fitted.made_for`). checkpoint_sha256: None if it suits any weights."""
        return {"model": self.config.name, "unet": asdict(self.config.unet), "checkpoint_sha256": checkpoint_sha256,
                "sampler": self.sampler.name, "steps": self.steps, "timesteps": self.sampler.timesteps,
                "fingerprint": self.fingerprint}

    def refuse_foreign(self, settings: Mapping[str, Any]) -> None:
        """Raise a UserError if the caching was not fitted to these settings, which may be incomplete."""
        with as_user_error():
            self.caching.check({"fingerprint": self.fingerprint, **settings})
            if self.caching:
                self.caching.check_network(self._channels())

    def _channels(self) -> dict[Hashable, int]:
        """The number of channels of each value that a cache may keep, by its key."""
        return {key: one.shape[1 if len(one.shape) == 4 else -1] for key, one in positions(self.trace).items()}

    @property
    def name(self) -> str:
        """The sample folder's name: uncached, steps59, uniform_n5, parti_centered_n5_c10_p1.5, uniform_n10_zeroed."""
        usual, sampler = self.config.sampler, self.sampler
        first, last = self.spec.condition.name()
        weights = self.spec.network.checkpoint
        parts = [*([weights.name] if weights else []),
                 *(part for method in self.caching.methods for part in method.name),
                 *([sampler.name] if sampler.name != usual.sampler else []),
                 *([f"steps{self.steps}"] if self.steps != usual.steps else []),
                 *([_short(sampler.timesteps)] if sampler.timesteps != timesteps_for(sampler.name, usual.timesteps)
                   else []), *last]
        return "_".join([*first, *(parts or ["uncached"])])


def _sampler(spec: RunSpec, config: Config) -> Sampler:
    """The sampler of a run. The user's options have priority, then a fitted file's, then the config's.

    Raises UserError, also for a fitted file that cannot be read.
    """
    usual = config.sampler
    with as_user_error():
        fitted = {name: value for method in spec.caching for name, value in method.sampling().items()}
        options = fitted | arguments.given(spec.sampler)
        table = fitted.get("table") if options == fitted else None      # with other options the run is refused later
        name = options.get("sampler", usual.sampler)
        timesteps = options.get("timesteps") or timesteps_for(name, usual.timesteps)
        if not is_listed(timesteps) and timesteps not in TIMESTEPS:
            raise UserError(f"--timesteps must be one of {', '.join(TIMESTEPS)}, or a list like 999,750,400,120, got "
                            f"{timesteps[:40]!r}")
        steps = options.get("steps", timesteps.count(",") + 1 if is_listed(timesteps) else usual.steps)
        eta = spec.sampler.eta if spec.sampler.eta is not None else usual.eta if name == "ddim" else 0.0
        sampler = Sampler(name, steps, timesteps, eta, config.diffusion, table)     # raises for a wrong number of steps
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"--steps must be from 1 to {MOST_STEPS}, got {steps}")
    return sampler


def _short(timesteps: str) -> str:
    """The name of a spacing, or the digest of a list of timesteps."""
    return f"times{hashlib.sha256(timesteps.encode()).hexdigest()[:8]}" if is_listed(timesteps) else timesteps


def _portable(path: Path) -> str:
    """A path, relative to the repository if it is in there."""
    whole = path.absolute()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


@cache
def _open(family: str, path: Path, *seen: int) -> tuple[Config, NestedUNet]:
    """The config and the U-Net of a model, shared by all its runs as long as the file does not change."""
    config = families()[family].load_config(path)
    return config, build(config)


def config_among(words: Sequence[str]) -> Path | None:
    """The config that a command line names. It decides which other options exist, so it is read first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    return first.parse_known_args(words)[0].config


def parse_run(doc: str | None, *kinds: type, family: Family | None = None, words: Sequence[str] | None = None,
              parts: Sequence[type] | None = None, defaults: Mapping[str, Any] | None = None,
              prog: str | None = None) -> list[Any]:
    """Parse a command line into a RunSpec and an object of each of the `kinds`, dataclasses of options.

    family: of the config; None: the one that --config says. parts: the dataclasses of a run's options that the command
    has; None: all. defaults: this command's, instead of the options' own; that of --batch-size is the family's.
    Raises UserError.
    """
    words = sys.argv[1:] if words is None else words
    config = config_among(words) if family is None else None
    if family is None and config is None:       # ends in an error or in --help
        arguments.parse(doc, ConfigFile, *kinds, words=words, defaults=defaults, prog=prog)
    family = family or family_named_by(config or "")
    spec = RunSpec(family.name, Path(), condition=family.condition())
    own = [type(part) for part in spec.parts if parts is None or isinstance(part, tuple(parts))]
    first, *objects = arguments.parse(doc, ConfigFile, *own, *kinds, words=words, flags=family.flags, prog=prog,
                                      defaults={"batch_size": family.batch_size, **(defaults or {})})
    options = {name: value for part in objects[:len(own)] for name, value in vars(part).items()}
    return [replace(spec, config=first.config).having(**options), *objects[len(own):]]
