"""What a machine does and how fast: nothing waits inside a run, few operators, and the command that measures it. Never
how long anything took."""

import diffusers
import pytest
import torch
from conftest import run_command
from test_graphs import CALLS, policies, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval import checks
from eval.cost import operators, sides
from eval.cost.sides import Subject, compare, peak_memory
from eval.tables import machine as tables
from run import results
from run.files import ROOT
from run.machine import Device
from run.results import Result
from scripts import machine
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.speed import accelerate
from unet_caching.speed.graphs import RecordedNetwork

CPU = torch.device("cpu")
SMALL_VIDEO = {
    "block_out_channels": (32, 64), "in_channels": 8, "layers_per_block": 2, "cross_attention_dim": 1024,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_attention_heads": 8,
    "projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32}


class Transfers(TorchDispatchMode):
    """Lists what is read from a device and what is copied to it; the meta device stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {value.device.type for value in tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)}
        if "_local_scalar_dense" in str(function) and devices == {"meta"}:
            raise AssertionError("the run waits for the device")
        out = function(*args, **kwargs or {})
        after = {value.device.type for value in tree_leaves(out) if isinstance(value, torch.Tensor)}
        if devices and after and devices != after and function._schema.name in ("aten::_to_copy", "aten::copy_"):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize(("name", "solver"), [
    *((name, ("dpmpp", "leading")) for name in (
        "none", "deepcache", "zeroed", "blocks", "order 2", "forecast blocks", "plan")),
    ("order 2", ("ddim", "uniform")), ("order 2", ("plms", "leading"))])
@torch.no_grad()
def test_nothing_in_a_run_waits_for_the_device(unet, name, solver):
    """Forecasts take their weights, of all calls, there in one copy; reuse takes nothing."""
    policy, unet = policies(unet)[name](), unet.to("meta")
    sampler = Sampler(solver[0], CALLS - (solver[0] == "plms"), solver[1], 0.0, Diffusion())
    with Transfers() as transfers:
        sampler.run(noise_predictor(unet, Diffusion(), torch.float32, policy), torch.empty(2, 3, 8, 8, device="meta"))
    assert len(transfers.found) == (name in ("order 2", "forecast blocks", "plan")), transfers.found


def test_cached_steps_call_fewer_operators_than_the_package():
    """The small model's are counted anew; those of real size stand in the records."""
    recorded = results.read_packed(ROOT / "results/machines/amd_epyc_avx2/records.jsonl")
    counts = {one.model: one.times["operators"] for one in recorded if one.kind == "operators"}
    assert counts.keys() >= {"ddpm_cifar10", "ldm_cin256", "sd_v15", "sdxl"}
    for counted in (operators.of_cached_steps(Subject("ldm_emoji")), *counts.values()):
        for step, theirs in counted["helper"].items():
            for side in counted.keys() - {"helper"}:
                ours, forecast = counted[side][step], counted[side][f"{step}, order 1"]
                assert ours["operators"] < theirs["operators"] and ours["kernels"] < theirs["kernels"]
                assert forecast["kernels"] == ours["kernels"] + 1       # a weighted sum, and nothing for its weights


@pytest.fixture
def accelerators(monkeypatch):
    """A tracer in the place of CUDA graphs, and compiling without making code."""
    compiling = torch.compile
    for module in (accelerate, sides):
        monkeypatch.setattr(module, "recorded", lambda network, device: RecordedNetwork(network, record))
    monkeypatch.setattr(torch, "compile", lambda network, **how: compiling(network, backend="eager", **how))
    monkeypatch.setattr(diffusers, "UNetSpatioTemporalConditionModel", lambda kind=(
        diffusers.UNetSpatioTemporalConditionModel), **how: kind(**SMALL_VIDEO, **how))


@pytest.mark.parametrize(("name", "mode"), [("tiny", "eager"), ("sd_emoji", "eager"), ("svd", "eager"),
                                            ("tiny", "graphs"), ("tiny", "compiled")])
def test_all_sides_compute_the_same(accelerators, tiny, name, mode):
    subject = Subject("svd", 64, 2) if name == "svd" else Subject(str(tiny) if name == "tiny" else name)
    found = compare(subject, 1, torch.float32, mode, CPU, 2, 1e9 if name == "tiny" else 0)
    main = "pipeline" if name == "svd" else "ours"
    assert found["sides"].keys() == {main, "diffusers"} | ({"pipeline"} if mode == "eager" else set()) | (
        {"helper"} if mode != "compiled" else set())
    for steps in found["sides"].values():
        assert all(step["difference"] < 1e-5 and len(step["rounds"]) == 2 for step in steps.values())
    assert all(step["over_ours"] == 1 for step in found["sides"][main].values())
    assert [run["calls"] for run in found["runs"].values()] == [50] * 4 + [12] * (mode != "compiled")
    assert all(("measured" in run) == (name == "tiny") for run in found["runs"].values())
    if mode == "eager":
        memory = found["memory"]
        assert memory[main]["run"] <= 1.02 * memory[main]["dense"] + memory["feature"]
        assert memory[main]["run"] < memory["helper"]["run"]


def test_peak_memory():
    def run() -> torch.Tensor:
        x = torch.ones(2**20)               # 4 MiB
        x = x + 1                           # 8
        del x
        return torch.ones(2**18)
    sizes = []
    for _ in range(3):
        kept = torch.ones(2**19)            # not of the run
        sizes.append(peak_memory(run, CPU))
        del kept
    assert sizes == pytest.approx([2**23] * 3, rel=0.01)


@pytest.fixture
def one_network(monkeypatch, tiny):
    monkeypatch.setattr(checks, "SMALL", (Subject(str(tiny)),))


def test_checks_name_what_differs_and_the_rest_still_runs(accelerators, one_network, monkeypatch):
    for how in ("cuda_graphs", "compile"):
        found = list(checks.runs(CPU, **{how: True}))
        assert len(found) > 1 and all(one.differs <= one.allowed for one in found)
    monkeypatch.setattr(checks, "SeededNoise", lambda seeds, device="cpu": lambda shape: torch.ones(len(seeds), *shape))
    monkeypatch.setitem(checks.CHECKS, "pipelines", lambda device: [][0])
    found = {name: checks.check(name, CPU) for name in ("outputs", "seeds", "pipelines", "CUDA graphs")}
    assert {name: one["state"] for name, one in found.items()} == {
        "outputs": "ok", "seeds": "failed", "pipelines": "failed", "CUDA graphs": "not here"}
    assert "seed 0, its first numbers differs by 1.5e+00, 1e-06 is allowed" in found["seeds"]["why"]
    assert found["pipelines"]["why"] == "IndexError: list index out of range"


def test_the_command_measures_once_and_goes_on(one_network, monkeypatch, tmp_path, capsys):
    """Stopped, it has shown what there is; the same command goes on, and then has nothing left to do."""
    options, where = machine.Options(quick=True, name="m", out=tmp_path), Device("cpu", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        machine.main.__wrapped__(options, where)
    assert "at most" in capsys.readouterr().out.split("check |")[1]
    words = "--quick", "--device", "cpu", "--threads", 1, "--name", "m", "--out", tmp_path
    assert run_command(machine.main, *words) == 0
    said = capsys.readouterr().out
    assert said.count("there already") == 1 and "**tiny**: " in said and " at a time. N = 3 at branch 1 is" in said
    folder, records = tmp_path / "m", results.read_packed(tmp_path / "m" / "records.jsonl")
    assert [one.kind for one in records] == ["checks", *["speed"] * len(machine.timed("quick", CPU)), "operators"]
    assert (folder / "table.md").read_text() == tables.report(records) and (folder / "charts.svg").is_file()
    assert run_command(machine.main, *words) == 0 and capsys.readouterr().out.count("there already") == len(records)
    assert run_command(machine.main, "--show", *words[1:]) == 0 and "**tiny**" in capsys.readouterr().out
    assert len(results.read_packed(folder / "records.jsonl")) == len(records)


def test_forms_differ_by_device(monkeypatch):
    monkeypatch.setattr(machine, "missing_compiler", lambda device: None)
    gpu = {form: machine.timed(form, torch.device("cuda")) for form in ("quick", "default", "full")}
    assert {one.subject.name for one in gpu["default"]} == {"ddpm_cifar10", "ldm_cin256", "sd_v15", "sdxl", "svd"}
    assert {(one.sizes, one.mode) for one in gpu["default"]} == {
        ((1,), "eager"), ((1,), "graphs"), ((1,), "compiled"), ((16, 4), "eager"), ((16, 4), "graphs")}
    assert len(gpu["quick"]) == 6 < len(gpu["default"]) < len(gpu["full"])
    assert {one.mode for one in machine.timed("default", CPU)} == {"eager"}


def test_rows_have_a_dash_for_what_was_not_measured():
    def step(*rounds: float) -> dict:
        return {"median": rounds[0], "rounds": rounds, "over_ours": 1.5}

    def row(**sides: dict) -> list[str]:
        return tables.Times(Result("speed", "x", {"batch_size": 3, "dtype": "fp32", "mode": "eager", "branch": 1},
                                   throughput={"sides": sides, "expected": {"branch 1": {"macs_fc": 0.2}}})).row()

    assert tables.full_steps(0.25, 5) == 10 + 40 * 0.25
    ours = {"full": step(2.0, 4.0), "branch 1": step(0.5, 1.0)}
    assert row(ours=ours) == ["x", "3", "fp32", "eager", "2", "-, 0.250, -", "-", "-, 0.200, -", "1",
                              "1.60, 1.98, 2.50", "1.67, 2.12, 2.78", "-", "-", "-", "-", "-"]
    assert row(ours=ours, helper={"full": step(4.0, 8.0), "branch 1": step(2.0, 4.0)})[-2:] == ["1.50", "3.00"]


@pytest.mark.parametrize("words", ["--threads 0", "--device meta", "--quick --full", "--device abacus"])
def test_bad_input(capsys, tmp_path, words):
    assert run_command(machine.main, *words.split(), "--out", tmp_path / "x") == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "x").exists()
