"""Columns of the tables of studies. Another one is a function here under its word, which gives the cell of a row among
the others. Names of metrics are columns, too, and some words stand for several of them."""

from collections.abc import Callable
from typing import NamedTuple

from eval.cost.macs import giga
from eval.metrics.registry import MEASURES, RMSE_TO_CONVERGED, SMALL_MEASURES
from lab.study.measures import minus_uncached
from lab.study.rows import EQUAL, Cost, Row, Rows, front
from run.results import Metric

Cell = Callable[[Row, Rows], str]
SCORES = ("KID-EffLite0", "KID-IncMixed5", "PSNR", "FID", "CLIP score")   # KID is unbiased, however few the images are
PAIRS = {"PSNR": ("PSNR to uncached, dB", 1), "SSIM": ("SSIM", 3), "1 - cos, EffLite0": ("feature distance", 3)}


class Column(NamedTuple):
    heading: str
    cell: Cell
    about: str = ""         # how to read it


COLUMNS: dict[str, Column] = {}
SEVERAL: dict[str, Callable[[Rows], list[Column]]] = {}


def column(word: str, heading: str, about: str = "") -> Callable[[Cell], Cell]:
    """Register a function as the cell of a column."""
    def register(cell: Cell) -> Cell:
        COLUMNS[word] = Column(heading, cell, about)
        return cell
    return register


def several(word: str) -> Callable[[Callable[[Rows], list[Column]]], Callable[[Rows], list[Column]]]:
    """Register a function as the columns that a word stands for."""
    def register(columns: Callable[[Rows], list[Column]]) -> Callable[[Rows], list[Column]]:
        SEVERAL[word] = columns
        return columns
    return register


def columns_of(word: str, rows: Rows) -> list[Column]:
    """The columns that a word stands for. Raises KeyError for one that there is not."""
    if word in SEVERAL:
        return SEVERAL[word](rows)
    return [COLUMNS[word] if word in COLUMNS else pair(word) if word in PAIRS else distance_column(word)]


def spread(metric: Metric | None, form: str, scale: float = 1) -> str:
    """A number with its interval where that is known, or a dash."""
    if metric is None:
        return "-"
    if metric.interval is None:
        return f"{scale * metric.value:{form}}"
    return f"{{:{form}}} [{{:{form}}}, {{:{form}}}]".format(*(scale * value for value in metric.bounds))


def with_error(metric: Metric, scale: float = 1.0, sign: str = "") -> str:
    return f"{scale * metric.value:{sign}.1f} ± {scale * 1.96 * (metric.stderr or 0):.1f}"


def distance(row: Row, name: str) -> str:
    """A distance to real images with its error, and in brackets how much more that is than without caching."""
    metric, more, scale = row.metric(name), row.metric(minus_uncached(name)), MEASURES[name].scale
    if metric is None:
        return "-"
    return with_error(metric, scale) + (f" ({with_error(more, scale, '+')})" if more else "")


def distance_column(name: str) -> Column:
    return Column(MEASURES[name].heading, lambda row, rows: distance(row, name), (
        "Distances to real images are on features of EfficientNet-Lite0 and, where it says IncMixed5, of InceptionV3 "
        "up to its block mixed5: they are not FID, and compare with each other only. FD: Frechet distance in 64 "
        "principal directions; KID: unbiased kernel distance. With 95 % errors over draws of the images; in brackets "
        "how much more that is than of the run without caching that all are compared with, paired by seed."))


def pair(name: str) -> Column:
    heading, decimals = PAIRS[name]

    def cell(row: Row, rows: Rows) -> str:
        metric = row.metric(name)
        return "-" if metric is None else f"{metric.value:.{decimals}f}"
    return Column(heading, cell, "PSNR, SSIM and feature distance (1 - cosine): of the images to the uncached ones of "
                                 "the same seed.")


def spread_column(name: str) -> Column:
    return Column(name, lambda row, rows: spread(row.metric(name), ".4g"))


def distances_of(rows: Rows) -> list[str]:
    """The distances to real images that all of some rows have: those of EffLite0, then those of other extractors."""
    return [one.name for one in SMALL_MEASURES if rows.rows and all(row.metric(one.name) for row in rows.rows)]


def scores_of(rows: Rows) -> list[str]:
    """The scores that some rows have, else the first metric that one has."""
    names = list(dict.fromkeys(name for row in rows.rows for one in row.records.values() for name in one.metrics))
    return [name for name in SCORES if name in names] or names[:1]


def on_front(rows: Rows, cost: Cost, name: str) -> list[int]:
    """The places of the rows on the front of a cost and a metric."""
    known = [(i, price, metric.value) for i, row in enumerate(rows.rows)
             if (price := cost(row)) is not None and (metric := row.metric(name))]
    higher = name in MEASURES and MEASURES[name].higher
    return [known[i][0] for i in front([pair for _, *pair in known], higher)]


