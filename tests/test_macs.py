"""MACs: the papers' digits, and a hand count on a tiny network."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, run_command

from ddpm.unet import UNet
from eval import macs
from eval.cost.macs import Costs, Macs, branch_macs, costs, count, mean, on_meta
from ldm.unet import UNet as LatentUNet
from run.families import build, example_inputs, load_config
from run.spec import RunSpec
from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import no_cache
from unet_caching.policy import Policy
from unet_caching.schedules import centered

CONFIGS = Path(__file__).parent.parent / "configs"

# The authors' code under its own counter and under FlopCounterMode, in G; branches from 1, as it has no branch 0.
CIFAR_HOOK = [1.2862, 2.2449, 3.3577, 4.2154, 5.1402, 5.4509, 5.6485, 5.8462, 5.9240, 5.9736, 6.0232]
CIFAR_FC = [1.2827, 2.2391, 3.3843, 4.3073, 5.2974, 5.6079, 5.8053, 6.0027, 6.0804, 6.1300, 6.1795]
LSUN_HOOK = [82.285, 132.876, 152.770, 165.418, 180.755, 197.478, 209.037, 221.669, 226.639, 229.797, 233.627, 238.076,
             241.503, 245.198, 246.440, 247.229, 248.019]
SD_HOOK, SD_FC = [98.138, 132.728, 167.716, 208.578, 243.237, 278.367, 315.175], [
    152.711, 188.729, 226.581, 270.305, 305.174, 340.730, 377.963]         # from branch 2


@cache
def counted(name: str) -> Costs:
    config = load_config(CONFIGS / f"{name}.yaml")
    return costs(build(config), example_inputs(config))


def in_g(values, digits: int) -> list[float]:
    return [round(value / 1e9, digits) for value in values]


def hooks(name: str, branches) -> list[float]:
    return [counted(name).cached(branch).hook for branch in branches]


def test_steps_of_the_pixel_models():
    cifar, lsun = counted("ddpm_cifar10"), counted("ddpm_bedroom")
    assert in_g(cifar.full, 4) == [6.0655, 6.2219] and in_g(lsun.full, 4) == [248.6912, 248.5138]
    assert in_g(hooks("ddpm_cifar10", range(1, 12)), 4) == CIFAR_HOOK
    assert in_g([cifar.cached(branch).fc for branch in range(1, 12)], 4) == CIFAR_FC
    assert 0 < cifar.cached(0).hook < cifar.cached(1).hook
    assert in_g(hooks("ddpm_bedroom", range(1, 18)), 3) == LSUN_HOOK and in_g([lsun.cached(2).hook], 4) == [132.8764]
    assert build(load_config(CONFIGS / "ddpm_church.yaml")).state_dict().keys() \
        == build(load_config(CONFIGS / "ddpm_bedroom.yaml")).state_dict().keys()


def test_steps_of_stable_diffusion():
    """77 tokens; the paper's rows count one row of the batch, 25 steps for as many images as 50."""
    found = counted("sd_v15")
    assert RunSpec.of(CONFIGS / "sd_v15.yaml").open().rows_per_image == 2
    assert in_g([*found.full, *found.cached(1)], 4) == [338.8316, 401.6367, 57.3285, 90.0715]
    assert in_g([found.full.hook, found.full.hook / 2], 2) == [338.83, 169.42]
    assert in_g(hooks("sd_v15", [0, *range(2, 9)]), 3) == [20.716, *SD_HOOK]
    assert in_g([found.cached(branch).fc for branch in range(2, 9)], 3) == SD_FC
    deeper = [*hooks("sd_v15", range(8, 12)), found.full.hook]      # not in the released code
    assert deeper == sorted(deeper)


# A tiny network, by hand

@pytest.fixture
def tiny():
    return UNet(**TINY_UNET).eval(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))


def conv(cin: int, cout: int, pixels: int, kernel: int = 3) -> Macs:
    fc = kernel ** 2 * cin * cout * pixels
    return Macs(fc + cout * pixels, fc)


def linear(cin: int, cout: int) -> Macs:
    return Macs(cin * cout + cout, cin * cout)


def norm(channels: int, pixels: int) -> Macs:
    return Macs(2 * channels * pixels, 0)


def add(*parts: Macs) -> Macs:
    return Macs(*map(sum, zip(*parts, strict=True)))


def res(cin: int, cout: int, pixels: int) -> Macs:
    first = [norm(cin, pixels), conv(cin, cout, pixels), linear(128, cout)]
    second = [norm(cout, pixels), conv(cout, cout, pixels)]
    return add(*first, *second, *([conv(cin, cout, pixels, 1)] if cin != cout else []))


def attention(channels: int, pixels: int) -> Macs:
    projections = [conv(channels, channels, pixels, 1)] * 4
    return add(norm(channels, pixels), *projections, Macs(0, 2 * pixels ** 2 * channels))


