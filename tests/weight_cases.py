"""Files of weights of Stable Diffusion in all layouts in which they are found: how each is made, and what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from stable_diffusion.config import Config, Unet
from stable_diffusion.parts import FIRST_STAGE, TEXT, UNET

SD1 = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
       "attention_resolutions": [1], "num_heads": 2, "context_dim": 16, "num_head_channels": None,
       "linear_projections": False}
CLIP = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "projection_dim": 16}
KL = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
      "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "sample_size": 16}
CONFIG = Config(name="sd_small", unet=Unet(**SD1), checkpoint="", resolution=32, downsampling=2, tokens=77)
SIGMAS = ((1 / CONFIG.diffusion.alphas_cumprod() - 1) ** 0.5)
Tensors = dict[str, Tensor]


class Place:
    """Where a case makes its files. tensors: of the one file."""

    def __init__(self, path: Path, folder: Path, tensors: Tensors):
        self.path, self.whole, self.tensors = path, folder, tensors

    def file(self, content, name: str = "x.safetensors", metadata: dict | None = None, **how) -> Path:
        if isinstance(content, bytes):
            (self.path / name).write_bytes(content)
        elif Path(name).suffix == ".safetensors":
            save_file(content, self.path / name, metadata)
        else:
            torch.save(content, self.path / name, **how)
        return self.path / name

    def plus(self, more: Tensors, **how) -> Path:
        return self.file(self.tensors | more, **how)

    def only(self, *prefixes: str, name: str = "part.safetensors", to: str | None = None) -> Path:
        """Those of some networks. to: what stands for the prefix."""
        return self.file({key if to is None else to + key.removeprefix(prefixes[0]): value
                          for key, value in self.tensors.items() if key.startswith(prefixes)}, name)

    def folder(self, *without: str) -> Path:
        """A copy of the folder."""
        shutil.copytree(self.whole, self.path / "folder", ignore=shutil.ignore_patterns(*without))
        return self.path / "folder"

    def rewritten(self, part: str, change: Callable[[Tensors], Tensors], name: str | None = None) -> Path:
        """The folder with other weights in a part. name: of the file, instead of the usual one."""
        copy = self.folder()
        file = next((copy / part).glob("*.safetensors"))
        content = change(load_file(file))
        file.unlink()
        save_file(content, file.with_name(name or file.name), {"format": "pt"})
        return copy

    def changed(self, file: str, **change) -> Path:
        """The folder with other values in a JSON file."""
        copy = self.folder()
        self.rewrite(copy / file, **change)
        return copy

    @staticmethod
    def rewrite(path: Path, **change) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


def shards(place: Place, index: bool = True, variant: str = "") -> Path:
    copy = place.folder()
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = list(load_file(file).items())
    file.unlink()
    names = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, (content[::2], content[1::2]), strict=True):
        save_file(dict(half), file.with_name(name))
    if index:
        file.with_name(f"{file.name}.index{variant}.json").write_text(json.dumps({
            "weight_map": {key: names[i % 2] for i, (key, _) in enumerate(content)}}))
    return copy


def whole_clip(place: Place) -> Path:
    copy = place.folder()
    text = load_file(copy / "text_encoder" / "model.safetensors")
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1,
              "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=16))
    clip.text_model.load_state_dict({name.removeprefix("text_model."): value for name, value in text.items()})
    clip.save_pretrained(copy / "text_encoder")
    return copy


def older_names(place: Place) -> Path:
    """As in the public folder of v1.5: attention of the autoencoder."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        return name
    return place.rewritten("vae", lambda tensors: {renamed(name): value for name, value in tensors.items()})


def without(place: Place, name: str) -> Path:
    (place.folder() / name).unlink()
    return place.path / "folder"


def damaged(place: Place, name: str) -> Path:
    (place.folder() / name).write_text("{")
    return place.path / "folder"


def pickled(place: Place) -> Path:
    copy = place.folder()
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        file = next((copy / part).glob("*.safetensors"))
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))      # full precision goes before it
    return copy


def shadows(place: Place) -> Tensors:
    """EMA weights as CompVis keeps them, all larger by one."""
    return {f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
            for name, value in place.tensors.items() if name.startswith(UNET)}


def more_channels(place: Place, channels: int) -> Path:
    name = f"{UNET}input_blocks.0.0.weight"
    return place.plus({name: torch.zeros(32, channels, 3, 3)})


