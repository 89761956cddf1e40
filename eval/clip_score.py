"""How well images match their prompts: the CLIP score of the papers' tables, with any model of open_clip.

    python -m eval.clip_score --samples samples/parti_interval5 --prompts PartiPrompts.tsv \\
        --weights open_clip_pytorch_model.bin --out results/parti_interval5_clip.json

The score is 100 * cosine between image and text features, at least 0, as a mean over images. DeepCache's released
evaluation computes the same, with ViT-g-14 and laion2b_s34b_b88k. Features are in float16 on a GPU, as there, and in
float32 on a CPU; the cosine is in float32. Scores of other models or weights are not comparable. Their names have the
model's name, and the name of the weights (--tag) or the start of the file's sha256. The published file needs no --tag.
--against RESULT.json gives the mean difference of two runs over images of equal seeds, with a paired interval: scores
vary far more from prompt to prompt than from run to run.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval.metrics.evaluator import Judged
from eval.metrics.images import ImageSet, open_images
from eval.metrics.intervals import mean_estimate
from eval.metrics.libraries import needed
from eval.metrics.registry import CLIP_SCORE
from eval.metrics.results import of_samples
from run import results
from run.cli import command, warn
from run.machine import Device
from run.prompts import prompts_sha256, read_prompts
from run.results import Metric, Result
from run.seeds import format_some, parse_seeds
from run.weights import read_tensors, sha256
from unet_caching.errors import UserError, one_line
from unet_caching.options import option, required

MODEL, PAPER_TAG = "ViT-g-14", "laion2b_s34b_b88k"      # of DeepCache's released evaluation
# sha256 of open_clip_pytorch_model.bin, from the repository of these weights on Hugging Face
PUBLISHED = "9ef136f407986fb607cd37a823eba38a3b6f95e8ec702b3d1687252985d84750"
_PREPARATION = ("mean", "std", "interpolation", "resize_mode")       # of images


@dataclass(frozen=True)
class Options(Judged):
    prompts: Path = required("the file of prompts that was sampled (run/prompts.py)")
    weights: Path = required("weights of the model, a local file; never downloaded")
    model: str = option(MODEL, "architecture of open_clip (default: %(default)s); OpenAI's own weights need the one "
                               "that ends in -quickgelu")
    tag: str | None = option(None, "open_clip's name of the weights, if a message asks for it")
    images_per_prompt: int | None = option(None, "seed s has prompt s // this (default: run.json's, or 1)", least=1)
    against: Path | None = option(None, "JSON of another run with the same seeds: print the difference")
    batch_size: int = option(16, "images at a time (default: %(default)s)", least=1)


class ImageText:
    """A model of open_clip with the weights of a local file, in evaluation mode; nothing is downloaded.

    name: an architecture of open_clip. tag: the name of the pretrained weights in the file; needed only if images are
    prepared differently for different weights. Raises UserError for a file that is missing or does not fit.
    """

    def __init__(self, name: str, weights: Path, tag: str | None = None, device: torch.device | str = "cpu"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        with needed("open_clip_torch"):
            import huggingface_hub.constants
            import open_clip
        huggingface_hub.constants.HF_HUB_OFFLINE = True     # read from the environment only at its first import
        preparation, self.device = preparation_of(open_clip, name, weights, tag), torch.device(device)
        read_tensors(weights)       # for its clear messages; open_clip reads the file again
        try:
            # open_clip cannot mistake an absolute path for the name of weights to download.
            net, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=str(weights.resolve()), pretrained_image=False,
                **{f"image_{key}": preparation.get(key) for key in _PREPARATION})
            self.tokenize = open_clip.get_tokenizer(name)
        except (OSError, ImportError) as error:         # tokenizers and text towers of Hugging Face
            raise UserError(f"{name} needs more files than the weights, and they are not on this machine: "
                            f"{one_line(error)[:300]}") from None
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"{weights} does not fit open_clip's {name}: {one_line(error)[:300]}") from None
        self.net = net.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def scores(self, pixels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 * cosine, at least 0, of uint8 [n, height, width, 3] with n texts: float32 [n]."""
        images = torch.stack([self.preprocess(Image.fromarray(image)) for image in pixels]).to(self.device)
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            x, y = self.net.encode_image(images), self.net.encode_text(self.tokenize(texts).to(self.device))
        cosine = torch.cosine_similarity(x.float(), y.float(), dim=-1)
        return (100 * cosine).clamp(min=0).cpu().numpy()


