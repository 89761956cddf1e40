"""Caching in video pipelines: the U-Net's own forward at interval 1, the PyPI helper's bits at interval 3."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from sd_pipelines import BETAS, save_blocks, save_plan
from tiny_pipelines import INPUTS, LEVELS, built, by_helper, call
from torch import nn

from unet_caching import enable_deepcache
from unet_caching.errors import UserError
from unet_caching.methods.plan import Call
from unet_caching.pipelines.scheduler import plan_scheduler

VIDEO = ("StableVideoDiffusionPipeline", "AnimateDiffPipeline", "TextToVideoSDPipeline")
STEPS = 4


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setitem(INPUTS, "num_inference_steps", STEPS)


@pytest.mark.parametrize(("name", "branches"), [(VIDEO[0], (0, 2)), (VIDEO[1], (1,)), (VIDEO[2], (0, 1))])
def test_video_pipelines(name, branches, caplog, monkeypatch):
    monkeypatch.setitem(LEVELS, "layers_per_block", 2)          # as the helper's numbers of branches have it
    pipe = built(getattr(diffusers, name))
    plain = call(pipe)
    for branch in branches:
        theirs = by_helper(pipe, branch, 3, call)
        with enable_deepcache(pipe, interval=3, branch=branch):
            ours = call(pipe)
        assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
    with enable_deepcache(pipe, interval=2, forecast=1), caplog.at_level("INFO", "unet_caching"):
        assert call(pipe).isfinite().all()
    assert "4 network calls, 2 of them full" in caplog.text and "per call and video" in caplog.text
    assert torch.equal(call(pipe), plain)


def free_init(pipe) -> None:
    pipe.enable_free_init(num_iters=3, use_fast_sampling=True)


def free_noise(pipe) -> None:
    pipe.enable_free_noise(context_length=2, context_stride=1)


def split_inference(pipe) -> None:
    free_noise(pipe)
    pipe.enable_free_noise_split_inference(spatial_split_size=64, temporal_split_size=8)


def offload(pipe) -> None:
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)


def freeu(pipe) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def of_plan(pipe, folder) -> dict:
    path = save_plan(folder / "plan.json", [Call(), Call(), Call(0, (0.8,)), Call(1)], steps=STEPS)
    pipe.scheduler = plan_scheduler(path, pipe.scheduler)
    return {"plan": path}


def of_block_schedule(pipe, folder) -> dict:
    save_blocks(folder / "blocks.json", pipe.unet, STEPS)
    return {"block_schedule": folder / "blocks.json"}


@pytest.mark.parametrize("way", [free_init, free_noise, split_inference, offload, freeu])
def test_what_is_added_to_a_video_pipeline(way):
    pipe = built(diffusers.AnimateDiffPipeline)
    before = call(pipe)
    way(pipe)
    plain = call(pipe)
    assert torch.equal(plain, before) == (way is offload)
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(call(pipe), plain)
    with enable_deepcache(pipe, interval=2, forecast=1):
        cached = call(pipe)
    assert cached.isfinite().all() and not torch.equal(cached, plain)


@pytest.mark.parametrize(("name", "fitted"), [*((name, of_block_schedule) for name in VIDEO), (VIDEO[1], of_plan)])
def test_what_is_fitted_in_a_video_pipeline(tmp_path, name, fitted):
    pipe = built(getattr(diffusers, name))
    pipe.scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    settings = fitted(pipe, tmp_path)
    plain = call(pipe)
    with enable_deepcache(pipe, **settings):
        cached = call(pipe)
    assert cached.isfinite().all() and not torch.equal(cached, plain) and torch.equal(call(pipe), plain)


@pytest.mark.slow
def test_a_compiled_video_unet():
    pipe = built(diffusers.AnimateDiffPipeline)
    with enable_deepcache(pipe):
        cached = call(pipe)
    torch.compiler.reset()
    graphs = []
    pipe.unet.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with enable_deepcache(pipe):
        assert torch.allclose(call(pipe), cached, atol=1e-5) and len(graphs) == 2


class Layer(nn.Module):
    """A residual layer of a U-Net of others, on [rows, channels, frames, height, width]."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.inside, self.time = nn.Conv3d(into, out, 3, padding=1), nn.Linear(8, out)
        self.conv_shortcut = nn.Conv3d(into, out, 1) if into != out else None

    def forward(self, x, temb):
        own = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return own + torch.tanh(self.inside(x) + self.time(temb)[:, :, None, None, None])


class Along(nn.Conv3d):
    """Mixes frames."""

    def forward(self, x, temb, encoder_hidden_states):
        return x + torch.tanh(super().forward(x) + encoder_hidden_states.mean())


