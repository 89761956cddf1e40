"""What a sweep shows: points.csv, table.md, and per model the cost-quality fronts and heat maps."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.cost.macs import giga
from eval.cost.runs import macs_per_image
from eval.metrics.images import open_images
from eval.metrics.registry import MEASURES, RMSE_TO_CONVERGED
from eval.metrics.small_sets import KernelDistance
from eval.quality import KID
from eval.tables.current import trained_on
from eval.tables.paper import Table
from eval.tables.plots import heat_maps, quality_fronts, sample_rows
from eval.tables.render import Speed, speed_of
from eval.tables.rows import printed_values
from eval.tables.text import markdown
from lab.study.arms import Arm
from lab.study.runner import minus_uncached, times_paths
from run import arguments, results
from run.files import write_atomically
from run.folder import missing_seeds
from run.results import Result
from run.spec import Run

HIGHER = tuple(name for name, measure in MEASURES.items() if measure.higher)       # is better
OTHER_KID = KernelDistance.named("IncMixed5").name
SHOWN = (KID, OTHER_KID, "PSNR", "FID", "CLIP score")    # in the pictures; KID is unbiased, however few the images are
MOST, SEEN, AMPLIFIED = 8, range(12), 8     # points in a picture of samples, seeds, and how their differences are shown
AXES = ("sampler", "steps", "interval", "branch", "schedule", "center", "power", "block schedule")    # others: after
PAIRS = (("interval", "branch"), ("center", "power"))                     # of the heat maps: rows, columns


class Point(NamedTuple):
    """A point of a sweep with what is known of it. axes: of AXES. printed: by the papers: (table, label, numbers)."""
    run: Run
    axes: dict[str, Any]
    result: Result | None
    speed: Speed | None
    printed: list[tuple[Table, str, dict[str, Any]]]

    @property
    def macs(self) -> float:
        """Of an image, both rows of guidance."""
        return macs_per_image(self.run).hook

    @property
    def time(self) -> float | None:
        """Measured network time, as a fraction of the uncached run's: what slows the machine cancels in it."""
        return 1 / self.speed.speedup if self.speed else None

    def metric(self, name: str) -> tuple[float, float, float] | None:
        """(value, low, high), the ends of its 95 % interval where there is one."""
        metric = self.result.metrics.get(name) if self.result else None
        return None if metric is None else metric.bounds


def times_path(folder: Path, model: str) -> Path:
    """Where a sweep keeps the times of a model's steps; others are beside it (lab.study.runner.times_paths)."""
    return folder / f"times_{model}.json"


def axes_of(run: Run) -> dict[str, Any]:
    """The settings of a run by axis; None where an axis has no meaning for it."""
    cache, schedule = run.caching.settings, run.spec.options.get("block_schedule")
    own = {name for part in (run.spec.sampler, *run.spec.caching) for name in arguments.names(part)}
    others = {name: value.stem if isinstance(value, Path) else value for name, value in run.spec.options.items()
              if name in own - {*AXES, "block_schedule"}}
    return {"sampler": run.sampler.name, "steps": run.steps, "interval": cache["interval"],
            **{axis: cache.get(axis) for axis in ("branch", "schedule", "center", "power")},
            "block schedule": schedule.stem if schedule else None, **others}


def axes_among(points: Sequence["Point"]) -> list[str]:
    """All axes of some points, in the order of AXES."""
    return list(dict.fromkeys(axis for p in points for axis in p.axes))


def front(points: Sequence[Sequence[float]], higher: bool) -> list[int]:
    """Which of (cost, quality) no other one beats: at most its cost and at least its quality, one of them better."""
    def beaten(i: int) -> bool:
        cost, value = points[i][0], points[i][1] * (1 if higher else -1)
        return any(c <= cost and v * (1 if higher else -1) >= value and (c, v) != tuple(points[i]) for c, v in points)
    return [i for i in range(len(points)) if not beaten(i)]


def on_front(points: Sequence[Point], cost: str, name: str) -> set[int]:
    """The places of the points on the front of a cost ("macs" or "time") and a metric."""
    known = [(i, getattr(p, cost), metric[0]) for i, p in enumerate(points)
             if getattr(p, cost) is not None and (metric := p.metric(name))]
    return {known[i][0] for i in front([pair for _, *pair in known], name in HIGHER)}


