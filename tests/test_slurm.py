"""Tables as Slurm jobs: what is submitted, and on a real Slurm of one node that it is done, whatever comes between."""

import os
import re
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from conftest import HERE
from forked import Forked
from PIL import Image
from slurm_node import SlurmNode, until, why_not

from ddpm import sample as ddpm_sample
from eval.cost.macs import Macs
from lab.study import plan
from lab.study.arms import Arm
from run import results
from run.folder import image_path
from scripts.slurm import cluster, submit
from scripts.slurm.cluster import Live
from scripts.slurm.submit import Slices, arrays
from unet_caching.errors import UserError

ROOT = HERE.parent
SETTINGS = """
gpu: {partition: gpu, gres: "gpu:1", cpus-per-task: 1, mem: 1G}
cpu: {partition: cpu, cpus-per-task: 1, mem: 1G}
time: {sample: "00:30:00", evaluate: "00:30:00", table: "00:30:00"}
images_per_task: 4
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """submit_table.sh without bash; returns what it printed."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "settings.yaml").write_text(SETTINGS)

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["submit", *words, *run.options])
        submit.main()
        return capsys.readouterr().out
    run.options = [f"--settings={tmp_path / 'settings.yaml'}",
                   *(f"--{name}={tmp_path / name}" for name in ("samples", "results", "logs"))]
    return run


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH with nothing but what the table scripts need to say their rows."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "basename", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


# Without Slurm


def test_slices_cover_every_seed_once_and_are_told_by_their_name():
    slices = Slices("samples/a:b/c", 10, 99, 25)
    seeds = [seed for task in slices.tasks(range(10, 100)) for seed in slices.seeds(task)]
    assert seeds == list(range(10, 100)) and slices.tasks([34, 35, 99]) == [0, 1, 3]
    assert Slices.named(slices.name) == slices and Slices.named("evaluate:x") is None


def made_by(found: list[tuple[Slices, list[int]]]) -> list[int]:
    return [seed for slices, tasks in found for task in tasks for seed in slices.seeds(task)]


def test_arrays_hold_what_is_missing_and_nothing_that_is_on_its_way():
    assert arrays("f", 100, 10, [], set()) == []
    assert arrays("f", 100, 10, [3, 5, 47, 99], set()) == [(Slices("f", 0, 99, 10), [0, 4, 9])]
    assert arrays("f", 105, 10, [104], {*range(50)}) == [(Slices("f", 0, 104, 10), [10])]
    # Others, of another size, have 20 to 29 and 45 to 59.
    taken = {*range(20, 30), *range(45, 60)}
    found = arrays("f", 100, 8, [seed for seed in range(10, 100) if seed not in taken], taken)
    assert sorted(made_by(found)) == [seed for seed in range(10, 100) if seed not in taken]
    assert len(found) == 3


def test_times_are_read_as_slurm_writes_them():
    times = {"30": 1800, "1:30": 90, "01:00:00": 3600, "2-0": 172800, "1-01:00:00": 90000, "infinite": float("inf")}
    assert {text: cluster.seconds(text) for text in times} == times


