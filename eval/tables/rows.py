"""The rows of the papers' tables as runs of ours: their settings, exact MACs, and where their images go.

Which command gives which row is said in the table scripts alone (scripts/table*.sh, scripts/block_caching_table*.sh);
what the paper prints for it in results/paper/*.yaml (eval.tables.paper). `of_table` brings both together.
"""

import argparse
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import nn

from eval.cost import bk_sdm
from eval.cost.macs import Macs, average, residual_macs, schedule_macs, step_macs
from eval.models import Config, build, example_inputs, load_config, rows_per_image
from eval.tables.paper import Section, Table, tables
from runs.errors import UserError
from runs.files import ROOT
from runs.options import CachePlan, add_cache_options, plan_cache
from sampling.samplers import num_calls, timesteps_for

CONFIGS = {"ddpm": Path("configs/ddpm_cifar10.yaml"), "ldm": Path("configs/ldm_cin256.yaml"),
           "sd": Path("configs/sd_v15.yaml")}
COMMANDS = {"ddpm": "ddpm.sample", "ldm": "ldm.sample", "sd": "stable_diffusion.sample"}


class Row(NamedTuple):
    """One run of a table."""
    section: str
    label: str
    package: str                # a key of COMMANDS
    options: list[str]          # of the sample command
    given: argparse.Namespace   # the same, parsed
    config_path: Path
    config: Config
    steps: int
    plan: CachePlan

    @property
    def printed_as(self) -> str:
        """The label of the paper's row that it is, or stands beside."""
        return self.label.split(" / ")[0]

    @property
    def sampler(self) -> str:
        return self.given.sampler or getattr(self.config.sampler, "sampler", "ddim")

    @property
    def dtype(self) -> str:
        return self.given.dtype or "fp32"

    @property
    def calls(self) -> int:
        """Network calls per image."""
        return num_calls(self.sampler, self.steps)

    @property
    def full_calls(self) -> int:
        """Those of them that run the whole network."""
        return len(self.plan.full_steps) if self.plan.cached else self.calls

    @property
    def pruned(self) -> str | None:
        """The size of BK-SDM's U-Net that takes the place of the config's: base, small or tiny."""
        return Path(self.given.model).name.split("-")[2] if self.given.diffusers_unet else None

    @property
    def pixels(self) -> int:
        """Bytes of an image's pixels."""
        config = self.config
        sized = config if hasattr(config, "resolution") else getattr(config, "first_stage", config.unet)
        return 3 * sized.resolution ** 2

    def step_macs(self) -> tuple[Macs, Macs]:
        """(full, cached) for one row of the network's batch."""
        if self.pruned:
            return (_pruned_macs(self.pruned),) * 2
        return _step_macs(self.config_path, self.plan.branch or 0)

    def macs(self, over: int | None = None) -> Macs:
        """Per step, as the papers count: the average over the steps, or their sum divided by `over` steps."""
        if self.plan.blocks is not None:
            mean = _blocks_macs(self.config_path, self.plan, self.calls)
        else:
            mean = average(*self.step_macs(), self.plan.full_steps, self.steps)
        return Macs(*(value * self.steps / (over or self.steps) for value in mean))

    def macs_per_image(self) -> Macs:
        """All network calls of an image, both rows of guidance."""
        if self.plan.blocks is not None:
            mean = _blocks_macs(self.config_path, self.plan, self.calls)
        else:
            mean = average(*self.step_macs(), range(self.full_calls), self.calls)
        return Macs(*(value * self.calls * rows_per_image(self.config) for value in mean))

    def settings(self) -> dict:
        """What run.json of the row's images says of sampling, the cache aside."""
        sampler = self.config.sampler
        found = {"model": self.config.name, "sampler": self.sampler, "steps": self.steps, "dtype": self.dtype,
                 "timesteps": timesteps_for(self.sampler, sampler.timesteps), "eta": 0.0}
        if hasattr(sampler, "guidance"):
            found["guidance"] = sampler.guidance if self.given.guidance is None else self.given.guidance
        return found

    def name(self) -> str:
        """Of the sample folder: uncached, steps59, uniform_n5, parti_centered_n5_c10_p1.5, uniform_n10_zeroed."""
        prompts, each = self.given.prompts, self.given.images_per_prompt
        parts = [Path(prompts).stem.removeprefix("captions_") + (f"_x{each}" if each != 1 else "")] if prompts else []
        parts += [Path(self.given.model).name] if self.given.model else []
        if self.plan.cached:
            s = self.plan.settings
            parts += [f"{s['schedule']}_n{s['interval']}"]
            parts += [f"c{s['center']}"] if s["center"] is not None else []
            parts += [f"p{s['power']:g}"] if s["power"] is not None else []
            parts += [f"branch{self.plan.branch}"] if self.plan.branch != self.config.sampler.branch else []
            parts += ["zeroed"] if s["zero_cache"] else []
        if self.plan.blocks is not None:
            parts += [f"blocks_{self.given.block_schedule.stem}"] + (["scale_shift"] if self.given.scale_shift else [])
        parts += [self.sampler] if self.sampler != getattr(self.config.sampler, "sampler", "ddim") else []
        parts += [f"steps{self.steps}"] if self.steps != self.config.sampler.steps else []
        parts += [f"guidance{self.given.guidance:g}"] if self.given.guidance is not None else []
        return "_".join(parts) if len(parts) > bool(prompts) else "_".join([*parts, "uncached"])