def preparation_of(open_clip: ModuleType, name: str, weights: Path, tag: str | None) -> dict[str, Any]:
    """How images are prepared for an architecture, as far as open_clip knows. Raises UserError as `ImageText`."""
    if name not in open_clip.list_models():
        near = [known for known in open_clip.list_models() if known.lower().startswith(name.lower()[:5])]
        raise UserError(f"open_clip has no model {name!r}; near it: {', '.join(near[:12]) or 'none'} "
                        f"({len(open_clip.list_models())} in open_clip.list_models())")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag is not None and tag not in tags:
        raise UserError(f"open_clip has no weights {tag!r} for {name}: choose from {', '.join(tags) or 'none'}")
    known = {t: open_clip.get_pretrained_cfg(name, t) for t in tags}
    if not weights.is_file():
        tag = tag or PAPER_TAG
        hub = known.get(tag, {}).get("hf_hub", "").rstrip("/")
        source = f"; {tag} is open_clip_model.safetensors or open_clip_pytorch_model.bin of {hub} on Hugging Face"
        raise UserError(f"no weights {weights}: give a file for open_clip's {name}{source if hub else ''}")
    ways = [{key: cfg[key] for key in _PREPARATION if cfg.get(key) is not None} for t, cfg in known.items()
            if tag in (None, t)]
    if any(way != ways[0] for way in ways):
        raise UserError(f"open_clip prepares images differently for different weights of {name}: name yours with "
                        f"--tag, one of {', '.join(tags)}")
    return ways[0] if ways else {}


def prompts_of_seeds(images: ImageSet, prompts: Sequence[str], images_per_prompt: int | None = None,
                     allow_fewer: bool = False) -> tuple[np.ndarray, int]:
    """(the index of each image's prompt [n], images per prompt): seed s has prompt s // images_per_prompt.

    Raises UserError if run.json has other prompts, if an image has no prompt, and, unless allow_fewer, if an image is
    missing.
    """
    seeds = images.numbers("images have no prompts")
    settings = (images.run() or {}).get("settings", {})
    recorded = settings.get("prompts_sha256")
    if recorded is not None and recorded != prompts_sha256(prompts):
        raise UserError(f"{images.description} was sampled from other prompts (prompts_sha256 {recorded[:12]}... in "
                        f"its run.json, {prompts_sha256(prompts)[:12]}... here): give the file that was sampled")
    per = settings.get("images_per_prompt", images_per_prompt or 1)
    if per < 1 or images_per_prompt not in (None, per):
        raise UserError(f"--images-per-prompt {images_per_prompt}: {images.description} has {per} per prompt")
    index = np.array(seeds) // per
    if index.max() >= len(prompts):
        raise UserError(f"{images.description} has seed {max(seeds)}, but the seeds of {len(prompts)} prompts with "
                        f"{per} images each end at {len(prompts) * per - 1}")
    missing = set(range(len(prompts) * per)) - set(seeds)
    if missing and not allow_fewer:
        raise UserError(f"{images.description} has {len(images)} of {len(prompts) * per} images; missing seeds "
                        f"{format_some(missing)}: sample them first, or add --allow-fewer for a number that says so")
    return index, per


def image_scores(images: ImageSet, texts: Sequence[str], model: ImageText, batch_size: int = 16) -> np.ndarray:
    """The score of each image with its text: float64 [n]. Raises UserError if one is not finite."""
    scores: list[float] = []
    with tqdm(total=len(images), unit="img", desc=f"scores of {images.description}", leave=False, disable=None) as bar:
        for batch in images.batches(batch_size):
            scores += model.scores(batch, texts[len(scores):len(scores) + len(batch)]).tolist()
            bar.update(len(batch))
    if not np.isfinite(scores).all():
        raise UserError("the features are not finite: an overflow in float16, or damaged weights")
    return np.array(scores)


def check_comparable(ours: Result, other: Result) -> None:
    """Raises UserError unless `other` is a result of the same measurement of images with the same seeds."""
    if other.kind != ours.kind:
        raise UserError("--against takes a result of eval.clip_score")
    pairs = [(key, getattr(other, where).get(key), getattr(ours, where)[key])
             for where, keys in (("details", ("model", "tag", "precision", "images_per_prompt")),
                                 ("hashes", ("weights", "prompts"))) for key in keys]
    unlike = [f"{key} {there} there, {here} here" for key, there, here in pairs if there != here]
    if unlike:
        raise UserError(f"--against: the scores were not measured alike: {'; '.join(unlike)}")
    alone = set(ours.details["per_image"]["seed"]) ^ set(other.details["per_image"]["seed"])
    if alone:
        raise UserError(f"--against: the two runs have other seeds: {format_some(alone)} in only one of them")


