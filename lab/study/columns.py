"""The columns of studies' tables. To add one: a word of COLUMNS with the function from a row and all rows to a cell.
Names of metrics are columns, too, and some words stand for several columns."""

from collections.abc import Callable
from typing import NamedTuple

from eval.cost.macs import giga
from eval.metrics.measure import PairMeasure
from eval.metrics.registry import MEASURES, RMSE_TO_CONVERGED, SMALL_MEASURES
from lab.study.measures import minus_uncached
from lab.study.rows import EQUAL, Cost, Row, Rows, front
from run.results import Metric

Cell = Callable[[Row, Rows], str]
SCORES = ("KID-EffLite0", "KID-IncMixed5", "PSNR", "FID", "CLIP score")   # KID is unbiased for any number of images
PAIRS = {"PSNR": ("PSNR to uncached, dB", 1), "SSIM": ("SSIM", 3), "1 - cos, EffLite0": ("feature distance", 3)}


class Column(NamedTuple):
    heading: str
    cell: Cell
    about: str = ""         # how to read it


def columns_of(word: str, rows: Rows) -> list[Column]:
    """The columns of a word. Raises KeyError for an unknown word."""
    if word in SEVERAL:
        return SEVERAL[word](rows)
    return [COLUMNS[word] if word in COLUMNS else pair(word) if word in PAIRS else distance_column(word, rows)]


def spread(metric: Metric | None, form: str, scale: float = 1) -> str:
    """A number with its interval, if it is known; a dash for no number."""
    if metric is None:
        return "-"
    if metric.interval is None:
        return f"{scale * metric.value:{form}}"
    return f"{{:{form}}} [{{:{form}}}, {{:{form}}}]".format(*(scale * value for value in metric.bounds))


def number(value: float | None, unit: str = "") -> str:
    """A number with two decimals; a dash for no number."""
    return "-" if value is None else f"{value:.2f}{unit}"


def with_error(metric: Metric, scale: float = 1.0, sign: str = "") -> str:
    return f"{scale * metric.value:{sign}.1f} ± {scale * 1.96 * (metric.stderr or 0):.1f}"


def distance(row: Row, name: str) -> str:
    """A distance to real images with its error, and in brackets its difference to the reference run's."""
    metric, more, scale = row.metric(name), row.metric(minus_uncached(name)), MEASURES[name].scale
    if metric is None:
        return "-"
    return with_error(metric, scale) + (f" ({with_error(more, scale, '+')})" if more else "")


def of_images(heading: str, name: str, rows: Rows) -> str:
    """A heading. For distances of sets it has the number of images, since the distances depend on that."""
    counts = sorted({one.images or 0 for row in rows.rows for one in row.records.values() if name in one.metrics})
    of_pairs = isinstance(MEASURES.get(name), PairMeasure)
    return f"{heading}, {' or '.join(map(str, counts))} images" if counts and not of_pairs else heading


