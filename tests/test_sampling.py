"""Noise, DDIM, and the runs of `ddpm.sample`: through the command line, as a user does."""

import json
import os
import shutil
import signal
import threading
import time
import weakref
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import HERE, fails, run_command, tiny_ddpm
from forked import Forked, signal_at
from PIL import Image

from ddpm.sample import main
from run import stopping
from run.cli import command
from run.families import load_config
from run.folder import RunFolder, to_uint8
from run.image_model import fill, open_model
from run.machine import Machine
from run.seeds import format_seeds, parse_seeds
from run.spec import Run, RunSpec
from unet_caching.errors import UserError
from unet_caching.samplers.diffusion import Diffusion, predicted_noise, training_target
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler
from unet_caching.samplers.solvers import ddim
from unet_caching.samplers.timesteps import quadratic_timesteps, uniform_timesteps

UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": [4]}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The config of a tiny random model, its checkpoint beside it."""
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), UNET, steps=6)


@pytest.fixture
def sample(tiny):
    """sample(*words): the command within this process; its exit code."""
    return lambda *words: run_command(main, "--config", tiny, "--threads", 1, "--device", "cpu", *words)


@pytest.fixture
def start(tiny, tmp_path):
    """start(name, *words, ...): the same as a process of its own (tests/forked.py)."""
    return lambda name, *words, **more: Forked("ddpm.sample", "--config", tiny, "--threads", 1, "--device", "cpu",
                                               *words, log=tmp_path / f"{name}.log", **more)


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


# ---- noise and DDIM

def test_noise_depends_on_the_seed_alone():
    together = SeededNoise([3, 1, 4])
    first, second = together((3, 8, 8)), together((3, 8, 8))
    for i, seed in enumerate([3, 1, 4]):
        alone = SeededNoise([seed])
        assert torch.equal(alone((3, 8, 8))[0], first[i])
        assert torch.equal(alone((3, 8, 8))[0], second[i])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_solves_a_gaussian_exactly(eta):
    """For data N(0, s^2) the ideal noise prediction is known, and many small steps must give variance s^2."""
    alphas, spread = Diffusion("linear").alphas_cumprod(), 0.5

    def ideal(x, t, step):
        alpha = alphas[t]
        return x * (1 - alpha).sqrt() / (alpha * spread ** 2 + 1 - alpha)

    noise = SeededNoise(range(16))
    x = ddim(ideal, noise((3, 16, 16)), uniform_timesteps(1000), alphas, eta, noise)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


def test_v_and_noise_stand_for_the_same():
    alpha, x0, noise = torch.tensor(0.3), torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    for prediction in ("noise", "v"):
        output = training_target(prediction, x0, noise, alpha)
        assert torch.allclose(predicted_noise(prediction, output, x, alpha), noise, atol=1e-6)


def test_timesteps():
    assert uniform_timesteps(8) == list(range(0, 1000, 125))
    assert quadratic_timesteps(8) == [0, 16, 65, 146, 261, 408, 587, 800]
    assert len(uniform_timesteps(30)) == 30 and uniform_timesteps(30)[-1] > 960
    for bad in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            uniform_timesteps(bad)
    assert quadratic_timesteps(100)[:9] == [0, 0, 0, 0, 1, 2, 2, 3, 5]         # as in the released code, CIFAR-10