class Runs(NamedTuple):
    """What a script says. pending: (section, label) -> why it cannot be run yet."""
    rows: list[Row]
    pending: dict[tuple[str, str], str]

    def beside(self, section: str, label: str) -> list[Row]:
        """The runs that are, or stand beside, a row of the paper."""
        return [row for row in self.rows if (row.section, row.printed_as) == (section, label)]


@cache
def _open(path: Path) -> tuple[Config, nn.Module]:
    config = load_config(path if path.is_absolute() else ROOT / path)
    return config, build(config)


def num_branches(path: Path) -> int:
    """Skips of the U-Net of a config."""
    return _open(path)[1].num_branches


@cache
def _step_macs(path: Path, branch: int) -> tuple[Macs, Macs]:
    config, unet = _open(path)
    return step_macs(unet, example_inputs(config), branch)


@cache
def _residual_macs(path: Path) -> tuple[Macs, dict[str, Macs]]:
    config, unet = _open(path)
    return residual_macs(unet, example_inputs(config))


def _blocks_macs(path: Path, plan: CachePlan, calls: int) -> Macs:
    """Per network call, of a run with a block schedule."""
    full, residuals = _residual_macs(path)
    if plan.cached:
        full = average(*_step_macs(path, plan.branch), plan.full_steps, calls)
    return schedule_macs(full, residuals, plan.block_steps, calls)


@cache
def _pruned_macs(size: str) -> Macs:
    return bk_sdm.step_macs(size)


def options_parser(prog: str) -> argparse.ArgumentParser:
    """Those options of the sample commands that tell rows apart."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--prompts")
    parser.add_argument("--images-per-prompt", type=int, default=1)
    parser.add_argument("--model")
    parser.add_argument("--diffusers-unet", action="store_true")
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--dtype")
    add_cache_options(parser)
    return parser


def parse_row(text: str, configs: Mapping[str, Path] | None = None) -> Row:
    """A row as table.sh says it: SECTION LABEL PACKAGE OPTIONS. configs: other ones, by package. Raises UserError."""
    section, label, package, *options = shlex.split(text)
    given = options_parser(f"row {label!r}").parse_args(options)
    path = (configs or {}).get(package) or given.config or CONFIGS[package]
    config, unet = _open(path)
    steps = config.sampler.steps if given.steps is None else given.steps
    plan = plan_cache(given, steps, unet.num_branches, config.sampler.branch)
    if given.config:                                # not repeated among the options
        at = options.index("--config")
        del options[at:at + 2]
    return Row(section, label, package, options, given, path, config, steps, plan)


def script_parser() -> argparse.ArgumentParser:
    """What a table script says (scripts/table.sh)."""
    parser = argparse.ArgumentParser(prog="scripts.plan", allow_abbrev=False)
    parser.add_argument("--script", required=True)
    parser.add_argument("--table", required=True, help="of results/paper/*.yaml, where it is not --own")
    parser.add_argument("--own", nargs=2, metavar=("IMAGES", "TITLE"), help="of no paper")
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--later", action="append", default=[])
    return parser


def parse_script(said: Sequence[str], configs: Mapping[str, Path] | None = None) -> tuple[argparse.Namespace, Runs]:
    """The script's own words and its rows. Raises UserError."""
    script = script_parser().parse_args(said)
    pending = {}
    for text in script.later:
        section, label, reason = shlex.split(text)
        pending[section, label] = reason
    return script, Runs([parse_row(text, configs) for text in script.row], pending)


@cache
def said_by(script: str) -> tuple[str, ...]:
    """Ask a table script for its rows."""
    done = subprocess.run(["bash", f"scripts/{script}", "--rows"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scripts/{script} --rows failed: {done.stderr.strip()}")
    return tuple(done.stdout.rstrip("\0").split("\0"))


def of_table(table: Table) -> Runs:
    """The runs of a table, as its script says them; none where it has no script."""
    return parse_script(said_by(table.script))[1] if table.script else Runs([], {})


@cache
def printed_values(model: str) -> dict[str, list[tuple[Table, str, dict[str, float | str]]]]:
    """What the papers print for the runs of a model: name of the sample folder -> (table, label, numbers) of each row.

    Rows of ours that only stand beside one of the paper's are left out.
    """
    found: dict[str, list] = {}
    for table in tables().values():
        for row in [] if table.schedules else of_table(table).rows:
            if row.config.name == model and row.label == row.printed_as:
                found.setdefault(row.name(), []).append((table, row.label, section_of(table, row).rows[row.label]))
    return found


def check_against(table: Table, runs: Runs) -> None:
    """Whether every run is of a row that the paper has. Raises UserError."""
    for section, label in [*((row.section, row.printed_as) for row in runs.rows), *runs.pending]:
        if section not in table.sections or label not in table.sections[section].rows:
            raise UserError(f"{table.name} of results/paper has no row {label!r}"
                            + (f" in section {section!r}" if section else ""))


def section_of(table: Table, row: Row) -> Section:
    return table.sections[row.section]
