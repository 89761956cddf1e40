"""The MACs and throughput commands on LDM: which package a config belongs to, the paper's non-uniform rows, guidance.

The digits of single steps and of uniform schedules are in test_ldm.py.
"""

import json
from pathlib import Path

import pytest

import ddpm.unet
import ldm.unet
from eval import macs, throughput
from eval.cost import timing
from run.families import build, example_inputs, family, load_config, rows_per_image
from unet_caching.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(("name", "unet", "shapes", "rows"), [
    ("ddpm_cifar10", ddpm.unet.UNet, [(2, 3, 32, 32), (2,)], 1),
    ("ldm_cin256", ldm.unet.UNet, [(2, 3, 64, 64), (2,), (2, 1, 512)], 2),
    ("ldm_emoji", ldm.unet.UNet, [(2, 3, 16, 16), (2,), (2, 1, 64)], 2)])
def test_any_config_opens(name, unet, shapes, rows):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert family(config).name == name.split("_")[0] and rows_per_image(config) == rows
    network, inputs = build(config), example_inputs(config, 2)
    assert isinstance(network, unet) and not network.training
    assert [tuple(value.shape) for value in inputs] == shapes
    assert network(*inputs).shape == (2, config.unet.out_channels, *shapes[0][2:])


@pytest.mark.parametrize("content", ["name: unet_x", "unet: {ch: 32}", "name: [ldm_x]", "- 1", "a: [", ""])
def test_a_config_of_no_package_is_refused(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(("interval", "center", "power", "printed"), [
    (2, 120, 1.2, "52.12"), (3, 120, 1.2, "36.48"), (5, 110, 1.4, "23.50"), (10, 110, 1.2, "13.97"),
    (20, 120, 1.4, "9.39")])
def test_macs_of_table_9(monkeypatch, capsys, interval, center, power, printed):
    monkeypatch.setattr("sys.argv", f"eval.macs --config {CONFIGS / 'ldm_cin256.yaml'} --json --interval {interval} "
                                    f"--schedule centered --center {center} --power {power}".split())
    macs.main()
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["branch"]) == (250, 0)
    assert f"{result['macs'] / 1e9:.2f}" == printed


def test_throughput_counts_images_not_rows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(timing, "interleave", lambda variants, *_: {
        name: (run(), timing.Timing([2.0 if name is None else 0.5]))[1] for name, run in variants.items()})
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", f"eval.throughput --config {CONFIGS / 'ldm_emoji.yaml'} --batch-size 3 "
                                    f"--device cpu --threads 1 --interval 5 --out {out}".split())
    throughput.main()
    result = json.loads(out.read_text())
    assert "batch 3 (6 rows with guidance)" in capsys.readouterr().out
    assert (result["settings"]["batch_size"], result["settings"]["rows"]) == (3, 6)
    times = result["throughput"]
    run, = times["runs"]
    assert (run["branch"], run["calls"]) == (0, 250)
    assert run["images_per_second"] == 3 / (50 * 2.0 + 200 * 0.5)
