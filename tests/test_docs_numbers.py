"""README and docs: every row of their tables of results says what the records under results/ say."""

import itertools
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from eval.cost.macs import branch_macs, giga
from eval.tables import machine
from lab.study.columns import with_error
from lab.study.ledger import records_of
from lab.study.measures import minus_uncached
from lab.study.rows import Row, Rows, mean_of
from lab.study.tables import measured
from run import results
from run.families import build, example_inputs, load_config
from run.files import ROOT
from run.results import Result

MODELS = {"latent": "ldm", "pixel": "ddpm", "text": "sd"}      # what the pages call the models
SOLVERS = {"unipc": "UniPC", "plms": "PLMS"}
Cells = list[str]
Records = dict[str, Result]             # of a run, by measure


@cache
def records(study: str) -> dict[str, Records]:
    """What a study measured, by the name of the run."""
    return records_of(ROOT / "results" / study / "records.jsonl")


@cache
def tables_of(page: str) -> list[list[Cells]]:
    """The tables of a page, the head of each first; nothing in bold, and no link."""
    text = re.sub(r"\*\*| \(\[\w+\]\([^)]*\)\)", "", (ROOT / page).read_text())
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
            for head, _, *rows in tables]


def signed(bounds: tuple[float, float, float], digits: int = 1) -> str:
    """A value and its interval."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*bounds, d=digits)


def nearness(found: Records) -> float:
    return float(np.mean(found["near"].details["psnr"]))


class Place(NamedTuple):
    """A row of a page's table."""
    table: int                  # which of the page
    row: int                    # which of the table, from 1
    head: Cells
    label: str
    cells: Cells                # after the label


# What the cells of a row should say; None of a row that is not of results. A dash of the page's may leave one out.


@cache
def forecasts(label: str) -> Rows:
    rows = measured(f"forecast_{MODELS[label]}")
    return Rows(rows, rows[0], 64)


def by_kind(label: str, steps: str, interval: str) -> dict[str, Row]:
    """The runs of a row, by kind: UniPC on the cheapest branch, and the best of fewer steps."""
    rows = forecasts(label)
    own = {one.kind: one for one in sorted(rows.rows, key=lambda one: -one.cost)
           if (one.run.sampler.name, one.run.steps, one.options.get("interval")) == (
               "unipc", int(steps), int(interval)) and "centered" not in one.name}
    best = rows.rival(own["forecast, order 1"])
    return own | ({"fewer steps": best} if best else {})


def held_out(row: Row) -> str:
    return f"{row.psnr[64:].mean():.1f}"


def of_forecasts(at: Place) -> Cells | None:
    if not (found := re.fullmatch(r"(\w+), (\d+) steps, N = (\d+)", at.label)):
        return None
    runs = by_kind(*found.groups())
    plain, wanted = runs["fewer steps"], [f"{runs['forecast, order 1'].cost:.1f}"]
    kinds = ("fewer steps", "reuse", "forecast, order 1", "forecast, order 2")
    for kind, cell in zip(kinds, at.cells[1:], strict=True):
        value = "-" if cell == "-" else held_out(runs[kind])
        if kind == "fewer steps":
            value += f" ({SOLVERS[plain.run.sampler.name]}, {plain.run.calls})"
        elif kind != "reuse" and cell != "-":
            value += f" ({signed(forecasts(found[1]).nearer(runs[kind], plain).bounds)})"
        wanted.append(value)
    return wanted


def of_readme(at: Place) -> Cells | None:
    if at.label == "the same: speed-up":
        runs = results.read(ROOT / "results" / "throughput" / "ldm_cin256_cpu.json").times["runs"]
        speed = {one["interval"]: one["speedup"] for one in runs if one["branch"] == 0}
        return [at.cells[0], f"{', '.join(f'{speed[n]:.2f}' for n in (2, 3, 5, 10, 20))} (one CPU thread)"]
    if found := re.fullmatch(r"(\w+) model", at.label):
        return of_plans(at._replace(label=f"{found[1]}, 12 calls"))[:-1]
    if found := re.fullmatch(r"(\w+) model, .*\((\d+) UniPC steps, N = (\d+)\)", at.label):
        runs = by_kind(*found.groups())
        return [held_out(runs[kind]) for kind in ("fewer steps", "reuse", "forecast, order 1")]
    return None


