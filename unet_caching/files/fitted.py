"""Files of what was fitted to the runs of one model. They say which runs, and are refused by any other.

JSON where there are no tensors, safetensors otherwise, with the same in their metadata: `kind`, `format`, `made_for`,
`values`, `notes`, and the digest of all but the notes. Errors are ValueErrors here, which say what was wrong with which
file.
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
    """What was fitted to the runs of one model. Kinds of it are dataclasses, whose own fields decide what runs do; one
    that is None by default is left out of files and digests while it is None.
    """
    kind: ClassVar[str]                     # what messages call it
    maker: ClassVar[str]                    # the command that makes one
    has_tensors: ClassVar[bool] = False
    made_for: dict[str, Any]                # the settings under `MadeFor`
    tensors: dict[str, Tensor] = field(default_factory=dict, kw_only=True)      # float32; in files half precision
    notes: dict[str, Any] = field(default_factory=dict, kw_only=True)           # how it came about
    known_as: str | None = field(default=None, kw_only=True)    # its sha256 in an earlier format, which runs recorded

    @property
    def sha256(self) -> str:
        """By which runs know it: the digest of what decides what they do."""
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
        numbers = json.loads(json.dumps(content), parse_int=float)      # 5 and 5.0 are one
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write a file: whole, or not at all."""
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
        """Read a file. Raises ValueError where it is missing, damaged, changed by hand or of another kind."""
        if not Path(path).is_file():
            raise ValueError(f"no {cls.kind} {path}: {cls.maker} makes one")
        about, tensors = _tensors(path) if cls.has_tensors else (read_json(path), {})
        if not isinstance(about, dict) or (about.get("kind"), about.get("format")) != (cls.kind, FORMAT):
            raise ValueError(f"{path} is no {cls.kind} of format {FORMAT}: {cls.maker} makes one")
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
        """What is wrong with it, beyond what types say; None where nothing is."""
        return None if all(value.isfinite().all() for value in self.tensors.values()) else "its numbers are not finite"

    def bounds(self) -> dict[str, Any]:
        """The settings of the runs that it is for."""
        return self.made_for

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than it was made for; those not known yet may be left out.

        Raises ValueError that says what differs.
        """
        bounds = self.bounds()
        differing = [key for key, value in bounds.items()
                     if key in settings and value != settings[key] and value is not None]
        if differing:
            shown = (f"the U-Net of {bounds['model']} there, another here" if key in ("unet", "fingerprint") else
                     f"{key} {bounds[key]} there, {settings[key]} here" for key in differing)
            raise ValueError(f"the {self.kind} was made for another run: {'; '.join(dict.fromkeys(shown))}")


@dataclass
class MadeFor:
    """What of a run's settings a file is made for. Guidance, prompts and number format may differ: what is fitted is
    measured over many images, and small changes of the trajectory move it little.
    """
    model: str
    unet: dict
    checkpoint_sha256: str | None       # None: any weights
    sampler: str
    steps: int
    timesteps: str
    fingerprint: str | None = None      # of the U-Net, by which pipelines know it; None where it was not known


@dataclass
class _File:
    """What is in a file beside tensors."""
    kind: str
    format: int
    sha256: str
    made_for: MadeFor
    values: dict
    notes: dict
    known_as: str | None = None


_COMMON = {one.name for one in fields(Fitted)}


def _half(value: Tensor) -> Tensor:
    """As it is in files, where the error is far below that of what it stands for."""
    return value.detach().cpu().half().contiguous()


def _tensors(path: Path | str) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("fitted", "{}")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}     # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    return parse_json(about, path), tensors


def made_for(path: Path | str) -> Mapping[str, Any]:
    """The runs that a file of any kind is for; nothing where it is no such file, which `Fitted.load` refuses."""
    for read in (read_json, lambda path: _tensors(path)[0]):
        with suppress(ValueError, KeyError, TypeError, OSError):
            return read(path)["made_for"]
    return {}


def fingerprint(unet: nn.Module, in_channels: int, context: int | None) -> str:
    """A digest of a U-Net's shape: equal in our layout and in diffusers', with or without adapters, and when quantised.

    It is of the widths of all normalisations, which nothing of that touches. in_channels: of the image or latents.
    context: channels of what cross-attention attends to; None without.
    """
    groups = Counter(module.num_channels for module in unet.modules() if isinstance(module, nn.GroupNorm))
    layers = Counter(module.normalized_shape[0] for module in unet.modules() if isinstance(module, nn.LayerNorm))
    content = [in_channels, context, sorted(groups.items()), sorted(layers.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