def short(row: Row, rows: Rows) -> str:
    """A row among the others, in short, by the options that differ: N=5 b2."""
    if row.plain:
        one_way = len({(one.run.sampler.name, one.run.steps) for one in rows.rows}) == 1
        return "uncached" if one_way else f"{row.run.sampler.name} {row.run.steps}"
    cached = [one for one in rows.rows if not one.plain]
    words = {"interval": "N=", "branch": "b", "center": "c", "power": "p"}
    order = ["sampler", "steps", "interval", "branch", "schedule", "center", "power"]
    names = sorted(row.options, key=lambda name: order.index(name) if name in order else len(order))
    return " ".join(f"{words.get(name, f'{name} ')}{row.options[name]}" for name in names
                    if name == "interval" or len({one.options.get(name) for one in cached}) > 1) or "cached"


@column("arm", "arm")
def _arm(row: Row, rows: Rows) -> str:
    return row.arm.label


@column("run", "run")
def _run(row: Row, rows: Rows) -> str:
    return row.name


@column("kind", "system")
def _kind(row: Row, rows: Rows) -> str:
    return row.kind


COLUMNS["point"] = Column("point", short)


@column("full / calls", "full / calls")
def _calls(row: Row, rows: Rows) -> str:
    return f"{row.run.full_calls} / {row.run.calls}"


@column("full / all steps", "full / all steps")
def _steps(row: Row, rows: Rows) -> str:
    full = row.run.caching.settings.get("full_steps") or range(row.run.steps)
    return f"{len(full)} / {row.run.steps}"


@column("macs", "MACs per image, G")
def _macs(row: Row, rows: Rows) -> str:
    return f"{giga(row.macs):.2f}"


@column("of uncached", "of uncached")
def _share(row: Row, rows: Rows) -> str:
    return f"{row.macs / rows.whole.macs:.3f}"


@column("speed-up by MACs", "speed-up by MACs")
def _speedup(row: Row, rows: Rows) -> str:
    return f"{rows.whole.macs / row.macs:.2f}x"


@column("measured", "measured", "Measured: the network time of a run without caching over that of the arm, from the "
                                "times of the kinds of calls, which took turns.")
def _measured(row: Row, rows: Rows) -> str:
    return "-" if row.time is None else f"{rows.whole.run.calls / row.time:.2f}x"


@column("cost", "cost, calls", "Costs are in full network calls per image, by multiply-accumulates (where each image "
                               "decides what is computed, the mean of what it came to).")
def _cost(row: Row, rows: Rows) -> str:
    return f"{row.cost:.2f}"


@column("time", "time, calls", "Time: of the network, in full calls.")
def _time(row: Row, rows: Rows) -> str:
    return "-" if row.time is None else f"{row.time:.2f}"


@column("near", "PSNR, dB", "PSNR, dB: to the same seed of the run that all are compared with, of latents where that "
                            "is a converged run, else of images; with 95 % intervals.")
def _near(row: Row, rows: Rows) -> str:
    return spread(rows.near(row), ".1f")


def _gain(row: Row, rows: Rows, other: Row | None) -> str:
    """How much nearer a row comes than another one; and which that is, where no budget says it."""
    if row.arm.budget is not None or other is None:
        return spread(rows.nearer(row, other), "+.1f") if row.arm.budget or not row.plain else ""
    return "" if row.plain else f"{spread(rows.nearer(row, other), '+.1f')} ({other.run.sampler.name}, {other.cost:g})"


@column("gain", "beside the best of fewer steps", (
    "Differences are in dB, paired by seed, with 95 % intervals, to the run without caching that comes nearest at the "
    "same budget; where there are no budgets to that in brackets: the best of those that cost no more than the "
    f"cheapest which costs at least {EQUAL:g} of what the row does."))
def _beside_best(row: Row, rows: Rows) -> str:
    return _gain(row, rows, rows.rival(row))


@column("gain of its sampler", "beside the same sampler")
def _beside_same(row: Row, rows: Rows) -> str:
    return _gain(row, rows, rows.rival(row, among=lambda one: one.run.sampler.name == row.run.sampler.name))


@column("gain at equal time", "the same at equal time")
def _beside_time(row: Row, rows: Rows) -> str:
    return _gain(row, rows, rows.rival(row, lambda one: one.time))


@column("made", "made in, CPU min", "Made in: CPU minutes that measuring and training took before the first image; ? "
                                    "where that was made elsewhere.")
def _made(row: Row, rows: Rows) -> str:
    return "?" if row.made is None else f"{row.made / 60:.1f}" if row.made else "-"


@several("distances")
def _distances(rows: Rows) -> list[Column]:
    return [distance_column(name) for name in distances_of(rows)]


@several("scores")
def _scores(rows: Rows) -> list[Column]:
    return [spread_column(name) for name in scores_of(rows)]


@several("shifts")
def _shifts(rows: Rows) -> list[Column]:
    names = [*map(minus_uncached, SCORES[:2]), RMSE_TO_CONVERGED.name]
    return [spread_column(name) for name in names if any(row.metric(name) for row in rows.rows)]


@several("front")
def _front(rows: Rows) -> list[Column]:
    main = next(iter(scores_of(rows)), "")

    def on(heading: str, cost: Cost) -> Column:
        places = on_front(rows, cost, main)
        return Column(heading, lambda row, rows: "yes" if rows.rows.index(row) in places else "", (
            f"Front: no other arm has a lower cost and a better {main}; among arms whose intervals overlap, which one "
            "is on it is chance."))
    return [on("front by MACs", lambda row: row.macs), on("by time", lambda row: row.time)]
