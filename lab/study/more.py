"""The texts of table.md after the table of arms. To add one: a function here, from rows to lines (none if there is
nothing to say), and its word in MORE."""

from collections.abc import Callable, Sequence

import numpy as np

from eval.metrics.registry import MEASURES, SMALL_MEASURES
from eval.quality import FD, KID
from eval.tables.text import markdown
from lab.fit.teacher import MEASURES as DISTANCES
from lab.study.columns import distances_of, of_images, spread
from lab.study.measures import minus_uncached
from lab.study.rows import Row, Rows
from run import results
from run.files import ROOT


def sentences(rows: Rows) -> list[str]:
    """How each cached arm of a budget compares with fewer steps."""
    found = []
    for row in rows.rows:
        other = rows.rival(row) if row.arm.entry.budget and not row.plain else None
        gain = rows.nearer(row, other)
        if other is None or gain is None:
            continue
        value, low, high = gain.bounds
        near, far = sorted((abs(low), abs(high)))
        verdict = f"from {other.arm.label}, which may be chance" if low <= 0 <= high else (
            f"{'nearer to' if value > 0 else 'further from'} the uncached images than {other.arm.label} ({near:.1f} to "
            f"{far:.1f})")
        found.append(f"- At the cost of {row.cost:.1f} full calls, {row.arm.label}: {abs(value):.1f} dB {verdict}.")
    return found


def under(text: str, table: Sequence[Sequence[str]]) -> list[str]:
    """A table under a text; nothing if the table has only a head."""
    return [text, "", *markdown(table)] if len(table) > 1 else []


def judged(rows: Rows) -> list[str]:
    """How much further each row's images are from real ones than the reference run's."""
    measures = [one for one in SMALL_MEASURES if any(row.metric(minus_uncached(one.name)) for row in rows.rows)]
    heads = (of_images(one.heading, minus_uncached(one.name), rows) for one in measures)
    table: list[tuple[str, ...]] = [("run", "cost, calls", *heads)]
    for row in sorted(rows.rows, key=lambda row: (-row.cost, row.name)):
        found = [row.metric(minus_uncached(one.name)) for one in measures]
        if found and all(found):
            table.append((row.name, f"{row.cost:.2f}", *(
                spread(metric, "+.2f", one.scale) for metric, one in zip(found, measures, strict=True))))
    return under("How much further from real images than the converged images of the same seeds: distances of feature "
                 "distributions (`eval.quality`) on all seeds, less those of the converged images, with 95 % "
                 "intervals of the paired difference; below zero is nearer.", table)


def orders(rows: Rows) -> list[str]:
    """How fast the error falls with more steps: a row for each kind, sampler and interval with at least three runs.

    The order between two numbers of steps is the slope of log(error) over log(steps); an error is 10^(-PSNR / 20).
    """
    table: list[tuple[str, ...]] = [("kind", "sampler", "N", "steps", "order between them")]
    groups: dict[tuple[str, str, object], dict[int, float]] = {}
    for row in rows.rows:
        if row.psnr is not None:
            interval = row.run.caching.settings.get("interval") if row.run.caching else None
            groups.setdefault((row.kind, row.run.sampler.name, interval), {})[row.run.steps] = row.psnr.mean()
    for (kind, sampler, interval), found in groups.items():
        own = dict(sorted(found.items()))
        if len(own) > 2:
            slopes = np.diff(list(own.values())) / 20 / np.diff(np.log10(list(own)))
            table.append((kind, sampler, str(interval or "-"), ", ".join(map(str, own)),
                          ", ".join(f"{slope:.2f}" for slope in slopes)))
    return under("How fast the error falls as all steps shrink: the slope of log(error) over log(steps), between one "
                 "number of steps and the next.", table)


def controls(rows: Rows) -> list[str]:
    """Whether the scores can tell bad images: arms of the kind "control" should be clearly worse than the first arm."""
    names, whole = distances_of(rows), rows.rows[0]

    def verdict(row: Row, name: str) -> str:
        metric, other = row.metric(name), whole.metric(name)
        worse = metric is not None and other is not None and metric.bounds[1] > other.bounds[2]
        return f"{name} {'' if worse else 'NOT '}clearly worse"

    found = [f"- {row.arm.label}: {', '.join(verdict(row, name) for name in names)} than {whole.arm.label}"
             for row in rows.rows if row.kind == "control"]
    return ["**Can the scores see what matters?** (95 % intervals that do not overlap)", "", *found] if found else []


def floors(rows: Rows) -> list[str]:
    """The distances of real images, and of as many samples."""
    table: list[tuple[str, ...]] = [("images", "against", f"real: {FD}", f"samples: {FD}",
                                     f"real: {KID} x 1000", f"samples: {KID} x 1000")]
    for floor in _of_quality(rows).get("floors", ()):
        kind = "the other training images" if floor["kind"] == "split" else "training images of other names"
        cells = [f"{MEASURES[name].scale * floor[name][of]['mean']:.1f}" for name in (FD, KID)
                 for of in ("real", "samples")]
        table.append((str(floor["n"]), f"{floor['reference_n']} {kind}", *cells))
    return under("**Real against real**, beside as many uncached samples:", table)


def copies(rows: Rows) -> list[str]:
    """The distance of samples, and of held-out real images, to the nearest training image."""
    near = _of_quality(rows).get("nearest_reference")
    if not near:
        return []
    return ["**Copies?** Feature distance to the nearest training image, median (5 % quantile): samples "
            f"{near['samples']['median']:.2f} ({near['samples']['5%']:.2f}), real images of held-out names "
            f"{near['held_out']['median']:.2f} ({near['held_out']['5%']:.2f}). Far smaller for samples would mean "
            "copies."]


def _of_quality(rows: Rows) -> dict:
    """The details in the quality record of the first row, which is without caching."""
    record = rows.rows[0].records.get("quality")
    return record.details if record else {}


def fitted(rows: Rows) -> list[str]:
    """The effect of scale-shift on held-out seeds, from the reports beside its files."""
    table: list[tuple[str, ...]] = [("schedule", "distance to uncached of", "without", "with scale-shift",
                                     "difference, 95% interval")]
    files = {row.options["scale_shift"]: row.run.spec.options["scale_shift"] for row in rows.rows
             if "scale_shift" in row.options}
    for name, file in sorted(files.items()):
        found = results.read(ROOT / file.with_suffix(".scale_shift.json"))
        for measure in DISTANCES:
            plain, adjusted, difference = (
                found.metrics[f"{measure}, {arm}"] for arm in ("plain", "adjusted", "adjusted less plain"))
            table.append((name, measure, f"{plain.value:.4f}", f"{adjusted.value:.4f}", spread(difference, ".4f")))
    return markdown(table) if files else []


MORE: dict[str, Callable[[Rows], list[str]]] = {
    "sentences": sentences, "judged": judged, "orders": orders, "controls": controls, "floors": floors,
    "copies": copies, "fitted": fitted}
