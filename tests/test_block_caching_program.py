"""Block Caching through the commands: measure, schedule, train, show, and samples made with what they write."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import HERE, run_command
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm import sample as ddpm_sample
from ddpm.checkpoint import published_state_dict as ddpm_tensors
from ddpm.unet import UNet
from eval import macs
from eval.metrics.images import open_images
from lab.fit.__main__ import main as fit_main
from lab.fit.block_schedule import ScheduleMaker, threshold_schedule
from lab.fit.changes import BlockChanges
from lab.fit.meters import ChangeMeter
from lab.fit.scale_shift import best_line
from ldm import first_stage
from ldm import sample as ldm_sample
from ldm.checkpoint import Model
from ldm.checkpoint import published_state_dict as ldm_tensors
from ldm.unet import UNet as LatentUNet
from run import results
from unet_caching.methods.block_caching import BlockSchedule, ScaleShiftTable
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.options import RunShape

STEPS = 5
DDPM = {"resolution": 16, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": [8]}
LDM = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
       "attention_resolutions": [1], "num_heads": 1, "context_dim": 8}
STAGE = {"resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3, "n_embed": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tiny random models: ddpm.yaml and ldm.yaml."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_file(ddpm_tensors(UNet(**DDPM)), folder / "ddpm.safetensors")
    model = Model(LatentUNet(**LDM), first_stage.build(**STAGE), nn.Embedding(4, 8))
    save_file({name: value.contiguous() for name, value in ldm_tensors(model).items()}, folder / "ldm.safetensors")
    diffusion = {"beta_schedule": "cosine", "prediction": "v"}
    (folder / "ddpm.yaml").write_text(yaml.safe_dump({
        "name": "ddpm_tiny", "unet": DDPM, "diffusion": diffusion, "checkpoint": str(folder / "ddpm.safetensors"),
        "sampler": {"steps": STEPS, "timesteps": "trailing", "branch": 1, "images": 4}}))
    (folder / "ldm.yaml").write_text(yaml.safe_dump({
        "name": "ldm_tiny", "unet": LDM, "first_stage": STAGE, "num_classes": 3, "diffusion": diffusion,
        "checkpoint": str(folder / "ldm.safetensors"),
        "sampler": {"steps": STEPS, "guidance": 2.0, "branch": 0, "images": 4}}))
    return folder


def program(verb, *words) -> int:
    return run_command(fit_main, verb, *words)


@pytest.fixture
def fails(capsys):
    """Whether a command ended with one line about what was wrong."""
    def check(code: int, *words: str) -> bool:
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and error.startswith("error: ") and all(word in error for word in words), error
        return True
    return check


@pytest.fixture(scope="module")
def made(folder) -> Path:
    """changes.json of the DDPM, a schedule of half the MACs, and its scale-shift."""
    common = ["--config", folder / "ddpm.yaml", "--device", "cpu"]
    assert program("changes", *common, "--seeds", "0-3", "--similar", 1, "--out", folder / "changes.json") == 0
    assert program("block-schedule", "--changes", folder / "changes.json", "--kinds", "all", "--macs", 0.5,
                   "--out", folder / "half.json") == 0
    assert program("scale-shift", *common, "--block-schedule", folder / "half.json", "--seeds", "10-17",
                   "--held-out-seeds", "20-23", "--out", folder / "half.safetensors") == 0
    return folder


def sample(folder, out, *words, module=ddpm_sample, name="ddpm") -> int:
    return run_command(module.main, "--config", folder / f"{name}.yaml", "--seeds", "0-3", "--device", "cpu",
                       "--out", out, *words)


def pixels(path) -> np.ndarray:
    return np.concatenate(list(open_images(path).batches(8)))


def settings(path) -> dict:
    return json.loads((path / "run.json").read_text())["settings"]


def test_measured(made):
    changes = BlockChanges.load(made / "changes.json")
    assert changes.calls == STEPS and changes.made_for["model"] == "ddpm_tiny" and changes.notes["seeds"] == "0-3"
    kinds = {one.kind for one in changes.residuals.values()}
    assert kinds == {"transformer", "resnet"}
    assert all(one.changes[0] == 0 and min(one.changes[1:]) > 0 for one in changes.residuals.values())
    for picture in ("changes_transformer", "changes_resnet", "changes_similarity", "half"):
        assert (made / f"{picture}.png").stat().st_size > 1000


def test_schedule_from_a_budget(made, tmp_path, fails, capsys):
    changes, half = BlockChanges.load(made / "changes.json"), BlockSchedule.load(made / "half.json")
    assert half.blocks == {name: threshold_schedule(one.changes, half.delta)
                           for name, one in changes.residuals.items()}
    maker = ScheduleMaker(changes, "all")
    assert half.macs["hook"] <= 0.5 * half.macs_full["hook"]
    assert maker.macs(maker.blocks(half.delta * (1 - 1e-6))).hook > 0.5 * half.macs_full["hook"]    # the smallest delta
    make = ["block-schedule", "--changes", made / "changes.json", "--kinds", "all"]
    assert program(*make, "--speedup", 2, "--out", tmp_path / "same.json") == 0
    assert BlockSchedule.load(tmp_path / "same.json").sha256 == half.sha256
    assert program("show", made / "half.json", "--out", tmp_path / "x.png") == 0
    assert f"delta {half.delta:.6g}" in capsys.readouterr().out and (tmp_path / "x.png").is_file()
    for words, why in ((["--macs", 0.01], "cannot be reached"), (["--macs", 2], "fraction"), (["--delta", -1], "delta"),
                       (["--speedup", 0.5], "speedup"), (["--interval", 2], "--branch"),
                       (["--kinds", "attention"], "no attention blocks")):
        assert fails(program(*make, *words, "--out", tmp_path / "no.json"), why)
    assert not (tmp_path / "no.json").exists()


def test_delta_0_equals_no_cache_bit_for_bit(made, tmp_path):
    assert program("block-schedule", "--changes", made / "changes.json", "--kinds", "all", "--delta", 0,
                   "--out", tmp_path / "0.json") == 0
    assert sample(made, tmp_path / "plain") == 0
    assert sample(made, tmp_path / "zero", "--block-schedule", tmp_path / "0.json") == 0
    assert (pixels(tmp_path / "plain") == pixels(tmp_path / "zero")).all()


def test_samples_are_those_of_the_schedule_and_leak_nothing(made, tmp_path):
    half = BlockSchedule.load(made / "half.json")
    run = ["--block-schedule", made / "half.json"]
    assert sample(made, tmp_path / "plain") == 0 and sample(made, tmp_path / "one", *run) == 0
    assert sample(made, tmp_path / "two", *run, "--batch-size", 2) == 0
    assert sample(made, tmp_path / "adjusted", *run, "--scale-shift", made / "half.safetensors") == 0
    one, two, plain, adjusted = (pixels(tmp_path / name).astype(int) for name in ("one", "two", "plain", "adjusted"))
    assert abs(one - two).max() <= 1 and (one != plain).any() and (adjusted != one).any()
    cache = settings(tmp_path / "adjusted")["cache"]["block_caching"]
    assert cache["schedule_sha256"] == half.sha256 and cache["kinds"] == "all" and cache["delta"] == half.delta
    assert cache["scale_shift_sha256"] and settings(tmp_path / "one")["cache"]["block_caching"][
        "scale_shift_sha256"] is None
    assert "block_caching" not in settings(tmp_path / "plain")["cache"]


def test_macs_of_the_run(made, capsys):
    half = BlockSchedule.load(made / "half.json")
    words = ["--config", made / "ddpm.yaml", "--block-schedule", made / "half.json", "--json"]
    assert run_command(macs.main, *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"] == pytest.approx(half.macs["hook"]) and found["macs_fc"] == pytest.approx(half.macs["fc"])
    assert found["macs_full"] == half.macs_full["hook"]
    assert run_command(macs.main, *words, "--steps", STEPS + 1) == 2


def test_together_with_deepcache(made, tmp_path, capsys):
    make = ["block-schedule", "--changes", made / "changes.json", "--kinds", "all", "--macs", 0.7]
    assert program(*make, "--interval", 2, "--branch", 1, "--out", tmp_path / "outer.json") == 0
    outer, changes = BlockSchedule.load(tmp_path / "outer.json"), BlockChanges.load(made / "changes.json")
    assert 0 < len(outer.blocks) < len(changes.residuals)
    capsys.readouterr()
    words = ["--block-schedule", tmp_path / "outer.json", "--interval", 2, "--branch", 1]
    assert run_command(macs.main, "--config", made / "ddpm.yaml", *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"] <= 0.7 * found["macs_full"]
    maker = ScheduleMaker(changes, "all", DeepCacheOptions(2, 1).bind(RunShape(STEPS, STEPS, 6, 1), ()))
    assert found["macs"] == pytest.approx(maker.macs(outer.blocks).hook)
    assert sample(made, tmp_path / "both", *words) == 0
    assert sample(made, tmp_path / "level", *words[2:]) == 0
    assert (pixels(tmp_path / "both") != pixels(tmp_path / "level")).any()
    cache = settings(tmp_path / "both")["cache"]
    assert cache["interval"] == 2 and cache["block_caching"]["blocks"] == len(outer.blocks)


def test_compiled_with_one_graph_for_each_set(made, tmp_path, monkeypatch, capsys):
    graphs, compile = [], torch.compile

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda network, fullgraph: compile(network, fullgraph=fullgraph,
                                                                             backend=backend))
    run = ["--block-schedule", made / "half.json", "--scale-shift", made / "half.safetensors", "--batch-size", 2]
    assert sample(made, tmp_path / "eager", *run) == 0
    capsys.readouterr()
    with torch._dynamo.config.patch(recompile_limit=1):                     # the command raises it
        assert sample(made, tmp_path / "compiled", *run, "--compile") == 0
    half = BlockSchedule.load(made / "half.json")
    sets = {frozenset(name for name, steps in half.blocks.items() if step not in steps) for step in range(STEPS)}
    assert f"torch.compile: {len(sets)} graphs" in capsys.readouterr().out
    assert len(graphs) <= len(sets) + 1
    assert (pixels(tmp_path / "compiled") == pixels(tmp_path / "eager")).all()


def test_a_rhythm_needs_no_weights_and_fits_any(made, tmp_path, fails):
    """The ones that are shipped are what the command makes."""
    make = ["rhythm", "--config", made / "ddpm.yaml", "--kinds", "all", "--out", tmp_path / "rhythm.json"]
    assert program(*make, "--computed", "0,2") == 0
    rhythm = BlockSchedule.load(tmp_path / "rhythm.json")
    assert set(map(tuple, rhythm.blocks.values())) == {(0, 2)} and rhythm.made_for["checkpoint_sha256"] is None
    assert sample(made, tmp_path / "images", "--block-schedule", tmp_path / "rhythm.json") == 0
    assert sample(made, tmp_path / "plain") == 0
    assert (pixels(tmp_path / "images") != pixels(tmp_path / "plain")).any()
    for steps, why in (("1,2", "must contain 0"), ("0,5", "stay below"), ("x", "do not parse")):
        assert fails(program(*make, "--computed", steps), why)
    assert fails(sample(made, tmp_path / "no", "--block-schedule", tmp_path / "rhythm.json", "--steps", 6), "steps")
    for path in (HERE.parent / "configs" / "block_schedules").glob("*.json"):
        shipped = BlockSchedule.load(path)
        example = [0, 5, 9, 13, 17]         # arXiv 2312.03209, Section 3.2, of 20 steps and counted from 1 there
        assert shipped.calls in (20, 50)
        assert all(steps == [s * shipped.calls // 20 for s in example] for steps in shipped.blocks.values())


def test_other_runs_are_refused(made, tmp_path, fails):
    run, out = ["--block-schedule", made / "half.json"], tmp_path / "no"
    assert fails(sample(made, out, *run, "--steps", 6), "steps 5 there, 6 here")
    assert fails(sample(made, out, *run, "--sampler", "dpmpp"), "sampler ddim there, dpmpp here")
    assert fails(sample(made, out, *run, "--timesteps", "uniform"), "timesteps trailing there, uniform here")
    weights = load_file(made / "ddpm.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, tmp_path / "other.safetensors")
    assert fails(sample(made, out, *run, "--checkpoint", tmp_path / "other.safetensors"), "checkpoint_sha256")
    assert fails(sample(made, out, "--scale-shift", made / "half.safetensors"), "--block-schedule")
    assert fails(sample(made, out, *run, "--interval", 2, "--zero-cache"), "--zero-cache")
    assert fails(sample(made, out, *run, module=ldm_sample, name="ldm"), "model ddpm_tiny there, ldm_tiny here")
    assert not out.exists()


def test_files_that_do_not_fit_are_refused(made, tmp_path, fails):
    """In one line; what any file of its kind is refused for is in test_fitted.py."""
    half, adjust = made / "half.json", made / "half.safetensors"
    schedule, bad = BlockSchedule.load(half), tmp_path / "bad.json"
    for change, why in (({"blocks": {"nobody's": [0]}}, "names nobody's, and this U-Net has no such block"),
                        ({"calls": STEPS + 1}, "is of 6 network calls, and this run makes 5")):
        replace(schedule, **change).save(bad)
        assert fails(sample(made, tmp_path / "no", "--block-schedule", bad), why)
    replace(schedule, blocks=schedule.blocks | {name: [0] for name in list(schedule.blocks)[:1]}).save(bad)
    assert fails(sample(made, tmp_path / "no", "--block-schedule", bad, "--scale-shift", adjust), "for another block")
    for path, why in ((made / "changes.json", "is no block schedule"), (tmp_path / "none.json", "no block schedule")):
        assert fails(sample(made, tmp_path / "no", "--block-schedule", path), why)
    table = ScaleShiftTable.load(adjust)
    name = next(iter(table.tensors))
    for change, why in ((lambda value: value[:, :, :1], "has 1 channels for"),
                        (lambda value: value[:1], "one scale and shift for each reused residual")):
        replace(table, tensors=table.tensors | {name: change(table.tensors[name])}).save(tmp_path / "bad.safetensors")
        assert fails(sample(made, tmp_path / "no", "--block-schedule", half, "--scale-shift",
                            tmp_path / "bad.safetensors"), why)
    bad.write_text("{")
    assert fails(sample(made, tmp_path / "no", "--block-schedule", bad), "damaged")
    assert fails(program("block-schedule", "--changes", bad, "--out", tmp_path / "no.json"), "damaged")


def test_changes_that_are_not_finite_are_neither_written_nor_read(made, tmp_path, fails, monkeypatch):
    changes = BlockChanges.load(made / "changes.json")
    name = next(iter(changes.residuals))
    changes.residuals[name].changes[1] = float("nan")
    changes.save(tmp_path / "nan.json")
    schedule = ["block-schedule", "--changes", tmp_path / "nan.json", "--kinds", "all", "--out", tmp_path / "no.json"]
    assert fails(program(*schedule), "changes[1] is nan and should be a finite number")
    real = ChangeMeter.changes
    monkeypatch.setattr(ChangeMeter, "changes", lambda meter: real(meter) | {name: torch.tensor([0, np.nan])})
    assert fails(program("changes", "--config", made / "ddpm.yaml", "--device", "cpu", "--seeds", "0-1", "--similar", 0,
                         "--out", tmp_path / "no.json"), "are not finite")
    assert not (tmp_path / "no.json").exists()


def test_least_squares_is_the_best_line():
    torch.manual_seed(0)
    value = torch.randn(4, 3, 5, 5)
    scale, shift = torch.tensor([0.5, 1.0, -2.0]), torch.tensor([0.0, 3.0, 1.0])
    found = best_line(value, value * scale[:, None, None] + shift[:, None, None], ridge=0)
    assert torch.allclose(found[0], scale, atol=1e-5) and torch.allclose(found[1], shift, atol=1e-5)
    tokens = value.flatten(2).mT
    assert torch.allclose(best_line(tokens, tokens * scale, ridge=0)[0], scale, atol=1e-5)
    assert torch.allclose(best_line(value, -value, ridge=1e6)[0], torch.ones(3), atol=1e-4)     # towards the identity
    assert torch.equal(best_line(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 1e-2)[0], torch.ones(3))


@pytest.mark.parametrize("method", ["least-squares", "adam"])
def test_scale_shift_brings_held_out_seeds_nearer(made, tmp_path, method):
    out = tmp_path / "x.safetensors"
    assert program("scale-shift", "--config", made / "ddpm.yaml", "--device", "cpu",
                   "--block-schedule", made / "half.json", "--seeds", "30-77", "--batch-size", 4,
                   "--lr", 1e-2, "--held-out-seeds", "20-27", "--method", method, "--out", out) == 0
    found = results.read(tmp_path / "x.scale_shift.json")
    assert found.details["method"] == method and found.details["held_out_seeds"] == "20-27" and found.images == 8
    assert found.metrics["feature, adjusted less plain"].interval[1] < 0
    assert len(ScaleShiftTable.load(out).adjustments(BlockSchedule.load(made / "half.json"))) == STEPS


def test_bad_training_is_refused(made, tmp_path, fails):
    train = ["scale-shift", "--config", made / "ddpm.yaml", "--device", "cpu", "--block-schedule", made / "half.json"]
    out = tmp_path / "x.safetensors"
    assert fails(program(*train, "--seeds", "0-3", "--held-out-seeds", "3-5", "--out", out), "seed 3")
    assert fails(program(*train, "--seeds", "0-3", "--held-out-seeds", "4-5", "--out", tmp_path / "x.json"), "--out")
    assert fails(program(*train, "--seeds", "0-3", "--held-out-seeds", "4-5", "--steps", 4, "--out", out), "steps")


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp"])
def test_latent_model_with_guidance_and_every_sampler(folder, tmp_path, sampler):
    common = ["--config", folder / "ldm.yaml", "--device", "cpu", "--sampler", sampler]
    assert program("changes", *common, "--seeds", "0-1", "--similar", 0, "--out", tmp_path / "c.json") == 0
    changes = BlockChanges.load(tmp_path / "c.json")
    assert changes.calls == STEPS + (sampler == "plms")
    assert {one.kind for one in changes.residuals.values()} == {"transformer", "resnet", "attention"}
    assert program("block-schedule", "--changes", tmp_path / "c.json", "--delta", 1, "--out", tmp_path / "s.json") == 0
    assert program("scale-shift", *common, "--block-schedule", tmp_path / "s.json", "--seeds", "2-3",
                   "--held-out-seeds", "4-5", "--out", tmp_path / "s.safetensors") == 0
    assert sample(folder, tmp_path / "x", "--sampler", sampler, "--block-schedule", tmp_path / "s.json",
                  "--scale-shift", tmp_path / "s.safetensors", module=ldm_sample, name="ldm") == 0
    assert len(pixels(tmp_path / "x")) == 4
