"""Many processes on one machine: whatever the split, the stops and the restarts, the same noise, images and numbers."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import HERE, fails
from forked import Forked, signal_at
from PIL import Image
from test_sampling import sample, start, tiny  # noqa: F401  fixtures

from unet_caching.samplers.noise import SeededNoise


def pixels(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*/*.png"))
    assert [int(file.stem) for file in files] == list(range(64))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_64_seeds_however_they_are_split(sample, start, tmp_path, monkeypatch):  # noqa: F811
    """As one batch of 64; as 4 ranks; as 8 slices, two of which are stopped on the way and started again."""
    draw, draws = SeededNoise.__call__, tmp_path / "draws"

    def recorded(self, shape):
        noise = draw(self, shape)
        with open(draws, "a") as file:
            for generator, values in zip(self.generators, noise, strict=True):
                file.write(f"{generator.initial_seed()} {hashlib.sha256(values.numpy()).hexdigest()}\n")
        return noise

    monkeypatch.setattr(SeededNoise, "__call__", recorded)
    common = ["--interval", 3, "--steps", 4]
    assert sample(*common, "--seeds", "0-63", "--batch-size", 64, "--out", tmp_path / "one") == 0
    ranks = [start(f"rank{i}", *common, "--seeds", "0-63", "--out", tmp_path / "ranks",
                   env={"RANK": str(i), "WORLD_SIZE": "4"}) for i in range(4)]
    assert [rank.wait() for rank in ranks] == [0] * 4, ranks[0].output

    def part(i: int, **more) -> Forked:
        return start(f"slice{i}", *common, "--seeds", f"{8 * i}-{8 * i + 7}", "--batch-size", 3, "--out",
                     tmp_path / "slices", **more)

    stopped = [part(1, before=signal_at(9, signal.SIGUSR1)), part(6, before=signal_at(52, signal.SIGKILL))]
    assert [process.wait() for process in stopped] == [75, -signal.SIGKILL]
    assert 0 < len(list((tmp_path / "slices").glob("000/*.png"))) < 16
    assert [process.wait() for process in [part(i) for i in range(8)]] == [0] * 8

    one, four, eight = (pixels(tmp_path / name) for name in ("one", "ranks", "slices"))
    assert max(np.abs(one - four).max(), np.abs(one - eight).max()) <= 1
    found = {tuple(line.split()) for line in draws.read_text().splitlines()}
    assert len(found) == len({seed for seed, _ in found}) == 64        # the same noise, whoever drew it


def test_torchrun_shares_seeds_and_passes_on_a_stop(tiny, tmp_path):  # noqa: F811
    """The command itself, with its progress bar."""
    out = tmp_path / "out"
    words = ["--config", tiny, "--seeds", "0-1999", "--batch-size", 2, "--threads", 1, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=120", "-m", "ddpm.sample",
         *map(str, words)], cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def both_at_work() -> bool:
        log = out / "sessions.jsonl"
        return bool(list(out.glob("*/*.png"))) and len(log.read_text().splitlines()) == 2

    while not both_at_work() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    made = len(list(out.glob("*/*.png")))
    assert 0 < made < 2000 and made % 2 == 0
    assert process.returncode and re.search(r"stopped: \d+ of 2000 images are there; the same command goes on", output)
    assert "2 processes" in output and "/2000" in output


def test_a_process_of_torchrun_takes_its_own_gpu(sample, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Seen in the message, where there is no GPU."""
    monkeypatch.setenv("LOCAL_RANK", "96")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 100)
    assert fails(capsys, sample("--device", "cuda", "--out", tmp_path / "out"), "cuda:96 does not exist")
