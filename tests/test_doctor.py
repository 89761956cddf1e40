"""What the doctor says is missing."""

from pathlib import Path

import torch

from eval.tables.arms import CLIP, INCEPTION
from eval.tables.paper import find, tables
from scripts import doctor, download
from scripts.download import File, catalogue


def test_every_file_of_the_tables_has_a_download():
    items = catalogue()
    for table in tables().values():
        if table.script and not table.schedules:
            for arm in doctor.arms_of(table):
                for path in [*arm.inputs_of_sampling().values(), *arm.inputs.values()]:
                    assert doctor.named(path, items).startswith("bash scripts/download.sh "), path
    for path in (INCEPTION, CLIP, *doctor.references().values()):
        if str(path).startswith("emoji:"):          # shipped, and no file
            continue
        assert "download.sh" in doctor.named(path, items)


def test_the_doctor_says_what_a_table_needs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scripts.doctor", "3", "9"])
    monkeypatch.setattr(doctor, "ROOT", Path("/nowhere"))
    monkeypatch.setattr(doctor, "unmet", lambda file: {})
    monkeypatch.setattr(doctor, "machine", lambda: iter(["no machine"]))
    doctor.main()
    out = capsys.readouterr().out
    for line in ("to sample: checkpoint checkpoints/stable-diffusion-v1-5: bash scripts/download.sh sd_v15",
                 "to sample: prompts data/prompts/parti.tsv: bash scripts/download.sh parti_prompts",
                 "to sample: checkpoint checkpoints/bk-sdm-tiny-2m: bash scripts/download.sh bk_sdm_tiny",
                 "to judge: checkpoints/clip_vit_g_14/open_clip_pytorch_model.bin: bash scripts/download.sh clip"):
        assert line in out
    assert out.count("bash scripts/download.sh") == 7 and "Table 9" in out and "nothing is missing" in out


def first_line(monkeypatch, folder: Path, wrong: str = "", gpu: bool = False) -> str:
    """What the doctor says first of Table 2 where a folder is the repository."""
    monkeypatch.setattr(doctor, "ROOT", folder)
    monkeypatch.setattr(doctor, "unmet", lambda file: {"numpy": wrong})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    said = doctor.report([find("2")]).splitlines()
    assert said[1] == "" and said[0].startswith("Right now: ")
    return said[0]


def test_the_first_line_says_what_can_be_done_and_the_next_step(monkeypatch, tmp_path):
    assert first_line(monkeypatch, tmp_path, "numpy>=2: missing").endswith("-m pip install -r requirements.txt.")
    assert "Next: git checkout -- checkpoints" in first_line(monkeypatch, tmp_path)

    def put(path: Path | str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()

    for path in doctor.SHIPPED.values():
        assert (download.ROOT / path).is_file()
        put(path)
    line = first_line(monkeypatch, tmp_path)
    assert "time the small models (DDPM, LDM, Stable Diffusion) on " in line
    assert "no table of the papers yet" in line and line.endswith("Next: bash scripts/demo.sh, three to five minutes.")
    put("results/demo_short/index.html")
    assert first_line(monkeypatch, tmp_path).endswith("see docs/pipelines.md.")
    line = first_line(monkeypatch, tmp_path, gpu=True)
    assert "on a GPU" in line and line.endswith("Next: bash scripts/download.sh ddpm_cifar10.")
    for arm in doctor.arms_of(find("2")):
        for path in (*arm.inputs_of_sampling().values(), *arm.inputs.values()):
            put(path)
    line = first_line(monkeypatch, tmp_path, gpu=True)
    assert "1 of 1 tables of the papers." in line and line.endswith("Next: bash scripts/table2_ddpm.sh.")


def test_states_of_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "x").write_bytes(b"abc")
    here, away = File("u", Path("x")), File("u", Path("y"))
    assert [doctor.state(download.Item("about", files)) for files in ([here], [here, away], [away])] == [
        "here", "missing, 1 of 2 files here", "missing"]
