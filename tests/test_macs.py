"""MACs: the papers' digits, and a hand count on a tiny network."""

import json
from pathlib import Path

import pytest
import torch

from ddpm.unet import UNet
from eval import macs
from eval.cost.macs import Macs, average, branch_macs, costs, count, mean, on_meta
from run.families import build, example_inputs, load_config
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import no_cache
from unet_caching.policy import Policy
from unet_caching.schedules import centered, uniform

CONFIGS = Path(__file__).parent.parent / "configs"

# The authors' code under its own counter and under FlopCounterMode, in G; branches from 1, as it has no branch 0.
CIFAR_HOOK = [1.2862, 2.2449, 3.3577, 4.2154, 5.1402, 5.4509, 5.6485, 5.8462, 5.9240, 5.9736, 6.0232]
CIFAR_FC = [1.2827, 2.2391, 3.3843, 4.3073, 5.2974, 5.6079, 5.8053, 6.0027, 6.0804, 6.1300, 6.1795]
LSUN_HOOK = [82.285, 132.876, 152.770, 165.418, 180.755, 197.478, 209.037, 221.669, 226.639, 229.797, 233.627, 238.076,
             241.503, 245.198, 246.440, 247.229, 248.019]


def counted(name: str) -> tuple[Macs, dict[int, Macs]]:
    config = load_config(CONFIGS / f"ddpm_{name}.yaml")
    unet = build(config)
    return branch_macs(unet, example_inputs(config), range(unet.num_branches))


@pytest.fixture(scope="module")
def cifar():
    return counted("cifar10")


@pytest.fixture(scope="module")
def lsun():
    return counted("bedroom")


def in_g(values, digits: int) -> list[float]:
    return [round(value / 1e9, digits) for value in values]


def test_cifar_steps(cifar):
    full, cached = cifar
    assert in_g(full, 4) == [6.0655, 6.2219]
    assert in_g([cached[branch].hook for branch in range(1, 12)], 4) == CIFAR_HOOK
    assert in_g([cached[branch].fc for branch in range(1, 12)], 4) == CIFAR_FC
    assert 0 < cached[0].hook < cached[1].hook


def test_lsun_steps(lsun):
    full, cached = lsun
    assert in_g(full, 4) == [248.6912, 248.5138]
    assert in_g([cached[2].hook], 4) == [132.8764]
    assert in_g([cached[branch].hook for branch in range(1, 18)], 3) == LSUN_HOOK
    assert build(load_config(CONFIGS / "ddpm_church.yaml")).state_dict().keys() \
        == build(load_config(CONFIGS / "ddpm_bedroom.yaml")).state_dict().keys()


# The papers' cells, by interval (branch 2, 100 steps), and those of ours that do not come out to the printed digits.
TABLE_2_CIFAR, OTHERWISE_2 = {2: "4.15", 3: "3.54", 5: "3.01", 10: "2.63"}, {2: "4.1552"}
TABLE_2_LSUN = {2: "190.8", 3: "172.3", 5: "156.0"}
# CIFAR-10 at N = 5, by branch (the paper's rows are branch + 1). Branches 6 and 7 are far off, and not explained;
# the others would need the last digit cut or lowered.
TABLE_12 = dict(enumerate(["1.60", "2.24", "3.01", "3.89", "4.58", "5.31", "5.45", "5.60", "5.88", "5.95", "5.99",
                           "6.03"]))
OTHERWISE_12 = {0: "1.6096", 3: "3.8993", 4: "4.5854", 5: "5.3252", 6: "5.5738", 7: "5.7319", 8: "5.8900"}


def check_cells(printed: dict[int, str], otherwise: dict[int, str], ours: dict[int, float]) -> None:
    """Ours in G, rounded as printed, must be the printed digits; exactly the cells in `otherwise` are not."""
    def shown(key: int, like: str) -> str:
        return f"{ours[key] / 1e9:.{len(like.split('.')[1])}f}"

    assert {key: shown(key, like) for key, like in printed.items() if key not in otherwise} \
        == {key: like for key, like in printed.items() if key not in otherwise}
    assert {key: shown(key, like) for key, like in otherwise.items()} == otherwise
    assert not [key for key in otherwise if shown(key, printed[key]) == printed[key]]


def test_table_2(cifar, lsun):
    for (full, cached), printed, otherwise in ((cifar, TABLE_2_CIFAR, OTHERWISE_2), (lsun, TABLE_2_LSUN, {})):
        ours = {interval: average(full, cached[2], uniform(100, interval), 100).hook for interval in printed}
        check_cells(printed, otherwise, ours)


def test_table_12(cifar):
    full, cached = cifar
    check_cells(TABLE_12, OTHERWISE_12,
                {branch: average(full, cached[branch], uniform(100, 5), 100).hook for branch in range(12)})


def test_average_counts_steps_where_the_interval_does_not_divide_them(cifar):
    full, cached = cifar
    assert average(full, cached[2], uniform(100, 3), 100).hook == (34 * full.hook + 66 * cached[2].hook) / 100
    assert average(full, full, uniform(7, 2), 7) == full


# A tiny network, by hand

SIZES = dict(resolution=8, in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4])


@pytest.fixture
def tiny():
    return UNet(**SIZES).eval(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))


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


def test_counts_a_network_wherever_it_is(tiny):
    unet, inputs = tiny
    with torch.device("meta"):
        assert costs(UNet(**SIZES), inputs).values == costs(unet, inputs).values
    assert all(parameter.device.type == "cpu" for parameter in unet.parameters())


def test_any_policy(tiny):
    unet, inputs = tiny
    full_steps = centered(12, 4, 5, 1.4)
    found = costs(unet, inputs)
    assert mean(found.calls(DeepCache(2, full_steps), 12)) == average(found.full, found.cached(2), full_steps, 12)

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

def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["eval.macs", "--config", str(CONFIGS / "ddpm_emoji.yaml"), *args])
    macs.main()


def test_command_prints_all_branches(monkeypatch, capsys):
    run(monkeypatch, "--json")
    result = json.loads(capsys.readouterr().out)
    assert [row["branch"] for row in result["branches"]] == list(range(12))
    run(monkeypatch)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 12


def test_command_averages_a_run(monkeypatch, capsys):
    run(monkeypatch, "--json", "--interval", "5", "--branch", "1", "--steps", "12")
    result = json.loads(capsys.readouterr().out)
    assert result["full_steps"] == [0, 5, 10]
    assert result["macs"] == (3 * result["macs_full"] + 9 * result["macs_cached"]) / 12
    run(monkeypatch, "--interval", "5")
    assert "20 full of 100 steps, branch 2" in capsys.readouterr().out


@pytest.mark.parametrize("args", ["--branch 12", "--branch -1", "--interval 0", "--steps 5 --interval 6", "--steps 0",
                                  "--config nowhere.yaml", "--interval 2 --schedule centered"])
def test_command_refuses_bad_input(monkeypatch, capsys, args):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