def shown_metrics(points: Sequence[Point]) -> list[str]:
    """The metrics for the pictures: those of SHOWN that were measured, else the first that was."""
    names = list(dict.fromkeys(name for p in points if p.result for name in p.result.metrics))
    return [name for name in SHOWN if name in names] or names[:1]


def records(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """A flat record per point of one model; what is not known is left out."""
    main = next(iter(shown_metrics(points)), None)
    fronts = {cost: on_front(points, cost, main) if main else set() for cost in ("macs", "time")}
    for i, p in enumerate(points):
        record = {"model": p.run.config.name, **p.axes, "full calls": p.run.full_calls, "calls": p.run.calls,
                  "images": p.result.images if p.result else None, "G MACs per image": round(giga(p.macs), 6),
                  "speed-up by MACs": round(points[0].macs / p.macs, 4)}
        if p.speed:
            record["speed-up measured"] = f"{p.speed.speedup:.6g}"
        for name, metric in (p.result.metrics if p.result else {}).items():
            record[name] = f"{metric.value:.6g}"
            if metric.interval:
                record |= {f"{name}, low": f"{metric.interval[0]:.6g}", f"{name}, high": f"{metric.interval[1]:.6g}"}
        if main:
            record |= {f"front of {main} by MACs": int(i in fronts["macs"]),
                       f"front of {main} by time": int(i in fronts["time"])}
        for table, row, numbers in p.printed:
            record["paper"] = "; ".join(filter(None, [record.get("paper"), f"{table.name}, {row}: " + ", ".join(
                f"{key} {value}" for key, value in numbers.items() if key not in ("center", "power"))]))
        yield record


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """All records under all their keys."""
    text, keys = io.StringIO(), list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def label(p: Point, points: Sequence[Point], varying: Sequence[str]) -> str:
    """A point of a model in the fewest words: N=5 b2."""
    if not p.run.caching:
        one_way = len({(q.run.sampler.name, q.run.steps) for q in points}) == 1
        return "uncached" if one_way else f"{p.run.sampler.name} {p.run.steps}"
    short = dict.fromkeys(AXES, "") | {"interval": "N=", "branch": "b", "center": "c", "power": "p"}
    return " ".join(f"{short.get(axis, f'{axis} ')}{value}" for axis, value in p.axes.items()
                    if value is not None and (axis in varying or (axis == "interval" and value > 1)))


def varying(points: Sequence[Point]) -> list[str]:
    """The axes that differ among the cached points of a model, those with most values first."""
    cached = [p for p in points if p.run.caching] or points
    count = {axis: len({p.axes.get(axis) for p in cached}) for axis in axes_among(points)}
    return sorted((axis for axis in count if count[axis] > 1), key=lambda axis: -count[axis])


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """One model's table, a row per point."""
    names, axes = shown_metrics(points), varying(points)
    fronts = {cost: on_front(points, cost, names[0]) if names else set() for cost in ("macs", "time")}
    extra = [name for name in (*map(minus_uncached, (KID, OTHER_KID)), RMSE_TO_CONVERGED.name)
             if any(p.metric(name) for p in points)]
    lines = [("point", "full / calls", "speed-up by MACs", "measured", *names, *extra, "front by MACs", "by time")]
    for i, p in enumerate(points):
        cells = []
        for name in (*names, *extra):
            metric = p.metric(name)
            cells.append("-" if metric is None else "{:.4g} [{:.4g}, {:.4g}]".format(*metric)
                         if metric[1] != metric[2] else f"{metric[0]:.4g}")
        lines.append((label(p, points, axes) or "cached", f"{p.run.full_calls} / {p.run.calls}",
                      f"{points[0].macs / p.macs:.2f}x", f"{p.speed.speedup:.2f}x" if p.speed else "-", *cells,
                      *("yes" if i in fronts[cost] else "" for cost in fronts)))
    return lines


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """The pictures of one model: those that its points can fill."""
    model, names, axes = points[0].run.config.name, shown_metrics(points), varying(points)
    if not names:
        return []
    costs = [("macs", "MACs per image (G)"), ("time", "measured network time (uncached = 1)")]
    costs = [cost for cost in costs if any(getattr(p, cost[0]) is not None for p in points)]
    marks = []
    for p in points:
        cached = p.run.caching
        printed = {name: [float(numbers[column]) / MEASURES[name].scale for _, _, numbers in p.printed
                          if (column := MEASURES[name].column or "") in numbers] for name in names}
        color, marker = (p.axes.get(axes[i]) if cached and len(axes) > i else None for i in (0, 1))
        marks.append({"macs": giga(p.macs), "time": p.time, "printed": printed, "label": label(p, points, axes),
                      "color": color, "marker": marker, "cached": bool(cached), **{n: p.metric(n) for n in names}})
    panels = [(cost, (name, name, name in HIGHER), on_front(points, cost[0], name)) for name in names for cost in costs]
    drawn = [folder / f"fronts_{model}.png"]
    quality_fronts(marks, drawn[0], panels, len(costs), axes[:2])
    for rows, columns in PAIRS:
        if {rows, columns} <= set(axes):
            maps = _maps(points, rows, columns, [axis for axis in axes if axis not in (rows, columns)], names)
            if maps:
                drawn.append(folder / f"{rows}_{columns}_{model}.png")
                heat_maps(maps, drawn[-1], rows, columns)
    return drawn


def _maps(points: Sequence[Point], rows: str, columns: str, others: Sequence[str], names: Sequence[str]
          ) -> list[tuple[str, list, list, np.ndarray, list[list[str]], bool]]:
    """(title, row values, column values, numbers, texts, whether higher is better) of each panel.

    A panel per measure; or, where other axes vary too, one of the first measure for each of their combinations.
    """
    cached = [p for p in points if p.run.deepcache and None not in (p.axes[rows], p.axes[columns])]
    heads = [sorted({p.axes[axis] for p in cached}) for axis in (rows, columns)]
    measures = [minus_uncached(name) if any(p.metric(minus_uncached(name)) for p in cached) else name for name in names]

    def panel(title: str, chosen: Sequence[Point], of: Callable[[Point], tuple[float, float, float] | None],
              higher: bool) -> tuple[str, list, list, np.ndarray, list[list[str]], bool]:
        numbers = np.full([len(head) for head in heads], math.nan)
        texts = [["" for _ in heads[1]] for _ in heads[0]]
        for p in chosen:
            value = of(p)
            if value is not None:
                i, j = (head.index(p.axes[axis]) for head, axis in zip(heads, (rows, columns), strict=True))
                numbers[i, j], low, high = value
                sure = title.startswith(tuple(map(minus_uncached, names))) and not low <= 0 <= high
                texts[i][j] = f"{value[0]:.3g}" + ("*" if sure else "")
        return title, heads[0], heads[1], numbers, texts, higher

    if others:
        found = []
        for kind in dict.fromkeys(tuple(p.axes.get(axis) for axis in others) for p in cached):
            chosen = [p for p in cached if tuple(p.axes.get(axis) for axis in others) == kind]
            words = ", ".join(f"{axis} {value}" for axis, value in zip(others, kind, strict=True) if value is not None)
            if len(chosen) > 1:
                found.append(panel(f"{measures[0]}\n{textwrap.fill(words, 44)}", chosen,
                                   lambda p: p.metric(measures[0]), measures[0] in HIGHER))
        return [one for one in found if not np.isnan(one[3]).all()]
    found = [panel(name, cached, methodcaller("metric", name), name in HIGHER) for name in measures]
    found.append(panel("speed-up by MACs", cached, lambda p: (points[0].macs / p.macs,) * 3, True))
    found.append(panel("speed-up measured", cached, lambda p: (p.speed.speedup,) * 3 if p.speed else None, True))
    return [one for one in found if not np.isnan(one[3]).all()]


def draw_samples(arms: Sequence[Arm], points: Sequence[Point], path: Path) -> bool:
    """The first images of the points of one model, each above its difference to the first one's; False where they are
    too many to look at, or some are not there."""
    if not 2 <= len(arms) <= MOST or any(missing_seeds(arm.folder, SEEN) for arm in arms):
        return False
    rows: list[tuple[str, np.ndarray]] = []
    for arm, p in zip(arms, points, strict=True):
        images = next(open_images(arm.folder, SEEN).batches(len(SEEN)))
        rows.append((label(p, points, varying(points)) or "cached", images))
        if len(rows) > 1:
            difference = AMPLIFIED * abs(images.astype(int) - rows[0][1])
            rows.append((f"difference x {AMPLIFIED}", (255 - difference.clip(0, 255)).astype(np.uint8)))
    sample_rows(rows, path, scale=64 / rows[0][1].shape[1])
    return True


def points_of(found: Sequence[tuple[Arm, Result | None]], folder: Path) -> dict[str, list[Point]]:
    """What is known of the arms of a sweep, by model. folder: where its times are."""
    by_model: dict[str, list[Point]] = {}
    for arm, result in found:
        run, model = arm.run, arm.run.config.name
        points = by_model.setdefault(model, [])
        times = [(path, results.read(path)) for path in times_paths(times_path(folder, model), [arm]) if path.is_file()]
        printed = {} if trained_on(run.config) else printed_values(model)
        points.append(Point(run, axes_of(run), result, speed_of(times, run, (points[0].run if points else run).calls),
                            printed.get(arm.name, [])))
    return by_model


def render(found: Sequence[tuple[Arm, Result | None]], folder: Path) -> str:
    """Write table and pictures of what there is into `folder`; returns what to tell the user."""
    folder.mkdir(parents=True, exist_ok=True)
    by_model = points_of(found, folder)
    text = as_csv([record for points in by_model.values() for record in records(points)])
    write_atomically(folder / "points.csv", lambda path: path.write_text(text))
    written, sections = [folder / "points.csv", folder / "table.md"], [f"# Sweep {folder.name}", ""]
    for model, points in by_model.items():
        pictures = draw(points, folder)
        samples = folder / f"samples_{model}.png"
        if draw_samples([arm for arm, _ in found if arm.run.config.name == model], points, samples):
            pictures.append(samples)
        written += pictures
        done = [p.result for p in points if p.result]
        images = ", ".join(sorted({f"{result.images:,}" for result in done}))
        sections += [f"## {model}", "", f"{len(done)} of {len(points)} points judged" + (f", {images} images each" if
                     images else "") + ". " + about(points), "", *markdown(table(points)), "",
                     *(f"![{path.stem}]({path.name})" for path in pictures), ""]
    write_atomically(folder / "table.md", lambda path: path.write_text("\n".join(sections)))
    judged = sum(result is not None for _, result in found)
    return f"{judged} of {len(found)} points are judged; wrote {', '.join(map(str, written))}"


def about(points: Sequence[Point]) -> str:
    """How to read a model's numbers."""
    lines = []
    names = shown_metrics(points)
    if KID in names:
        lines.append(f"{KID} is a kernel distance to the training images on EfficientNet-Lite0 features: no published "
                     "KID, and comparable within this table only. Brackets: 95 % intervals; that of "
                     f"\"{minus_uncached(KID)}\" is over pairs of images of one seed, so it tells smaller shifts than "
                     "the two distances alone do; where it leaves out 0, the map has a star. PSNR: to the uncached "
                     "image of the same seed, dB.")
    if OTHER_KID in names:
        lines.append(f"{OTHER_KID} is the same on features of InceptionV3 up to its block mixed5.")
    by = next((found for p in points if p.result and (found := p.result.details.get("convergence"))), None)
    if by:
        lines.append(f"{RMSE_TO_CONVERGED.name}: root mean squared error, levels of 255, to images of {by['steps']} "
                     f"steps without caching; a dash where {by['twice']['steps']} steps change it by more than "
                     f"{100 * by['within']:g} %.")
    if names:
        lines.append(f"Front: no other point has a lower cost and a better {names[0]}; among points whose intervals "
                     "overlap, which one is on it is chance.")
    speeds = [p.speed for p in points if p.speed]
    if speeds:
        where, settings = speeds[0].result.provenance, speeds[0].result.settings
        threads = f", {where['threads']} CPU threads" if where["device"] == "cpu" else ""
        lines.append(f"Measured: network time from full and cached steps that took turns; {settings['dtype']}, batch "
                     f"{settings['batch_size']}, {where['device_name']}{threads}.")
    return " ".join(lines)
