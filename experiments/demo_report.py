"""table.md of the demo, from its results."""

from eval.cost.macs import giga
from eval.quality import FD, KID

HEAD = ("arm", "full / all steps", "MACs per image, G", "speed-up by MACs", "measured", "FD-EffLite0",
        "KID-EffLite0 x 1000", "PSNR to uncached, dB", "SSIM", "feature distance")


def markdown(rows: list[tuple[str, ...]]) -> list[str]:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def with_error(estimate: dict, scale: float = 1.0) -> str:
    return f"{scale * estimate['value']:.1f} ± {scale * 1.96 * estimate['stderr']:.1f}"


def clearly_worse(result: dict, other: dict, measure: str) -> bool:
    """Do the 95% intervals of two arms not overlap, the first being the larger?"""
    return result["quality"][measure]["interval"][0] > other["quality"][measure]["interval"][1]


def arm_rows(results: dict[str, dict], timing: dict) -> list[tuple[str, ...]]:
    """One row per arm; a dash where there is nothing to compare with."""
    whole, rows = results["uncached"]["macs"]["hook"], [HEAD]
    for name, result in results.items():
        macs, near = result["macs"]["hook"], result.get("fidelity")
        rows.append((result["label"], f"{len(result['full_steps'])} / {result['steps']}", f"{giga(macs):.2f}",
                     f"{whole / macs:.2f}x", f"{timing['speedup'][name]:.2f}x",
                     with_error(result["quality"][FD]), with_error(result["quality"][KID], 1e3),
                     *((f"{near['psnr']['mean']:.1f}", f"{near['ssim']['mean']:.3f}",
                        f"{near['feature_distance']['mean']:.3f}") if near else ("-", "-", "-"))))
    return rows


def floor_rows(floors: list[dict]) -> list[tuple[str, ...]]:
    """What real images score, beside as many samples."""
    rows = [("images", "against", "real: FD", "samples: FD", "real: KID x 1000", "samples: KID x 1000")]
    for floor in floors:
        kind = "the other training images" if floor["kind"] == "split" else "training images of other names"
        fd, kid = floor[FD], floor[KID]
        rows.append((str(floor["n"]), f"{floor['reference_n']} {kind}",
                     f"{fd['real']['mean']:.1f}", f"{fd['samples']['mean']:.1f}",
                     f"{1e3 * kid['real']['mean']:.1f}", f"{1e3 * kid['samples']['mean']:.1f}"))
    return rows


def report(results: dict[str, dict], timing: dict, where: dict) -> str:
    """One model's section of table.md: what caching costs and saves, and whether the scores can be trusted."""
    first = results["uncached"]["quality"]
    nearest = first["nearest_reference"]
    unrelated = next(result["fidelity"]["psnr"]["unrelated"] for result in results.values() if "fidelity" in result)
    checks = []
    few = next(name for name in results if name in ("ddim10", "plms10"))
    for name, what in ((few, f"10 instead of {results['uncached']['steps']} sampling steps"),
                       ("n10_zeroed", "a cache that is zeroed, as in the paper's Table 5")):
        verdicts = [f"{measure} {'' if clearly_worse(results[name], results['uncached'], measure) else 'NOT '}"
                    "clearly worse" for measure in (FD, KID)]
        checks.append(f"- {what}: {', '.join(verdicts)} than the uncached run")
    return "\n".join([
        f"{first['samples']['images']} images per arm, the same seeds in each; {where['device_name']}, "
        "fp32.", "",
        *markdown(arm_rows(results, timing)), "",
        f"FD: Frechet distance in the first {first[FD]['dims']} principal directions of the "
        f"{first['reference']['images']} real training images. KID: unbiased kernel distance. Both are on "
        "EfficientNet-Lite0 features: they are not FID, and compare with each other only. ± is 1.96 standard errors "
        "over draws of the samples.",
        "Measured: network time of a run, from full and cached steps timed in turns at batch "
        f"{timing['batch_size']} on {timing['threads']} threads; a cached step took {timing['ratio']:.3f} of a full "
        "one.",
        f"PSNR, SSIM and feature distance (1 - cosine): to the uncached image of the same seed; images of different "
        f"seeds have a PSNR of {unrelated:.1f} dB.", "",
        "**Can the scores see what matters?** (95 % intervals that do not overlap)", "", *checks, "",
        "**Real against real**, beside as many uncached samples:", "", *markdown(floor_rows(first["floors"])), "",
        f"**Copies?** Feature distance to the nearest training image, median (5 % quantile): samples "
        f"{nearest['samples']['median']:.2f} ({nearest['samples']['5%']:.2f}), real images of held-out names "
        f"{nearest['held_out']['median']:.2f} ({nearest['held_out']['5%']:.2f}). Far smaller for samples would mean "
        "copies.", ""])
