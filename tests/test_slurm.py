"""Tables as Slurm jobs: what is submitted. No Slurm is needed."""


import shlex
import shutil

import pytest
from slurm_node import SETTINGS

from eval.tables.arms import Arm, Given
from lab.study import papers
from run.files import ROOT
from scripts.slurm import cluster, submit
from scripts.slurm.cluster import Live
from scripts.slurm.submit import Slices
from unet_caching.errors import UserError


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH with nothing but what the table scripts need to say their rows."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "basename", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_slices_cover_every_seed_once_and_are_told_by_their_name():
    slices = Slices("samples/a:b/c", 89, 25)
    seeds = [seed for task in slices.tasks(range(90)) for seed in slices.seeds(task)]
    assert seeds == list(range(90)) and slices.tasks([24, 25, 89]) == [0, 1, 3]
    assert Slices.named(slices.name) == slices and Slices.named("evaluate:x") is None


def test_times_are_read_as_slurm_writes_them():
    times = {"30": 1800, "1:30": 90, "01:00:00": 3600, "2-0": 172800, "1-01:00:00": 90000, "infinite": float("inf")}
    assert {text: cluster.seconds(text) for text in times} == times


@pytest.fixture
def all_files_there(monkeypatch):
    """Weights and the evaluators' files, as far as the plan can tell."""
    for name in ("missing_for_sampling", "missing_for_judging"):
        monkeypatch.setattr(Arm, name, lambda arm: [])


@pytest.mark.parametrize("name", ["table5", "table9", "table13", "block_caching_table1", "emoji"])
def test_a_table_has_its_jobs(submit_table, no_slurm, all_files_there, name):
    """A sample array and an evaluation per row, none twice, then the table; each waits for what it needs."""
    arms = papers.make_plan(submit.find_table(name), papers.Options(), Given(images=1000)).arms
    out = submit_table(name, "--dry-run", "--images", "1000")
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


def test_what_is_on_its_way_is_waited_for_and_what_waits_in_vain_is_replaced(submit_table, monkeypatch, tmp_path):
    """Tasks 0 and 1 of 4 run, 2 and 3 were cancelled: the evaluation that waits for all four must be another."""
    array = Slices(str(tmp_path / "samples/ddpm_emoji/steps10"), 15, 4).name
    evaluation = f"evaluate:{tmp_path / 'results/runs/ddpm_emoji/steps10_16_quality.json'}"
    table = f"table:{tmp_path / 'results/runs/table_emoji_16.txt'}"
    waiting = [Live("78", None, evaluation, True), Live("79", None, table, True)]
    live = [Live("77", 0, array, False), Live("77", 1, array, True)]
    words = ["table_emoji", "--only", "steps10", "--images", "16", "--dry-run"]

    monkeypatch.setattr(cluster, "live_jobs", lambda: live + waiting)
    out = submit_table(*words)
    assert "--array=2-3 " in out and "--dependency=afterok:$job1,afterany:77 " in out
    assert "# on their way already: 77\n" in out and out.endswith("scancel 78\nscancel 79\n")

    other = Slices(str(tmp_path / "samples/ddpm_emoji/steps10"), 15, 3).name            # of another size: 9 to 11
    monkeypatch.setattr(cluster, "live_jobs", lambda: [*live, Live("81", 3, other, True)])
    out = submit_table(*words)
    assert "--array=2-3 " in out and "--dependency=afterok:$job1,afterany:77:81 " in out

    rest = [Live("80", task, array, True) for task in (2, 3)]
    monkeypatch.setattr(cluster, "live_jobs", lambda: live + rest + waiting)
    assert submit_table(*words).endswith("# on their way already: 77 80 78 79\n")
    monkeypatch.setattr(cluster, "live_jobs", lambda: live + rest)      # somebody cancelled what would come after
    out = submit_table(*words)
    assert "sample.sbatch" not in out and "--dependency=afterany:77:80 " in out and "afterok:$job1 " in out


def test_rows_without_weights_are_left_out_and_others_are_not(submit_table, no_slurm, tmp_path):
    out = submit_table("table5", "--dry-run", "--config", str(ROOT / "configs/ddpm_emoji.yaml"))
    assert out.count("# left out: ") == 2 and out.count("sample.sbatch") == 2
    assert "# left out: LDM" in out and "model.ckpt" in out


BAD = {"nonsense": "no table 'nonsense': choose from table1_ldm_imagenet",
       "table1": "no row of table1_ldm_imagenet.sh can be sampled",
       "table_emoji --images 0": "--images must be 1 or more",
       "table_emoji --images-per-task 0": "--images-per-task must be 1 or more",
       "table_emoji --time soon": "time limit 'soon' does not parse",
       "table_emoji --time 00:10:00": "must be 15 minutes or more",
       "table_emoji --only nothing": "is not a row of this table"}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(submit_table, no_slurm, capsys, tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        submit_table(*words.split()[:1], "--dry-run", *words.split()[1:])
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


def test_without_slurm_nothing_is_submitted(submit_table, no_slurm, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        submit_table("table_emoji")
    assert stop.value.code == 2 and "no squeue on PATH" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
