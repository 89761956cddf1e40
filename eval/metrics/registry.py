"""All metrics. The commands, results, tables and plots go by this list."""

from eval.metrics.features import EffLite0, SmallExtractor
from eval.metrics.inception_scores import FID, IS, PRECISION_RECALL, SFID
from eval.metrics.incmixed5 import IncMixed5
from eval.metrics.lpips import LPIPS, OTHER_BACKBONE
from eval.metrics.measure import Measure, PairMeasure, PixelMeasure, SetMeasure
from eval.metrics.pixel_pairs import PSNR, RMSE_TO_CONVERGED, SSIM
from eval.metrics.small_sets import FrechetInBasis, KernelDistance, SmallSetDistance

CLIP_SCORE = Measure("CLIP score", "clip", "CLIP score", higher=True)                       # eval.clip_score
FEATURE_DISTANCE = PairMeasure("1 - cos, EffLite0", key="feature_distance", label="1 - cos, EffLite0")

PIXELS: tuple[PixelMeasure, ...] = (PSNR, SSIM)                                             # eval.fidelity
PAIRS: tuple[PairMeasure, ...] = (*PIXELS, FEATURE_DISTANCE, LPIPS, OTHER_BACKBONE, RMSE_TO_CONVERGED)
SETS: tuple[SetMeasure, ...] = (FID, SFID, IS, PRECISION_RECALL)                       # eval.adm, eval.fid
SMALL_SETS: tuple[type[SmallSetDistance], ...] = (FrechetInBasis, KernelDistance)           # eval.quality
EXTRACTORS: dict[str, type[SmallExtractor]] = {"efflite0": EffLite0, "incmixed5": IncMixed5}    # for SMALL_SETS
SMALL_MEASURES: tuple[Measure, ...] = tuple(one.named(of.name) for of in EXTRACTORS.values() for one in SMALL_SETS)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in (
    *(measure for one in SETS for measure in one.measures), CLIP_SCORE, *SMALL_MEASURES,
    *PAIRS)}
