"""Any table of the two papers: paper | ours | difference. A dash: not printed, or not measured.

    python -m eval.table 1                                table1, as text
    python -m eval.table table3 block_caching_table1 --format markdown
    python -m eval.table --all                            writes results/README.md and results/tables/*.csv, *.tex

The command counts MACs, which need no weights. All other numbers come from the JSON files under results/, if their run
is the row's: all settings, the weights, the number of images, the evaluator and its files, the prompts
(eval/tables/current.py). In the text format, the reasons for missing numbers are below the table.
"""

from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

from eval.tables.arms import runs_of
from eval.tables.paper import find
from eval.tables.render import FORMATS, RESULTS, Rendered, everything
from run import results
from run.cli import command
from run.files import write_atomically
from unet_caching.errors import UserError
from unet_caching.options import option


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = option((), "table1 to table14 (or 1 to 14), block_caching_table1 and 2", word=True,
                                    metavar="NAME")
    format: str = option("text", "default: %(default)s", choices=tuple(FORMATS))
    results: Path = option(RESULTS, "folder of the results (default: results)")
    trials: bool = option(False, "show numbers of fewer images, too, labelled")
    all: bool = option(False, "write all tables into the folder of the results")


@command
def main(options: Options) -> None:
    if bool(options.names) == options.all:
        raise UserError("name tables, like 1 or table12, or use --all")
    if not options.results.is_dir():
        raise UserError(f"no folder {options.results}")
    chosen = [find(name) for name in options.names]
    runs = [runs_of(table) for table in chosen]
    models = None if options.all else {arm.run.config.name for one in runs for arm in one.arms}
    found = list(results.read_all(options.results, models))
    for table, own in zip(chosen, runs, strict=True):
        text = FORMATS[options.format](Rendered(table, own, found, options.trials))
        print(text, end="\n" if options.format == "csv" else "\n\n")
    if options.all:
        (options.results / "tables").mkdir(exist_ok=True)
        files = everything(found)
        for name, text in files.items():
            write_atomically(options.results / name, methodcaller("write_text", text))
        print(f"wrote {options.results}/README.md and {len(files) - 1} files in {options.results}/tables/")


if __name__ == "__main__":
    main()
