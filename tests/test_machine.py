"""What a machine does and how fast: nothing waits inside a run, few operators, and the command that measures it."""

import pytest
import torch
from test_graphs import CALLS, policies
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.samplers import Sampler, noise_predictor


class Transfers(TorchDispatchMode):
    """Lists what is read from a device and what is copied to it; the meta device stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {value.device.type for value in tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)}
        if "_local_scalar_dense" in str(function) and devices == {"meta"}:
            raise AssertionError("the run waits for the device")
        out = function(*args, **kwargs or {})
        after = {value.device.type for value in tree_leaves(out) if isinstance(value, torch.Tensor)}
        if devices and after and devices != after and function._schema.name in ("aten::_to_copy", "aten::copy_"):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("name", ["none", "deepcache", "zeroed", "blocks", "order 2", "forecast blocks", "plan"])
@pytest.mark.parametrize("solver", [("ddim", "uniform"), ("plms", "leading"), ("dpmpp", "leading")])
@torch.no_grad()
def test_nothing_in_a_run_waits_for_the_device(unet, name, solver):
    """Forecasts take their weights, of all calls, there in one copy; reuse takes nothing."""
    policy, unet = policies(unet)[name](), unet.to("meta")
    sampler = Sampler(solver[0], CALLS - (solver[0] == "plms"), solver[1], 0.0, Diffusion())
    with Transfers() as transfers:
        sampler.run(noise_predictor(unet, Diffusion(), torch.float32, policy), torch.empty(2, 3, 8, 8, device="meta"))
    assert len(transfers.found) == (name in ("order 2", "forecast blocks", "plan")), transfers.found