def test_cheap_rows_get_more_images_per_task_by_their_macs(tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    settings = cluster.read_settings(tmp_path / "settings.yaml")
    settings.time.sample = "10:00:00"
    monkeypatch.setattr(submit, "macs_per_image", lambda run: Macs(run, run))
    arms = [SimpleNamespace(run=macs, images=5000) for macs in (6, 3, 1)]
    assert list(submit.images_per_task(arms, settings, None)) == [4, 4, 4]
    assert list(submit.images_per_task(arms, settings, 100)) == [800, 1600, 4800]
    assert list(submit.images_per_task(arms, settings, 200)) == [1600, 3200, 5000]      # no more than there are


@pytest.fixture
def all_files_there(monkeypatch):
    """Weights and the evaluators' files, as far as the plan can tell."""
    for name in ("missing_for_sampling", "missing_for_judging"):
        monkeypatch.setattr(Arm, name, lambda arm: [])


@pytest.mark.parametrize("name", ["table1", "table2", "table5", "table9", "table13", "block_caching_table1", "emoji"])
def test_a_table_has_its_jobs(run, no_slurm, all_files_there, name):
    """A sample array and an evaluation per row, none twice, then the table; each waits for what it needs."""
    args = plan.user_parser("x").parse_args(["--images", "1000"])
    arms = plan.make_plan(submit.find_table(name), args).arms
    out = run(name, "--dry-run", "--images", "1000")
    if not arms:
        assert "only lists settings" in out
        return
    words = [shlex.split(line.partition("$(sbatch ")[2][:-1]) for line in out.splitlines() if line.startswith("job")]
    steps = {next(word for word in line if word.startswith("--job-name=")): line for line in words}
    assert len(steps) == len(words)
    kinds = [step.removeprefix("--job-name=").split(":")[0] for step in steps]
    assert kinds.count("sample") == len({arm.folder for arm in arms})
    assert kinds.count("evaluate") == len({arm.result for arm in arms}) and kinds[-1] == "table"
    for i, (kind, line) in enumerate(zip(kinds, words, strict=True), 1):
        after = [word for word in line if word.startswith("--dependency=")]
        if kind == "sample":
            assert not after and "scripts/slurm/sample.sbatch" in line and "--seeds" not in line
            before = i
        else:
            needed = [before] if kind == "evaluate" else [n for n, other in enumerate(kinds, 1) if other == "evaluate"]
            assert after == [f"--dependency=afterok:{':'.join(f'$job{n}' for n in needed)}"]
            assert "--kill-on-invalid-dep=yes" in line


def test_what_is_on_its_way_is_waited_for_and_what_waits_in_vain_is_replaced(run, monkeypatch, tmp_path):
    """Tasks 0 and 1 of 4 run, 2 and 3 were cancelled: the evaluation that waits for all four must be another."""
    array = Slices(str(tmp_path / "samples/ddpm_emoji/steps10"), 0, 15, 4).name
    evaluation = f"evaluate:{tmp_path / 'results/runs/ddpm_emoji/steps10_16_quality.json'}"
    table = f"table:{tmp_path / 'results/runs/table_emoji_16.txt'}"
    waiting = [Live("78", None, evaluation, True), Live("79", None, table, True)]
    live = [Live("77", 0, array, False), Live("77", 1, array, True)]
    words = ["table_emoji", "--only", "steps10", "--images", "16", "--dry-run"]

    monkeypatch.setattr(cluster, "live_jobs", lambda: live + waiting)
    out = run(*words)
    assert "--array=2-3 " in out and "--dependency=afterok:$job1,afterany:77 " in out
    assert "# on their way already: 77\n" in out and out.endswith("scancel 78\nscancel 79\n")

    rest = [Live("80", task, array, True) for task in (2, 3)]
    monkeypatch.setattr(cluster, "live_jobs", lambda: live + rest + waiting)
    assert run(*words).endswith("# on their way already: 77 80 78 79\n")
    monkeypatch.setattr(cluster, "live_jobs", lambda: live + rest)      # somebody cancelled what would come after
    out = run(*words)
    assert "sample.sbatch" not in out and "--dependency=afterany:77:80 " in out and "afterok:$job1 " in out


def test_rows_without_weights_are_left_out_and_others_are_not(run, no_slurm, tmp_path):
    out = run("table5", "--dry-run", "--config", str(ROOT / "configs/ddpm_emoji.yaml"))
    assert out.count("# left out: ") == 2 and out.count("sample.sbatch") == 2
    assert "# left out: LDM" in out and "model.ckpt" in out


BAD = {"nonsense": "no table 'nonsense': choose from table1_ldm_imagenet",
       "table1": "no row of table1_ldm_imagenet.sh can be sampled",
       "table_emoji --images 0": "--images must be 1 or more",
       "table_emoji --images-per-task 0": "--images-per-task must be 1 or more",
       "table_emoji --images-per-task 5 --images-per-hour 5": "not both",
       "table_emoji --time soon": "time limit 'soon' does not parse",
       "table_emoji --time 00:10:00": "must be 15 minutes or more",
       "table_emoji --only nothing": "is no row of this table"}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(run, no_slurm, capsys, tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        run(*words.split()[:1], "--dry-run", *words.split()[1:])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[words] in err


@pytest.mark.parametrize("line, said", [("partitions: 3", "partitions"), ("images_per_task: 0", "images_per_task"),
                                        ("time: {sample: soon, evaluate: '1', table: '1'}", "soon")])
def test_bad_settings_are_refused(tmp_path, line, said):
    key = line.split(":")[0]
    kept = [other for other in SETTINGS.splitlines() if not other.startswith(key)]
    (tmp_path / "bad.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(UserError, match=said):
        cluster.read_settings(tmp_path / "bad.yaml")


def test_without_slurm_nothing_is_submitted(run, no_slurm, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("table_emoji")
    assert stop.value.code == 2 and "no squeue on PATH" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


# On a Slurm of one node


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
def test_what_the_cluster_would_refuse_is_refused_before(slurm, run, capsys, tmp_path, words, gpus, said):
    (tmp_path / "settings.yaml").write_text(SETTINGS.replace("gpu:1", f"gpu:{gpus}"))
    with pytest.raises(SystemExit) as stop:
        run("table_emoji", *words)
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


def test_a_table_with_a_cancelled_task_and_deleted_images(slurm, run, monkeypatch, tmp_path):
    words = ["table_emoji", "--only", "steps10", "--images", "12"]
    folder, logs = tmp_path / "samples/ddpm_emoji/steps10", tmp_path / "logs"
    table = tmp_path / "results/runs/table_emoji_12.txt"

    # Two submits at once are one: an array of 3, of which 2 fit at a time; the last is cancelled before it begins.
    both = [Forked(submit.main, *words, *run.options, log=tmp_path / f"submit{i}") for i in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    (first,) = filter(None, (ids(one.output) for one in both))
    assert first.keys() == {"sample", "evaluate", "table"} and len(slurm.queue()) == 5
    slurm.ask("scancel", f"{first['sample']}_2")
    assert any(f"on their way already: {first['sample']} {first['evaluate']}" in one.output for one in both)
    slurm.wait()
    assert seeds_in(folder) == list(range(8)) and not table.exists()
    assert sum(job["JobState"] == "COMPLETED" for job in slurm.ended()) == 2

    # What is missing is the cancelled slice, and what should have come after it.
    out = run(*words, "--dry-run")
    assert "--array=2 " in out and "afterok:$job1" in out and not slurm.queue()
    second = ids(run(*words))
    assert set(slurm.queue()) == {f"{second['sample']}_2", second["evaluate"], second["table"]}
    slurm.wait()
    assert seeds_in(folder) == list(range(12))
    result = results.read(tmp_path / "results/runs/ddpm_emoji/steps10_12_quality.json")
    assert result.images == 12 and f"{result.metrics['FD-EffLite0'].value:.1f}" in table.read_text()
    assert len(list(logs.glob("*.log"))) == 5
    assert "is complete" in run(*words) and not slurm.queue()

    # Three images are deleted: these are made, and no other.
    before = {seed: image_path(folder, seed).stat().st_mtime_ns for seed in range(12)}
    for seed in (5, 6, 7):
        image_path(folder, seed).unlink()
    third = ids(run(*words))
    assert third.keys() == {"sample", "evaluate", "table"}
    slurm.ask("scancel", third["evaluate"], third["table"])
    slurm.wait()
    after = {seed: image_path(folder, seed).stat().st_mtime_ns for seed in range(12)}
    assert [seed for seed in range(12) if before[seed] != after[seed]] == [5, 6, 7]
    alone = sample_here(monkeypatch, tmp_path / "alone", "--config", "configs/ddpm_emoji.yaml", "--steps", "10",
                        "--seeds", "0-11", "--threads", "1", "--device", "cpu")
    assert abs(pixels(folder, range(12)) - alone).max() <= 1


class Process(NamedTuple):
    pid: int
    job: str        # the number that the task has for itself


def process(module: str, array: str, task: int) -> Process | None:
    """That of `python -m module` in a task of an array, if it runs."""
    wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            env = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-m", module.encode()] and wanted <= set(env):
            return Process(int(path.name), next(word.split(b"=")[1].decode() for word in env
                                                if word.startswith(b"SLURM_JOB_ID=")))
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
    slurm.ask("scancel", "--signal=USR1", "--batch", process("program", array, 1).job)      # its own number: see below
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
