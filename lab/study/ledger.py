"""The records of a study: beside the images while it runs, and packed into one file when it is rendered."""

from collections.abc import Sequence
from pathlib import Path

from eval.tables.arms import Arm
from eval.tables.current import Wanted, match
from run import results
from run.results import Result

Key = tuple[str, str, str]      # the run, the measure, the seeds


class Ledger:
    """The records of a study, by arm and measure, from beside the images and from the packed file."""

    def __init__(self, packed: Path, before: "Ledger | None" = None):
        """packed: the packed file. before: another study's records, whose times are preferred."""
        self.packed = packed
        self.known: dict[Key, Result] = {
            _key(result): result for result in (results.read_packed(packed) if packed.is_file() else ())}
        self.known |= {key: one for key, one in before.known.items() if key[1] == "time"} if before else {}

    def record(self, arm: Arm, kind: str, wanted: Wanted) -> tuple[Result | None, str | None]:
        """The current record of a measure; else why there is none, in words."""
        path = arm.record(kind)
        found = [(path, results.read(path))] if path.is_file() else []
        found += [(self.packed, one) for (name, measure, _), one in self.known.items()
                  if (name, measure) == (arm.name, kind)]
        _, result, why_not = match(found, wanted)
        return result, None if result else why_not or "no"

    def made_of(self, files: dict[str, str]) -> dict[str, Result]:
        """The records, by measure, of the arm with these fitted files. files: paths by option."""
        return {result.kind: result for result in self.known.values() if result.details.get("made_of") == files}

    def pack(self, found: Sequence[Result], names: set[str]) -> None:
        """Write the packed file: these records, and the known ones of the runs and files in `names`."""
        kept = {key: one for key, one in self.known.items() if key[0] in names}
        self.known = kept | {_key(result): result for result in found}
        order = {name: number for number, name in enumerate(dict.fromkeys(_key(one)[0] for one in found))}
        in_order = sorted(self.known.items(), key=lambda pair: order.get(pair[0][0], len(order)))
        results.write_packed(self.packed, [result for _, result in in_order])


def _key(result: Result) -> Key:
    """The key of a record. A run's time holds for all seeds."""
    seeds = "" if result.kind == "time" else str(result.details.get("seeds", ""))
    return str(result.details.get("name") or result.details.get("file")), result.kind, seeds


def records_of(packed: Path) -> dict[str, dict[str, Result]]:
    """The records of a packed file, by the name of the run and by measure. Raises UserError."""
    found: dict[str, dict[str, Result]] = {}
    for result in results.read_packed(packed):
        found.setdefault(_key(result)[0].rpartition("/")[2], {})[result.kind] = result
    return found