def alone(place: Place, to: str) -> dict:
    return {"path": place.folder("unet"), "unet": place.only(UNET, to=to)}


def with_vae(place: Place, vae: Path) -> dict:
    return {"path": place.only(UNET, TEXT, name="rest.safetensors"), "vae": vae}


# Each makes the same model: the path, or arguments of load_checkpoint.
LOADS: dict[str, Callable[[Place], Path | dict]] = {
    "one file": lambda p: p.plus({}),
    "its name without suffix": lambda p: p.plus({}).rename(p.path / "3f2b9c"),
    "its name is a pickle's": lambda p: p.plus({}).rename(p.path / "x.ckpt"),
    "Lightning's pickle": lambda p: p.file({"global_step": 1, "state_dict": p.tensors}, "x.ckpt"),
    "a pickle from before torch 1.6": lambda p: p.file(p.tensors, "x.pt", _use_new_zipfile_serialization=False),
    "data-parallel": lambda p: p.file({f"module.{name}": value for name, value in p.tensors.items()}),
    "compiled": lambda p: p.file({name.replace(UNET, f"{UNET}_orig_mod."): value for name, value in p.tensors.items()}),
    "buffers, losses, constants": lambda p: p.plus({
        f"{TEXT}transformer.text_model.embeddings.position_ids": torch.arange(77)[None], "betas": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()), "first_stage_model.loss.logvar": torch.zeros(()),
        "alphas_cumprod": CONFIG.diffusion.alphas_cumprod()}),
    "what ComfyUI saves": lambda p: p.plus({
        f"{TEXT}logit_scale": torch.tensor(4.6), f"{TEXT}transformer.text_projection.weight": torch.zeros(16, 16)}),
    "what merge tools leave": lambda p: p.plus({
        f"{TEXT}text_projection": torch.zeros(16, 16), "denoiser.sigmas": SIGMAS.half()}),
    "metadata of noise": lambda p: p.plus({}, metadata={
        "modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False", "format": "pt"}),
    "plain and EMA weights: plain": lambda p: p.plus(shadows(p)),
    "EMA in an entry": lambda p: p.file({"ema": p.tensors, "model": p.tensors | {
        f"{UNET}out.2.bias": torch.ones(4)}, "optimizer": {}, "step": 3}, "x.pt"),
    "--unet without prefix": lambda p: alone(p, ""),
    "--unet with ComfyUI's prefix": lambda p: alone(p, "diffusion_model."),
    "--unet of a whole file": lambda p: {"path": p.folder("unet"), "unet": p.plus({})},
    "--unet in diffusers' names": lambda p: {"path": p.only(FIRST_STAGE, TEXT), "unet": p.file(
        load_file(p.whole / "unet" / "diffusion_pytorch_model.safetensors"), "u.safetensors")},
    "--unet FOLDER": lambda p: {"path": p.only(FIRST_STAGE, TEXT), "unet": p.whole / "unet"},
    "--vae in CompVis' names": lambda p: with_vae(p, p.only(FIRST_STAGE, to="")),
    "--vae in diffusers' names": lambda p: with_vae(p, p.whole / "vae" / "diffusion_pytorch_model.safetensors"),
    "--vae FOLDER": lambda p: with_vae(p, p.whole / "vae"),
    "--vae of a whole folder": lambda p: {"path": p.folder("vae"), "vae": p.whole},
    "folder": lambda p: p.folder(),
    "folder in shards": shards,
    "folder in shards of a variant": lambda p: shards(p, variant=".fp16"),
    "folder of pickles": pickled,
    "folder with variant fp16": lambda p: p.rewritten("unet", dict, "diffusion_pytorch_model.fp16.safetensors"),
    "folder with variant bf16": lambda p: p.rewritten("vae", dict, "diffusion_pytorch_model.bf16.safetensors"),
    "folder with non_ema alone": lambda p: {"ema": False, "path": p.rewritten(
        "unet", dict, "diffusion_pytorch_model.non_ema.safetensors")},
    "folder with a whole CLIP": whole_clip,
    "folder with older names": older_names,
    "folder with the text encoder's prefix": lambda p: p.rewritten("text_encoder", lambda tensors: {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        **{f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}}),
    "tokenizer of any length": lambda p: p.changed("tokenizer/tokenizer_config.json", model_max_length=10 ** 30),
    "tokenizer without config": lambda p: without(p, "tokenizer/tokenizer_config.json"),
}