def test_a_step_from_a_timestep_to_itself_leaves_the_image():
    alphas, x, noise = Diffusion("linear").alphas_cumprod(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    seen = []
    once = ddim(lambda *_: noise, x, [0, 2, 400], alphas)
    again = ddim(lambda x, t, step: seen.append((t, step)) or noise, x, [0, 0, 0, 2, 2, 400], alphas)
    assert torch.allclose(once, again, atol=1e-5)
    assert seen == [(400, 0), (2, 1), (2, 2), (0, 3), (0, 4), (0, 5)]


def test_every_config_has_a_sampler_that_runs():
    for path in sorted((HERE.parent / "configs").glob("*.yaml")):
        config = load_config(path)
        usual = config.sampler
        sampler = Sampler(usual.sampler, usual.steps, usual.timesteps, usual.eta, config.diffusion)
        assert len(sampler.call_timesteps()) == sampler.calls, path


def test_to_uint8():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256.0).view(1, 1, 1, 256) / 127.5 - 1
    assert to_uint8(every).ravel().tolist() == list(range(256))
    with pytest.raises(UserError, match="finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


# ---- runs

def test_seeds_parse_and_format():
    assert parse_seeds("0-3, 7,9-9") == [0, 1, 2, 3, 7, 9]
    assert format_seeds([9, 7, 0, 1, 3, 2]) == "0-3,7,9"
    for bad in ("", "a", "1-", "-1", "5-3", "1,,2", "1-3,2", "1.5"):
        with pytest.raises(UserError, match="seeds"):
            parse_seeds(bad)


def test_interval_one_equals_no_cache_and_batches_do_not_matter(sample, tmp_path):
    for name, words in {"a": ["--batch-size", 5], "b": ["--batch-size", 5, "--interval", 1, "--branch", 0],
                        "c": ["--batch-size", 2], "d": ["--interval", 3]}.items():
        assert sample("--seeds", "0-4", "--out", tmp_path / name, *words) == 0
    assert images(tmp_path / "a") == images(tmp_path / "b") != images(tmp_path / "d")
    assert len(images(tmp_path / "a")) == 5
    for name in images(tmp_path / "a"):
        a, c = (np.asarray(Image.open(tmp_path / x / name)).astype(int) for x in "ac")
        assert np.abs(a - c).max() <= 1         # the same noise; rounding may differ by batch size


def test_a_folder_opens_as_its_run(tiny, sample, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ["--interval", 2, "--branch", 0, "--sampler", "unipc", "--out", out]
    assert sample(*words, "--seeds", 0) == 0
    whole, run = json.loads((out / "run.json").read_text()), Run.of_folder(out)
    assert whole["provenance"]["versions"]["torch"] == version("torch") and whole["provenance"]["device"] == "cpu"
    assert run.spec == RunSpec.of(tiny, interval=2, branch=0, sampler="unipc") and run.settings == {
        key: value for key, value in whole["settings"].items() if key != "checkpoint_sha256"}
    for changed in ({"steps": 7}, {"cache": {"plan": {}}}, {"model": "nobodys"}):
        (out / "run.json").write_text(json.dumps(whole | {"settings": whole["settings"] | changed}))
        with pytest.raises(UserError):
            Run.of_folder(out)

    # Made before the options were kept: the folder goes on, and the settings say as much of a model in configs/.
    (out / "run.json").write_text(json.dumps({key: value for key, value in whole.items() if key != "run"}))
    assert sample(*words, "--seeds", "0-1") == 0 and len(images(out)) == 2
    (tmp_path / "configs").mkdir()
    shutil.copy(tiny, tmp_path / "configs" / "ddpm_tiny.yaml")
    monkeypatch.setattr("run.families.ROOT", tmp_path)
    assert Run.of_folder(out).name == run.name


def test_slices_and_resume_equal_one_run(sample, tmp_path):
    common = ["--interval", 3, "--eta", 1, "--batch-size", 1, "--steps", 4]
    assert sample(*common, "--seeds", "0-5", "--out", tmp_path / "whole") == 0
    parts = tmp_path / "parts"
    for seeds in ("4-5", "0,2", "0-5"):
        assert sample(*common, "--seeds", seeds, "--out", parts) == 0
    assert images(parts) == images(tmp_path / "whole")

    broken = sorted(parts.glob("*/*.png"))
    broken[0].unlink()
    broken[1].write_bytes(broken[1].read_bytes()[:50])      # as after a power cut
    (parts / "000" / ".000003.png.elsewhere.1.tmp").write_bytes(b"another machine's")
    assert sample(*common, "--seeds", "0-5", "--out", parts) == 0
    assert images(parts) == images(tmp_path / "whole")
    assert (parts / "000" / ".000003.png.elsewhere.1.tmp").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_stopped_goes_on(sample, start, tmp_path, number):
    """At once, or after its batch where it is asked in good order; an echo of that changes nothing."""
    out = tmp_path / "stopped"
    words = ["--seeds", "0-11", "--batch-size", 3, "--interval", 2, "--out"]
    process = start("first", *words, out, before=signal_at(4, number, number))
    code, made = process.wait(), images(out)
    assert 0 < len(made) < 12 and "Traceback" not in process.output
    if number == signal.SIGINT:
        assert code == 130 and "goes on" in process.output
    else:
        assert code == 75 and len(made) % 3 == 0
        assert process.output.endswith(f"stopped: {len(made)} of 12 images are there; the same command goes on\n")
    assert sample(*words, out) == 0 and sample(*words, tmp_path / "whole") == 0
    assert images(out) == images(tmp_path / "whole") and images(out).items() >= made.items()
    assert not list(out.glob("**/.*.tmp"))


def test_a_program_of_several_runs_stops_between_them(tiny, tmp_path):
    """Though nothing is missing of the run in which it was asked."""
    @command
    def several():
        for name in "ab":
            machine, run = Machine(device="cpu"), RunSpec.of(tiny, steps=2).open()
            model = open_model(run, machine)
            decode = model.decode
            model.decode = lambda latents: os.kill(os.getpid(), signal.SIGTERM) or decode(latents)
            fill(model, [0, 1], tmp_path / name, machine)

    process = Forked(several, log=tmp_path / "log")
    assert process.wait(60) == 75, process.output
    assert len(images(tmp_path / "a")) == 2 and not (tmp_path / "b").exists()


def test_the_same_signal_again_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_ECHO", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    with stopping.StopRequest() as stop:
        assert not stop.asked
    assert signal.getsignal(signal.SIGTERM) is before

    @command
    def waiting():
        with stopping.StopRequest():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    process = Forked(waiting, log=tmp_path / "log")
    assert process.wait(30) == 130
    assert "still here" in process.output and process.output.count("stopping after") == 1


@pytest.mark.parametrize(("change", "word"), [
    ("--interval 0", "interval"), ("--interval 7", "interval"), ("--branch 4", "branch"), ("--branch -1", "branch"),
    ("--seeds 3-1", "backwards"), ("--seeds x", "cannot be read"), ("--steps 0", "steps"), ("--eta 2", "eta"),
    ("--batch-size 0", "batch-size"), ("--schedule centered", "center"), ("--center 3", "center"),
    ("--zero-cache", "zero-cache"), ("--schedule centered --center 9 --power 1.4 --interval 2", "center"),
    ("--checkpoint nowhere.ckpt", "nowhere.ckpt"), ("--config nowhere.yaml", "nowhere.yaml"),
    ("--device cuda:99", "cuda:99")])
def test_bad_input_is_one_line_and_leaves_nothing(sample, tmp_path, capsys, change, word):
    assert fails(capsys, sample("--out", tmp_path / "out", *change.split()), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("edit", "word"), [
    (lambda c: c.update(intervall=3), "intervall"), (lambda c: c["unet"].update(chh=3), "chh"),
    (lambda c: c.pop("unet"), "unet"), (lambda c: c["unet"].update(ch="many"), "ch"),
    (lambda c: c["diffusion"].update(beta_schedule="sine"), "sine"), (lambda c: c["unet"].update(ch=33), "ch"),
    (lambda c: c["sampler"].update(timesteps="cubic"), "cubic"),
    (lambda c: c["diffusion"].update(prediction="x"), "'x'"),
    (lambda c: c["unet"].update(ch_mult=[1, 2]), "down.1.block.0.nin_shortcut.weight")])
def test_bad_config_is_one_line(tiny, sample, tmp_path, capsys, edit, word):
    config = yaml.safe_load(tiny.read_text())
    edit(config)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    assert fails(capsys, sample("--config", tmp_path / "bad.yaml", "--out", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(sample, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample("--interval", 2, "--seeds", 0, "--out", out) == 0
    before = images(out)
    for change in (["--interval", 3], ["--interval", 2, "--steps", 5], ["--interval", 2, "--branch", 0]):
        assert fails(capsys, sample(*change, "--out", out), "other settings")
    assert fails(capsys, sample("--out", out), "other settings", "2 there, 1 here")
    assert images(out) == before
    (out / "run.json").unlink()
    assert fails(capsys, sample("--interval", 2, "--out", out), "run.json")


# ---- the folder

def pictures(seeds) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), seed, np.uint8) for seed in seeds])


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """fill() asks for one batch at a time, and keeps the last one at most, which is being written."""
    kept = []

    def made(seeds, report):
        assert sum(ref() is not None for ref in kept) <= 2
        batch = pictures(seeds)
        kept.append(weakref.ref(batch))
        return batch

    assert RunFolder(tmp_path / "out", {}, {}).fill(range(40), 4, made) == 40
    assert len(kept) == 10


def test_the_next_batch_starts_while_the_last_is_written(tmp_path, monkeypatch):
    run, save, started = RunFolder(tmp_path / "out", {}, {}), RunFolder.save, threading.Event()

    def slow(self, seed, image):
        assert seed >= 2 or started.wait(30)        # the first batch is written once the second has started
        save(self, seed, image)

    def made(seeds, report):
        if 2 in seeds:
            assert not images(run.path)
            started.set()
        return pictures(seeds)

    monkeypatch.setattr(RunFolder, "save", slow)
    assert run.fill(range(6), 2, made) == 6
    assert [np.asarray(Image.open(path)).max() for path in sorted(run.path.glob("*/*.png"))] == list(range(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_is_finished_is_written_when_the_next_batch_fails(tmp_path, monkeypatch, error):
    run, save = RunFolder(tmp_path / "out", {}, {}), RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda *args: (time.sleep(0.05), save(*args)))

    def made(seeds, report):
        if 4 in seeds:
            raise error
        return pictures(seeds)

    with pytest.raises(error):
        run.fill(range(6), 2, made)
    assert run.seeds() == [0, 1, 2, 3]
