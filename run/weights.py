"""Weights on disk. Files are never run as code; every tensor is loaded by name and shape."""

import hashlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from run.files import stamp, write_atomically
from unet_caching.errors import UserError, one_line


def sha256(path: Path) -> str:
    """The hex digest of a file. The file is read again only if it has changed."""
    return _sha256(Path(path).absolute(), *stamp(path))


@cache
def _sha256(path: Path, *seen: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_md5(path: Path, md5: str) -> None:
    """Compare a downloaded file with its published md5 (hex). Raises UserError if it is missing or differs."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5.lower():
        raise UserError(f"{path} has md5 {digest}, the published file {md5}: it is cut short, damaged or another "
                        "file; download it again")


# What training frameworks store beside the weights. Unpickled as classes without behaviour.
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.progress.ProgressBar",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
)


class _Inert:
    """Takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (type(name.rsplit(".", 1)[1], (_Inert,), {}), name) for name in _HARMLESS]


# What a file without readable tensors is, by its first bytes or the end of its name, and what to do.
_NO_TENSORS = (
    (rb"\Z", "empty: download it again"),
    (rb"\s*<", "a web page, not the file that was to be downloaded: download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (rb"GGUF", "a GGUF file, whose tensors are quantised: take the .safetensors that it was made from"),
    (rb".*\.onnx\Z", "ONNX, a compiled network: take the .safetensors or the diffusers folder of the same model"),
    (rb".*\.(msgpack|h5|tflite|pb)\Z", "another framework's: take the .safetensors of the same model"),
    (rb".*\.(zip|tar|gz|7z)\Z", "an archive: unpack it, and name the file in it"))


def read_tensors(path: Path) -> object:
    """The content of a checkpoint: a dict of tensors from safetensors, the pickled object from a pickle.

    Tensors are memory-mapped, not copied. Pickles are opened with weights_only=True; what frameworks store beside the
    weights becomes objects without behaviour. The index.json of a sharded checkpoint stands for all its shards.
    Raises UserError for a file that is missing or damaged, and for a pickle that wants to run code, which it names.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[object, dict[str, str]]:
    """What `read_tensors` returns, and the metadata of a safetensors file (else empty). Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}" + (": it is a folder; name the file in it" if path.is_dir() else ""))
    if path.name.endswith(".json"):
        return _read_shards(path), {}
    for pattern, what in _NO_TENSORS:
        if re.match(pattern, _head(path), re.DOTALL) or re.match(pattern, os.fsencode(path.name.lower()), re.DOTALL):
            raise UserError(f"{path} is damaged or not a checkpoint: it is {what}")
    try:
        if is_safetensors(path):
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        # torch warns of unusual pickle protocols and then fails. Files from before torch 1.6 cannot be memory-mapped.
        with (warnings.catch_warnings(category=UserWarning, action="ignore"), torch.serialization.safe_globals(_INERT)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise UserError(f"{path} is a pickle that wants {wanted[1]}, which is not a tensor, so it was not opened: "
                            "take a file that holds tensors only, or convert it where you trust it") from None
        # The rest of the message advises to open the file unsafely.
        reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
        raise UserError(f"{path} is damaged, or holds more than tensors: {one_line(reason)[:160]}") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError, struct.error) as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {one_line(error)[:160]}") from None
    _check_plain(content, path)
    return content, {}


def is_safetensors(path: Path) -> bool:
    """Whether a file is in safetensors format, by its name or by its header, which starts with a length below 4 GB."""
    return path.suffix.lower() == ".safetensors" or re.match(rb".{4}\0{4}\{", _head(path), re.DOTALL) is not None


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def shards(index: Path) -> list[Path]:
    """The shards that an index.json lists, sorted. Raises UserError for a file that is not such an index."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(index.with_name(Path(name).name) for name in names)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged, or not an index of weights in shards") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in shards(index):
        tensors |= tensors_of(read_tensors(file), file, "sharded")
    return tensors


def _check_plain(content: object, path: Path) -> None:
    """Raise a UserError for a tensor that has no values or is sparse or quantised."""
    parts = content if isinstance(content, list) else [content]
    parts = [*parts, *(part.get("state_dict") for part in parts if isinstance(part, dict))]
    for part in parts:
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, Tensor) and (value.is_meta or value.is_quantized or value.layout != torch.strided):
                raise UserError(f"{path}: {name} is a tensor without values, sparse or quantised, and should be a "
                                "plain one")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all."""
    write_atomically(Path(path), lambda temporary: write_tensors(tensors, temporary, metadata))


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file in place. Raises OSError where the disk is full."""
    try:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    os.chmod(path, 0o644)


def tensors_of(content: object, path: Path, model: str) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, which may be under Lightning's entry `state_dict`.

    model: the name of the architecture, for messages. Raises UserError, naming `path`, for any other content.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise UserError(f"{path} does not hold named tensors, as {model} checkpoints do")
    return content


_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}     # names before diffusers 0.18


def in_todays_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention tensors of older diffusers files, as most public ones are, to today's names."""
    return {re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda match: f"{match[1]}.{_OLDER[match[2]]}.",
                   name): value for name, value in state_dict.items()}


def load_strict(module: nn.Module, state_dict: dict[str, Tensor], published_name: Callable[[str], str]) -> None:
    """Copy tensors with published names into a module. A module on the meta device takes them over without a copy.

    Raises UserError that names every tensor that is missing, extra, of the wrong shape or kind of number, or not
    finite; then nothing is loaded.
    """
    ours = module.state_dict()
    names = {published_name(name): name for name in ours}
    faults = [f"missing {name}" for name in names if name not in state_dict]
    faults += [f"extra {name}" for name in state_dict if name not in names]
    faults += [f"{name} is {list(state_dict[name].shape)} and should be {list(ours[own].shape)}"
               for name, own in names.items() if name in state_dict and state_dict[name].shape != ours[own].shape]
    faults += [f"{name} is {state_dict[name].dtype} and should be {ours[own].dtype}".replace("torch.", "")
               for name, own in names.items() if name in state_dict
               and state_dict[name].is_floating_point() != ours[own].is_floating_point()]
    faults = faults or [f"{name} is not finite (NaN or infinite numbers): the file is damaged, take another"
                        for name in names if not _is_finite(state_dict[name])]
    if faults:
        raise UserError(f"the checkpoint does not fit {type(module).__module__}.{type(module).__name__}: "
                        f"{'; '.join(faults)}")
    module.load_state_dict({own: state_dict[name] for name, own in names.items()},
                           assign=all(value.is_meta for value in ours.values()))


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Large tensors are not copied."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack((tensor.float() if tensor.itemsize == 1 else tensor).aminmax()).isfinite().all())
