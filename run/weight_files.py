"""Open a file of weights, whatever program wrote it. All models open theirs here: the wrappers of training frameworks
are removed, EMA or plain weights are chosen, and what the file says of its network is compared with the config. A file
that cannot be used is refused in one line that says what it is and what to do.
"""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from run.weights import read_file, sha256, tensors_of
from unet_caching.errors import UserError, one_line
from unet_caching.samplers.diffusion import PREDICTIONS, Diffusion

_IN_PIPELINE = "load it into a diffusers pipeline, where enable_deepcache caches"
# What a file is that has a tensor or an entry of such a name, and what to do.
_KINDS = (
    (r"\blora_|\.lora\.|_lora[._]|^lora_|\.hada_|\.lokr_|\.oft_",
     f"a LoRA, which changes another model: {_IN_PIPELINE}"),
    (r"^control_model\.|^controlnet_|input_hint_block", f"a ControlNet: {_IN_PIPELINE}"),
    (r"^(image_proj|ip_adapter)\b", f"an IP-Adapter: {_IN_PIPELINE}"),
    (r"motion_modules\.", f"a video model's (AnimateDiff): {_IN_PIPELINE}"),
    (r"\btime_stack\.|temporal_transformer_block", f"a video model's: {_IN_PIPELINE}"),
    (r"\b(joint_blocks|double_blocks|single_transformer_blocks|transformer_blocks\.0\.ff_context)\.",
     "a transformer's (Stable Diffusion 3, Flux), which is not a U-Net"),
    (r"^edm_(mean|std|vpred)", "of a model with EDM's noise levels (CosXL, Playground 2.5), which are not sampled "
                               f"here: {_IN_PIPELINE}"),
    (r"^(emb_params|string_to_param|clip_[lg])$", f"a textual inversion, words for another model: {_IN_PIPELINE}"),
    (r"^param_groups$|\bexp_avg\b", "an optimiser's state: take the weights of the same training run"),
    (r"^shadow_params$", "an EMA without the names of its tensors: take the folder unet/ or unet_ema/ beside it"),
    (r"\.(absmax|quant_map|SCB|qweight|qzeros|scale_weight)$|^scaled_fp8$",
     "quantised: take the same weights in float16 or float32"))
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")    # of data-parallel training and torch.compile
_PLAIN = ("state_dict", "model", "model_state_dict")        # entries of a file that holds more than the weights
_EMA = ("ema", "ema_state_dict", "model_ema", "ema_model")
_SHADOWS = "model_ema."                                     # CompVis' EMA weights; their names have no dots
_DROPPED_PREFIXES = (_SHADOWS, "first_stage_model.loss.", "loss.")      # losses and their networks
_DROPPED = frozenset((                                                  # the noise schedule's buffers, and marks
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr"))


class WeightFile(NamedTuple):
    """An open file of weights. ema: whether the tensors are EMA weights; None if the file has only one kind."""
    path: Path
    tensors: dict[str, Tensor]
    ema: bool | None = None


def open_weights(path: Path, model: str, diffusion: Diffusion | None = None, ema: bool | None = None) -> WeightFile:
    """Open a file of weights.

    model: the name of the architecture, for messages. diffusion: what the config says of the network, which the file
    must agree with; None skips this check. ema: take the EMA or the plain weights of a file that has both. None takes
    the EMA weights, except from CompVis' files, whose scripts take the plain ones.
    Raises UserError for a file that is missing, damaged, unsafe or something else, for one whose prediction or noise
    levels differ from the config's, and if `ema` is set but the file has only one kind of weights.
    """
    content, metadata = read_file(Path(path))
    content, of_ema, both = _unwrapped(content, ema, Path(path))
    if isinstance(content, dict):
        refuse_other(content, path)
    tensors = {_WRAPPERS.sub("", name): value for name, value in tensors_of(content, path, model).items()}
    shadows = _shadows(tensors)
    if shadows:
        both, of_ema = True, ema is True
        tensors |= shadows if ema else {}
    if ema is not None and not both:
        raise UserError(f"{path} has only one kind of weights: leave out --ema")
    if diffusion is not None:
        _check_marks(path, tensors, metadata, diffusion)
    kept = {name: value for name, value in tensors.items()
            if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)}
    return WeightFile(Path(path), kept, of_ema if both else None)


def refuse_other(names: Collection[object], path: Path) -> None:
    """Raise a UserError if the names in a file are not those of a U-Net, saying what the file is instead."""
    for pattern, what in _KINDS:
        if name := next((name for name in names if isinstance(name, str) and re.search(pattern, name)), None):
            raise UserError(f"{path} is {what} (it holds {name})")


def _unwrapped(content: object, ema: bool | None, path: Path) -> tuple[object, bool, bool]:
    """The entry of a file's content that holds the weights, whether they are EMA ones, and whether it has both kinds.
    """
    if isinstance(content, list):
        if len(content) < 5 or not isinstance(content[-1], dict):
            raise UserError(f"{path} is a list of {len(content)} parts without EMA weights at its end: the DDIM "
                            "training code writes [weights, optimizer, epoch, step, EMA weights]")
        return content[0 if ema is False else -1], ema is not False, True
    if not isinstance(content, dict):
        return content, False, False
    plain, averaged = (next((content[name] for name in names if isinstance(content.get(name), dict)), None)
                       for names in (_PLAIN, _EMA))
    if averaged is not None and (ema is not False or plain is None):
        return averaged, True, plain is not None
    return content if plain is None else plain, False, averaged is not None


def _shadows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' EMA weights under the names of the plain ones; empty if there are none."""
    names = {f"{_SHADOWS}{name.removeprefix('model.').replace('.', '')}": name for name in tensors
             if name.startswith("model.")}
    return {names[name]: value for name, value in tensors.items() if name in names}


# What a file's metadata may say of the prediction -> our name for it.
_SAID = {"v": "v", "true": "v", "eps": "noise", "false": "noise", **{name: own for own, name in PREDICTIONS.items()}}


def _check_marks(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], diffusion: Diffusion) -> None:
    """Raise a UserError if a file says that its network was trained differently than the config says."""
    marks = {name: metadata[name].lower() for name in ("modelspec.prediction_type", "prediction_type",
                                                       "ss_v_parameterization") if name in metadata}
    said = {name: _SAID.get(value, value) for name, value in marks.items() if value not in ("", "none")}
    said |= {"v_pred": "v"} if "v_pred" in tensors else {}
    for name, prediction in said.items():
        if prediction != diffusion.prediction:
            raise UserError(f"{path} says that its network predicts {prediction} ({name}), the config says "
                            f"{diffusion.prediction}: " + (
                                f"write `prediction: {prediction}` under `diffusion` into a copy of the config"
                                if prediction in PREDICTIONS else f"only {', '.join(PREDICTIONS)} are sampled here"))
    zero = "ztsnr" in tensors or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    if zero and not diffusion.zero_terminal_snr:
        raise UserError(f"{path} says that its network was trained at zero terminal SNR (ztsnr): write "
                        "`zero_terminal_snr: true` under `diffusion` and `timesteps: trailing` under `sampler` into a "
                        "copy of the config")
    alphas = diffusion.alphas_cumprod().double()
    found = tensors.get("alphas_cumprod", alphas).double()
    if "denoiser.sigmas" in tensors:
        found = 1 / (1 + tensors["denoiser.sigmas"].double() ** 2)
    if found.shape != alphas.shape or not torch.allclose(found, alphas, rtol=0, atol=2e-3):       # kept in float16
        raise UserError(f"{path} was trained at other noise levels than the config says: its alphas_cumprod go from "
                        f"{found.max():.4f} to {found.min():.4f} in {len(found)} timesteps, the config's from "
                        f"{alphas[0]:.4f} to {alphas[-1]:.4f} in {len(alphas)}")


