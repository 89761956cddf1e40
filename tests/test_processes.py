"""Many processes on one machine: whatever the split, the stops and the restarts, the same noise, images and numbers."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from PIL import Image
from test_sampling import ROOT, in_process, tiny, wait_for_an_image  # noqa: F401
from tqdm import tqdm

from eval.metrics import extract
from unet_caching.samplers.noise import SeededNoise


def pixels(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*/*.png"))
    assert [int(file.stem) for file in files] == list(range(64))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_a_fork_that_is_killed_while_it_draws_its_bar_stops_no_other(tmp_path):
    """tqdm's lock of its own is one for all forks."""
    def draw_and_hold() -> None:
        with tqdm(range(3)) as bar, bar.get_lock():
            (tmp_path / "holds").touch()
            time.sleep(60)

    with tqdm(range(3)):                        # a lock is there before the forks
        first = Forked(draw_and_hold, log=tmp_path / "first")
        while not (tmp_path / "holds").exists():
            time.sleep(0.002)
        first.send(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert Forked(lambda: list(tqdm(range(3))), log=tmp_path / "second").wait(20) == 0


def test_64_seeds_however_they_are_split(tiny, tmp_path, monkeypatch):  # noqa: F811
    """As one batch of 64; as 4 ranks; as 8 slices, two of which are stopped on the way and started again."""
    draw, draws = SeededNoise.__call__, tmp_path / "draws"

    def recorded(self, shape):
        noise = draw(self, shape)
        with open(draws, "a") as file:
            for generator, values in zip(self.generators, noise, strict=True):
                file.write(f"{generator.initial_seed()} {hashlib.sha256(values.numpy()).hexdigest()}\n")
        return noise

    monkeypatch.setattr(SeededNoise, "__call__", recorded)
    common = ["--config", tiny, "--interval", 3, "--steps", 40, "--threads", 1]
    assert in_process(monkeypatch, *common, "--seeds", "0-63", "--batch-size", 64, "--out", tmp_path / "one") == 0
    ranks = [Forked("ddpm.sample", *common, "--seeds", "0-63", "--out", tmp_path / "ranks", log=tmp_path / f"rank{i}",
                    env={"RANK": str(i), "WORLD_SIZE": "4"}) for i in range(4)]
    assert [rank.wait() for rank in ranks] == [0] * 4, ranks[0].output

    def slices(numbers) -> list[Forked]:
        return [Forked("ddpm.sample", *common, "--seeds", f"{8 * i}-{8 * i + 7}", "--batch-size", 3, "--out",
                       tmp_path / "slices", log=tmp_path / f"slice{i}") for i in numbers]

    first = slices([1, 6])
    for process, number in zip(first, (signal.SIGUSR1, signal.SIGKILL), strict=True):
        while not (made := list((tmp_path / "slices").glob("000/*.png"))) and process.running():
            time.sleep(0.002)
        process.send(number)
        process.wait()
    assert 0 < len(made) < 16
    assert [process.wait() for process in slices(range(8))] == [0] * 8

    one, four, eight = (pixels(tmp_path / name) for name in ("one", "ranks", "slices"))
    print("largest differences", np.abs(one - four).max(), np.abs(one - eight).max())
    assert max(np.abs(one - four).max(), np.abs(one - eight).max()) <= 1
    found = {tuple(line.split()) for line in draws.read_text().splitlines()}
    assert len(found) == len({seed for seed, _ in found}) == 64        # the same noise, whoever drew it


def test_torchrun_shares_seeds_and_passes_on_a_stop(tiny, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    args = ["--config", tiny, "--seeds", "0-199", "--steps", 50, "--batch-size", 2, "--threads", 1, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=120", "-m", "ddpm.sample", *map(str, args),
         out], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    wait_for_an_image(out)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    made = len(list(out.glob("*/*.png")))
    assert 0 < made < 200 and made % 2 == 0
    assert process.returncode and re.search(r"stopped: \d+ of 200 images are there; the same command goes on", output)


def test_a_process_of_torchrun_takes_its_own_gpu(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Seen in the message, where there is no GPU."""
    monkeypatch.setenv("LOCAL_RANK", "96")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 100)
    assert in_process(monkeypatch, "--config", tiny, "--device", "cuda", "--out", tmp_path / "out") == 2
    assert "cuda:96 is not there" in capsys.readouterr().err


def test_four_processes_judge_as_one(tmp_path, monkeypatch):
    """eval.quality, its features in parts of 6 images, with the same numbers to the last bit."""
    monkeypatch.setattr(extract, "PART", 6)
    for name in ("samples", "reference"):
        (tmp_path / name / "000").mkdir(parents=True)
        for seed in range(24):
            image = np.random.default_rng([seed, len(name)]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / name / "000" / f"{seed:06d}.png")
        (tmp_path / name / "run.json").write_text('{"settings": {}}')

    def judge(out: str, **env) -> Forked:
        return Forked("eval.quality", "--samples", tmp_path / "samples", "--reference", tmp_path / "reference",
                      "--repeats", 2, "--dims", 4, "--threads", 1, "--out", tmp_path / out, log=tmp_path / f"log{env}",
                      env=env)

    four = [judge("four.json", RANK=str(i), WORLD_SIZE="4") for i in range(4)]
    assert [process.wait() for process in four] == [0] * 4, four[0].output
    assert ["all images" in process.output for process in four] == [True, False, False, False]
    parts = sorted(tmp_path.glob("*/.features/*/part-*.npz"))
    assert len(parts) == 8
    for part in parts:
        part.unlink()
    assert judge("one.json").wait() == 0
    one, four = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "four.json"))
    assert one["metrics"] == four["metrics"] and one["details"] == four["details"]


@pytest.mark.slow
def test_two_processes_are_nearly_twice_as_fast(tmp_path):
    """One thread each; on two idle cores."""
    if (os.cpu_count() or 1) < 2 or os.getloadavg()[0] > 0.3:
        pytest.skip(f"needs two idle cores: the load is {os.getloadavg()[0]:.1f}")

    def seconds(processes: int, name: str) -> float:
        started = time.monotonic()
        running = [Forked("ddpm.sample", "--config", ROOT / "configs" / "ddpm_emoji.yaml", "--steps", 50, "--seeds",
                          f"0-{32 * processes - 1}", "--batch-size", 8, "--threads", 1, "--out", tmp_path / name,
                          log=tmp_path / f"{name}{i}", env={"RANK": str(i), "WORLD_SIZE": str(processes)})
                   for i in range(processes)]
        assert [process.wait() for process in running] == [0] * processes, running[0].output
        return time.monotonic() - started

    pairs = [(seconds(1, f"one{i}"), seconds(2, f"two{i}")) for i in range(3)]
    ratios = sorted(2 * one / two for one, two in pairs)
    print("throughput of two processes over one:", ratios)
    assert ratios[1] >= 1.7