@cache
def plans(model: str, calls: str) -> dict[str, Records]:
    """The runs of a budget: the plan of a search, the learned one, learned steps, evenly spread and fitted ones: the
    best of each. Where a search chose fitted steps they are its plan, too."""
    best: dict[str, Records] = {}
    for run, found in records(f"plans_{model}").items():
        name = run.removeprefix("prompts_x2_")
        for kind, pattern in (("steps", rf"plan_{model}_emoji_{calls}_steps_.*"),
                              ("plan", rf"plan_{model}_emoji_{calls}_unipc.*"),
                              ("even", rf"unipc_steps{calls}(_trailing)?"),
                              ("fitted", rf"unipc_steps{calls}_times\w+")):
            if "near" in found and re.fullmatch(pattern, name):
                kind = "learned" if kind == "plan" and "." in found["near"].settings["timesteps"] else kind
                best[kind] = max(filter(None, (best.get(kind), found)), key=nearness)
    return best


def nearer(one: Records, other: Records) -> str:
    return signed(mean_of(np.array(one["near"].details["psnr"]) - np.array(other["near"].details["psnr"])).bounds)


def of_plans(at: Place) -> Cells | None:
    if found := re.fullmatch(r"(\w+), (\d+) calls", at.label):
        runs = plans(MODELS[found[1]], found[2])
        cells = [f"{nearness(runs[kind]):.1f}" if kind in runs else "-"
                 for kind in ("even", "fitted", "steps", "plan", "learned")]
        return [*cells, nearer(runs["learned"], runs["steps"]) if {"learned", "steps"} <= runs.keys() else "-"]
    if at.label in MODELS:              # the plans for 12 calls of the other models
        model = MODELS[at.label]
        runs, others = plans(model, "12"), []
        for other in MODELS.values():
            there = [one for name, one in records(f"plans_{model}").items() if f"plan_{other}_emoji_12_on_" in name
                     and "near" in one]
            assert len(there) == (other != model)
            others += [f"{nearness(one):.1f} at {one['near'].details['full_calls']:.1f}" for one in there] or ["-"]
        return [*(f"{nearness(runs[kind]):.1f}" for kind in ("plan", "fitted", "even")), *others]
    return None


@cache
def systems(model: str) -> dict[str, dict[str, str]]:
    """PSNR by system and budget, as results/systems_MODEL/table.md has it and as its records do."""
    found: dict[str, dict[str, str]] = {}
    text, runs = (ROOT / "results" / f"systems_{model}" / "table.md").read_text(), records(f"systems_{model}")
    for part in text.split("\n## ")[1:]:
        for row in re.findall(r"^\| (.+) \|$", part, re.M)[1:]:
            system, run, _, _, near, *_ = row.split(" | ")
            if not system.startswith("---"):
                assert near.startswith(f"{nearness(runs[run]):.1f} ["), run
                found.setdefault(system, {})[part.split()[0]] = f"{nearness(runs[run]):.1f}"
    return found


def of_systems(at: Place) -> Cells | None:
    model, *budgets = at.head
    found = systems(MODELS[model.split()[0]]).get(at.label) if model.endswith(" model") else None
    return None if found is None else [found.get(calls, "-") for calls in budgets]


def score(row: Row, name: str) -> str:
    """A distance to real images, and how much more that is than without caching."""
    metrics = row.records["quality"].metrics
    value, more = metrics[name], metrics.get(minus_uncached(name))
    return with_error(value) if more is None else f"{value.value:.1f} ({with_error(more, sign='+')})"


def judged(row: Row, unit: str = "") -> Cells:
    near = row.records["fidelity"].metrics["PSNR"] if "fidelity" in row.records else None
    return [score(row, "FD-EffLite0"), score(row, "FD-IncMixed5"), f"{near.value:.1f}{unit}" if near else "-"]