class Stage(nn.Module):
    """Layers, motion modules of which some are none, as LatentSync has them, and resampling."""
    added = 0.0

    def __init__(self, into: tuple, out: int, moving: bool, resample: nn.Module | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(Layer(channels, out) for channels in into)
        self.motion_modules = nn.ModuleList(Along(out, out, (3, 1, 1), padding=(1, 0, 0)) if moving else None
                                            for _ in into)
        self.downsamplers = self.upsamplers = None if resample is None else nn.ModuleList([resample])


class Down(Stage):
    def forward(self, hidden_states, temb=None, encoder_hidden_states=None):
        x, made = hidden_states, ()
        for resnet, motion in zip(self.resnets, self.motion_modules, strict=True):
            x = resnet(x, temb)
            x = x if motion is None else motion(x, temb, encoder_hidden_states=encoder_hidden_states)
            made += (x,)
        for resample in self.downsamplers or ():
            x = resample(x)
            made += (x,)
        return x, made


class Up(Stage):
    def forward(self, hidden_states, res_hidden_states_tuple, temb=None, encoder_hidden_states=None,
                upsample_size=None):
        x, skips = hidden_states, res_hidden_states_tuple
        for resnet, motion in zip(self.resnets, self.motion_modules, strict=True):
            x, skips = resnet(torch.cat([x, skips[-1]], 1), temb), skips[:-1]
            x = x if motion is None else motion(x, temb, encoder_hidden_states=encoder_hidden_states)
        for resample in self.upsamplers or ():
            x = resample(x, upsample_size)
        return x + self.added


class Widen(nn.Module):
    def forward(self, x, size):
        return nn.functional.interpolate(x, size)


class Unet3D(ModelMixin, ConfigMixin):
    """A U-Net of another project: diffusers' parts by name, classes and forwards of its own, five dimensions."""
    config_name, factor = "config.json", 1.0

    @register_to_config
    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv3d(4, 8, 1), nn.Conv3d(8, 4, 1)
        half = nn.MaxPool3d((1, 2, 2), ceil_mode=True)
        self.down_blocks = nn.ModuleList([Down((8, 8), 8, True, half), Down((8, 16), 16, False)])
        self.mid_block = Layer(16, 16)
        self.up_blocks = nn.ModuleList([Up((32, 32, 24), 16, False, Widen()), Up((24, 16, 16), 8, True)])

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        temb = torch.sin(torch.arange(1.0, 9.0) * timestep / 100).expand(len(sample), 8)
        x = self.conv_in(sample)
        skips = (x,)
        for block in self.down_blocks:
            x, made = block(x, temb=temb, encoder_hidden_states=encoder_hidden_states)
            skips += made
        x = self.factor * self.mid_block(x, temb)
        for block in self.up_blocks:
            own, skips = skips[-3:], skips[:-3]
            x = block(hidden_states=x, res_hidden_states_tuple=own, temb=temb,
                      encoder_hidden_states=encoder_hidden_states,
                      upsample_size=skips[-1].shape[2:] if skips else None)
        return (self.conv_out(x),)


class Theirs(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int) -> torch.Tensor:
        x = torch.randn(1, 4, 3, 8, 7, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t, torch.ones(1, 2, 8))[0], t, x).prev_sample
        return x


def test_a_video_unet_of_others():
    """Duck-typed: what consists of the same parts is cached, as by the helper, which such projects use; what computes
    more than the parts do, in a block or around them, is refused."""
    torch.manual_seed(0)
    pipe = Theirs(Unet3D().eval(), DDIMScheduler(**BETAS, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    plain, ran = pipe(6), []
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(pipe(6), plain)
    for branch in range(6):
        theirs = by_helper(pipe, branch, 3, lambda pipe: pipe(6))
        hooks = [module.register_forward_hook(lambda *_: ran.append(1))
                 for module in pipe.unet.modules() if isinstance(module, Layer)]
        with enable_deepcache(pipe, interval=3, branch=branch):
            assert torch.equal(pipe(6), theirs) and not torch.equal(theirs, plain)
        layers = [1, 3, 5, 6, 8, 10][branch]            # of 11: those above the branch; branch 3 adds a downsampling
        assert len(ran) == 2 * 11 + 4 * layers
        ran.clear()
        for hook in hooks:
            hook.remove()
    for part, name in ((lambda unet: unet.up_blocks[0], "added"), (lambda unet: unet, "factor")):
        pipe.unet = Unet3D.from_config(pipe.unet.config).eval()
        setattr(part(pipe.unet), name, 1.5)
        with enable_deepcache(pipe), pytest.raises(UserError, match="Unet3D, which cannot be taken apart: its parts"):
            pipe(6)
