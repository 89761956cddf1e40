"""Fitted files: results of fitting to the runs of one model. A file says which runs, and every other run refuses it.

A file without tensors is JSON; one with tensors is safetensors, with the same JSON in its metadata: `kind`, `format`,
`made_for`, `values`, `notes`, and the digest of all but the notes. Errors are ValueErrors that name the file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from unet_caching.files.schema import build, check, parse_json, read_json, readable
from unet_caching.files.whole import check_replaceable, write_and_move

FORMAT = 2
Kind = TypeVar("Kind", bound="Fitted")


@dataclass
class Fitted:
    """A result of fitting to the runs of one model. Each kind is a dataclass with further fields, which decide what a
    run does. A field that is None by default is left out of files and digests while it is None.
    """
    kind: ClassVar[str]                     # its name in messages
    maker: ClassVar[str]                    # the command that makes one
    has_tensors: ClassVar[bool] = False
    made_for: dict[str, Any]                # the settings of `MadeFor`
    tensors: dict[str, Tensor] = field(default_factory=dict, kw_only=True)      # float32; in files half precision
    notes: dict[str, Any] = field(default_factory=dict, kw_only=True)           # how it was made
    known_as: str | None = field(default=None, kw_only=True)    # its sha256 in an earlier format, for runs that have it

    @property
    def sha256(self) -> str:
        """The digest that runs record, of everything that decides what they do."""
        return self.known_as or self._digest()

    def _values(self) -> dict[str, Any]:
        values = asdict(replace(self, tensors={}))
        optional = {one.name for one in fields(self) if one.default is None}
        return {name: value for name, value in values.items()
                if name not in _COMMON and not (value is None and name in optional)}

    def _digest(self) -> str:
        content = [self.kind, self.made_for, self._values(), self.known_as,
                   {name: hashlib.sha256(_half(value).numpy().tobytes()).hexdigest()
                    for name, value in self.tensors.items()}]
        numbers = json.loads(json.dumps(content), parse_int=float)      # so that 5 equals 5.0
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write a file, whole or not at all."""
        about = {"kind": self.kind, "format": FORMAT, "sha256": self._digest(), "made_for": self.made_for,
                 "values": self._values(), "notes": self.notes,
                 **({} if self.known_as is None else {"known_as": self.known_as})}
        content = f"{readable(about)}\n".encode()
        if self.has_tensors:
            halves = {name: _half(value) for name, value in self.tensors.items()}
            content = save(halves, {"fitted": json.dumps(about)})
        check_replaceable(Path(path))
        write_and_move(Path(path), lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls: type[Kind], path: Path | str) -> Kind:
        """Read a file. Raises ValueError if it is missing, damaged, changed by hand or of another kind."""
        if not Path(path).is_file():
            raise ValueError(f"no {cls.kind} {path}: {cls.maker} makes one")
        about, tensors = _tensors(path) if cls.has_tensors else (read_json(path), {})
        if not isinstance(about, dict) or (about.get("kind"), about.get("format")) != (cls.kind, FORMAT):
            raise ValueError(f"{path} holds no {cls.kind} of format {FORMAT}: {cls.maker} makes one")
        check(about, _File, path)
        if both := about["values"].keys() & _COMMON:
            raise ValueError(f"{path} is damaged: it has an unknown key {min(both)}")
        content = {**about["values"], "made_for": about["made_for"], "notes": about["notes"],
                   "known_as": about.get("known_as")}
        check(content, cls, path)
        found = replace(build(content, cls), tensors=tensors)
        if (fault := found.fault()) is not None:
            raise ValueError(f"{path} is damaged: {fault}")
        if about["sha256"] != found._digest():
            raise ValueError(f"{path} has been changed since it was made: its sha256 does not fit")
        return found

    def fault(self) -> str | None:
        """What is wrong with the values, beyond their types; None if nothing is."""
        return None if all(value.isfinite().all() for value in self.tensors.values()) else "its numbers are not finite"

    def bounds(self) -> dict[str, Any]:
        """The settings that a run must have."""
        return self.made_for

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError that says what differs, if a run has other settings. Unknown ones may be left out."""
        bounds = self.bounds()
        differing = [key for key, value in bounds.items()
                     if key in settings and value != settings[key] and value is not None]
        if differing:
            shown = (f"the U-Net of {bounds['model']} there, another here" if key in ("unet", "fingerprint") else
                     f"{key} {bounds[key]} there, {settings[key]} here" for key in differing)
            raise ValueError(f"the {self.kind} was made for another run: {'; '.join(dict.fromkeys(shown))}")


@dataclass
class MadeFor:
    """The settings of a run that a file is made for. Guidance, prompts and number format may differ: the fit is a mean
    over many images, and small changes of the trajectory change it little.
    """
    model: str
    unet: dict
    checkpoint_sha256: str | None       # None: any weights
    sampler: str
    steps: int
    timesteps: str
    fingerprint: str | None = None      # of the U-Net, for pipelines; None in older files


@dataclass
class _File:
    """The content of a file except the tensors."""
    kind: str
    format: int
    sha256: str
    made_for: MadeFor
    values: dict
    notes: dict
    known_as: str | None = None


_COMMON = {one.name for one in fields(Fitted)}


def _half(value: Tensor) -> Tensor:
    """The half precision of files, whose rounding error is far below the errors of the fit."""
    return value.detach().cpu().half().contiguous()


def _tensors(path: Path | str) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("fitted", "{}")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}     # noqa: SIM118  it is not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    return parse_json(about, path), tensors


def made_for(path: Path | str) -> Mapping[str, Any]:
    """The settings of `MadeFor` in a file of any kind; empty for any other file, which `Fitted.load` refuses."""
    for read in (read_json, lambda path: _tensors(path)[0]):
        with suppress(ValueError, KeyError, TypeError, OSError):
            return read(path)["made_for"]
    return {}


def fingerprint(unet: nn.Module, in_channels: int, context: int | None) -> str:
    """A digest of a U-Net's shape: equal in our layout and in diffusers', with or without adapters, and when quantised.

    It is made from the widths of all normalisation layers, which none of these change. in_channels: of the image or
    latents. context: channels of the tokens of cross-attention; None without it.
    """
    groups = Counter(module.num_channels for module in unet.modules() if isinstance(module, nn.GroupNorm))
    layers = Counter(module.normalized_shape[0] for module in unet.modules() if isinstance(module, nn.LayerNorm))
    content = [in_channels, context, sorted(groups.items()), sorted(layers.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
