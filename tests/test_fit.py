"""`python -m lab.fit`: what each kind learns on a tiny random model, and the samples that are made with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, TINY_UNET, main_of, run_command, tiny_ddpm, tiny_ldm
from safetensors.torch import load_file, save_file

from ddpm import sample as ddpm_sample
from eval import macs
from eval.cost.runs import macs_per_image
from eval.metrics.images import open_images
from lab.fit.__main__ import FITS
from lab.fit.block_schedule import ScheduleMaker, threshold_schedule
from lab.fit.changes import BlockChanges, ChangeMeter
from lab.fit.fit import weights_sha256
from lab.fit.scale_shift import best_line
from ldm import sample as ldm_sample
from run import results
from run.image_model import open_model
from run.machine import Machine
from run.spec import RunSpec
from unet_caching.methods.adaptive import AdaptiveRule
from unet_caching.methods.block_caching import BlockSchedule, ScaleShiftTable
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.options import RunShape

STEPS = 7
SEEDS = ("--seeds", "10-17", "--held-out-seeds", "20-23", "--batch-size", 2)
CLOCK = ("--clock", 3, "--clock-branch", 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), TINY_UNET, steps=STEPS)


@pytest.fixture(scope="module")
def made(config) -> Path:
    """A folder with a file of each kind, and its report."""
    folder = config.parent
    for kind, name, words in (
            ("changes", "changes.json", ("--seeds", "0-3")),
            ("block-schedule", "half.json", ("--changes", folder / "changes.json", "--kinds", "all", "--macs", 0.5)),
            ("rhythm", "rhythm.json", ("--kinds", "all", "--computed", "0,2")),
            ("scale-shift", "half.safetensors", ("--block-schedule", folder / "half.json", *SEEDS)),
            ("adaptor", "clock.safetensors", (*CLOCK, *SEEDS, "--passes", 2, "--channels", 8)),
            ("router", "routed.json", (*SEEDS, "--calls", 4)),
            ("router", "routed2.json", (*SEEDS, "--calls", 5.5, "--every-second")),
            ("adaptive", "rule.json", (*SEEDS, "--calls", 4))):
        model = () if kind == "block-schedule" else ("--config", config)
        on = ("--device", "cpu") if kind in FITS else ()
        assert run_command(main_of("lab.fit"), kind, *model, *on, *words, "--out", folder / name) == 0
    return folder


@pytest.fixture
def fails(capsys):
    """Whether a command ended with one line about what was wrong."""
    def check(code: int, *words: str) -> bool:
        error = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and "error: " in error and all(word in error for word in words), error
        return True
    return check


@pytest.fixture
def sample(config, tmp_path):
    """sample(name, *words): the images of a run as int arrays, and what its run.json says of caching."""
    def images(name: str, *words: object) -> tuple[np.ndarray, dict]:
        assert run_command(ddpm_sample.main, "--config", config, "--device", "cpu", "--seeds", "0-3", *words, "--out",
                           tmp_path / name) == 0
        cache = json.loads((tmp_path / name / "run.json").read_text())["settings"]["cache"]
        return np.concatenate(list(open_images(tmp_path / name).batches(8))).astype(int), cache
    return images


def schedule(*words) -> int:
    return run_command(main_of("lab.fit"), "block-schedule", *words)


# The command

@pytest.mark.parametrize("program", [("lab.plans", "search"), *(("lab.fit", kind) for kind in FITS)], ids=" ".join)
@pytest.mark.parametrize("config", ["ldm_cin256", "sd_v15"])
def test_each_takes_the_options_of_every_model(program, config, capsys):
    """Its own beside those of sampling, under names that do not meet."""
    module, *words = program
    assert run_command(main_of(module), *words, "--config", f"configs/{config}.yaml", "--help") == 0
    assert "--seeds" in capsys.readouterr().out


def test_kinds_are_listed(capsys):
    assert run_command(main_of("lab.fit"), "--help") == 0
    text = capsys.readouterr().out
    assert all(f"python -m lab.fit {kind}" in text for kind in FITS)
    assert run_command(main_of("lab.fit"), "scale") == 2 and "name what to fit: changes, " in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name", "arms", "nearer"), [
    ("scale-shift", "half.scale_shift", ("plain", "adjusted"), "feature"),
    ("adaptor", "clock.adaptor", ("identity", "learned"), "feature"),
    ("router", "routed.router", ("evenly", "routed"), "latents"),
    ("router", "routed2.router", ("evenly", "routed"), None),
    ("adaptive", "rule.adaptive", ("evenly", "adaptive"), None)])
def test_reports_compare_on_held_out_seeds(made, config, kind, name, arms, nearer):
    """And say that the network stayed as it was."""
    report = results.read(made / f"{name}.json")
    assert report.kind == kind and report.images == 4 and report.details["held_out_seeds"] == "20-23"
    assert report.details["seeds"] == "10-17" and report.details["fitted_s"] > 0
    before, after = arms
    for measure in ("latents", "pixels") if kind == "adaptive" else ("feature", "latents", "pixels"):
        less, own, other = (report.metrics[f"{measure}, {arm}"] for arm in (f"{after} less {before}", after, before))
        assert less.value == pytest.approx(own.value - other.value, rel=1e-5, abs=1e-6)
        assert measure != nearer or less.bounds[2] < 0
    model = open_model(RunSpec.of(config).open(), Machine(device="cpu"))
    model.load()
    assert report.hashes["weights"] == weights_sha256(model.unet)


@pytest.mark.parametrize(("words", "key", "summary"), [
    (("--block-schedule", "half.json"), "block_caching", "blocks computed"),
    (("--block-schedule", "half.json", "--scale-shift", "half.safetensors"), "block_caching", "with scale-shift"),
    ((*CLOCK, "--adaptor", "clock.safetensors"), "clockwork", "clock 3 at branch 1, a learned adaptor"),
    (("--block-schedule", "routed.json"), "block_caching", "blocks computed"),
    (("--adaptive", "rule.json"), "adaptive", "adaptive at branch 1")])
def test_samples_take_what_was_fitted_and_refuse_that_of_another_run(made, sample, run, tmp_path, capsys, words, key,
                                                                     summary):
    words = [made / word if str(word).endswith(("json", "tensors")) else word for word in words]
    images, cache = sample("fitted", *words)
    assert summary in capsys.readouterr().out and cache[key]
    assert (images != sample("plain")[0]).any()
    without, _ = sample("without", *(words[:2] if "--scale-shift" in words else CLOCK if "--adaptor" in words else ()))
    assert (images != without).any()
    assert run(ddpm_sample.main, *words, "--steps", STEPS + 1, "--out", tmp_path / "no") == 2
    assert f"steps {STEPS} there, {STEPS + 1} here" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("kind", "words", "why"), [
    *((kind, ("--seeds", "0-3", "--held-out-seeds", "3-5"), "seed 3 is in two of --seeds and --held-out-seeds")
      for kind in FITS if kind != "changes"),
    *((kind, ("--out", "nowhere/file.json"), "--out must be a .") for kind in FITS),
    *((kind, ("--compile",), "are for sampling") for kind in FITS),
    ("scale-shift", ("--lr", 0), "--lr must be above 0"), ("scale-shift", ("--interval", 2), "and other caching"),
    ("scale-shift", ("--steps", 5), f"steps {STEPS} there, 5 here"),
    ("adaptor", ("--clock", 1), "need a --clock of 2"), ("adaptor", ("--channels", 0), "--channels must be 1 or more"),
    ("adaptor", ("--dtype", "bf16"), "in float32"), ("adaptor", ("--interval", 2), "leave out --interval"),
    ("router", ("--calls", 1), "take fewer steps, or a larger budget"), ("router", ("--lr", 0), "--lr must be above 0"),
    ("router", ("--every-second", "--calls", 4), "a larger budget"), ("router", ("--lam", -1), "--lam 0 or more"),
    ("router", ("--kinds", "attention"), "no attention blocks"), ("router", ("--dtype", "bf16"), "in float32"),
    ("adaptive", ("--calls", 0.5), "--calls must be from"),
    ("adaptive", ("--adaptive-branch", 0), "--adaptive-branch must be")])
def test_refusals(fit, made, tmp_path, fails, kind, words, why):
    usual = {"scale-shift": ("--block-schedule", made / "half.json"), "adaptor": CLOCK, "adaptive": ("--calls", 4)}
    held_out = () if kind == "changes" else ("--held-out-seeds", "20-23")
    suffix = ".safetensors" if FITS[kind].file.has_tensors else ".json"
    assert fails(fit(kind, "--seeds", "10-17", *held_out, *usual.get(kind, ()), "--out", tmp_path / f"file{suffix}",
                     *words), why)
    assert not any(tmp_path.iterdir())


# Block schedules

def test_measured(made):
    changes = BlockChanges.load(made / "changes.json")
    assert changes.calls == STEPS and changes.made_for["model"] == "ddpm_tiny" and changes.notes["seeds"] == "0-3"
    assert {one.kind for one in changes.residuals.values()} == {"transformer", "resnet"}
    assert all(one.changes[0] == 0 and min(one.changes[1:]) > 0 for one in changes.residuals.values())
    for picture in ("changes_transformer", "changes_resnet", "half", "rhythm"):
        assert (made / f"{picture}.png").stat().st_size > 1000


def test_schedule_from_a_budget(made, config, tmp_path, fails, capsys):
    changes, half = BlockChanges.load(made / "changes.json"), BlockSchedule.load(made / "half.json")
    assert half.blocks == {name: threshold_schedule(one.changes, half.delta)
                           for name, one in changes.residuals.items()}
    maker = ScheduleMaker(changes, "all")
    assert half.macs["hook"] <= 0.5 * half.macs_full["hook"]
    assert maker.macs(maker.blocks(half.delta * (1 - 1e-6))).hook > 0.5 * half.macs_full["hook"]    # the smallest delta
    make = ["--changes", made / "changes.json", "--kinds", "all"]
    assert schedule(*make, "--speedup", 2, "--out", tmp_path / "same.json") == 0
    assert BlockSchedule.load(tmp_path / "same.json").sha256 == half.sha256
    assert f"delta {half.delta:.6g}" in capsys.readouterr().out and (tmp_path / "same.png").is_file()
    for words, why in ((["--macs", 0.01], "cannot be reached"), (["--macs", 2], "fraction"), (["--delta", -1], "delta"),
                       (["--speedup", 0.5], "speedup"), (["--interval", 2], "--branch"),
                       (["--kinds", "attention"], "no attention blocks")):
        assert fails(schedule(*make, *words, "--out", tmp_path / "no.json"), why)
    assert not (tmp_path / "no.json").exists()
    assert macs_per_image(RunSpec.of(config, block_schedule=made / "half.json").open()) == pytest.approx(
        [STEPS * half.macs[convention] for convention in ("hook", "fc")])


def test_samples_are_those_of_the_schedule_and_leak_nothing(made, sample, tmp_path):
    """A threshold of 0 is the run without caching, bit for bit."""
    assert schedule("--changes", made / "changes.json", "--kinds", "all", "--delta", 0, "--out",
                    tmp_path / "0.json") == 0
    plain, cache = sample("plain")
    assert (plain == sample("zero", "--block-schedule", tmp_path / "0.json")[0]).all()
    assert "block_caching" not in cache
    half = BlockSchedule.load(made / "half.json")
    one, cache = sample("one", "--block-schedule", made / "half.json")
    two, _ = sample("two", "--block-schedule", made / "half.json", "--batch-size", 2)
    assert abs(one - two).max() <= 1
    about = {"schedule_sha256": half.sha256, "kinds": "all", "delta": half.delta, "blocks": len(half.blocks)}
    assert cache["block_caching"] == {**about, "scale_shift_sha256": None}


def test_together_with_deepcache(made, config, sample, tmp_path, capsys):
    make = ["--changes", made / "changes.json", "--kinds", "all", "--macs", 0.58]
    assert schedule(*make, "--interval", 2, "--branch", 1, "--out", tmp_path / "outer.json") == 0
    outer, changes = BlockSchedule.load(tmp_path / "outer.json"), BlockChanges.load(made / "changes.json")
    assert 0 < len(outer.blocks) < len(changes.residuals)
    capsys.readouterr()
    words = ["--block-schedule", tmp_path / "outer.json", "--interval", 2, "--branch", 1]
    assert run_command(macs.main, "--config", config, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"] <= 0.58 * found["macs_full"]
    branches = len(changes.macs_cached)
    maker = ScheduleMaker(changes, "all", DeepCacheOptions(2, 1).bind(RunShape(STEPS, STEPS, branches, 1), ()))
    assert found["macs"] == pytest.approx(maker.macs(outer.blocks).hook)
    both, cache = sample("both", *words)
    assert (both != sample("level", *words[2:])[0]).any()
    assert cache["interval"] == 2 and cache["block_caching"]["blocks"] == len(outer.blocks)


def test_a_rhythm_needs_no_weights_and_fits_any(made, config, sample, tmp_path, fails):
    """The ones that are shipped are what the command makes."""
    rhythm = BlockSchedule.load(made / "rhythm.json")
    assert set(map(tuple, rhythm.blocks.values())) == {(0, 2)} and rhythm.made_for["checkpoint_sha256"] is None
    save_file({name: value + 1e-3 for name, value in load_file(config.parent / "tiny.safetensors").items()},
              tmp_path / "other.safetensors")
    assert len(sample("other", "--block-schedule", made / "rhythm.json", "--checkpoint",
                      tmp_path / "other.safetensors")[0]) == 4
    for steps, why in (("1,2", "must contain 0"), (f"0,{STEPS}", "stay below"), ("x", "cannot be read")):
        assert fails(run_command(main_of("lab.fit"), "rhythm", "--config", config, "--computed", steps, "--out",
                                 tmp_path / "no.json"), why)
    for path in (HERE.parent / "configs" / "block_schedules").glob("*.json"):
        shipped = BlockSchedule.load(path)
        example = [0, 5, 9, 13, 17]         # arXiv 2312.03209, Section 3.2, of 20 steps and counted from 1 there
        assert shipped.calls in (20, 50)
        assert all(steps == [s * shipped.calls // 20 for s in example] for steps in shipped.blocks.values())


def test_files_that_do_not_fit_are_refused(made, run, config, tmp_path, fails):
    """In one line; what any file of its kind is refused for is in test_fitted.py."""
    half, adjust, bad = made / "half.json", made / "half.safetensors", tmp_path / "bad.json"
    tensors = tmp_path / "bad.safetensors"

    def refused(why: str, *words: object) -> bool:
        return fails(run(ddpm_sample.main, *words, "--seeds", "0", "--out", tmp_path / "no"), why)

    found = BlockSchedule.load(half)
    for change, why in (({"blocks": {"nobody's": [0]}}, "names nobody's, but this U-Net has no such block"),
                        ({"calls": STEPS + 1}, f"is for {STEPS + 1} network calls, but this run makes {STEPS}")):
        replace(found, **change).save(bad)
        assert refused(why, "--block-schedule", bad)
    replace(found, blocks=found.blocks | {next(iter(found.blocks)): [*range(STEPS)]}).save(bad)
    assert refused("for another block", "--block-schedule", bad, "--scale-shift", adjust)
    table = ScaleShiftTable.load(adjust)
    name = next(iter(table.tensors))
    for change, why in ((lambda value: value[:, :, :1], "has 1 channels for"),
                        (lambda value: value[:1], "a scale and shift for each reuse of a residual")):
        replace(table, tensors=table.tensors | {name: change(table.tensors[name])}).save(tensors)
        assert refused(why, "--block-schedule", half, "--scale-shift", tensors)
    for path, why in ((made / "changes.json", "no block schedule of"), (tmp_path / "none.json", "no block schedule")):
        assert refused(why, "--block-schedule", path)
    save_file({key: value + 1e-3 for key, value in load_file(config.parent / "tiny.safetensors").items()}, tensors)
    assert refused("checkpoint_sha256", "--block-schedule", half, "--checkpoint", tensors)
    assert refused("--block-schedule", "--scale-shift", adjust)
    assert refused("--zero-cache", "--block-schedule", half, "--interval", 2, "--zero-cache")
    assert not (tmp_path / "no").exists()


def test_changes_that_are_not_finite_are_neither_written_nor_read(made, fit, tmp_path, fails, monkeypatch):
    changes = BlockChanges.load(made / "changes.json")
    name = next(iter(changes.residuals))
    changes.residuals[name].changes[1] = float("nan")
    changes.save(tmp_path / "nan.json")
    assert fails(schedule("--changes", tmp_path / "nan.json", "--kinds", "all", "--out", tmp_path / "no.json"),
                 "changes[1] is nan and should be a finite number")
    real = ChangeMeter.changes
    monkeypatch.setattr(ChangeMeter, "changes", lambda meter: real(meter) | {name: torch.tensor([0, np.nan])})
    assert fails(fit("changes", "--seeds", "0-1", "--out", tmp_path / "no.json"), "are not finite")
    assert not (tmp_path / "no.json").exists()


# Learning

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


def test_the_papers_way_brings_held_out_seeds_nearer_too(fit, made, tmp_path):
    out = tmp_path / "x.safetensors"
    assert fit("scale-shift", "--block-schedule", made / "half.json", "--seeds", "30-53", "--batch-size", 4, "--lr",
               1e-2, "--held-out-seeds", "20-25", "--method", "adam", "--out", out) == 0
    found = results.read(tmp_path / "x.scale_shift.json")
    assert found.details["method"] == "adam" and found.metrics["feature, adjusted less plain"].interval[1] < 0
    assert len(ScaleShiftTable.load(out).adjustments(BlockSchedule.load(made / "half.json"))) == STEPS


def test_budgets_are_kept(made, config):
    """A router's by what is rounded, on every second call nothing but those; a rule's as it comes out."""
    for name, calls in (("routed", 4), ("routed2", 5.5)):
        found, report = BlockSchedule.load(made / f"{name}.json"), results.read(made / f"{name}.router.json")
        assert 0.9 * calls < report.details["full_calls"] <= calls
        run = RunSpec.of(config, block_schedule=made / f"{name}.json").open()
        assert macs_per_image(run).hook == pytest.approx(STEPS * found.macs["hook"])
    assert all({0, 2, 4, 6} <= set(steps) for steps in found.blocks.values())
    rule, report = AdaptiveRule.load(made / "rule.json"), results.read(made / "rule.adaptive.json")
    assert report.metrics["full calls, as it came out"].value == pytest.approx(rule.notes["spent"]["mean"])
    assert 0.8 * 4 < rule.notes["spent"]["mean"] < 1.2 * 4
    assert RunSpec.of(config, adaptive=made / "rule.json").open().full_calls == len(rule.typical)


def test_a_latent_model_with_guidance_and_a_sampler_that_calls_once_more(tmp_path):
    run = ["--config", tiny_ldm(tmp_path, steps=4), "--device", "cpu", "--sampler", "plms"]
    fit, files = main_of("lab.fit"), [tmp_path / name for name in ("c.json", "s.json", "s.safetensors")]
    assert run_command(fit, "changes", *run, "--seeds", "0-1", "--out", files[0]) == 0
    changes = BlockChanges.load(files[0])
    assert changes.calls == 5
    assert {one.kind for one in changes.residuals.values()} == {"transformer", "resnet", "attention"}
    assert schedule("--changes", files[0], "--delta", 1, "--out", files[1]) == 0
    assert run_command(fit, "scale-shift", *run, "--block-schedule", files[1], "--seeds", "2-3", "--held-out-seeds",
                       "4-5", "--out", files[2]) == 0
    assert run_command(ldm_sample.main, *run, "--seeds", "0-1", "--block-schedule", files[1], "--scale-shift",
                       files[2], "--out", tmp_path / "x") == 0
