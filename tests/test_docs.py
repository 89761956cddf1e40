"""README and docs: every command parses, every link leads to something, and what README says in short is measured."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, main_of, run_command

from eval import throughput
from lab.study.columns import with_error
from lab.study.ledger import records_of
from lab.study.measures import minus_uncached
from lab.study.rows import Row, Rows, mean_of
from lab.study.tables import measured
from run import results
from run.results import Metric, Result

ROOT = HERE.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"),
                *ROOT.glob("scripts/slurm/*.md")])
PROGRAMS = ("python", ".venv/bin/python")


class Parsed(BaseException):
    """The command line has been read, and the command's work would begin."""


def lines_of(page: Path) -> Iterator[str]:
    """The lines of a page's blocks of shell commands, those that go on put together."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if language == "bash":
            yield from (line for line in re.sub(r"\\\n\s*", "", block).splitlines() if "..." not in line)


def commands(page: Path) -> list[list[str]]:
    """The programs of the project that a page calls, and their words."""
    found = []
    for line in lines_of(page):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|"):
                words.append(word)
                continue
            if words[:1] == ["bash"] or (words[:1] and words[0] in PROGRAMS and words[1:2] == ["-m"]):
                found.append(words)
            words = []
    return found


CALLS = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page)]
MODULES = [(page, words) for page, words in CALLS if words[0] != "bash" and words[2] != "venv"]


def test_pages_have_commands():
    assert len(MODULES) > 25 and {words[2] for _, words in MODULES} >= {"ddpm.sample", "eval.fid", "lab.plans"}


@pytest.mark.parametrize(("page", "words"), MODULES, ids=lambda one: " ".join(one) if isinstance(one, list) else None)
def test_every_command_parses(page, words, monkeypatch, capsys):
    def parsed(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    read = argparse.ArgumentParser.parse_args
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr("sys.argv", words[2:])
    try:
        main_of(words[2])()
    except Parsed:
        return
    except SystemExit:
        pytest.fail(f"{page}: {capsys.readouterr().err}")
    pytest.fail(f"{page}: {words[2]} has no command line")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_script_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, place = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{page}: {target}"
            if place:
                headings = [re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-")
                            for one in re.findall(r"^#+ (.+)$", file.read_text(), re.M)]
                assert place in headings, f"{page}: {target}"
    for script in re.findall(r"\b(?:scripts|tests)/[\w/]+\.(?:sh|py|sbatch)\b", text):
        assert (ROOT / script).is_file(), f"{page}: {script}"
    for module in re.findall(r"python -m ((?:\w+\.)+\w+)", text):
        name = module.removeprefix("unet_caching.")
        assert importlib.util.find_spec(name) is not None, f"{page}: {module}"


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text) <= 10_000


def numbers(cell: str) -> list[float]:
    """The decimals of a cell, in order; whole numbers such as a number of calls are none."""
    return [float(text) for text in re.findall(r"[+-]?\d+\.\d", cell)]


MODELS = {"latent": "ldm", "pixel": "ddpm", "text": "sd"}      # what the pages call the models


def records(study: str) -> dict[str, dict[str, Result]]:
    """What a study measured: by the name of the run, and by measure."""
    return records_of(ROOT / "results" / study / "records.jsonl")


@pytest.fixture(scope="module")
def studied() -> dict[str, Rows]:
    """What the studies of forecasts measured."""
    found = {}
    for label, model in MODELS.items():
        rows = measured(f"forecast_{model}")
        found[label] = Rows(rows, rows[0], 64)
    return found


def chosen(rows: Rows, steps: int, interval: int) -> dict[str, Row]:
    """The runs of one row of a page, by kind: UniPC on the cheapest branch and the best of fewer steps."""
    own = {one.kind: one for one in sorted(rows.rows, key=lambda one: -one.cost)
           if (one.run.sampler.name, one.run.steps, one.options.get("interval")) == ("unipc", steps, interval)
           and "centered" not in one.name}
    best = rows.rival(own["forecast, order 1"])
    return own | ({"fewer steps": best} if best else {})


def held_out(row: Row) -> float:
    return row.psnr[64:].mean()


def test_the_table_of_forecasts_is_that_of_the_studies(studied):
    rows = re.findall(r"^\| (\w+), (\d+) steps, N = (\d+) \| ([\d.]+) \| (.+) \|$",
                      (ROOT / "docs" / "forecasting.md").read_text(), re.M)
    assert len(rows) > 12
    for model, steps, interval, calls, cells in rows:
        runs, row = chosen(studied[model], int(steps), int(interval)), cells.split(" | ")
        assert runs["forecast, order 1"].cost == pytest.approx(float(calls), abs=0.051)
        for kind, cell in zip(("fewer steps", "reuse", "forecast, order 1", "forecast, order 2"), row, strict=True):
            if cell == "-":
                continue
            value, *difference = numbers(cell)
            assert value == pytest.approx(held_out(runs[kind]), abs=0.051), (model, steps, interval, kind)
            if difference:
                by = studied[model].nearer(runs[kind], runs["fewer steps"])
                assert difference == pytest.approx(by.bounds, abs=0.051), (model, steps, interval)


def test_the_table_of_forecast_blocks_is_that_of_the_studies():
    text, end = (ROOT / "docs" / "forecasting.md").read_text(), {"ldm": "_steps50", "ddpm": ""}
    deep = {"ldm": ("uniform_n2{}_steps50", "uniform_n4{}_steps50"), "ddpm": ("uniform_n3{}", "uniform_n20{}")}
    rows: dict[str, list[float]] = {}
    for model, fewer in (("ldm", ("steps26", "steps15")), ("ddpm", ("steps51", "steps30"))):
        near = {name: float(np.mean(found["near"].details["psnr"][64:]))
                for name, found in records(f"blocks_{model}").items() if "near" in found}
        names = {"fewer DDIM steps": fewer, "DeepCache": [name.format("") for name in deep[model]],
                 "DeepCache, forecast": [name.format("_forecast1") for name in deep[model]], **{
                     label: [f"blocks_{model}_all_{share}{words}{end[model]}" for share in (50, 30)]
                     for label, words in (
                         ("blocks, reused", ""), ("blocks, scale-shift", "_scale_shift"),
                         ("blocks, forecast", "_forecast1"),
                         ("blocks, scale-shift and forecast", "_scale_shift_forecast1"))}}
        for label, of in names.items():
            rows.setdefault(label, []).extend(near[name] for name in of)
    for label, values in rows.items():
        row = re.search(rf"^\| {label} \| (.+) \|$", text, re.M)
        assert row and numbers(row[1]) == pytest.approx(values, abs=0.051), label


def test_what_is_said_of_quality_is_measured():
    text = (ROOT / "docs" / "forecasting.md").read_text()
    arms = {"ldm": ("{}_unipc_steps50", "unipc_steps{}"), "ddpm": ("{}_unipc_steps50", "unipc_steps{}"),
            "sd": ("prompts_x2_{}_unipc_trailing", "prompts_x2_unipc_steps{}_trailing")}
    for label, model, branch, steps in (("latent", "ldm", "", (18, 11)), ("text", "sd", "_branch0", (18, 12)),
                                        ("pixel", "ddpm", "_branch0", (19, 13))):
        (cached, plain), found = arms[model], records(f"{model}_emoji_forecast")
        for interval, fewer in zip((3, 5), steps, strict=True):
            names = [cached.format(f"uniform_n{interval}{branch}{words}") for words in ("", "_forecast1")]
            for network, digits in (("EffLite0", 0), ("IncMixed5", 1)):
                values = (found[name]["quality"].metrics[minus_uncached(f"KID-{network}")].bounds
                          for name in (*names, plain.format(fewer)))
                cells = ["{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(1000 * one for one in value), d=digits)
                         for value in values]
                line = f"| {label}, {fewer} calls, {network} | {' | '.join(cells)} |"
                assert line in text, line


def test_what_readme_says_of_forecasts_is_measured(studied):
    rows = re.findall(r"^\| (\w+) model, .*\((\d+) UniPC steps, N = (\d+)\) \| (.+) \|$",
                      (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 5
    for model, steps, interval, cells in rows:
        runs = chosen(studied[model], int(steps), int(interval))
        told = [value for cell in cells.split(" | ") for value in numbers(cell)]
        wanted = [held_out(runs[kind]) for kind in ("fewer steps", "reuse", "forecast, order 1")]
        assert told == pytest.approx(wanted, abs=0.051), (model, steps, interval)


def nearness(found: dict[str, Result]) -> float:
    return float(np.mean(found["near"].details["psnr"]))


def of_plans(model: str, calls: int) -> dict[str, dict[str, Result]]:
    """The plan of a budget, UniPC with so many evenly spread steps, and with so many fitted ones where the plan is not
    that: the best list that any search found."""
    best: dict[str, dict[str, Result]] = {}
    for run, found in records(f"plans_{model}").items():
        name = run.removeprefix("prompts_x2_")
        for kind, pattern in (("plan", rf"plan_{model}_emoji_{calls}_unipc.*"),
                              ("even", rf"unipc_steps{calls}(_trailing)?"),
                              ("fitted", rf"unipc_steps{calls}_times\w+")):
            if "near" in found and re.fullmatch(pattern, name):
                best[kind] = max(filter(None, (best.get(kind), found)), key=nearness)
    return best


def less(one: dict[str, Result], other: dict[str, Result]) -> str:
    by = mean_of(np.array(one["near"].details["psnr"]) - np.array(other["near"].details["psnr"]))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*by.bounds)


def row_of_plans(label: str, calls: int) -> str:
    """What docs/planning.md says of a plan."""
    runs = of_plans(MODELS[label], calls)
    plan, even, fitted = runs["plan"], runs["even"], runs.get("fitted", runs["plan"])
    near = [f"{nearness(run):.1f}" for run in (plan, even, fitted)]
    far = ["{:+.0f}".format(1000 * run["quality"].metrics[minus_uncached("KID-EffLite0")].value)
           for run in (plan, even, fitted)]
    cells = [f"{label}, {calls} calls", *near, less(plan, even), less(plan, fitted) if "fitted" in runs else "is that",
             " / ".join(far)]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_plans_is_that_of_the_studies():
    text = (ROOT / "docs" / "planning.md").read_text()
    told = re.findall(r"^\| (\w+), (\d+) calls \|", text, re.M)
    assert len(told) >= 5 and {label for label, _ in told} >= {"latent"}
    for label, calls in told:
        assert row_of_plans(label, int(calls)) in text


@pytest.mark.parametrize("label", MODELS)
def test_what_is_said_of_plans_of_other_models_is_measured(label):
    """What docs/planning.md says of the plans for 12 calls of other models."""
    model, runs, cells = MODELS[label], of_plans(MODELS[label], 12), list[str]()
    for other in ("ldm", "ddpm", "sd"):
        found = [one for name, one in records(f"plans_{model}").items() if f"plan_{other}_emoji_12_on_" in name
                 and "near" in one]
        assert len(found) == (other != model), other
        cells += [f"{nearness(one):.1f} at {one['near'].details['full_calls']:.1f}" for one in found] or ["-"]
    row = f"| {label} | {' | '.join([f'{nearness(runs[k]):.1f}' for k in ('plan', 'fitted', 'even')] + cells)} |"
    assert row in (ROOT / "docs" / "planning.md").read_text()


def test_what_readme_says_of_plans_is_measured():
    text = " ".join((ROOT / "README.md").read_text().split())
    calls, plan, of_even, even, of_fitted, fitted = re.search(
        r"at the cost of (\d+) full calls \(latent model\): ([\d.]+) dB, ([\d.]+) nearer than evenly spread UniPC "
        r"steps \(([\d.]+)\) and ([\d.]+) nearer than steps at fitted timesteps \(([\d.]+)\)", text).groups()
    runs = of_plans("ldm", int(calls))
    assert [float(one) for one in (plan, even, fitted)] == pytest.approx(
        [nearness(runs[kind]) for kind in ("plan", "even", "fitted")], abs=0.051)
    assert less(runs["plan"], runs["even"]).startswith(f"+{of_even} ")
    assert less(runs["plan"], runs["fitted"]).startswith(f"+{of_fitted} ")


def test_the_table_of_sdxl_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "speed.md").read_text()
    words = re.search(r"^python -m eval.throughput (grid .+)$", text, re.M)
    assert words and run_command(throughput.main, *words[1].split()) == 0
    assert capsys.readouterr().out in text


def test_what_readme_says_of_time_is_measured():
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| the same: speed"))
    runs = results.read(ROOT / "results" / "throughput" / "ldm_cin256_cpu.json").times["runs"]
    measured = {one["interval"]: one["speedup"] for one in runs if one["branch"] == 0}
    told = [float(text) for text in re.findall(r"\d+\.\d\d", line.split("|")[3])]
    assert told == pytest.approx([measured[interval] for interval in (2, 3, 5, 10, 20)], abs=0.0051)


@pytest.mark.parametrize(("column", "compare"), [(2, "compare"), (3, "compare_intel")])
def test_what_is_said_of_speed_by_processor_is_measured(column, compare):
    """A packed product is beside the steps in the newer JSONs; for the older ones a profile has it."""
    text, folder = (ROOT / "docs" / "speed.md").read_text(), ROOT / "results" / "throughput"
    assert "oneDNN with packed weights at 130 to 228" in (folder / "profile_sd_v15_cpu.md").read_text()
    found: dict[str, dict[str, float]] = {}
    fastest = {}
    for model in ("sd_v15", "ldm_cin256", "ddpm_cifar10"):
        compared = results.read(folder / compare / f"{model}_b1_fp32_eager_cpu.json")
        times, sides = results.read(folder / f"{model}_cpu.json").times, compared.times["sides"]
        fastest[model] = compared.times.get("peak", {"gflops": 228})["gflops"]
        macs = times["full"]["macs_fc"] * compared.settings["rows"]
        cost = {"full": macs, "cached": macs * compared.times["expected"]["macs_fc"]}
        found[model] = {f"{side} {step}": 2e-9 * cost[step] / sides[side][step]["median"]
                        for side in sides for step in cost if step in sides[side]}
        found[model] |= {"full ratio": sides["diffusers"]["full"]["over_ours"],
                         "cached ratio": sides["helper"]["cached"]["over_ours"]}
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 4]
    first = next(number for number, line in enumerate(lines) if "130 to 228" in line[2])
    rows = [line[column] for line in lines[first:]]
    assert rows[0].strip().startswith(f"{min(fastest.values()):.0f} to {max(fastest.values()):.0f}") or column == 2
    shares = [(model, what) for model, what in (
        ("sd_v15", "ours full"), ("sd_v15", "diffusers full"), ("sd_v15", "ours cached"), ("sd_v15", "helper cached"),
        ("ldm_cin256", "ours full"), ("ldm_cin256", "diffusers full"))]
    for (model, what), row in zip(shares, rows[1:], strict=False):
        speed, share = map(int, re.findall(r"\d+", row))
        told = (round(found[model][what]), round(100 * found[model][what] / fastest[model]))
        assert (speed, share) == told, (model, what)
    for what, row in zip(("full ratio", "cached ratio"), rows[1 + len(shares):], strict=False):
        told = [float(value) for value in re.findall(r"[\d.]+(?=x)", row)]
        assert told == pytest.approx([found[model][what] for model in found], abs=0.0051)
        assert f"{min(told):.2f}x to {max(told):.2f}x" in " ".join((ROOT / "README.md").read_text().split())


def cells_of(study: str) -> Iterator[list[str]]:
    """The lines of all tables of a study's table.md, each with the heading that it stands under."""
    heading = ""
    for line in (ROOT / "results" / study / "table.md").read_text().splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if line.startswith("| ") and "---" not in line:
            yield [heading, *(cell.strip() for cell in line.strip("|").split("|"))]


