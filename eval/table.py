"""Any table of the two papers: paper | ours | difference. A dash: not printed, or not measured.

    python -m eval.table 1                                table1, as text
    python -m eval.table table3 block_caching_table1 --format markdown
    python -m eval.table --all                            writes results/README.md and results/tables/*.csv, *.tex

The command counts MACs, which need no weights. All other numbers come from the JSON files under results/, if their run
is the row's: all settings, the weights, the number of images, the evaluator and its files, the prompts
(eval/tables/current.py). In the text format, the reasons for missing numbers are below the table.
"""

import argparse
from operator import methodcaller
from pathlib import Path

from eval.tables.arms import runs_of
from eval.tables.paper import find
from eval.tables.render import FORMATS, RESULTS, Rendered, everything
from run import results
from run.cli import command
from run.files import write_atomically
from unet_caching.errors import UserError


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="table1 to table14 (or 1 to 14), block_caching_table1 and 2")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: results)")
    parser.add_argument("--trials", action="store_true", help="show numbers of fewer images, too, labelled")
    parser.add_argument("--all", action="store_true", help="write all tables into the folder of the results")
    args = parser.parse_args()
    if bool(args.names) == args.all:
        raise UserError("give names of tables, like 1 or table12, or --all")
    if not args.results.is_dir():
        raise UserError(f"no folder {args.results}")
    chosen = [find(name) for name in args.names]
    runs = [runs_of(table) for table in chosen]
    models = None if args.all else {arm.run.config.name for one in runs for arm in one.arms}
    found = list(results.read_all(args.results, models))
    for table, own in zip(chosen, runs, strict=True):
        text = FORMATS[args.format](Rendered(table, own, found, args.trials))
        print(text, end="\n" if args.format == "csv" else "\n\n")
    if args.all:
        (args.results / "tables").mkdir(exist_ok=True)
        files = everything(found)
        for name, text in files.items():
            write_atomically(args.results / name, methodcaller("write_text", text))
        print(f"wrote {args.results}/README.md and {len(files) - 1} files in {args.results}/tables/")


if __name__ == "__main__":
    main()
