"""Load and save LDM weights under their published names.

A public checkpoint (cin256-v2, CompVis) holds three networks with a prefix each: the U-Net, the first stage and the
class embedder. The modules of our U-Net have the published names.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm import first_stage
from ldm.config import Config
from ldm.diffusers_layout import diffusers_unet as diffusers_unet
from ldm.unet import UNet
from run import weight_files
from run.files import write_atomically
from run.libraries import diffusers
from run.weight_files import file_sha256, named, open_weights
from run.weights import is_safetensors, load_strict, sha256, write_tensors
from unet_caching.errors import UserError

UNET, FIRST_STAGE, CLASSES = "model.diffusion_model.", first_stage.PREFIX, "cond_stage_model."


class Model(NamedTuple):
    """The networks of a checkpoint. classes: label -> context vector; the last label is the unconditional one."""
    unet: UNet
    first_stage: diffusers.VQModel
    classes: nn.Embedding


def load_state_dict(unet: UNet, state_dict: dict[str, Tensor]) -> None:
    """Load tensors with their published names, with or without `model.diffusion_model.`.

    Raises UserError that names every missing, extra or misshapen tensor; then the U-Net is unchanged.
    """
    load_strict(unet, {name.removeprefix(UNET): value for name, value in state_dict.items()}, str)


def split(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Split a whole checkpoint by prefix, and remove the prefixes: {UNET: {...}, FIRST_STAGE: {...}, CLASSES: {...}}.

    Raises UserError, naming `path`, as `run.weight_files.split` does, and for another model's weights.
    """
    parts = weight_files.split(tensors, path, (UNET, FIRST_STAGE, CLASSES), "LDM")
    if "embedding.weight" not in parts[CLASSES]:
        raise UserError(f"{path} is not class-conditional: it has no {CLASSES}embedding.weight but "
                        f"{CLASSES}{next(iter(parts[CLASSES]))}; sample Stable Diffusion with stable_diffusion.sample")
    return parts


def load_checkpoint(config: Config, path: Path, ema: bool | None = None) -> Model:
    """Build the three networks with the weights of a whole checkpoint file, in evaluation mode, float32 on the CPU.

    A pickle is converted, once, to a safetensors file next to it. Weights in float32 are memory-mapped, so loading
    takes little more memory than they do. ema: take the U-Net's EMA weights or the plain ones, which are the default.
    Raises UserError for a file that is missing, damaged, unsafe or another model's.
    """
    tensors = open_weights(path, "LDM", config.diffusion, ema).tensors
    copy = path if ema else convert(path)       # a converted file has only the plain weights
    parts = split(tensors if copy == path else open_weights(copy, "LDM").tensors, path)
    with torch.device("meta"):
        model = Model(UNet(**vars(config.unet)), first_stage.build(**vars(config.first_stage)),
                      nn.Embedding(config.num_classes + 1, config.unet.context_dim))
    with named(path):
        load_strict(model.classes, parts[CLASSES], lambda name: f"embedding.{name}")
        load_state_dict(model.unet, parts[UNET])
        first_stage.load_state_dict(model.first_stage, parts[FIRST_STAGE])
    for network in model:
        network.float().eval().requires_grad_(False)
    return model


def load_unet(config: Config, path: Path, ema: bool | None = None) -> UNet:
    """Only the U-Net of `load_checkpoint`. Raises UserError."""
    return load_checkpoint(config, path, ema).unet


def published_state_dict(model: Model) -> dict[str, Tensor]:
    """The three networks' tensors under their published names, as in a public checkpoint."""
    return ({UNET + name: value for name, value in model.unet.state_dict().items()}
            | {FIRST_STAGE + name: value for name, value in first_stage.published_state_dict(model.first_stage).items()}
            | {f"{CLASSES}embedding.weight": model.classes.weight})


def convert(path: Path) -> Path:
    """The safetensors file to load for `path`: itself, or MODEL.safetensors next to the pickle MODEL.ckpt.

    It is written, with what `split` keeps, the first time and whenever the pickle has changed. The digests of both
    files are in MODEL.safetensors.sha256, in the format of sha256sum. In a read-only folder the pickle itself is used.
    """
    path = Path(path)
    if not path.is_file() or is_safetensors(path):
        return path
    target = path.with_suffix(".safetensors")
    note = Path(f"{target}.sha256")
    text = note.read_text() if note.is_file() else ""
    noted = {name: digest for digest, name in re.findall(r"(?m)^([0-9a-f]{64})  (.+)$", text)}
    current = target.is_file() and noted.get(target.name) == sha256(target)
    if current and noted.get(path.name) == sha256(path):
        return target
    if target.exists() and not current and (target.name in noted or not note.is_file()):    # a note may be cut short
        raise UserError(f"{target} is in the way: {path} is to be converted to it, and it was not made from that file; "
                        "move one of them")
    if not os.access(path.parent, os.W_OK):
        return path
    parts = split(open_weights(path, "LDM").tensors, path)

    def write(temporary: Path) -> None:
        write_tensors({prefix + name: value for prefix, part in parts.items() for name, value in part.items()},
                      temporary)
        # First the digests, so that every target made here has them. Other processes may convert at the same time.
        lines = f"{sha256(temporary)}  {target.name}\n{sha256(path)}  {path.name}\n"
        write_atomically(note, lambda note: note.write_text(lines))

    write_atomically(target, write)
    return target


def checkpoint_sha256(path: Path, ema: bool | None = None) -> str:
    """The hex digest of the file that `load_checkpoint` reads."""
    return file_sha256(path, ema) if ema else sha256(convert(path))
