"""The Inception network of FID (2015-12-05, 1008 classes): torch-fidelity's, with weights from a local file.

Nothing is downloaded. The file has TensorFlow's weights in torchvision's layout (95,628,359 bytes). It is published
under two names, which end with the start of its sha256:
    weights-inception-2015-12-05-6726825d.pth   github.com/toshas/torch-fidelity, release v0.2.0
    pt_inception-2015-12-05-6726825d.pth        github.com/mseitzer/pytorch-fid, release fid_weights
The scores depend on how images are resized to 299 pixels, so each way has a name (MODES).
"""

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.metrics.libraries import needed
from run.weights import read_tensors, sha256, tensors_of
from unet_caching.errors import UserError, one_line

WHERE = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth "
         "or https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
         "pt_inception-2015-12-05-6726825d.pth")
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"     # sha256 of the file
SIZE = 299
DIMS = {"pool": 2048, "logits": 1008, "spatial": 17 * 17 * 7}
_SPATIAL_CHANNELS = 7


def tensorflow(x: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> [n, 3, 299, 299] in [-1, 1): TensorFlow 1's bilinear, corner-anchored, no antialias."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(SIZE, SIZE), align_corners=False)
    return (x - 128) / 128


def pytorch_fid(x: Tensor) -> Tensor:
    """PyTorch's bilinear on [0, 1], centre-anchored, no antialias; then [-1, 1]."""
    return 2 * F.interpolate(x.float() / 255, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - 1


def clean(x: Tensor) -> Tensor:
    """clean-fid's: Pillow's bicubic with antialias in float, clipped to [0, 255]."""
    return (_clean_fid("clean", x) - 128) / 128


def legacy_pytorch(x: Tensor) -> Tensor:
    """clean-fid's own version of pytorch-fid: PyTorch's bilinear on [0, 255], then [-1, 1]."""
    return 2 * (_clean_fid("legacy_pytorch", x) / 255) - 1


def _clean_fid(mode: str, x: Tensor) -> Tensor:
    with warnings.catch_warnings(), needed("clean-fid"):        # clean-fid silences all warnings for good
        from cleanfid.resize import build_resizer
        resize = build_resizer(mode)                            # uint8 [h, w, 3] -> float32 [299, 299, 3]
        images = [resize(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(x.device)


# clean-fid's own network is a torchscript file with the same weights.
MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "adm": tensorflow, "pytorch-fid": pytorch_fid, "clean": clean, "legacy_pytorch": legacy_pytorch,
    "legacy_tensorflow": tensorflow}


class Inception:
    """uint8 [n, height, width, 3] -> float32 features by layer; an eval.metrics.extract.Extractor.

    pool: [n, 2048], after the last pooling (FID, precision, recall). logits: [n, 1008], without the bias (IS).
    spatial: [n, 2023], the first 7 channels of Mixed_6d.branch1x1, after its ReLU, in (row, column, channel) order:
    sFID's (Nash et al., arXiv 2103.03841; openai/guided-diffusion evaluator.py, mixed_6/conv).
    mode: how images are prepared, one of MODES. published: whether the weights are the published file's.
    Raises UserError if the weights are missing or another network's, or if the mode's library is missing.
    """

    def __init__(self, weights: Path, mode: str, layers: tuple[str, ...] = ("pool",),
                 device: torch.device | str = "cpu"):
        MODES[mode](torch.zeros(1, 3, 8, 8, dtype=torch.uint8))      # fails now, if its library is missing
        self.weights, self.mode, self.device = Path(weights), mode, torch.device(device)
        self.layers: Mapping[str, int] = {name: DIMS[name] for name in layers}
        if not self.weights.is_file():
            raise UserError(f"no Inception weights {weights}: get {WHERE}")
        self.net = load(self.weights).to(self.device)       # before any image is read: it may not fit
        self.sha256 = sha256(self.weights)
        self.published = self.sha256 == PUBLISHED

    @property
    def id(self) -> str:
        """What decides the features. adm and legacy_tensorflow are the same computation and share kept features."""
        way = {"adm": "tensorflow", "legacy_tensorflow": "tensorflow"}.get(self.mode, self.mode)
        return f"Inception-2015-12-05:sha256={self.sha256}:{way}:{'+'.join(self.layers)}:fp32"

    def name(self, metric: str) -> str:
        """The name of a number: with other weights it is not the metric of the literature, nor of any table."""
        return metric if self.published else f"{metric}, other weights"

    @property
    def notes(self) -> list[str]:
        """Warnings about the numbers."""
        return [] if self.published else [
            f"{self.weights} is not the published file (sha256 {PUBLISHED[:16]}...): with other "
            "weights no number here is an FID, sFID, IS, precision or recall of the literature"]

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The features by layer, in float32 throughout (no TF32)."""
        x = torch.tensor(np.ascontiguousarray(pixels), device=self.device).permute(0, 3, 1, 2)
        layers = {}

        def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            layers["spatial"] = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

        hook = self.net.Mixed_6d.branch1x1.register_forward_hook(keep)
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            # torch-fidelity's forward knows only one way to prepare images. Its modules in order are the network.
            *body, fc = self.net.children()
            layers["pool"] = nn.Sequential(*body)(MODES[self.mode](x)).flatten(1)
            layers["logits"] = layers["pool"] @ fc.weight.T
        finally:
            hook.remove()
            torch.backends.cudnn.allow_tf32 = tf32
        return {name: layers[name].cpu().numpy() for name in self.layers}


def load(path: Path) -> Any:
    """The network with the weights of a file. Raises UserError if they do not fit, with the difference."""
    state = tensors_of(read_tensors(path), path, "Inception")
    fc = state.get("fc.weight")
    if fc is None or tuple(fc.shape) != (DIMS["logits"], DIMS["pool"]):
        classes = "no fc.weight" if fc is None or not fc.ndim else f"{fc.shape[0]} classes"
        raise UserError(f"{path} is not the Inception network of FID, which has {DIMS['logits']} classes (this file: "
                        f"{classes}; torchvision's, of 1000, is another network): get {WHERE}")
    # Counters that batch normalisation does not use; some files have them.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in state.items()}, buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the Inception network of FID: {one_line(error)[:300]}; get {WHERE}"
                        ) from None
