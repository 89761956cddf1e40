"""Tables and programs as Slurm jobs on a real Slurm of one node: that all is done, whatever comes between."""


import contextlib
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from PIL import Image
from slurm_node import SETTINGS, SlurmNode, until, why_not

from ddpm import sample as ddpm_sample
from run import results
from run.files import ROOT
from run.folder import image_path
from scripts.slurm import submit


@pytest.fixture(scope="module")
def slurm():
    if reason := why_not():
        pytest.skip(f"Slurm cannot start here: {reason}")
    with SlurmNode() as node:
        yield node


@pytest.mark.parametrize("words, gpus, said", [
    (["--partition", "fast"], 1, "no partition 'fast' on this cluster: it has gpu, cpu"),
    (["--time", "03:00:00"], 1, "beyond that of partition gpu, 1:00:00"),
    (["--images-per-task", "1", "--images", "2000"], 1, "more images per task make fewer"),
    ([], 7, "configuration is not available")])
def test_what_the_cluster_would_refuse_is_refused_before(slurm, submit_table, capsys, tmp_path, words, gpus, said):
    (tmp_path / "settings.yaml").write_text(SETTINGS.replace("gpu:1", f"gpu:{gpus}"))
    with pytest.raises(SystemExit) as stop:
        submit_table("table_emoji", *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert not slurm.queue() and not any(tmp_path.glob("logs/*"))


def pixels(folder: Path, seeds: range) -> np.ndarray:
    return np.stack([np.asarray(Image.open(image_path(folder, seed)), int) for seed in seeds])


def seeds_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*/*.png"))


def sample_here(monkeypatch, folder: Path, *words: str) -> np.ndarray:
    """The same command in this process: one batch after the other, all seeds."""
    monkeypatch.setattr("sys.argv", ["sample", *words, "--out", str(folder)])
    ddpm_sample.main()
    return pixels(folder, range(len(seeds_in(folder))))


def ids(out: str) -> dict[str, str]:
    """What submit printed: 'sample', 'evaluate', 'table' -> id."""
    return {kind: job for job, kind in re.findall(r"^(\d+)  (sample|evaluate|table) ", out, re.MULTILINE)}


def test_a_table_with_a_cancelled_task_and_deleted_images(slurm, submit_table, monkeypatch, tmp_path):
    words = ["table_emoji", "--only", "steps10", "--images", "12"]
    folder, logs = tmp_path / "samples/ddpm_emoji/steps10", tmp_path / "logs"
    table = tmp_path / "results/runs/table_emoji_12.txt"

    # Two submits at once are one: an array of 3, of which 2 fit at a time; the last is cancelled before it begins.
    both = [Forked(submit.main, *words, *submit_table.options, log=tmp_path / f"submit{i}") for i in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    (first,) = filter(None, (ids(one.output) for one in both))
    assert first.keys() == {"sample", "evaluate", "table"} and len(slurm.queue()) == 5
    slurm.ask("scancel", f"{first['sample']}_2")
    assert any(f"on their way already: {first['sample']} {first['evaluate']}" in one.output for one in both)
    slurm.wait()
    assert seeds_in(folder) == list(range(8)) and not table.exists()
    assert sum(job["JobState"] == "COMPLETED" for job in slurm.ended()) == 2

    # What is missing is the cancelled slice, and what should have come after it.
    out = submit_table(*words, "--dry-run")
    assert "--array=2 " in out and "afterok:$job1" in out and not slurm.queue()
    second = ids(submit_table(*words))
    assert set(slurm.queue()) == {f"{second['sample']}_2", second["evaluate"], second["table"]}
    slurm.wait()
    assert seeds_in(folder) == list(range(12))
    result = results.read(tmp_path / "results/runs/ddpm_emoji/steps10_12_quality.json")
    assert result.images == 12 and f"{result.metrics['FD-EffLite0'].value:.1f}" in table.read_text()
    assert len(list(logs.glob("*.log"))) == 5
    assert "is complete" in submit_table(*words) and not slurm.queue()

    # Three images are deleted: these are made, and no other.
    before = {seed: image_path(folder, seed).stat().st_mtime_ns for seed in range(12)}
    for seed in (5, 6, 7):
        image_path(folder, seed).unlink()
    third = ids(submit_table(*words))
    assert third.keys() == {"sample", "evaluate", "table"}
    slurm.ask("scancel", third["evaluate"], third["table"])
    slurm.wait()
    after = {seed: image_path(folder, seed).stat().st_mtime_ns for seed in range(12)}
    assert [seed for seed in range(12) if before[seed] != after[seed]] == [5, 6, 7]
    alone = sample_here(monkeypatch, tmp_path / "alone", "--config", "configs/ddpm_emoji.yaml", "--steps", "10",
                        "--seeds", "0-11", "--threads", "1", "--device", "cpu")
    assert abs(pixels(folder, range(12)) - alone).max() <= 1


def process(module: str, array: str, task: int) -> tuple[int, str] | None:
    """Id and job of `python -m module` in a task of an array, if it runs; the job by the task's own number."""
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, env = ((path / name).read_text().split("\0") for name in ("cmdline", "environ"))
            if words[1:3] == ["-m", module] and wanted <= set(env):
                return int(path.name), dict(line.partition("=")[::2] for line in env)["SLURM_JOB_ID"]
    return None


PROGRAM = """
import os, sys, time
print("doing", *sys.argv[1:], flush=True)
while "1/2" in sys.argv and os.environ["SLURM_RESTART_COUNT"] == "0":
    time.sleep(0.05)
"""


def test_a_program_as_an_array_goes_on_after_its_time_limit(slurm, monkeypatch, tmp_path):
    """As program.sbatch says: shares, and a job after them. The first task is told that its time is over."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    options = ["--parsable", "--mem=1G", f"--chdir={ROOT}"]
    line = ["scripts/slurm/program.sbatch", "program", "--own"]
    array = slurm.ask("sbatch", *options, f"--output={tmp_path}/%a.log", "--array=1-2", *line)
    last = slurm.ask("sbatch", *options, f"--output={tmp_path}/last.log", f"--dependency=afterok:{array}",
                     "--kill-on-invalid-dep=yes", *line)

    until(lambda: process("program", array, 1), "the first task to begin")
    until(lambda: "doing" in (tmp_path / "1.log").read_text(), "the first task to be at work")
    slurm.ask("scancel", "--signal=USR1", "--batch", process("program", array, 1)[1])
    until(lambda: slurm.queue()[f"{array}_1"] == "PENDING", "the first task to be in the queue again")
    slurm.start_now(f"{array}_1")
    slurm.wait()

    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("1", "2", "last")}
    assert all("exit status 0" in log for log in logs.values())
    assert "exit status 138" in logs["1"] and "restarts: 1" in logs["1"] and "doing --own --share 1/2" in logs["1"]
    assert "doing --own --share 2/2" in logs["2"] and "doing --own\n" in logs["last"]
    assert [job["JobState"] for job in slurm.ended() if job["JobId"] == last] == ["COMPLETED"]


class Sampler:
    """A task's sampler, held after its first image of some seeds, so that what comes next hits it in the middle."""

    def __init__(self, array: str, task: int, folder: Path, seeds: range):
        self.folder, self.seeds = folder, seeds
        until(lambda: process("ddpm.sample", array, task), f"the sampler of task {task}", pause=0.05)
        self.pid, self.job = process("ddpm.sample", array, task)
        until(lambda: self.made() > 0, "its first image", pause=0.005)
        os.kill(self.pid, signal.SIGSTOP)

    def made(self) -> int:
        return sum(seed in self.seeds for seed in seeds_in(self.folder))

    def has_usr1(self) -> bool:
        """Whether the signal has arrived, and waits for the process to go on."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return bool(int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def test_four_tasks_two_requeues_and_another_job_are_one_process(slurm, monkeypatch, tmp_path):
    """Seeds 0-31. Task 1 is asked to stop, as before its time limit; task 2 is put back, as at preemption."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "images"
    command = ["--config", "configs/ddpm_emoji.yaml", "--steps", "10", "--device", "cpu"]
    options = ["--parsable", "--mem=1G", f"--output={tmp_path}/%A_%a.log", f"--chdir={ROOT}"]
    line = [sys.executable, "-m", "ddpm.sample", *command, "--batch-size", "1", "--out", str(folder)]
    # Another job in the same folder, whose seeds are task 0's, too.
    other = slurm.ask("sbatch", *options, "--array=0", "scripts/slurm/sample.sbatch", "4-7", "8", *line)
    array = slurm.ask("sbatch", *options, "--array=0-3", "scripts/slurm/sample.sbatch", "0-31", "8", *line)

    with ThreadPoolExecutor() as pool:
        asked, put_back = pool.map(lambda task: Sampler(array, task, folder, range(8 * task, 8 * task + 8)), (1, 2))

    # By its own number: for ARRAY_TASK, Slurm 22.05 sends the signal, says that it did not, and scancel tries again.
    slurm.ask("scancel", "--signal=USR1", "--batch", asked.job)
    until(asked.has_usr1, "the signal")
    asked.go_on()
    slurm.ask("scontrol", "requeue", f"{array}_2")      # lets it go on, too, for as long as a batch takes
    for task, sampler in ((1, asked), (2, put_back)):
        until(lambda task=task: slurm.queue()[f"{array}_{task}"] == "PENDING", f"task {task} to be in the queue again")
        assert 0 < sampler.made() < 8
        slurm.start_now(f"{array}_{task}")
    slurm.wait()

    assert seeds_in(folder) == list(range(32)) and not list(folder.rglob("*.tmp"))
    ended = [job["JobState"] for job in slurm.ended() if job.get("ArrayJobId") in (array, other)]
    assert ended.count("COMPLETED") == 5
    logs = [(tmp_path / f"{array}_{task}.log").read_text() for task in range(4)]
    assert [log.count("restarts: 1") for log in logs] == [0, 1, 1, 0]
    assert all(log.count("exit status 0") == 1 for log in logs) and "exit status 75" in logs[1]
    alone = sample_here(monkeypatch, tmp_path / "alone", *command, "--seeds", "0-31", "--threads", "1")
    assert abs(pixels(folder, range(32)) - alone).max() <= 1