@cache
def arms_of(study: str) -> dict[str, dict[str, Row]]:
    """What a study measured, by model and arm."""
    found: dict[str, dict[str, Row]] = {}
    for row in measured(study):
        found.setdefault(row.run.config.name, {})[row.arm.label] = row
    return found


def of_demo(at: Place) -> Cells | None:
    model, _, arm = at.label.partition(": ")
    own = arms_of("demo").get(f"{MODELS.get(model)}_emoji", {})
    if arm not in own:
        return None
    row, whole = own[arm], next(iter(own.values()))
    full = len(row.run.caching.settings.get("full_steps") or range(row.run.steps))
    return [f"{full} / {row.run.steps}", f"{whole.macs / row.macs:.2f}x", f"{whole.time / row.time:.2f}x", *judged(row)]


def of_block_caching(at: Place) -> Cells | None:
    """The study's arms at half of the work are in the order of these labels."""
    labels = ["no caching", "transformers, delta 0.5 (the paper's)", "", "DeepCache", "DeepCache, non-uniform",
              "Block Caching", "Block Caching, scale-shift", "both methods", "fewer steps"]
    rows = [[*own.values()] for own in arms_of("block_caching").values()]
    return [cell for own in rows for cell in (f"{own[labels.index(at.label)].macs / own[0].macs:.2f}",
                                              *judged(own[labels.index(at.label)], " dB")[1:])]


@cache
def of_machine(name: str) -> list[Result]:
    return results.read_packed(ROOT / "results" / "machines" / name / "records.jsonl")


def alone(name: str) -> list[machine.Times]:
    """Those of one image, eagerly; in float32 where there are such."""
    times = [machine.Times(one) for one in of_machine(name) if one.kind == "speed"]
    single = [one for one in times if one.record.settings["batch_size"] == 1 and one.record.settings["mode"] == "eager"]
    return sorted(single, key=lambda one: one.record.settings["dtype"] != "fp32")


SETTINGS = {        # machine, model and interval, of real networks; likeness, and the study and runs of the small ones
    "Stable Diffusion 1.x and 2.x, 50 steps": (
        "amd_epyc_avx512/sd_v15", 3, "{} / {} (text model)", "forecast_sd",
        "prompts_x2_uniform_n3_forecast1_unipc_trailing", "prompts_x2_unipc_steps20_trailing"),
    "the same, 24 steps": (
        "", 2, "{} / {} (text model)", "forecast_sd",
        "prompts_x2_uniform_n2_branch0_forecast1_unipc_steps24_trailing", "prompts_x2_unipc_steps13_trailing"),
    "SDXL, 50 steps": ("intel_xeon/sdxl", 3, "guess: as above", ""),
    "LCM, Turbo, Lightning: 1 to 8 steps": (
        "", 1, "fewer steps: {}, N = 10: {} (text model)", "forecast_sd", "prompts_x2_unipc_steps7_trailing",
        "prompts_x2_uniform_n10_branch0_forecast1_unipc_trailing"),
    "DDPM in pixels (UNet2DModel), 50 steps": (
        "amd_epyc_avx512/ddpm_cifar10", 2, "{} / {} (pixel model, branch 0)", "forecast_ddpm",
        "uniform_n2_branch0_forecast1_unipc_steps50", "unipc_steps26")}


def of_settings(at: Place) -> Cells | None:
    if at.label not in SETTINGS:
        return None
    name, interval, near, study, *runs = SETTINGS[at.label]
    saved = at.cells[1:3]
    if name:
        where, model = name.split("/")
        times = next(times for times in alone(where) if times.record.model == model and times.helper is not None)
        cached = times.macs(times.usual), machine.ratio(times.record.times["sides"]["helper"], times.usual)
        saved = [f"{machine.STEPS / machine.full_steps(ratio, interval):.2f}x" for ratio in cached]
    found = [np.mean(records(study)[run]["near"].details["psnr"][64:]) for run in runs]
    return [at.cells[0], *saved, near.format(*(f"{one:.1f}" for one in found))]


