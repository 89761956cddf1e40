"""table.md of the demo, from its results."""

from collections.abc import Iterable, Mapping, Sequence

from eval.cost.macs import giga
from eval.cost.timing import Times
from eval.metrics.pixel_pairs import PSNR, SSIM
from eval.metrics.registry import EXTRACTORS, MEASURES, SMALL_MEASURES
from eval.metrics.small_sets import FrechetInBasis
from eval.quality import FD, KID
from eval.tables.text import markdown
from lab.study.runner import minus_uncached
from run.results import Metric, Result


def with_error(metric: Metric, scale: float = 1.0, sign: str = "") -> str:
    return f"{scale * metric.value:{sign}.1f} ± {scale * 1.96 * (metric.stderr or 0):.1f}"


def shown(result: Result, name: str, decimals: int) -> str:
    """A metric, or a dash where there was nothing to compare with."""
    metric = result.metrics.get(name)
    return "-" if metric is None else f"{metric.value:.{decimals}f}"


def distances_of(arms: Iterable[Result]) -> list[str]:
    """The distances to real images that all of some results have: those of EffLite0, then those of other extractors."""
    there = set.intersection(*(set(arm.metrics) for arm in arms))
    return [measure.name for measure in SMALL_MEASURES if measure.name in there]


def distances(result: Result, names: Iterable[str]) -> list[str]:
    """Some distances to real images with their errors, and in brackets how much more that is than uncached."""
    return [distance(result.metrics, name) for name in names]


def distance(metrics: Mapping[str, Metric], name: str) -> str:
    """One of `distances`, a dash where it is not known."""
    if name not in metrics:
        return "-"
    more, scale = metrics.get(minus_uncached(name)), MEASURES[name].scale
    return with_error(metrics[name], scale) + (f" ({with_error(more, scale, '+')})" if more else "")


def panels(arms: Iterable[Result]) -> list[tuple[str, str]]:
    """What charts of some arms show, with labels: Frechet distances by all extractors, or both distances by the only
    one; PSNR."""
    judged = distances_of(arms)
    frechet = [name for of in EXTRACTORS.values() if (name := FrechetInBasis.named(of.name).name) in judged]
    names = [*(frechet if len(frechet) > 1 else judged), PSNR.name]
    headings = {name: MEASURES[name].heading for name in names} | {PSNR.name: "PSNR to uncached, dB"}
    return [(name, f"{headings[name]} ({MEASURES[name].better} is better)") for name in names]


def pairs(arms: Sequence[Result]) -> list[tuple[str, ...]]:
    """How near the images of some arms come to the uncached ones of the same seeds: columns, their heads first."""
    return [("PSNR to uncached, dB", SSIM.name, "feature distance"),
            *((shown(arm, PSNR.name, 1), shown(arm, SSIM.name, 3), shown(arm, "1 - cos, EffLite0", 3)) for arm in arms)]


def clearly_worse(result: Result, other: Result, name: str) -> bool:
    """Do the 95% intervals of two arms not overlap, the first being the larger?"""
    return result.metrics[name].bounds[1] > other.metrics[name].bounds[2]


def arm_rows(arms: dict[str, Result], timing: Result) -> list[tuple[str, ...]]:
    """One row per arm."""
    whole, names = arms["uncached"].details["macs_per_image"]["macs"], distances_of(arms.values())
    last, *near = pairs([*arms.values()])
    rows: list[tuple[str, ...]] = [("arm", "full / all steps", "MACs per image, G", "speed-up by MACs", "measured",
                                    *(MEASURES[name].heading for name in names), *last)]
    for (name, arm), pair in zip(arms.items(), near, strict=True):
        macs = arm.details["macs_per_image"]["macs"]
        rows.append((arm.details["label"], f"{len(arm.full_steps)} / {arm.settings['steps']}", f"{giga(macs):.2f}",
                     f"{whole / macs:.2f}x", f"{timing.details['speedup'][name]:.2f}x", *distances(arm, names), *pair))
    return rows


def floor_rows(floors: list[dict]) -> list[tuple[str, ...]]:
    """What real images score, beside as many samples."""
    rows: list[tuple[str, ...]] = [("images", "against", f"real: {FD}", f"samples: {FD}",
                                    f"real: {KID} x 1000", f"samples: {KID} x 1000")]
    for floor in floors:
        kind = "the other training images" if floor["kind"] == "split" else "training images of other names"
        fd, kid = floor[FD], floor[KID]
        rows.append((str(floor["n"]), f"{floor['reference_n']} {kind}",
                     f"{fd['real']['mean']:.1f}", f"{fd['samples']['mean']:.1f}",
                     f"{1e3 * kid['real']['mean']:.1f}", f"{1e3 * kid['samples']['mean']:.1f}"))
    return rows


def report(arms: dict[str, Result], timing: Result) -> str:
    """One model's section of table.md: what caching costs and saves, and whether the scores can be trusted."""
    first = arms["uncached"].details["quality"]
    nearest = first["nearest_reference"]
    unrelated = next(near["psnr"]["unrelated"] for arm in arms.values() if (near := arm.details["fidelity"]))
    checks, names = [], distances_of(arms.values())
    cached = next(ratio for kind, (_, ratio) in Times.of(timing).kinds.items() if kind.reused)
    few = next(name for name in arms if name in ("ddim10", "plms10"))
    for name, what in ((few, f"10 instead of {arms['uncached'].settings['steps']} sampling steps"),
                       ("n10_zeroed", "a cache that is zeroed, as in the paper's Table 5")):
        verdicts = [f"{measure} {'' if clearly_worse(arms[name], arms['uncached'], measure) else 'NOT '}"
                    "clearly worse" for measure in names]
        checks.append(f"- {what}: {', '.join(verdicts)} than the uncached run")
    return "\n".join([
        f"{first['samples']['images']} images per arm, the same seeds in each; {timing.provenance['device_name']}, "
        "fp32.", "",
        *markdown(arm_rows(arms, timing)), "",
        f"FD: Frechet distance in the first {first[FD]['dims']} principal directions of the "
        f"{first['reference']['images']} real training images. KID: unbiased kernel distance. They are "
        "on features of EfficientNet-Lite0 and, where it says IncMixed5, of InceptionV3 up to its block mixed5: they "
        "are not FID, and compare with each other only. In brackets: more than without caching, paired by seed. ± is "
        "1.96 standard errors over draws of the samples.",
        "Measured: network time of a run, from full and cached steps timed in turns at batch "
        f"{timing.settings['batch_size']}, CPU threads: {timing.provenance['threads']}; a cached step took "
        f"{cached:.3f} of a full one.",
        "PSNR, SSIM and feature distance (1 - cosine): to the uncached image of the same seed; "
        f"images of different seeds have a PSNR of {unrelated:.1f} dB.", "",
        "**Can the scores see what matters?** (95 % intervals that do not overlap)", "", *checks, "",
        "**Real against real**, beside as many uncached samples:", "", *markdown(floor_rows(first["floors"])), "",
        f"**Copies?** Feature distance to the nearest training image, median (5 % quantile): samples "
        f"{nearest['samples']['median']:.2f} ({nearest['samples']['5%']:.2f}), real images of held-out names "
        f"{nearest['held_out']['median']:.2f} ({nearest['held_out']['5%']:.2f}). Far smaller for samples would mean "
        "copies.", ""])