def rows_of_systems(study: str) -> list[str]:
    """What docs/systems.md says of each system, the nearest at most budgets first; a dash where there is no run."""
    found: dict[str, dict[int, float]] = {}
    runs = records(study)
    for heading, system, run, _, _, near, *_ in cells_of(study):
        if system != "system":
            assert near.startswith(f"{nearness(runs[run]):.1f} ["), run
            found.setdefault(system, {})[int(heading.split()[0])] = nearness(runs[run])
    budgets = sorted({calls for cells in found.values() for calls in cells})
    order = sorted(found, key=lambda system: -float(np.mean([found[system].get(calls, 0.0) for calls in budgets])))
    return [f"| {system} | "
            + " | ".join(f"{found[system][calls]:.1f}" if calls in found[system] else "-" for calls in budgets) + " |"
            for system in order]


@pytest.mark.parametrize("model", MODELS.values())
def test_the_tables_of_systems_are_those_of_their_results(model):
    rows, text = rows_of_systems(f"systems_{model}"), (ROOT / "docs" / "systems.md").read_text()
    assert len(rows) > 10 and all(row in text for row in rows)


def score(found: dict[str, Result], name: str) -> str:
    """A distance to real images, and how much more that is than without caching."""
    metrics = found["quality"].metrics
    value, more = metrics[name], metrics.get(minus_uncached(name))
    return with_error(value) if more is None else f"{value.value:.1f} ({with_error(more, sign='+')})"


