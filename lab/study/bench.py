"""A part of a study at work: its arms on this machine, to sample and to measure."""

import resource
import shlex
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.tables.arms import Arm, Given, of_run
from eval.tables.study import (
    Entry,
    Part,
    against,
    entries,
    files_of,
    missing,
    needed,
    opened,
    read_study,
    with_common,
)
from lab.study.commands import python
from lab.study.ledger import Ledger
from lab.study.measures import MEASURES, Setup, times
from lab.study.show import show_of
from run import results
from run.files import ROOT
from run.folder import RunFolder, missing_seeds
from run.image_model import fill, open_model, summary
from run.provenance import provenance
from run.results import Result
from run.seeds import parse_seeds
from run.spec import Run
from run.weights import sha256
from unet_caching.errors import UserError, as_user_error
from unet_caching.registry import METHODS

MADE = "fitted file"            # the kind of the records of files that were made


class Bench:
    """The arms of a part. Raises UserError for arms that cannot run."""

    def __init__(self, part: Part, path: Path, given: Given, ledger: Ledger):
        self.part, self.path, self.given, self.ledger = part, path, given, ledger
        self.seeds = parse_seeds(part.seeds)
        if unknown := [kind for kind in part.measure if kind not in MEASURES]:
            raise UserError(f"{path}: no measure {unknown[0]!r}: choose from {', '.join(MEASURES)}")
        with as_user_error(f"{path}: "):
            self.show = show_of(part.show)
        self.evaluator = next((kind for kind in part.measure if kind in ("adm", "fid", "clip_score")), "")
        whole = self._arm(against(part, path), Entry({}, "converged" if "near" in part.measure else "uncached"))
        self.also = [*self._beside()]
        self.setup = Setup(part, whole, [self._arm(run, Entry({}, f"converged, {run.steps} steps"))
                                         for run in self._many_steps()], given.samples / "converged")
        self.open()

    def open(self) -> None:
        """Open the arms whose fitted files exist."""
        found, self.left_out = opened(self.part, self.path)
        self.arms = [self._arm(run, entry) for entry, run in found]
        self.names = {arm.name for arm in self.arms}

    def kept(self) -> Iterator[tuple[Arm, dict[str, Result]]]:
        """Arms whose fitted files no longer exist, with their kept records: as runs without those files."""
        for entry in self.left_out:
            known = self.ledger.made_of({name: str(file) for name, file in files_of(entry).items()})
            there = {name: value for name, value in entry.options.items() if Path(str(value)) not in missing(entry)}
            run = with_common(self.part, there).open()
            if known and run.caching:
                name = next(iter(known.values())).details["name"]
                yield self._arm(run, replace(entry, called=entry.called or name.partition("/")[2])), known

    def _beside(self) -> Iterator["Bench"]:
        """The arms of the other studies that are shown, too. Their times are taken from this study, if it has them.

        Raises UserError for studies that cannot be compared.
        """
        for name in self.part.also:
            other = read_study(self.path.with_name(f"{name}.yaml") if self.path.is_absolute() else name)
            part = other.parts[0]
            differing = [key for key in ("model", "seeds", "against") if getattr(part, key) != getattr(self.part, key)]
            if differing:
                raise UserError(f"{self.path}: {name} cannot be shown, too: it has another {' and '.join(differing)}")
            if "time" in self.part.measure:
                part = replace(part, measure=[*part.measure, "time"])
            ledger = Ledger(self.given.results / other.name / "records.jsonl", self.ledger)
            yield Bench(part, other.path, self.given, ledger)

    def _arm(self, run: Run, entry: Entry) -> Arm:
        return of_run(run, entry, self.seeds, self.given, self.evaluator)

    def _many_steps(self) -> Iterator[Run]:
        """The runs that `converged` compares with."""
        if "converged" not in self.part.measure:
            return
        own = dict.fromkeys(("sampler", "timesteps", "eta")) | self.part.converged
        plain = replace(with_common(self.part, {}), caching=tuple(method() for method in METHODS))
        for factor in (1, 2):
            run = plain.having(**own | {"steps": factor * self.part.converged["steps"]}).open()
            if run.sampler.eta:
                raise UserError(f"{self.path}: converged has eta {run.sampler.eta}, but only steps without noise "
                                "converge: say eta: 0")
            yield run

    @property
    def all(self) -> list[Arm]:
        """The arms, each run once, after the runs that they are compared with."""
        looked_at = [self.setup.whole, *self.setup.converged] if self.looks_at_images or self.part.twice else []
        return list({arm.name: arm for arm in (*looked_at, *self.arms)}.values())

    @property
    def looks_at_images(self) -> bool:
        return any(MEASURES[kind].images for kind in self.part.measure)

    def kinds(self, arm: Arm) -> list[str]:
        """The measures of an arm. An arm that is only there to compare with has only its quality measured."""
        own = [kind for kind in self.part.measure if MEASURES[kind].applies(arm, self.setup)]
        if arm.name not in self.names:
            own = [kind for kind in own if kind == "quality" and arm == self.setup.whole]
        return [*own, *(["twice"] if self.part.twice and arm.name == self.setup.whole.name else [])]

    def record(self, arm: Arm, kind: str) -> tuple[Result | None, str | None]:
        """The current record of a measure and an arm; else why there is none, in words."""
        found, why_not = self.ledger.record(arm, kind, MEASURES[kind].wanted(kind, arm, self.setup))
        return (replace(found, details=found.details | {"name": arm.name}) if found else None), why_not

    def records(self, arm: Arm) -> dict[str, Result]:
        """The current records of an arm, by measure."""
        found = {kind: self.record(arm, kind)[0] for kind in self.kinds(arm)}
        return {kind: result for kind, result in found.items() if result is not None}

    def lacking(self, arm: Arm) -> list[str]:
        """The measures of an arm that are missing and that this machine can do, without its time (`time`)."""
        kinds = [kind for kind in self.kinds(arm)
                 if kind != "time" and (kind != arm.evaluator or not arm.missing_for_judging())]
        return [kind for kind in kinds if self.record(arm, kind)[0] is None]

    def to_sample(self, arm: Arm) -> bool:
        """Whether images of an arm are needed and missing."""
        beside = any(arm.name == one.name for one in (self.setup.whole, *self.setup.converged))
        looking = (kind for one in (self.arms if beside else [arm]) for kind in self.lacking(one))
        return any(MEASURES[kind].images for kind in looking) and bool(missing_seeds(arm.folder, arm.seeds))

    def complete(self, arm: Arm) -> bool:
        return not self.lacking(arm) and not self.to_sample(arm)

    def run(self, arm: Arm) -> bool:
        """Sample and measure what is missing; False if that must wait for images from other processes.

        Raises UserError if its folder has images of another run.
        """
        if self.to_sample(arm):
            self.sample(arm)
        for kind in self.lacking(arm):
            beside = [self.setup.whole, *self.setup.converged] if MEASURES[kind].images else []
            if any(missing_seeds(one.folder, arm.seeds) for one in (arm, *beside) if beside):
                return False
            result = MEASURES[kind].of(arm, self.setup)
            if result and kind != arm.evaluator:
                self.write(arm, result)
            if why_not := self.record(arm, kind)[1]:        # it would be measured again and again
                raise UserError(f"{arm.folder}: {why_not}: name another folder with --samples")
        return True

    def write(self, arm: Arm, result: Result) -> None:
        """Write a record of an arm, with the names of its fitted files."""
        entry = next((one.entry for one in self.arms if one.name == arm.name), arm.entry)
        made_of = {name: str(file) for name, file in files_of(entry).items()}
        details = result.details | ({"made_of": made_of} if made_of else {})
        results.write(arm.record(result.kind), replace(result, details=details))

    def time(self, names: Collection[str]) -> None:
        """Time the runs with these names that have no time yet, together: calls of one kind are timed once."""
        if "time" in self.part.measure:
            arms = {arm.name: arm for arm in self.arms if arm.name in names and "time" in self.kinds(arm)
                    and self.record(arm, "time")[0] is None}
            for arm, result in times([*arms.values()], self.setup):
                self.write(arm, result)

    def sample(self, arm: Arm) -> None:
        """Make the missing images in this process. If `near` is measured, note the PSNR of their latents."""
        if "near" not in self.part.measure or arm in self.setup.converged:
            made = fill(open_model(arm.run, arm.on), arm.seeds, arm.folder, arm.on)
            print(summary(arm.run, arm.folder, arm.images, made), flush=True)
            return
        distances, whole = self.setup.distances, arm.run.name == self.setup.whole.run.name
        model = distances.on(arm.run)
        folder = RunFolder(arm.folder, model.settings | {"cache": arm.run.caching.settings}, provenance(model.device),
                           arm.run.spec.to_json())

        def images(seeds: list[int], report: Any) -> np.ndarray:
            if whole:
                return model.decode(distances.converged(seeds).to(model.device))
            latents = model.latents(seeds, model.policy(), report=report)
            distances.note(arm.run, seeds, latents)
            return model.decode(latents)

        folder.fill(list(arm.seeds), distances.machine.batch_size, images)
        model.write_listing(folder)

    def made(self, file: str) -> Path:
        """The file that notes how a fitted file was made, while the study runs."""
        return self.given.samples / "made" / f"{file.replace('/', '_')}.json"

    def note(self, file: str) -> Result | None:
        """How a fitted file was made; None if that is not known, or if the file has changed since."""
        path = self.made(file)
        found = results.read(path) if path.is_file() else self.ledger.known.get((file, MADE, ""))
        changed = found and (ROOT / file).is_file() and found.hashes["file"] != sha256(ROOT / file)
        return None if changed else found

    def make(self) -> None:
        """Make the missing fitted files, and note the time of each. Raises UserError if a command fails."""
        common = shlex.join(with_common(self.part, {}).words())
        for name in self._made_for(*entries(self.part, self.path)):
            path = ROOT / name
            if path.is_file():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            line = ["-m", *shlex.split(self.part.made[name].replace("{common}", common)), "--out", name]
            said = shlex.join(["python", *line])
            print(said, flush=True)
            started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
            python(line, name)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = sum(getattr(after, one) - getattr(before, one) for one in ("ru_utime", "ru_stime"))
            results.write(self.made(name), Result(
                MADE, self.setup.whole.run.config.name, hashes={"file": sha256(path)}, provenance=provenance("cpu"),
                details={"file": name, "command": said, "cpu_s": round(cpu, 2), "bytes": path.stat().st_size}
                ).stamped(started))
        self.open()

    def _made_for(self, *arms: Entry) -> list[str]:
        """The fitted files of some arms that the study makes, after the files that these need."""
        own = (str(path) for arm in arms for path in files_of(arm).values() if str(path) in self.part.made)
        return list(dict.fromkeys(other for path in own for other in needed(path, self.part.made)))

    def cost_of_making(self, entry: Entry) -> float | None:
        """The CPU seconds of making all fitted files of an arm, and the files that these need; None if not known."""
        if any(str(path) not in self.part.made for path in files_of(entry).values()):
            return None
        notes = [self.note(file) for file in self._made_for(entry)]
        return None if None in notes else sum(note.details["cpu_s"] for note in notes if note)
