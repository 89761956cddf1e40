"""Files of what was fitted to the runs of one model: they say which runs, and are refused by any other."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unet_caching.files.schema import check, read_json

SignedFile = TypeVar("SignedFile", bound="Signed")
TensorFile = TypeVar("TensorFile")

# What of a run's settings a fitted file is made for. Guidance, prompts and number format may differ: it is measured
# over many images, and small changes of the trajectory move it little.
BOUND = ("model", "unet", "checkpoint_sha256", "sampler", "steps", "timesteps")


def bound(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's settings a file is made for: those under BOUND, and the U-Net's `fingerprint` where it is known.
    """
    return {key: run[key] for key in (*BOUND, "fingerprint") if key in BOUND or key in run}


class Signed(Protocol):
    """A dataclass that is kept as JSON, with the digest of what decides the pixels. run: the settings under BOUND."""
    __dataclass_fields__: ClassVar[dict[str, Any]]
    run: dict[str, Any]

    @property
    def sha256(self) -> str: ...


def read_signed(cls: type[SignedFile], path: Path, kind: str, number: int, program: str) -> SignedFile:
    """Read a JSON file of a kind and format. program: which makes one.

    Raises ValueError where it is missing, damaged, changed by hand, or does not say which runs it was made for.
    """
    if not Path(path).is_file():
        raise ValueError(f"no {kind} {path}: python -m {program} makes one")
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("kind"), content.get("format")) != (kind, number):
        raise ValueError(f"{path} is no {kind} of format {number}")
    values = {key: value for key, value in content.items() if key not in ("kind", "format", "sha256")}
    check(values, cls, path)
    found = cls(**values)
    if content.get("sha256") != found.sha256:
        raise ValueError(f"{path} has been changed since it was made: its sha256 does not fit")
    check_bound(found.run, path)
    return found


def read_tensors(path: Path, kind: str, number: str, make: Callable[[dict, dict, dict[str, Tensor]], TensorFile]
                 ) -> TensorFile:
    """Read a safetensors file of a kind and format. make(made_for, notes, tensors): float32 tensors, by name.

    Raises ValueError where it is damaged, of another kind, or does not say which runs it was made for.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if (about.get("kind"), about.get("format")) != (kind, number):
                raise ValueError(f"{path} holds no {kind} of format {number}")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}     # noqa: SIM118  it is no dict
        made_for = json.loads(about["made_for"])
        found = make(made_for, json.loads(about["notes"]), tensors)
        check_bound(made_for["run"], path)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    return found


def check_bound(run: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a file that does not say which runs it was made for."""
    if missing := [key for key in BOUND if key not in run]:
        raise ValueError(f"{path} does not say for which {', '.join(missing)} it was made")


def refuse_other_run(what: str, made_for: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a run of other settings than a file was made for; those not known yet may be left out.

    what: how the message begins, "the block schedule was made". made_for: the settings under BOUND, and more; a
    checkpoint_sha256 of None stands for any weights. Raises ValueError that says what differs.
    """
    differing = [key for key in made_for if key in settings and made_for[key] != settings[key]
                 and not (key == "checkpoint_sha256" and made_for[key] is None)]
    if differing:
        shown = ("unet differs" if key in ("unet", "fingerprint") else
                 f"{key} {made_for[key]} there, {settings[key]} here" for key in differing)
        raise ValueError(f"{what} for another run: {'; '.join(shown)}")


def fingerprint(unet: nn.Module, in_channels: int, context: int | None) -> str:
    """A digest of a U-Net's shape: equal in our layout and in diffusers', with or without adapters, and when quantised.

    It is of the widths of all normalisations, which nothing of that touches. in_channels: of the image or latents.
    context: channels of what cross-attention attends to; None without.
    """
    groups = Counter(module.num_channels for module in unet.modules() if isinstance(module, nn.GroupNorm))
    layers = Counter(module.normalized_shape[0] for module in unet.modules() if isinstance(module, nn.LayerNorm))
    content = [in_channels, context, sorted(groups.items()), sorted(layers.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
