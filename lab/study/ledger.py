"""What has been measured of a study: records beside the images while it runs, and one file of all of them once it is
rendered."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.tables.arms import Arm
from eval.tables.current import Wanted, match
from run import results
from run.results import Result

Key = tuple[str, str, str]      # the run, the measure, the seeds


class Ledger:
    """The records of a study, by arm and measure; they are looked for beside the images, then in the file of all."""

    def __init__(self, packed: Path, before: "Ledger | None" = None):
        """packed: the file of all. before: another study's, whose times are taken first."""
        self.packed = packed
        found = {_key(result): result for result in (results.read_packed(packed) if packed.is_file() else ())}
        first = {key: one for key, one in before.known.items() if key[1] == "time"} if before else {}
        self.known: dict[Key, Result] = found | first

    def record(self, arm: Arm, kind: str, wanted: Wanted) -> tuple[Result | None, str | None]:
        """The record of a measure that is current; without one why that is so, in words."""
        _, found, why_not = match(self._candidates(arm, kind, wanted), wanted)
        return found, None if found else why_not or "no"

    def _candidates(self, arm: Arm, kind: str, wanted: Wanted) -> Iterable[tuple[Path, Result]]:
        path = arm.record(kind)
        if path.is_file():
            yield path, results.read(path)
        own = (arm.name, kind, wanted.seeds or "")
        if own in self.known:
            yield self.packed, self.known[own]
        yield from ((self.packed, one) for key, one in self.known.items() if key[:2] == own[:2] and key != own)

    def made_of(self, files: dict[str, str]) -> dict[str, Result]:
        """The records of an arm that is made of these files, by option; by measure."""
        return {result.kind: result for result in self.known.values() if result.details.get("made_of") == files}

    def note(self, path: Path, kind: str) -> Result | None:
        """What is noted of a file that was made."""
        return self.known.get((str(path), kind, ""))

    def pack(self, found: Sequence[Result], names: set[str]) -> None:
        """Write the file of all records: these, and those of other seeds of the same runs and files."""
        kept = {key: one for key, one in self.known.items() if key[0] in names}
        self.known = kept | {_key(result): result for result in found}
        order = {name: number for number, name in enumerate(dict.fromkeys(_key(one)[0] for one in found))}
        in_order = sorted(self.known.items(), key=lambda pair: order.get(pair[0][0], len(order)))
        results.write_packed(self.packed, [result for _, result in in_order])


def _key(result: Result) -> Key:
    """A record's place: those of a run's time are of all seeds."""
    seeds = "" if result.kind == "time" else str(result.details.get("seeds", ""))
    return str(result.details.get("name") or result.details.get("file")), result.kind, seeds


def records_of(packed: Path) -> dict[str, dict[str, Result]]:
    """The records of a file of all, by the name of the run and by measure. Raises UserError."""
    found: dict[str, dict[str, Result]] = {}
    for result in results.read_packed(packed):
        found.setdefault(_key(result)[0].rpartition("/")[2], {})[result.kind] = result
    return found
