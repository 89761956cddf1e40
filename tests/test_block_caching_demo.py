"""The demo of Block Caching, on a tiny random model."""

import pytest
from test_demo import tiny

from lab.study import block_caching_demo, demo
from run import results
from run.files import ROOT


@pytest.mark.slow
def test_demo_end_to_end(tmp_path, monkeypatch):
    out, files = tmp_path / "results" / "block_caching", tmp_path / "checkpoints" / "block_caching"
    monkeypatch.setattr(block_caching_demo, "FILES", files)
    monkeypatch.setattr(block_caching_demo, "BUDGETS", (0.6,))
    monkeypatch.setattr(block_caching_demo, "SEEDS", (4, 4, 4))
    monkeypatch.setattr(demo, "others", lambda: ())         # whatever is fetched on this machine
    monkeypatch.setattr(demo, "MODELS", (tiny(tmp_path, attn_resolutions=[16])._replace(steps=8),))
    monkeypatch.setattr("sys.argv", ["demo", "--models", "ddpm", "--images", "80", "--samples",
                                     str(tmp_path / "samples"), "--results", str(out)])
    block_caching_demo.main()

    table = (out / "table.md").read_text()
    assert "A tiny DDPM" in table and "scale-shift" in table and "| no cache |" in table
    found = {path.stem: result for path, result in results.read_all(out / "ddpm")}
    macs = {name: result.details["macs_per_image"]["macs"] for name, result in found.items()}
    uniform = next(value for name, value in macs.items() if name in ("n2", "n3"))
    assert macs["all_60"] <= 1.0001 * uniform < macs["uncached"]
    assert found["all_60_scale_shift"].settings["cache"]["block_caching"]["scale_shift_sha256"]
    assert (files / "ddpm_all_60.safetensors").is_file() and (out / "equal_cost_ddpm.png").is_file()
    assert "data:image/webp" in (out / "index.html").read_text()


def test_the_table_is_that_of_the_results_that_are_kept():
    folder = ROOT / "results" / "block_caching"
    sections = (block_caching_demo.section(model, folder) for model in demo.MODELS)
    assert "\n".join(filter(None, sections)) == (folder / "table.md").read_text()