# What each is refused for, in words of the line.
REFUSED: dict[str, tuple[Callable[[Place], Path | dict], list[str]]] = {
    **{f"metadata {name}": (lambda p, name=name, value=value: p.plus({}, metadata={name: value}),
                            ["predicts v", name, "config says noise", "`prediction: v`"])
       for name, value in (("modelspec.prediction_type", "v"), ("ss_v_parameterization", "True"),
                           ("prediction_type", "v_prediction"))},
    "metadata of x_0": (lambda p: p.plus({}, metadata={"modelspec.prediction_type": "sample"}), ["predicts sample"]),
    "v_pred": (lambda p: p.plus({"v_pred": torch.zeros(0)}), ["predicts v", "v_pred", "`prediction: v`"]),
    "ztsnr": (lambda p: p.plus({"ztsnr": torch.zeros(0)}), ["zero terminal SNR", "`zero_terminal_snr: true`"]),
    "metadata of zero SNR": (lambda p: p.plus({}, metadata={"ss_zero_terminal_snr": "True"}), ["zero terminal SNR"]),
    "edm_vpred": (lambda p: p.plus({"edm_vpred.sigma_max": torch.zeros(1)}), ["EDM's noise levels"]),
    "other sigmas": (lambda p: p.plus({"denoiser.sigmas": SIGMAS * 2}), ["other noise levels", "0.0047"]),
    "other alphas": (lambda p: p.plus({"alphas_cumprod": torch.ones(500)}), ["other noise levels", "500 timesteps"]),
    "infinite": (lambda p: p.plus({f"{FIRST_STAGE}decoder.conv_out.bias": torch.full((3,), -torch.inf)}),
                 ["decoder.conv_out.bias is not finite"]),
    "--unet of a folder of v": (lambda p: {"path": p.whole, "unet": p.changed(
        "scheduler/scheduler_config.json", prediction_type="v_prediction")}, ["prediction_type is 'v_prediction'"]),
    "shift_factor": (lambda p: p.changed("vae/config.json", shift_factor=0.1159), ["shift_factor", "0.1159"]),
    "--ema of one kind": (lambda p: {"path": p.plus({}), "ema": True}, ["leave out --ema"]),
    "--ema of a folder of one kind": (lambda p: {"path": p.folder(), "ema": False}, ["non_ema"]),
    "non_ema alone": (lambda p: p.rewritten("unet", dict, "diffusion_pytorch_model.non_ema.safetensors"),
                      ["--ema no"]),
    "shards without index": (lambda p: shards(p, index=False), ["-of-00002", "index.json"]),
    "a shard": (lambda p: shards(p) / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors",
                ["U-Net alone", "--unet"]),
    "another name": (lambda p: p.rewritten("unet", dict, "mine.safetensors"), ["no ", "(but mine.safetensors)"]),
    "9 channels": (lambda p: more_channels(p, 9), ["9 channels", "inpainting", "StableDiffusionInpaintPipeline"]),
    "8 channels": (lambda p: more_channels(p, 8), ["8 channels", "InstructPix2Pix"]),
    "5 channels": (lambda p: more_channels(p, 5), ["5 channels", "Depth2Img"]),
    "LoRA of kohya": (lambda p: p.file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}),
                      ["a LoRA", "diffusers pipeline"]),
    "LoRA of PEFT": (lambda p: p.file({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(1)}), ["a LoRA"]),
    "ControlNet": (lambda p: p.file({"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}), ["a ControlNet"]),
    "IP-Adapter": (lambda p: p.file({"image_proj": {"proj.weight": torch.zeros(1)}, "ip_adapter": {}}, "x.bin"),
                   ["an IP-Adapter"]),
    "textual inversion": (lambda p: p.file({"string_to_param": {"*": torch.zeros(1)}}, "x.pt"),
                          ["a textual inversion"]),
    "AnimateDiff": (lambda p: p.file({"down_blocks.0.motion_modules.0.x": torch.zeros(1)}), ["video"]),
    "optimiser": (lambda p: p.file({"state": {}, "param_groups": []}, "optimizer.bin"), ["an optimiser's state"]),
    "EMA without names": (lambda p: p.file({"decay": 0.9, "shadow_params": []}, "x.pt"), ["unet_ema/"]),
    "quantised": (lambda p: p.plus({f"{UNET}out.2.weight.absmax": torch.zeros(1)}), ["quantised"]),
    "Stable Diffusion 3": (lambda p: p.file({f"{UNET}joint_blocks.0.x": torch.zeros(1)}), ["Stable Diffusion 3"]),
    "Flux": (lambda p: p.file({"double_blocks.0.x": torch.zeros(1)}), ["Flux"]),
    "Stable Diffusion 2": (lambda p: p.only(UNET, FIRST_STAGE, TEXT) and p.plus({f"{TEXT}model.x": torch.zeros(1)}),
                           ["2.x", "noise or v", "diffusers folder"]),
    "SDXL": (lambda p: p.plus({"conditioner.embedders.0.x": torch.zeros(1)}), ["SDXL", "configs/sdxl.yaml"]),
    "GGUF": (lambda p: p.file(b"GGUF\3\0\0\0", "x.gguf"), ["GGUF", "take the .safetensors"]),
    "ONNX": (lambda p: p.file(b"\10\10\22\7pytorch", "x.onnx"), ["ONNX"]),
    "Flax": (lambda p: p.file(b"\x83", "x.msgpack"), ["another framework"]),
    "a web page": (lambda p: p.file(b"<!DOCTYPE html>", "x.safetensors"), ["a web page", "download it again"]),
    "Git LFS": (lambda p: p.file(b"version https://git-lfs.github.com/spec/v1", "x.ckpt"), ["git lfs pull"]),
    "empty": (lambda p: p.file(b"", "x.safetensors"), ["empty"]),
    "an archive": (lambda p: p.file(b"PK\3\4", "x.zip"), ["unpack it"]),
    "cut short": (lambda p: p.file(p.plus({}).read_bytes()[:-9], "y.safetensors"), ["damaged"]),
    "U-Net alone": (lambda p: p.only(UNET), ["no first_stage_model.*, cond_stage_model.*", "--vae", "--unet"]),
    "autoencoder alone": (lambda p: p.only(FIRST_STAGE, to=""), ["an autoencoder alone", "--vae"]),
    "a tensor of nothing": (lambda p: p.plus({"surplus.weight": torch.zeros(1)}), ["surplus.weight"]),
    "a tensor too many": (lambda p: p.plus({f"{UNET}surplus.weight": torch.zeros(1)}), ["extra surplus.weight"]),
    "nothing": (lambda p: p.path / "none.safetensors", ["none.safetensors", "configs/ say where to get it"]),
    **{f"folder without {name}": (lambda p, name=name: without(p, name), [f"folder/{name}", "configs/ say where"])
       for name in ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
                    "text_encoder/model.safetensors", "scheduler/scheduler_config.json")},
    "folder without tokenizer": (lambda p: p.folder("tokenizer"), ["folder/tokenizer", "configs/ say where to get it"]),
    "tokenizer without vocabulary": (lambda p: without(p, "tokenizer/tokenizer.json"), ["vocab.json"]),
    "damaged tokenizer": (lambda p: damaged(p, "tokenizer/tokenizer.json"), ["does not hold CLIP's tokenizer"]),
    "damaged scheduler": (lambda p: damaged(p, "scheduler/scheduler_config.json"), ["config.json is damaged"]),
    "text encoder without a tensor": (
        lambda p: p.rewritten("text_encoder", lambda tensors: {
            name: value for name, value in tensors.items() if "layers.0.mlp.fc1.bias" not in name}),
        ["CLIPTextModel: missing ", "encoder.layers.0.mlp.fc1.bias"]),
    **{f"folder with {file}: {change}": (lambda p, file=file, change=change: p.changed(file, **change), words)
       for file, change, words in (
           ("unet/config.json", {"cross_attention_dim": 24}, ["cross_attention_dim is 24 and should be 16"]),
           ("unet/config.json", {"addition_embed_type": "text_time"}, ["addition_embed_type is 'text_time'"]),
           ("vae/config.json", {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny", "AutoencoderKL or VQModel"]),
           ("vae/config.json", {"layers_per_block": 2}, ["missing encoder.down_blocks.0.resnets.1.norm1.weight"]),
           ("text_encoder/config.json", {"hidden_size": "wide"}, ["hidden_size"]),
           ("tokenizer/tokenizer_config.json", {"model_max_length": 64}, ["64", "77"]),
           ("scheduler/scheduler_config.json", {"beta_end": 0.02}, ["beta_end is 0.02 and should be 0.012"]),
           ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr"]),
           ("model_index.json", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]},
            ["StableDiffusionXLPipeline"]),
           ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, ["T5EncoderModel"]))},
}
