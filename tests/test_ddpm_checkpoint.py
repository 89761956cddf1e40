"""Published DDPM checkpoints: every tensor by name and shape, nothing else, and no code."""

import gzip
import hashlib
import json
import pickle
import re

import pytest
import torch
from conftest import HERE, relative_error
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

from ddpm.checkpoint import diffusers_unet, load_checkpoint, load_state_dict, published_state_dict
from ddpm.unet import UNet
from run.families import load_config
from run.weights import check_md5
from unet_caching.errors import UserError
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.samplers import Sampler, noise_predictor

CONFIGS = HERE.parent / "configs"


@pytest.mark.parametrize(("config", "keys", "parameters", "branches"), [
    ("ddpm_cifar10", "ddpm_cifar10", 35_746_307, 12),
    ("ddpm_bedroom", "ddpm_lsun256", 113_673_219, 18), ("ddpm_church", "ddpm_lsun256", 113_673_219, 18),
])
def test_published_keys_load_strictly(config, keys, parameters, branches):
    published = json.loads(gzip.decompress((HERE / "formats" / f"keys_{keys}.json.gz").read_bytes()))["keys"]
    with torch.device("meta"):
        unet = UNet(**vars(load_config(CONFIGS / f"{config}.yaml").unet))
        load_state_dict(unet, {name: torch.empty(shape, dtype=getattr(torch, dtype))
                               for name, (shape, dtype) in published.items()})
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert unet.num_branches == branches
    assert {name: list(value.shape) for name, value in published_state_dict(unet).items()} \
        == {name: shape for name, (shape, _) in published.items()}


def test_published_configs_have_the_papers_settings():
    for name, timesteps in (("cifar10", "quad"), ("bedroom", "uniform"), ("church", "uniform")):
        config = load_config(CONFIGS / f"ddpm_{name}.yaml")
        sampler = config.sampler
        assert (sampler.steps, sampler.timesteps, sampler.eta, sampler.branch) == (100, timesteps, 0.0, 2)
        assert config.checkpoint.startswith("checkpoints/") and len(config.md5) == 32
        assert config.diffusion.alphas_cumprod()[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def make(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(resolution=8, in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
                attn_resolutions=[4])


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Of another network than the one they are loaded into, under published names."""
    return {name: value.clone() for name, value in published_state_dict(make(1)).items()}


def assert_refused(unet: UNet, *parts: str, load) -> None:
    """`load` raises one line with all of `parts`, and no weight has changed."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(UserError) as error:
        load()
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_round_trip(weights):
    unet = make(0)
    load_state_dict(unet, weights)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    assert torch.equal(unet.eval()(x, t), make(1).eval()(x, t))


@pytest.mark.parametrize("name", ["down.1.attn.0.q.weight", "up.0.block.1.nin_shortcut.weight", "temb.dense.1.bias"])
def test_a_missing_or_misshapen_tensor_is_named(weights, name):
    unet, value = make(0), weights.pop(name)
    assert_refused(unet, f"missing {name}", load=lambda: load_state_dict(unet, weights))
    weights[name] = torch.zeros(*value.shape, 2)
    assert_refused(unet, name, f"{list(value.shape)}", f"{[*value.shape, 2]}",
                   load=lambda: load_state_dict(unet, weights))


def test_every_fault_is_named(weights):
    unet = make(0)
    del weights["mid.block_1.conv1.weight"]
    weights["conv_in.bias"] = torch.zeros(1)
    weights["down.7.block.0.conv1.weight"] = torch.zeros(1)
    weights["input_blocks.0.0.bias"] = torch.zeros(32)      # our own name is not a published one
    assert_refused(unet, "missing mid.block_1.conv1.weight", "conv_in.bias is [1] and should be [32]",
                   "extra down.7.block.0.conv1.weight", "extra input_blocks.0.0.bias",
                   load=lambda: load_state_dict(unet, weights))


class Lightning:
    """Stands for what a training framework leaves in its checkpoints."""


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


@pytest.mark.parametrize(("extra", "wanted"), [(Lightning(), "Lightning"), (Payload(), "setattr")])
def test_a_pickle_that_wants_code_is_refused_by_name(weights, tmp_path, extra, wanted):
    torch.save({**weights, "callbacks": extra}, tmp_path / "model.ckpt")
    unet = make(0)
    assert_refused(unet, "model.ckpt", wanted, load=lambda: load_checkpoint(unet, tmp_path / "model.ckpt"))
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"callbacks": extra}, protocol=2))
    assert_refused(unet, "bare.ckpt", wanted, load=lambda: load_checkpoint(unet, tmp_path / "bare.ckpt"))
    (tmp_path / "newer.ckpt").write_bytes(pickle.dumps({"callbacks": extra}, protocol=5))     # torch stops before names
    assert_refused(unet, "newer.ckpt", "more than tensors", load=lambda: load_checkpoint(unet, tmp_path / "newer.ckpt"))
    assert not Payload.ran