def split(tensors: Mapping[str, Tensor], path: Path, prefixes: Sequence[str], model: str,
          lacking: Mapping[str, str] = {}) -> dict[str, dict[str, Tensor]]:
    """Split a whole checkpoint by prefix: {prefix: {name without the prefix: tensor}}.

    model: the name of the architecture, for messages. lacking: what to do if a part is missing, by prefix.
    Raises UserError, naming `path`, for a missing part and for tensors that belong to no part.
    """
    owner = {name: next((prefix for prefix in prefixes if name.startswith(prefix)), None) for name in tensors}
    parts = {prefix: {name.removeprefix(prefix): tensors[name] for name, own in owner.items() if own == prefix}
             for prefix in prefixes}
    unknown = [name for name, own in owner.items() if own is None]
    missing = [f"{prefix}*" for prefix, part in parts.items() if not part]
    if missing:
        others = f"; it holds {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}" if unknown else ""
        advice = "".join(f"; {lacking[prefix]}" for prefix, part in parts.items() if not part and prefix in lacking)
        raise UserError(f"{path} is not a whole {model} checkpoint: it has no {', '.join(missing)}{others}{advice}")
    if unknown:
        raise UserError(f"{path} holds tensors that are no part of {model} checkpoints: {', '.join(unknown)}")
    return parts


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A context that names the file in errors about its content."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        # What diffusers and transformers raise for settings that make no sense.
        raise UserError(f"{path}: no such network can be built: {one_line(error)[:200]}") from None


