"""Checks of a device: small networks with random weights, each result beside a reference."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval.cost.sides import PLAN, Nested, Subject, cached_steps, difference, their_words
from unet_caching.errors import one_line
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import PlanCache
from unet_caching.pipelines.enable import enable_deepcache
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.speed.accelerate import accelerated, place
from unet_caching.speed.compiled import missing_compiler

SMALL = tuple(map(Subject, ("ddpm_emoji", "ldm_emoji", "sd_emoji")))
ALLOWED = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}       # of the largest magnitude
FIRST = (1.5409961, -0.2934289, -2.1787894)         # PyTorch's first numbers of seed 0 on a CPU


class Compared(NamedTuple):
    """A result beside its reference. differs: the largest difference as a fraction of the largest magnitude."""
    what: str
    differs: float
    allowed: float


class NotHere(Exception):
    """Why a check cannot run on this device."""


def outputs(device: torch.device, *dtypes: torch.dtype) -> Iterator[Compared]:
    """Full and cached steps of our networks against a CPU's, in float32 and unpacked. On the device without TF32."""
    for subject in SMALL:
        plain, _ = subject.make("cpu", torch.float32)
        assert plain is not None
        inputs = subject.inputs(subject.rows, "cpu", torch.float32)
        wanted = {name: run() for name, run in cached_steps(plain, inputs, (0, 1), (0, 1), plain).items()}
        for dtype in dtypes or (torch.float32,):
            network = place(copy.deepcopy(plain), device, dtype)
            here = [x.to(device, dtype if x.is_floating_point() else None) for x in inputs]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                for name, run in cached_steps(network, here, (0, 1), (0, 1), network).items():
                    what = f"{subject}, {str(dtype).removeprefix('torch.')}, {name}"
                    yield Compared(what, difference(run(), wanted[name]), ALLOWED[dtype])


def half_precision(device: torch.device) -> Iterator[Compared]:
    """bfloat16 and float16 against float32, with a wide limit that catches overflow and nonsense."""
    yield from outputs(device, torch.bfloat16, torch.float16)


def runs(device: torch.device, **how: bool) -> Iterator[Compared]:
    """Runs of an accelerated network against the eager network, with reuse, forecasts and a plan."""
    plain, _ = SMALL[0].make("cpu", torch.float32)
    assert plain is not None
    network = place(plain, device)
    fast = accelerated(network, how.get("compile", False), how.get("cuda_graphs", False), 6).network
    x = SeededNoise([0, 1], device)((3, 32, 32))
    policies: dict[str, Callable[[], Policy | None]] = {
        "without a cache": lambda: None, "reuse": lambda: DeepCache(1, [0, 3, 6, 9]),
        "forecast": lambda: DeepCache(1, [0, 3, 6, 9], 1), "plan": lambda: PlanCache(PLAN)}
    for name in policies if how.get("cuda_graphs") else ("reuse", "forecast"):
        def latents(network: Callable[..., Tensor], name: str = name) -> Tensor:
            predict = noise_predictor(network, Diffusion(), x.dtype, policies[name]())
            return Sampler("ddim", len(PLAN), "uniform", 0.0, Diffusion()).run(predict, x)
        yield Compared(f"{name}, {len(PLAN)} calls", difference(latents(fast), latents(network)), ALLOWED[x.dtype])


def cuda_graphs(device: torch.device) -> Iterator[Compared]:
    """CUDA graphs against the eager network."""
    if device.type != "cuda":
        raise NotHere(f"the device is {device}")
    yield from runs(device, cuda_graphs=True)


def compiled(device: torch.device) -> Iterator[Compared]:
    """torch.compile against the eager network."""
    if missing := missing_compiler(device):
        raise NotHere(missing)
    yield from runs(device, compile=True)


def seeds(device: torch.device) -> Iterator[Compared]:
    """The noise of a seed, by itself and in a batch, against a CPU's, and the CPU's against its known first numbers."""
    alone = SeededNoise([0], device)((3, 32, 32))
    yield Compared("seed 0 among others", difference(SeededNoise([7, 0], device)((3, 32, 32))[1:], alone), 0.0)
    yield Compared("seed 0 on a CPU", difference(alone, SeededNoise([0])((3, 32, 32))), 0.0)
    yield Compared("seed 0, its first numbers", difference(SeededNoise([0])((3,)), torch.tensor([FIRST])), 1e-6)


def pipelines(device: torch.device) -> Iterator[Compared]:
    """diffusers' networks with caching at interval 1 against the same without caching, bit for bit."""
    from diffusers import DDIMPipeline, DDIMScheduler
    for subject in SMALL:
        _, (theirs, _) = subject.make(device, torch.float32)
        x, t, *beside = subject.inputs(subject.rows, device, torch.float32)
        own = theirs(x, t, **their_words(beside), return_dict=False)[0]
        yield Compared(f"{subject}, a call", difference(Nested(theirs)(x, t, *beside), own), 0.0)
    pipe = DDIMPipeline(SMALL[0].make(device, torch.float32)[1][0], DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(generator=generator, num_inference_steps=4, output_type="np").images)

    plain = images()
    with enable_deepcache(pipe, interval=1):
        yield Compared("a DDIMPipeline of 4 steps", difference(images(), plain), 0.0)


CHECKS: dict[str, Callable[[torch.device], Iterator[Compared]]] = {
    "outputs": outputs, "half precision": half_precision, "seeds": seeds, "pipelines": pipelines,
    "CUDA graphs": cuda_graphs, "torch.compile": compiled}


def check(name: str, device: torch.device) -> dict:
    """Run a check: {check, state, why, compared}. state: ok, failed, not here. Raises nothing."""
    found: list[Compared] = []
    state, why = "ok", ""
    try:
        with torch.inference_mode():
            found.extend(CHECKS[name](device))
    except NotHere as reason:
        state, why = "not here", str(reason)
    except Exception as error:
        state, why = "failed", f"{type(error).__name__}: {one_line(error)[:200]}"
    wrong = [one for one in found if not one.differs <= one.allowed]
    if wrong:
        state, why = "failed", "; ".join(f"{one.what} differs by {one.differs:.1e}, {one.allowed:g} is allowed"
                                         for one in wrong) + ("; " + why if why else "")
    if state == "ok":
        why = f"{len(found)} results, at most {max((one.differs for one in found), default=0.0):.1e} apart"
    return {"check": name, "state": state, "why": why, "compared": [one._asdict() for one in found]}
