"""What is a step of a run in a pipeline, and what is not: threads, callbacks, loops of one's own, shared U-Nets."""

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import CodeType

import diffusers
import pytest
import torch
from conftest import relative_error
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from sd_pipelines import (
    BETAS,
    TOLERANCE,
    XL,
    build,
    build_xl,
    direct,
    drawn,
    run,
    tiny_unet,
)
from tiny_pipelines import by_helper
from torch import Tensor, nn

from unet_caching import refresh_deepcache
from unet_caching.errors import UserError
from unet_caching.pipelines.enable import disable_deepcache, enable_deepcache


def shared(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Another pipeline on the same U-Net, with a scheduler of its own."""
    other = StableDiffusionPipeline(**pipe.components | {"scheduler": DDIMScheduler(**BETAS, clip_sample=False)},
                                    requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def test_threads_with_and_without_caching_on_one_unet(parts):
    pipe = build(parts)
    plain = [run(pipe, seed=seed, steps=8) for seed in range(3)]
    pipes = [pipe, shared(pipe), shared(pipe)]
    for other in pipes[1:]:                     # a tokenizer keeps how it pads: no two threads may share one
        other.register_modules(tokenizer=copy.deepcopy(pipe.tokenizer))
    enable_deepcache(pipes[0], interval=3)
    enable_deepcache(pipes[1], interval=2, branch=2)
    alone = [run(one, seed=seed, steps=8) for seed, one in enumerate(pipes)]
    assert torch.equal(alone[2], plain[2]) and not torch.equal(alone[0], plain[0])
    together = threading.Barrier(3, timeout=60)

    def at_once(seed: int) -> Tensor:
        def wait(pipe, step, t, tensors):
            together.wait()                 # all threads are in the midst of their runs at every step
            return tensors
        return run(pipes[seed], seed=seed, steps=8, callback_on_step_end=wait)

    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(at_once, range(3)), alone))


@pytest.mark.parametrize("inner", ["cached", "unet", "other unet"])
def test_calls_in_a_callback_are_no_steps(parts, calls, inner):
    pipe = build(parts)
    other = shared(pipe)
    if inner == "other unet":
        other.unet = tiny_unet()
    expected = run(other, steps=4), direct(pipe, 500)
    enable_deepcache(pipe, interval=3)
    alone = run(pipe)
    if inner == "cached":
        enable_deepcache(other, interval=2)
        expected = run(other, steps=4), expected[1]
    calls.clear()
    masks = []

    def callback(pipe, step, t, tensors):
        masks.append(calls.take())
        if inner == "unet":                 # what it is given makes no difference
            assert torch.equal(direct(pipe, 500), expected[1])
            direct(pipe, t), direct(pipe, t)
        else:
            assert torch.equal(run(other, steps=4), expected[0])
        masks.append(calls.take())
        return tensors

    assert torch.equal(run(pipe, callback_on_step_end=callback), alone)
    assert masks[::2] == ["1", "0", "0", "1", "0", "0"]
    assert set(masks[1::2]) == {{"cached": "1010", "unet": "111"}.get(inner, "1111")}


def test_a_callback_can_have_the_next_call_computed(parts, calls):
    pipe = build(parts)
    enable_deepcache(pipe, interval=3)
    run(pipe, callback_on_step_end=lambda _, step, t, tensors: (step == 1 and refresh_deepcache()) or tensors)
    assert calls.take() == "101100"


def test_loops_of_ones_own(parts, calls, caplog):
    pipe = build(parts)
    enable_deepcache(pipe, interval=5)
    run(pipe, steps=4)
    calls.clear()
    pipe.scheduler.set_timesteps(12)
    text, x = torch.zeros(1, 5, 16), torch.ones(1, 4, 8, 8)
    with pipe.progress_bar(total=12), torch.no_grad():
        for t in pipe.scheduler.timesteps:
            pipe.unet(x, t, text)
    assert calls.take() == "100001000010"
    pipe.scheduler.set_timesteps(14)
    with torch.no_grad():
        for t in pipe.progress_bar(pipe.scheduler.timesteps):
            pipe.unet(x, t, text)
    assert calls.take() == "10000100001000"
    with pipe.progress_bar(total=14):
        for t in range(14):
            direct(pipe, t)                                     # by a function that opened no bar
    assert calls.take() == "1" * 14 and "nothing was cached" in caplog.text
    pipe.scheduler.set_timesteps(3)
    with pipe.progress_bar(total=3), torch.no_grad():           # more calls than were planned compute everything
        for t in range(6):
            pipe.unet(x, t, text)
    assert calls.take() == "100111"


def test_a_loop_over_a_bar_that_was_broken_off(parts, calls):
    pipe = build(parts)
    enable_deepcache(pipe, interval=5)
    pipe.scheduler.set_timesteps(12)
    steps = pipe.scheduler.timesteps
    text, x = torch.zeros(1, 5, 16), torch.ones(1, 4, 8, 8)

    def broken() -> None:
        for i, t in enumerate(pipe.progress_bar(steps)):
            pipe.unet(x, t, text)
            if i == 2:
                raise KeyboardInterrupt

    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt) as kept:          # and with it the loop's frame
            broken()
        assert calls.take() == "100"
        pipe.unet(x, steps[2], text), pipe.unet(x, steps[3], text)
        assert calls.take() == "11"
        run(pipe)
        assert calls.take() == "100001"
        del kept
        run(pipe)
        assert calls.take() == "100001"


def test_copies_and_pickles_while_caching_is_on(parts, tmp_path):
    pipe = build(parts)
    plain = run(pipe, steps=4)
    enable_deepcache(pipe)
    cached = run(pipe, steps=4)
    unet = copy.deepcopy(pipe.unet)
    assert not any(isinstance(value, DiffusionPipeline) for value in vars(vars(unet)["forward"].__self__).values())
    torch.save(pipe.unet, tmp_path / "unet.pt")
    loaded = torch.load(tmp_path / "unet.pt", weights_only=False)
    for one in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert one.unet is not pipe.unet and torch.equal(run(one, steps=4), cached)
        disable_deepcache(one)
        assert torch.equal(run(one, steps=4), plain) and "forward" not in vars(one.unet)
    for one in (unet, loaded):
        pipe.unet = one                     # another U-Net than when caching was switched on
        assert torch.equal(run(pipe, steps=4), cached)
    disable_deepcache(pipe)
    assert "forward" not in vars(pipe.unet) and torch.equal(run(pipe, steps=4), plain)


@pytest.mark.skipif(diffusers.__version__ < "0.36" and not torch.cuda.is_available(), reason="it wants a GPU there")
def test_offloading_by_groups_of_blocks(parts, tmp_path):
    pipe = build(parts)
    plain = run(pipe)
    with enable_deepcache(pipe):
        cached = run(pipe)
    enable_deepcache(pipe)
    apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="block_level",
                           num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    assert torch.equal(run(pipe), cached)
    disable_deepcache(pipe)
    assert torch.equal(run(pipe), plain)
    enable_deepcache(pipe)
    assert torch.equal(run(pipe), cached)


class Own(UNet2DConditionModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def own_class(pipe) -> None:
    pipe.unet = Own(**{key: value for key, value in pipe.unet.config.items() if not key.startswith("_")})


@pytest.mark.parametrize(("change", "message"), [
    (own_class, "Own, which has a forward of its own"),
    (lambda pipe: setattr(pipe.unet, "forward", lambda *args: args), r"torch.compile\(pipe.unet\)"),
    (lambda pipe: setattr(pipe.unet.down_blocks[1], "forward", lambda *args: args), "down_blocks.1 has a forward"),
    (lambda pipe: pipe.unet.up_blocks[0].register_forward_hook(lambda *args: None), "up_blocks.0 has a forward hook"),
    (lambda pipe: pipe.unet.down_blocks.__setitem__(1, nn.Identity()), "has a Identity")])
def test_what_cannot_be_is_refused_with_the_reason(parts, change, message):
    """When caching is switched on, or, where it was on before that, when the pipeline runs."""
    pipe = build(parts)
    enable_deepcache(pipe)
    change(pipe)
    with pytest.raises(UserError, match=message):
        run(pipe)
    disable_deepcache(pipe)
    with pytest.raises(UserError, match=message):
        enable_deepcache(pipe)
    assert "progress_bar" not in vars(pipe)


def test_what_is_no_pipeline_is_refused(parts):
    without = build(parts)
    without.unet = None
    modular = getattr(diffusers, "ModularPipeline", None)
    if modular is not None:
        with pytest.raises(UserError, match="runs its loop in blocks"):
            enable_deepcache(object.__new__(modular))
    for made, message in ((object.__new__(diffusers.UnCLIPPipeline), r"UnCLIPPipeline has no pipe\.unet"),
                          (nn.Linear(1, 1), "Linear has no pipe"), (without, "NoneType")):
        with pytest.raises(UserError, match=message):
            enable_deepcache(made)


# What it costs

@contextmanager
def python_calls() -> Iterator[list[CodeType]]:
    """The functions that run in Python meanwhile: other work on a machine does not change their number."""
    found: list[CodeType] = []
    sys.setprofile(lambda frame, event, argument: found.append(frame.f_code) if event == "call" else None)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_the_start_of_a_run_and_a_cached_step_are_light(parts):
    """On SDXL's levels: a cached step runs no more functions than with the package; a run begins with some hundred."""
    pipe = build_xl(parts)
    pipe.unet = UNet2DConditionModel(**XL | {
        "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}).eval()
    pipe.scheduler.set_timesteps(12)
    added = {"text_embeds": drawn(1, 16), "time_ids": torch.zeros(1, 6)}
    inputs = {"encoder_hidden_states": drawn(1, 7, 16), "added_cond_kwargs": added}

    def cached_step() -> int:
        with torch.no_grad(), pipe.progress_bar(total=12):
            first, second, third = pipe.scheduler.timesteps[:3]
            pipe.unet(drawn(1, 4, 8, 8), first, **inputs)
            pipe.unet(drawn(1, 4, 8, 8), second, **inputs)
            with python_calls() as found:
                pipe.unet(drawn(1, 4, 8, 8), third, **inputs)
            return len(found)

    with enable_deepcache(pipe, branch=1):
        ours = cached_step()
    theirs = by_helper(pipe, 1, 3, lambda pipe: cached_step())
    assert ours <= theirs, (ours, theirs)

    def start() -> int:
        with python_calls() as found:
            pipe.progress_bar(total=12).__enter__()
        return len(found)

    plain = start()
    with enable_deepcache(pipe):
        assert start() - plain < 500


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["before", "after", "in place"])
def test_compiled_whole_a_unet_has_one_graph_for_full_steps_and_one_for_cached_ones(parts, kind):
    pipe = build(parts)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with enable_deepcache(pipe, forecast=1):
        cached = run(pipe, steps=8)
    torch.compiler.reset()
    unet = pipe.unet
    if kind == "in place":
        pipe.unet.compile(backend=backend, fullgraph=True)
    elif kind == "before":
        pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
    enable_deepcache(pipe, forecast=1)
    if kind == "after":
        pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
    assert relative_error(run(pipe, steps=8), cached) < TOLERANCE
    run(pipe, steps=8)
    assert len(graphs) == 2
    disable_deepcache(pipe)
    assert "forward" not in vars(unet)
