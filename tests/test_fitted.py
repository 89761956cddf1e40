"""Files of what was fitted: what comes back, what is refused, what their digest is of; and each kind's own rules."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import MADE_FOR
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lab.fit.changes import BlockChanges
from run.files import ROOT
from run.spec import RunSpec
from unet_caching.files.fitted import Fitted
from unet_caching.methods.adaptive import AdaptiveRule
from unet_caching.methods.block_caching import BlockSchedule, ScaleShiftTable
from unet_caching.methods.clockwork import Adaptor, AdaptorFile
from unet_caching.methods.plan import SAMPLING, Call, Plan


@dataclass
class Numbers(Fitted):
    kind = "list of numbers"
    maker = "python -m numbers"
    numbers: list[float]
    more: int | None = None


MACS = {"hook": 6, "fc": 7.5}
SCHEDULE = BlockSchedule(MADE_FOR, 4, "all", 0.5, {"a": [0, 2], "b": [0, 1, 2, 3]}, MACS, MACS)
ADAPTOR = {name: torch.full_like(value, 0.5) for name, value in Adaptor(4, 2).state_dict().items()} | {
    "table": torch.ones(4, 3, 2)}
FILES = {
    "numbers": Numbers(MADE_FOR, [1.5, 2], notes={"seeds": "0-7"}),
    "plan": Plan(MADE_FOR, [Call(), Call(2, (0.5,)), Call(1), Call()], [1.0, 2.0], MACS, MACS),
    "schedule": SCHEDULE, "rule": AdaptiveRule(MADE_FOR, 1, "a", [0.0, 1, 2, 3], 0.5, [0, 2]),
    "table": ScaleShiftTable.of([{"a": (torch.ones(3), torch.full((3,), call))} for call in range(4)], SCHEDULE),
    "adaptor": AdaptorFile(MADE_FOR, 2, [0, 3], tensors=ADAPTOR)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.bin"


@pytest.mark.parametrize("made", FILES.values(), ids=FILES.keys())
def test_a_file_comes_back(made, path):
    made.save(path)
    found = type(made).load(path)
    assert found.sha256 == made.sha256 and replace(found, tensors={}) == replace(made, tensors={})
    assert found.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(value, made.tensors[name]) for name, value in found.tensors.items())
    found.check({**MADE_FOR, "guidance": 1.5, "dtype": "fp16"})
    found.check({"model": "tiny"})
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_digest_is_of_all_that_decides(path):
    """Not of notes; an optional value that is not there yet changes nothing; an older digest stays its name."""
    made = FILES["numbers"]
    changed = [replace(made, numbers=[1.5, 3]), replace(made, made_for=MADE_FOR | {"steps": 5}), replace(made, more=1),
               replace(made, tensors={"x": torch.ones(1)}), replace(made, tensors={"x": torch.zeros(1)})]
    assert len({one.sha256 for one in (made, *changed)}) == 6
    assert replace(made, notes={}, numbers=[1.5, 2.0]).sha256 == made.sha256
    older = replace(made, known_as="abc")
    older.save(path)
    assert Numbers.load(path).sha256 == "abc"
    older.save(path)
    path.write_text(path.read_text().replace('"abc"', '"def"'))
    with pytest.raises(ValueError, match="has been changed"):
        Numbers.load(path)


@pytest.mark.parametrize(("settings", "words"), [
    ({"model": "big"}, "model tiny there, big here"), ({"sampler": "plms"}, "sampler ddim there, plms here"),
    ({"steps": 20}, "steps 4 there, 20 here"), ({"timesteps": "quad"}, "timesteps trailing there, quad here"),
    ({"checkpoint_sha256": "def"}, "checkpoint_sha256 abc there, def here"),
    ({"unet": {}, "fingerprint": "34"}, "the U-Net of tiny there, another here$"),
    ({"fingerprint": "34"}, "made for another run: the U-Net of tiny there, another here$"),
    ({"steps": 20, "model": "big"}, "model tiny there, big here; steps 4 there, 20 here")])
def test_other_runs_are_refused(settings, words):
    for made in FILES.values():
        with pytest.raises(ValueError, match=f"the {made.kind} was made for another run: .*{words}"
                           if "made for" not in words else words):
            made.check(settings)
    anything = replace(FILES["numbers"], made_for=MADE_FOR | {"checkpoint_sha256": None, "fingerprint": None})
    anything.check({"checkpoint_sha256": "def", "fingerprint": "34"})


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c.update(kind="plan"), r"no list of numbers of format 2: python -m numbers makes one"),
    (lambda c: c.update(format=1), "no list of numbers of format 2"), (lambda c: c.pop("sha256"), "has no sha256"),
    (lambda c: c["made_for"].pop("sampler"), "made_for has no sampler"),
    (lambda c: c["made_for"].update(steps="4"), "made_for.steps is '4' and should be a whole number"),
    (lambda c: c["values"].pop("numbers"), "has no numbers"), (lambda c: c.update(extra=1), "unknown key extra"),
    (lambda c: c["values"].update(tensors={}), "unknown key tensors"),
    (lambda c: c["values"].update(numbers=[1, float("nan")]), r"numbers\[1\] is nan and should be a finite number"),
    (lambda c: c["values"].update(numbers=[1.5, 3]), "has been changed since it was made"),
    (lambda c: c["made_for"].update(steps=5), "has been changed since it was made")])
def test_damaged_files_are_refused_in_one_line(path, change, words):
    FILES["numbers"].save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as raised:
        Numbers.load(path)
    assert path.name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("kind", [Numbers, AdaptorFile])
def test_what_is_no_file(path, kind, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.bin") as raised:
        kind.load(path)
    assert "\n" not in str(raised.value)


def test_nothing_is_written_over_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="not a regular file"):
        FILES["numbers"].save(tmp_path)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("plan", {"calls": []}, "at least one"), ("plan", {"calls": [Call(0)]}, "call 0 of a plan must compute"),
    ("plan", {"calls": [Call(), Call(1, (1.0,) * 4)]}, "call 1 .* 4 terms"),
    ("plan", {"macs": {"hook": 1}}, "MACs are"), ("plan", {"macs": {"hook": 0, "fc": 1}}, "1 or more"),
    ("plan", {"guidance": [2, 1]}, "the least and the most"),
    ("plan", {"calls": [Call(), Call(1.5)]}, r"calls\[1\].branch is 1.5"),
    ("plan", {"calls": [Call(), Call(True)]}, r"calls\[1\].branch is True"),
    ("schedule", {"blocks": {}}, "no blocks"), ("schedule", {"blocks": {"a": [1]}}, "steps of a must ascend from 0"),
    ("schedule", {"blocks": {"a": [0, 4]}}, "stay below 4"), ("schedule", {"calls": 0}, "1 or more"),
    ("rule", {"threshold": -1}, "0 or more"), ("rule", {"factors": []}, "typical full steps must"),
    ("rule", {"typical": [1]}, "ascend from 0"), ("rule", {"factors": [0, 1, 2, -3]}, "0 or more"),
    ("table", {"tensors": {"a": torch.ones(2, 3, 3)}}, "a should be"),
    ("adaptor", {"tensors": ADAPTOR | {"table": torch.ones(4, 3)}}, "table is"),
    ("adaptor", {"tensors": {"outer.weight": ADAPTOR["outer.weight"]}}, "table is"),
    ("adaptor", {"tensors": ADAPTOR | {"outer.weight": torch.ones(4, 1, 1, 1)}}, "those of an adaptor"),
    ("adaptor", {"tensors": ADAPTOR | {"inner.bias": torch.full((2,), torch.nan)}}, "not finite")])
def test_each_kind_refuses_what_cannot_be(path, name, change, words):
    replace(FILES[name], **change).save(path)
    with pytest.raises(ValueError, match=f"file.bin is damaged: .*{words}"):
        type(FILES[name]).load(path)


def test_tensors_are_part_of_the_digest(path):
    FILES["adaptor"].save(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path) | {"inner.bias": torch.ones(2).half()}, path, about)
    with pytest.raises(ValueError, match="has been changed"):
        AdaptorFile.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        AdaptorFile.load(path)


def test_a_table_belongs_to_one_schedule():
    table = FILES["table"].adjustments(SCHEDULE)
    assert [sorted(call) for call in table] == [[], ["a"], [], ["a"]] and (table[3]["a"][1] == 3).all()
    other = replace(SCHEDULE, blocks={"a": [0, 3]})
    with pytest.raises(ValueError, match="another block schedule"):
        FILES["table"].adjustments(other)
    with pytest.raises(ValueError, match="a scale and shift for each reuse of a residual"):
        shorter = replace(SCHEDULE, blocks={"a": [0]})
        replace(FILES["table"], schedule_sha256=shorter.sha256).adjustments(shorter)


def test_guidance_and_caches_that_a_file_is_not_for():
    with pytest.raises(ValueError, match="guidance 1 to 2 there, 3 here"):
        FILES["plan"].check({"guidance": 3.0})
    for settings, words in (({"branch": 1}, "branch 2 there, 1 here"), ({"full_steps": [0, 2]}, "full_steps"),
                            ({"calls": 5}, "calls 4 there, 5 here")):
        with pytest.raises(ValueError, match=words):
            FILES["adaptor"].check(settings)
    with pytest.raises(ValueError, match="calls 4 there, 5 here"):
        FILES["rule"].check({"calls": 5})


SHIPPED = {Plan: "plans/**/*.json", BlockSchedule: "**/*.json", AdaptiveRule: "systems/*/adaptive_??.json",
           BlockChanges: "block_caching/*_changes.json", AdaptorFile: "systems/*/clock_*.safetensors",
           ScaleShiftTable: "block_caching/*.safetensors"}


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.kind)
def test_shipped_files_say_which_unet_they_are_for(kind):
    """In the one format, and by its fingerprint, so that pipelines refuse others."""
    files = [*ROOT.glob(f"checkpoints/{SHIPPED[kind]}"), *ROOT.glob("configs/block_schedules/*.json")]
    found = [kind.load(file) for file in files
             if file.suffix != ".json" or json.loads(file.read_text()).get("kind") == kind.kind]
    assert len(found) > 2
    for one in found:
        assert one.made_for == json.loads(json.dumps(RunSpec.of(one.made_for["model"]).open().made_for(
            one.made_for["checkpoint_sha256"]))) | {key: one.made_for[key] for key in SAMPLING}