def test_hand_count(tiny):
    shell = [linear(32, 128), linear(128, 128), conv(3, 32, 64), norm(32, 64), conv(32, 3, 64)]
    encoder = [res(32, 32, 64), conv(32, 32, 16), add(res(32, 64, 16), attention(64, 16))]          # skips 1, 2, 3
    middle = add(res(64, 64, 16), attention(64, 16), res(64, 64, 16))
    decoder = [res(64, 32, 64), res(64 + 32, 32, 64),                                            # of skips 0, 1
               add(res(64 + 32, 64, 16), attention(64, 16), conv(64, 64, 64)),                   # of skip 2, upsampling
               add(res(64 + 64, 64, 16), attention(64, 16))]                                     # of skip 3
    full, cached = branch_macs(*tiny, range(4))
    assert full == add(*shell, *encoder, middle, *decoder)
    for branch in range(4):
        assert cached[branch] == add(*shell, *encoder[:branch], *decoder[:branch + 1])


def test_any_policy(tiny):
    unet, inputs = tiny
    full_steps = centered(12, 4, 5, 1.4)
    found = costs(unet, inputs)
    calls = [found.full if step in full_steps else found.cached(2) for step in range(12)]
    assert found.calls(DeepCache(2, full_steps), 12) == calls

    class ReuseResiduals(Policy):   # a policy with another kind of key: on odd steps, all residuals but the middle's
        def __init__(self):
            self.values = {}

        def at(self, step):
            def cache(key, compute):
                if isinstance(key, int) or key.startswith("middle") or not step % 2:
                    value = compute()
                    self.values[key] = value
                    return value
                return self.values[key]
            return cache

    forward = on_meta(unet, inputs)
    half, full = mean(found.calls(ReuseResiduals(), 4)), count(lambda: forward(no_cache))
    middle = add(res(64, 64, 16), attention(64, 16), res(64, 64, 16))
    assert full.hook / 2 + middle.hook / 2 < half.hook < full.hook
    assert full.fc / 2 + middle.fc / 2 < half.fc < full.fc


def test_linear_and_layer_norm_over_tokens():
    with torch.device("meta"):
        layers = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 5), torch.nn.SiLU(),
                                     torch.nn.Linear(5, 8, bias=False))
        x = torch.zeros(1, 7, 8)
    assert count(lambda: layers(x)) == Macs(2 * 56 + 7 * 8 * 5 + 5 + 7 * 5 * 8, 7 * 8 * 5 * 2)


@pytest.mark.parametrize("keys", [1, 77])
def test_attention_over_any_number_of_context_tokens(keys):
    q, k = torch.zeros(1, 8, 16, 4, device="meta"), torch.zeros(1, 8, keys, 4, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count(lambda: attend(q, k, k)) == Macs(0, 2 * 8 * 16 * keys * 4)


def test_a_layer_without_a_rule_is_an_error():
    layer = torch.nn.BatchNorm2d(3, device="meta")
    with pytest.raises(TypeError, match="BatchNorm2d"):
        count(lambda: layer(torch.zeros(2, 3, 4, 4, device="meta")))
    assert count(lambda: torch.nn.SiLU()(torch.zeros(1, device="meta"))) == Macs(0, 0)      # the hook is gone


# The command

def command(*words) -> int:
    return run_command(macs.main, "--config", CONFIGS / "ddpm_emoji.yaml", *words)


def test_command_prints_all_branches(capsys):
    assert command("--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["branch"] for row in result["branches"]] == list(range(12))
    assert command() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 12


def test_command_averages_a_run(capsys):
    assert command("--json", "--interval", 5, "--branch", 1, "--steps", 12) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["full_steps"] == [0, 5, 10]
    assert result["macs"] == (3 * result["macs_full"] + 9 * result["macs_cached"]) / 12
    assert command("--interval", 5) == 0
    assert "20 full of 100 steps, branch 2" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--branch 12", "--steps 5 --interval 6", "--config nowhere.yaml"])
def test_command_refuses_bad_input(capsys, words):
    assert command(*words.split()) == 2 and capsys.readouterr().err.count("\n") == 1


# Any model

@pytest.mark.parametrize(("name", "unet", "shapes", "rows"), [
    ("ddpm_cifar10", UNet, [(2, 3, 32, 32), (2,)], 1),
    ("ldm_cin256", LatentUNet, [(2, 3, 64, 64), (2,), (2, 1, 512)], 2),
    ("ldm_emoji", LatentUNet, [(2, 3, 16, 16), (2,), (2, 1, 64)], 2)])
def test_any_config_opens(name, unet, shapes, rows):
    run = RunSpec.of(CONFIGS / f"{name}.yaml").open()
    assert run.family.name == name.split("_")[0] and run.rows_per_image == rows
    network, inputs = build(run.config), example_inputs(run.config, 2)
    assert isinstance(network, unet) and not network.training
    assert [tuple(value.shape) for value in inputs] == shapes
    assert network(*inputs).shape == (2, run.config.unet.out_channels, *shapes[0][2:])


@pytest.mark.parametrize("content", ["name: unet_x", "unet: {ch: 32}", "name: [ldm_x]", "- 1", "a: [", ""])
def test_a_config_of_no_package_is_refused(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")