# Folders of diffusers and transformers

_NAMED = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)((?:\.\w+)?)\.(safetensors|bin)"
                    r"(?:\.index((?:\.\w+)?)\.json)?")


def weights_in(folder: Path, ema: bool | None = None) -> Path:
    """The file of weights in a network's folder, or the index of its shards.

    float32 comes before half precision, safetensors before pickles. ema: False takes diffusers' variant non_ema.
    Raises UserError if there is none.
    """
    there = {file: match for file in sorted(folder.glob("*")) if (match := _NAMED.fullmatch(file.name))}
    order = [".non_ema"] if ema is False else ["", ".fp32", ".fp16", ".bf16"]
    found = [(order.index(variant), match[2] == "bin", file) for file, match in there.items()
             if (variant := match[1] if match[3] is None else match[3] or match[1]) in order]
    if found:
        return min(found)[2]
    if ema is False:
        raise UserError(f"{folder} has no weights of the variant non_ema: leave out --ema")
    others = [file.name for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin")]
    if any("non_ema" in name for name in others):
        raise UserError(f"{folder} has only {', '.join(others)}: say --ema no to take these weights")
    if any("-of-" in name for name in others):
        raise UserError(f"{folder} has shards of weights ({others[0]}, ...), but not the index.json that belongs to "
                        "them: put it beside them")
    standard = "model.safetensors" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
    also = f" (but {', '.join(others)})" if others else ""
    raise UserError(f"no {folder / standard}{also}; the first lines of the model's file in configs/ say where to get "
                    "it")


def ema_of(path: Path, ema: bool | None = None) -> bool | None:
    """Whether the U-Net's weights are EMA ones; None if the file or folder has only one kind.

    ema: the choice of --ema. Raises UserError as `open_weights` does.
    """
    unet = path / "unet" if (path / "unet").is_dir() else path
    if not unet.is_dir():
        return open_weights(path, "U-Net", None, ema).ema
    if any("non_ema" in file.name for file in unet.iterdir()):
        return ema is not False
    if ema is not None:
        raise UserError(f"{unet} has only one kind of weights: leave out --ema")
    return None


def file_sha256(path: Path, ema: bool | None = None) -> str:
    """The hex digest of a file, or another one if `ema` takes other weights from it than None does."""
    whole = sha256(path)
    chosen = ema is not None and open_weights(path, "U-Net", None, ema).ema != open_weights(path, "U-Net").ema
    return hashlib.sha256(f"{whole}  {'EMA' if ema else 'plain'}\n".encode()).hexdigest() if chosen else whole