@pytest.mark.parametrize(("suffix", "kept"), [
    ("safetensors", 0.001), ("safetensors", 0.99), ("ckpt", 0.0), ("ckpt", 0.5), ("ckpt", 0.99)])
def test_a_cut_file_is_refused(weights, tmp_path, suffix, kept):
    path = tmp_path / f"model.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content))])
    unet = make(0)
    assert_refused(unet, f"model.{suffix}", load=lambda: load_checkpoint(unet, path))


def test_md5(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    digest = hashlib.md5(b"weights").hexdigest()
    check_md5(tmp_path / "model.ckpt", digest)
    check_md5(tmp_path / "model.ckpt", digest.upper())
    with pytest.raises(UserError, match=digest):
        check_md5(tmp_path / "model.ckpt", "0" * 32)
    with pytest.raises(UserError, match="no checkpoint"):
        check_md5(tmp_path / "none.ckpt", digest)


# Diffusers' layout

@pytest.mark.parametrize(("name", "parameters"), [("cifar10", 35_746_307), ("bedroom", 113_673_219)])
def test_the_public_sizes_load_strictly_from_diffusers(name, parameters):
    config = load_config(CONFIGS / f"ddpm_{name}.yaml")
    with torch.device("meta"):
        unet = UNet(**vars(config.unet))
        theirs = diffusers_unet(config, unet).state_dict()
        load_state_dict(unet, theirs)
    assert sum(value.numel() for value in theirs.values()) == parameters
    missing = "up_blocks.0.resnets.2.conv2.bias"
    with pytest.raises(UserError, match=f"missing {missing}"):
        load_state_dict(unet, {name: value for name, value in theirs.items() if name != missing})


@pytest.mark.parametrize("older", [False, True])
def test_samples_are_those_of_diffusers_own_pipeline(tmp_path, older):
    torch.manual_seed(0)
    theirs = UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, freq_shift=1,
                         down_block_types=("DownBlock2D", "AttnDownBlock2D"), flip_sin_to_cos=False,
                         up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0, norm_eps=1e-6,
                         attention_head_dim=None).eval()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if older else {}
    tensors = {re.sub(r"\b(to_q|to_k|to_v|to_out\.0)\b", lambda m: names.get(m[1], m[1]), name): value.contiguous()
               for name, value in theirs.state_dict().items()}
    file = tmp_path / ("model.bin" if older else "model.safetensors")
    torch.save(tensors, file) if older else save_file(tensors, file)
    unet = make(1).eval()
    load_checkpoint(unet, file)

    pipe = DDIMPipeline(theirs, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    diffusion = Diffusion()
    predict = noise_predictor(unet, diffusion, torch.float32, None)
    with torch.no_grad():
        x = Sampler("ddim", 10, "uniform", 0.0, diffusion).run(
            predict, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    ours = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.std() > 0.1 and relative_error(ours, torch.from_numpy(images)) < 2e-5