MACHINES = {"EPYC, AVX-512": "amd_epyc_avx512", "Xeon": "intel_xeon"}
NETWORKS = {"DDPM CIFAR-10": "ddpm_cifar10", "LDM-4-G": "ldm_cin256", "Stable Diffusion v1.5": "sd_v15",
            "SDXL, 1,024 pixels": "sdxl"}


def of_speed(at: Place) -> Cells | None:
    """MACs; rows of a machine's own table, in some of its columns."""
    if at.label in NETWORKS:
        config = load_config(NETWORKS[at.label])
        full, cached = branch_macs(build(config), example_inputs(config), [branch := config.sampler.branch])
        paper, macs = at.cells[0].split(" / ")[0], cached[branch].hook
        return [f"{paper} / {giga(full.hook):.4f}", str(branch), f"{giga(macs):.4f}", f"{macs / full.hook:.3f}"]
    rows = [dict(zip(machine.HEAD, times.row(), strict=True)) for times in alone(MACHINES[at.label])]
    shown = ([row[name] for name in at.head[1:]] for row in rows)
    return next(own for own in shown if own[:3] == at.cells[:3])


@cache
def pipelines() -> dict[tuple[str | None, str], Result]:
    return {(one.model, one.details["name"]): one for one in results.read_packed(ROOT / "results/pipelines.jsonl")}


def of_pipelines(at: Place) -> Cells | None:
    if at.head[0] == "U-Net":
        found = pipelines()[at.label, at.label].details
        full, shares = found["full"], [cached / found["full"] for cached in found["cached"]]
        return [f"{full / 1e12:.2f}", *(f"{share:.3f}, {3 / (1 + 2 * share):.2f}x" for share in shares)]
    if at.head[0] != "fresh noise, N = 3":
        return None
    wanted = []
    for model in ("sd_emoji", "ldm_emoji", "ddpm_emoji"):
        reuse, order1 = (pipelines().get((model, f"{at.label}, order {order}")) for order in (0, 1))
        if reuse is None or order1 is None:
            wanted.append("-")
            continue
        near = [np.array(one.details["psnr"]) for one in (reuse, order1)]
        wanted.append(f"{near[0].mean():.1f} -> {near[1].mean():.1f} ({signed(mean_of(near[1] - near[0]).bounds)})")
    return wanted


KINDS: dict[str, tuple[str, Callable[[Place], Cells | None], int]] = {      # page, what rows say, how many there are
    "forecasts": ("docs/forecasting.md", of_forecasts, 8), "README": ("README.md", of_readme, 9),
    "settings": ("docs/settings.md", of_settings, 5),
    "plans": ("docs/planning.md", of_plans, 11), "systems": ("docs/systems.md", of_systems, 8),
    "demo": ("docs/shipped_models.md", of_demo, 8), "block caching": ("docs/block_caching.md", of_block_caching, 8),
    "speed": ("docs/speed.md", of_speed, 12), "pipelines": ("docs/pipelines.md", of_pipelines, 5)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_that_of_the_records(kind):
    page, expected, rows = KINDS[kind]
    for table, (head, *lines) in enumerate(tables_of(page)):
        for number, (label, *cells) in enumerate(lines, 1):
            wanted = expected(Place(table, number, head, label, cells))
            assert wanted is None or cells == wanted, f"{page}: {label}"
            rows -= wanted is not None
    assert rows == 0


def test_what_readme_says_in_sentences():
    text = " ".join((ROOT / "README.md").read_text().split())
    sides = ("diffusers", "full"), ("helper", "cached")
    for name, (side, step) in itertools.product(("amd_epyc_avx512", "intel_xeon"), sides):
        times = [one for one in alone(name) if one.record.settings["dtype"] == "fp32"]
        ratios = [one.over_ours(side, "full" if step == "full" else one.usual) for one in times]
        assert f"{min(ratios):.2f}x to {max(ratios):.2f}x" in text


@pytest.mark.parametrize("folder", sorted((ROOT / "results" / "machines").iterdir()), ids=lambda folder: folder.name)
def test_tables_of_machines_are_those_of_their_records(folder):
    assert (folder / "table.md").read_text() == machine.report(of_machine(folder.name))
