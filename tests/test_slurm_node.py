"""Tables and programs as Slurm jobs on a real Slurm of one node: that all is done, whatever comes between."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import run_command, same
from forked import Forked
from slurm_node import SETTINGS, SlurmNode, until, why_not

from ddpm import sample as ddpm_sample
from run import results
from run.files import ROOT
from run.folder import seeds_there
from scripts.slurm import submit

OPTIONS = ["--parsable", "--mem=1G", f"--chdir={ROOT}"]


@pytest.fixture(scope="module")
def slurm():
    if reason := why_not():
        pytest.skip(f"Slurm cannot start here: {reason}")
    with SlurmNode() as node:
        yield node


@pytest.mark.parametrize("words, gpus, said", [
    (["--partition", "fast"], 1, "no partition 'fast' on this cluster: it has gpu, cpu"),
    (["--time", "03:00:00"], 1, "beyond the limit of partition gpu, 1:00:00"),
    (["--images-per-task", "1", "--images", "2000"], 1, "more images per task make fewer"),
    ([], 7, "configuration is not available")])
def test_what_the_cluster_would_refuse_is_refused_before(slurm, submit_table, capsys, tmp_path, words, gpus, said):
    (tmp_path / "settings.yaml").write_text(SETTINGS.replace("gpu:1", f"gpu:{gpus}"))
    with pytest.raises(SystemExit) as stop:
        submit_table("table_emoji", *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert not slurm.queue() and not any(tmp_path.glob("logs/*"))


def ids(out: str) -> dict[str, str]:
    """What submit printed: 'sample', 'evaluate', 'table' -> id."""
    return {kind: job for job, kind in re.findall(r"^(\d+)  (sample|evaluate|table) ", out, re.MULTILINE)}


def test_a_table_with_a_cancelled_task(slurm, submit_table, tmp_path):
    words = ["table_emoji", "--only", "steps10", "--images", "12"]
    folder, table = tmp_path / "samples/ddpm_emoji/steps10", tmp_path / "results/runs/table_emoji_12.txt"

    # Two submits at once are one: an array of 3, of which 2 fit at a time; the last is cancelled before it begins.
    both = [Forked(submit.main, *words, *submit_table.options, log=tmp_path / f"submit{i}") for i in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    (first,) = filter(None, (ids(one.output) for one in both))
    assert first.keys() == {"sample", "evaluate", "table"} and len(slurm.queue()) == 5
    slurm.ask("scancel", f"{first['sample']}_2")
    assert any(f"on their way already: {first['sample']} {first['evaluate']}" in one.output for one in both)
    slurm.wait()
    assert seeds_there(folder) == list(range(8)) and not table.exists()

    # What is missing is the cancelled slice, and what should have come after it.
    second = ids(submit_table(*words))
    assert set(slurm.queue()) == {f"{second['sample']}_2", second["evaluate"], second["table"]}
    slurm.wait()
    assert seeds_there(folder) == list(range(12))
    result = results.read(tmp_path / "results/runs/ddpm_emoji/steps10_12_quality.json")
    assert result.images == 12 and f"{result.metrics['FD-EffLite0'].value:.1f}" in table.read_text()
    assert "is complete" in submit_table(*words) and not slurm.queue()


def test_a_program_as_an_array_and_a_job_after_it(slurm, monkeypatch, tmp_path):
    (tmp_path / "program.py").write_text("import sys\nprint('doing', *sys.argv[1:])")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = ["scripts/slurm/program.sbatch", "program", "--own"]
    array = slurm.ask("sbatch", *OPTIONS, f"--output={tmp_path}/%a.log", "--array=1-2", *line)
    slurm.ask("sbatch", *OPTIONS, f"--output={tmp_path}/last.log", f"--dependency=afterok:{array}",
              "--kill-on-invalid-dep=yes", *line)
    slurm.wait()
    for name, said in (("1", "--own --share 1/2"), ("2", "--own --share 2/2"), ("last", "--own")):
        log = (tmp_path / f"{name}.log").read_text()
        assert f"doing {said}\n" in log and "exit status 0" in log


def test_a_task_that_is_asked_to_stop_and_one_that_is_put_back_go_on(slurm, monkeypatch, tmp_path):
    """As before a time limit, and as at preemption."""
    monkeypatch.chdir(ROOT)
    folder, count = tmp_path / "images", 24
    command = ["--config", "configs/ddpm_emoji.yaml", "--steps", "10", "--device", "cpu", "--batch-size", "1"]
    array = slurm.ask("sbatch", *OPTIONS, f"--output={tmp_path}/%a.log", "--array=0-1", "scripts/slurm/sample.sbatch",
                      f"0-{2 * count - 1}", str(count), sys.executable, "-m", "ddpm.sample", *command, "--out",
                      str(folder))

    def made(task: int) -> int:
        return sum(seed // count == task for seed in seeds_there(folder))

    for task in (0, 1):
        until(lambda task=task: made(task) > 0, f"the first image of task {task}", pause=0.01)
    # By its own number: for ARRAY_TASK, Slurm 22.05 sends the signal, says that it did not, and scancel tries again.
    own = slurm.ask("squeue", "-h", "-r", "-j", f"{array}_0", "-o", "%A")
    slurm.ask("scancel", "--signal=USR1", "--batch", own)
    slurm.ask("scontrol", "requeue", f"{array}_1")
    for task in (0, 1):
        until(lambda task=task: slurm.queue()[f"{array}_{task}"] == "PENDING", f"task {task} to be in the queue again")
        assert 0 < made(task) < count
        slurm.start_now(f"{array}_{task}")
    slurm.wait()

    assert not list(folder.rglob("*.tmp"))
    logs = [(tmp_path / f"{task}.log").read_text() for task in (0, 1)]
    assert all(log.count("restarts: 1") == log.count("exit status 0") == 1 for log in logs)
    assert "exit status 75" in logs[0]
    assert run_command(ddpm_sample.main, *command, "--seeds", f"0-{2 * count - 1}", "--out", tmp_path / "alone") == 0
    assert same(folder, tmp_path / "alone", tolerance=1)