def difference(ours: Result, other: Result) -> dict:
    """The score of `ours` minus the score of `other`, paired by seed: {mean, stderr, interval (95%)}.

    The error is over the choice of prompts: the bootstrap draws prompts, each with all of its images in both runs.
    """
    a, b = (np.array(result.details["per_image"]["score"]) for result in (ours, other))
    groups = np.array(ours.details["per_image"]["seed"]) // ours.details["images_per_prompt"]
    return mean_estimate(a - b, groups=groups)


@command
def main(options: Options, where: Device) -> None:
    started, device, prompts = time.time(), where.prepare(), read_prompts(options.prompts)
    images = open_images(options.samples, parse_seeds(options.seeds) if options.seeds else None)
    index, per = prompts_of_seeds(images, prompts, options.images_per_prompt, options.allow_fewer)
    other = results.read(options.against) if options.against else None
    model = ImageText(options.model, options.weights, options.tag, device)
    digest, expected = sha256(options.weights), len(prompts) * per
    name, notes = called(options.model, options.tag, options.weights, digest)
    warn(notes)
    result = of_samples(
        "clip_score", images, {}, device,
        inputs={"prompts": str(options.prompts), "weights": str(options.weights)},
        hashes={"prompts": prompts_sha256(prompts), "weights": digest},
        details={"model": options.model, "tag": options.tag, "images_per_prompt": per, "expected": expected,
                 "precision": "fp16 autocast" if device.type == "cuda" else "fp32",
                 "complete": len(images) == expected, "notes": notes, "per_image": {"seed": images.seeds}})
    if other:
        check_comparable(result, other)
    scores = image_scores(images, [prompts[i] for i in index], model, options.batch_size)
    result.metrics = {name: Metric.of(mean_estimate(scores, groups=index))}
    result.details["per_image"]["score"] = [round(score, 5) for score in scores.tolist()]
    result.details["clamped"] = int((scores == 0).sum())
    if other:
        result.details["difference"] = {"against": str(options.against), **difference(result, other)}
    result = result.stamped(started)
    print(table(result))
    options.write(result)


def called(model: str, tag: str | None, weights: Path, digest: str) -> tuple[str, list[str]]:
    """The name of a score by a file of weights, and notes about it. Raises UserError if the sha256 contradicts the tag.

    Only the papers' weights give a 'CLIP score': by the sha256 of their file, or by the user's word. The name of any
    other score has its model and weights.
    """
    published = digest == PUBLISHED
    if published and (model, tag or PAPER_TAG) != (MODEL, PAPER_TAG):
        raise UserError(f"{weights} is the published file of {MODEL} {PAPER_TAG}, not {model} {tag or ''}".rstrip())
    if published:
        return CLIP_SCORE.name, []
    if (model, tag) == (MODEL, PAPER_TAG):
        return CLIP_SCORE.name, [f"{weights} is not the published file of {tag}: only --tag says that it holds these "
                                 "weights"]
    notes = [f"{weights} is not the published file of {PAPER_TAG}: the score has its sha256 in its name and is in no "
             f"table of a paper; if the file holds these weights in another form, add --tag {PAPER_TAG}"]
    return (f"{CLIP_SCORE.name}, {model} {tag or f'sha256 {digest[:12]}'}",
            notes if (model, tag) == (MODEL, None) else [])


def table(result: Result) -> str:
    """The numbers as a few lines of text."""
    (name, score), = result.metrics.items()
    some = "" if result.details["complete"] else f" of {result.details['expected']} expected: NOT the full set"
    lines = ["{} {:.3f}  [{:.3f} {:.3f}], ".format(name, *score.bounds) +
             f"{result.details['model']} in {result.details['precision']}, {result.images} images{some}"]
    if by := result.details.get("difference"):
        lines.append(f"minus {by['against']}: {by['mean']:+.3f}  [{by['interval'][0]:+.3f} {by['interval'][1]:+.3f}], "
                     "paired by seed")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