def distance_column(name: str, rows: Rows) -> Column:
    small = name in {one.name for one in SMALL_MEASURES}
    heading = of_images(MEASURES[name].heading, name, rows)
    return Column(heading, lambda row, rows: distance(row, name), "" if not small else (
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


def spread_column(name: str, rows: Rows) -> Column:
    return Column(of_images(name, name, rows), lambda row, rows: spread(row.metric(name), ".4g"))


def distances_of(rows: Rows) -> list[str]:
    """The distances to real images that all rows have: on EffLite0's features, then on other extractors'."""
    return [one.name for one in SMALL_MEASURES if rows.rows and all(row.metric(one.name) for row in rows.rows)]


def scores_of(rows: Rows) -> list[str]:
    """The scores of SCORES that any row has; else the first metric of any row."""
    names = list(dict.fromkeys(name for row in rows.rows for one in row.records.values() for name in one.metrics))
    return [name for name in SCORES if name in names] or names[:1]


def on_front(rows: Rows, cost: Cost, name: str) -> list[int]:
    """The positions of the rows on the front of a cost and a metric."""
    known = [(i, price, metric.value) for i, row in enumerate(rows.rows)
             if (price := cost(row)) is not None and (metric := row.metric(name))]
    higher = name in MEASURES and MEASURES[name].higher
    return [known[i][0] for i in front([pair for _, *pair in known], higher)]


def short(row: Row, rows: Rows) -> str:
    """A short name of a row by the options in which the rows differ: N=5 b2."""
    if row.plain:
        one_way = len({(one.run.sampler.name, one.run.steps) for one in rows.rows}) == 1
        return "uncached" if one_way else f"{row.run.sampler.name} {row.run.steps}"
    cached = [one for one in rows.rows if not one.plain]
    words = {"interval": "N=", "branch": "b", "center": "c", "power": "p"}
    order = ["sampler", "steps", "interval", "branch", "schedule", "center", "power"]
    names = sorted(row.options, key=lambda name: order.index(name) if name in order else len(order))
    return " ".join(f"{words.get(name, f'{name} ')}{row.options[name]}" for name in names
                    if name == "interval" or len({one.options.get(name) for one in cached}) > 1) or "cached"


def _gain(row: Row, rows: Rows, other: Row | None) -> str:
    """How much nearer a row is than another one, and without budgets the other one's name."""
    if row.arm.entry.budget is not None or other is None:
        return spread(rows.nearer(row, other), "+.1f") if row.arm.entry.budget or not row.plain else ""
    return "" if row.plain else f"{spread(rows.nearer(row, other), '+.1f')} ({other.run.sampler.name}, {other.cost:g})"


def _beside_same(row: Row, rows: Rows) -> str:
    return _gain(row, rows, rows.rival(row, among=lambda one: one.run.sampler.name == row.run.sampler.name))


def _steps(row: Row, rows: Rows) -> str:
    full = row.run.caching.settings.get("full_steps") or range(row.run.steps)
    return f"{len(full)} / {row.run.steps}"


COLUMNS: dict[str, Column] = {
    "arm": Column("arm", lambda row, rows: row.arm.label),
    "run": Column("run", lambda row, rows: row.name),
    "kind": Column("system", lambda row, rows: row.kind),
    "point": Column("point", short),
    "full / calls": Column("full / calls", lambda row, rows: f"{row.run.full_calls} / {row.run.calls}"),
    "full / all steps": Column("full / all steps", _steps),
    "macs": Column("MACs per image, G", lambda row, rows: f"{giga(row.macs):.2f}"),
    "of uncached": Column("of uncached", lambda row, rows: f"{row.macs / rows.whole.macs:.3f}"),
    "speed-up by MACs": Column("speed-up by MACs", lambda row, rows: f"{rows.whole.macs / row.macs:.2f}x"),
    "measured": Column("measured", lambda row, rows: number(row.time and rows.whole.run.calls / row.time, "x"), (
        "Measured: the network time of a run without caching over that of the arm, from the times of the kinds of "
        "calls, which took turns.")),
    "cost": Column("cost, calls", lambda row, rows: number(row.cost), (
        "Costs are in full network calls per image, by multiply-accumulates (where each image decides what is "
        "computed, the mean of what it came to).")),
    "time": Column("time, calls", lambda row, rows: number(row.time), "Time: of the network, in full calls."),
    "near": Column("PSNR, dB", lambda row, rows: spread(rows.near(row), ".1f"), (
        "PSNR, dB: to the same seed of the run that all are compared with, of latents where that is a converged run, "
        "else of images; with 95 % intervals.")),
    "gain": Column("beside the best of fewer steps", lambda row, rows: _gain(row, rows, rows.rival(row)), (
        "Differences are in dB, paired by seed, with 95 % intervals, to the run without caching that comes nearest at "
        "the same budget; where there are no budgets to that in brackets: the best of those that cost no more than the "
        f"cheapest which costs at least {EQUAL:g} of what the row does.")),
    "gain of its sampler": Column("beside the same sampler", _beside_same),
    "gain at equal time": Column("the same at equal time", lambda row, rows: _gain(row, rows, rows.rival(
        row, lambda one: one.time))),
    "made": Column("made in, CPU min", lambda row, rows: (
        "?" if row.made is None else f"{row.made / 60:.1f}" if row.made else "-"), (
        "Made in: CPU minutes that measuring and training took before the first image; ? where that was made "
        "elsewhere.")),
}


def _shifts(rows: Rows) -> list[Column]:
    names = [*map(minus_uncached, SCORES[:2]), RMSE_TO_CONVERGED.name]
    return [spread_column(name, rows) for name in names if any(row.metric(name) for row in rows.rows)]


def _front(rows: Rows) -> list[Column]:
    main = next(iter(scores_of(rows)), "")

    def on(heading: str, cost: Cost) -> Column:
        places = on_front(rows, cost, main)
        return Column(heading, lambda row, rows: "yes" if rows.rows.index(row) in places else "", (
            f"Front: no other arm has a lower cost and a better {main}; among arms whose intervals overlap, which one "
            "is on it is chance."))
    return [on("front by MACs", lambda row: row.macs), on("by time", lambda row: row.time)]


SEVERAL: dict[str, Callable[[Rows], list[Column]]] = {
    "distances": lambda rows: [distance_column(name, rows) for name in distances_of(rows)],
    "scores": lambda rows: [spread_column(name, rows) for name in scores_of(rows)],
    "shifts": _shifts, "front": _front}