def psnr(found: dict[str, Result]) -> Metric | None:
    return found["fidelity"].metrics["PSNR"] if "fidelity" in found else None


def tables_of(page: str) -> list[list[str]]:
    """The lines of the tables of a page, without their heads."""
    return [table.splitlines()[2:] for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / page).read_text(), re.M)]


def test_the_tables_of_the_demo_are_those_of_its_results():
    rows = measured("demo")
    for model, fewest, told in zip(("ddpm", "ldm", "sd"), (10, 10, 8), tables_of("shipped_models.md"), strict=False):
        own = [row for row in rows if row.run.config.name == f"{model}_emoji"]
        lines = {" | ".join([
            f"| {row.arm.label}", f"{len(row.run.caching.settings.get('full_steps') or range(row.run.steps))} / "
            f"{row.run.steps}", f"{own[0].macs / row.macs:.2f}x", f"{own[0].time / row.time:.2f}x",
            score(row.records, "FD-EffLite0"), score(row.records, "FD-IncMixed5"),
            f"{near.value:.1f} |" if (near := psnr(row.records)) else "- |"]) for row in own}
        assert len(told) >= fewest and set(told) <= lines


def test_the_tables_of_block_caching_are_those_of_its_results():
    rows = measured("block_caching")
    for model, told in zip(("ddpm", "ldm"), tables_of("block_caching.md"), strict=False):
        own = [row for row in rows if row.run.config.name == f"{model}_emoji"]
        lines = [f"| {row.macs / own[0].macs:.2f} | {score(row.records, 'FD-EffLite0')} | "
                 f"{score(row.records, 'FD-IncMixed5')} | "
                 + (f"{near.value:.1f} dB |" if (near := psnr(row.records)) else "- |") for row in own]
        assert len(told) == len(own) and all(any(line.endswith(of_run) for line in told) for of_run in lines)
