"""The forward of diffusers' U-Nets as a nest over their own modules.

Line by line what their `forward` does (diffusers, models/unets/unet_2d_condition.py and unet_2d.py), except that a
cache is asked for each inner level. Without one the results are theirs, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from unet_caching.errors import UserError
from unet_caching.nest import nest
from unet_caching.pipelines.containers import Containers
from unet_caching.pipelines.parts import Caching, Call, down_parts, middle_part, num_skips, up_parts


def cached_forward(unet: UNet2DConditionModel | UNet2DModel, caching: Caching, *args: Any, **kwargs: Any) -> Any:
    """`unet(*args, **kwargs)`, with a cache. Raises UserError for residuals of a ControlNet that do not fit."""
    if isinstance(unet, UNet2DModel):
        return _unconditional(unet, caching, *args, **kwargs)
    scale, attention = 1.0, kwargs.get("cross_attention_kwargs")
    if attention is not None:
        kwargs["cross_attention_kwargs"] = {key: value for key, value in attention.items() if key != "scale"}
        scale = attention.get("scale", 1.0)
    if not USE_PEFT_BACKEND or scale == 1.0:
        return _conditional(unet, caching, *args, **kwargs)
    scale_lora_layers(unet, scale)
    try:
        return _conditional(unet, caching, *args, **kwargs)
    finally:
        unscale_lora_layers(unet, scale)


def _conditional(unet: UNet2DConditionModel, caching: Caching, sample: Tensor, timestep: Tensor | float | int,
                 encoder_hidden_states: Tensor, class_labels: Tensor | None = None,
                 timestep_cond: Tensor | None = None, attention_mask: Tensor | None = None,
                 cross_attention_kwargs: dict[str, Any] | None = None,
                 added_cond_kwargs: dict[str, Any] | None = None,
                 down_block_additional_residuals: Sequence[Tensor] | None = None,
                 mid_block_additional_residual: Tensor | None = None,
                 down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
                 encoder_attention_mask: Tensor | None = None,
                 return_dict: bool = True) -> UNet2DConditionOutput | tuple[Tensor]:
    # Embedding
    config = unet.config
    height, width = sample.shape[-2:]
    sized = bool(height % 2 ** unet.num_upsamplers or width % 2 ** unet.num_upsamplers)
    if config.center_input_sample:
        sample = 2 * sample - 1.0
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
    of_class = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if of_class is not None:
        emb = torch.cat([emb, of_class], dim=-1) if config.class_embeddings_concat else emb + of_class
    added = unet.get_aug_embed(emb=emb, encoder_hidden_states=encoder_hidden_states,
                               added_cond_kwargs=added_cond_kwargs)
    if config.addition_embed_type == "image_hint":
        added, hint = added
        sample = torch.cat([sample, hint], dim=1)
    if added is not None:
        emb = emb + added
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    context = unet.process_encoder_hidden_states(encoder_hidden_states=encoder_hidden_states,
                                                 added_cond_kwargs=added_cond_kwargs)
    if cross_attention_kwargs is not None and cross_attention_kwargs.get("gligen") is not None:
        boxes = unet.position_net(**cross_attention_kwargs["gligen"])
        cross_attention_kwargs = cross_attention_kwargs | {"gligen": {"objs": boxes}}

    # What ControlNets and adapters add
    control, adapter = None, down_intrablock_additional_residuals
    if down_block_additional_residuals is not None:
        if mid_block_additional_residual is not None:
            control = [*down_block_additional_residuals, mid_block_additional_residual]
            if len(control) != num_skips(unet) + 1:
                raise UserError(f"the ControlNet has {len(control) - 1} residuals for {num_skips(unet)} skips: it is "
                                "of another architecture")
        elif adapter is None:               # the name that they had before
            adapter = down_block_additional_residuals

    # Encoder, middle, decoder
    masks = (None if attention_mask is None else _bias(attention_mask, sample),
             None if encoder_attention_mask is None else _bias(encoder_attention_mask, sample))
    call = Call(caching, emb, Containers(unet), context, masks, cross_attention_kwargs, adapter, sized)
    sample = _nest(unet, call, sample, control)
    if unet.conv_norm_out:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    sample = unet.conv_out(sample)
    return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


def _unconditional(unet: UNet2DModel, caching: Caching, sample: Tensor, timestep: Tensor | float | int,
                   class_labels: Tensor | None = None, return_dict: bool = True) -> UNet2DOutput | tuple[Tensor]:
    # Embedding
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    t = timestep if torch.is_tensor(timestep) else torch.tensor([timestep], dtype=torch.long, device=sample.device)
    t = t[None].to(sample.device) if t.ndim == 0 else t
    t = t * torch.ones(sample.shape[0], dtype=t.dtype, device=t.device)
    emb = unet.time_embedding(unet.time_proj(t).to(dtype=unet.dtype))
    if unet.class_embedding is not None:
        if class_labels is None:
            raise ValueError("this U-Net is conditioned on classes: it needs class_labels")
        if unet.config.class_embed_type == "timestep":
            class_labels = unet.time_proj(class_labels)
        emb = emb + unet.class_embedding(class_labels).to(dtype=unet.dtype)
    elif class_labels is not None:
        raise ValueError("this U-Net is not conditioned on classes: leave out class_labels")

    # Encoder, middle, decoder
    sample = _nest(unet, Call(caching, emb, Containers(unet)), sample, None)
    sample = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
    if unet.config.time_embedding_type == "fourier":
        sample = sample / t.reshape(-1, 1, 1, 1)
    return UNet2DOutput(sample=sample) if return_dict else (sample,)


def _nest(unet: UNet2DConditionModel | UNet2DModel, call: Call, sample: Tensor,
          control: Sequence[Tensor] | None) -> Tensor:
    try:
        return nest(sample, down_parts(unet, call), middle_part(unet, call), up_parts(unet, call),
                    call.caching.cache, control)
    finally:
        call.containers.leave()


def _bias(mask: Tensor, sample: Tensor) -> Tensor:
    """A mask [batch, tokens], 1 = keep, as what is added to attention: [batch, 1, tokens]."""
    return ((1 - mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
