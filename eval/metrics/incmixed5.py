"""InceptionV3 up to its block mixed5, with the weights in npm's package nsfwjs (MIT): a second extractor.

The package's image classifier was trained with its first 50 convolutions frozen at ImageNet's weights. The layers after
mixed5 were tuned to its own task and are not used. Weights are stored in 8 bits: w = minimum + scale * byte. The
published archive is read unchanged; the layers and their order come from its model description (Keras').

Images are RGB in [0, 1]. nsfwjs only divides by 255 (src/core.ts; the graph itself has no scaling). The weights agree:
the 32 running means of the first normalisation are its kernels' sums times one colour, (0.591, 0.521, 0.487), but for
0.01 % of their squares. In [0, 1] that is the average colour of photographs, red before green before blue. In [-1, 1],
which Keras' own InceptionV3 takes, it would be nearly white, and in BGR bluish. A linear probe agrees, too, but says
less (the nine groups of emoji, logistic regression on 2,000 images, 1,353 held-out images, 45 % of them in the largest
group, the best of four penalties): 74.5 % are right with [0, 1], 73.8 % with [-1, 1], 69.5 % with ImageNet's mean and
deviation, while the penalty moves the result from 60 to 75 %. nsfwjs enlarges images to 299 pixels; here they are
enlarged to 128, since emoji have 32.
"""

import base64
import json
import re
import tarfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.metrics.features import SmallExtractor
from run.files import ROOT
from run.weights import sha256
from unet_caching.errors import UserError, one_line

ARCHIVE = ROOT / "checkpoints" / "nsfwjs-4.4.0.tgz"
SHA256 = "585cd178f3b994337c4d10a87b080d342fc52f8b9bf0085c4d1f345a3a1c5382"
LAST = "mixed5"
SIZE = 128          # pixels a side: 13 positions after the stem, 6 after mixed5
_FOLDER = "package/dist/models/inception_v3/"


class Network(NamedTuple):
    """layers: Keras' descriptions, each after its inputs. weights: float32, by name."""
    layers: list[dict[str, Any]]
    weights: dict[str, np.ndarray]


def read_archive(path: Path) -> Network:
    """The network in npm's package. Raises UserError if the file is something else."""
    try:
        with tarfile.open(path) as archive:
            files = {Path(member.name).name: file.read().decode() for member in archive
                     if member.name.startswith(_FOLDER) and (file := archive.extractfile(member))}
        model = _literal(files["model.min.js"])
        manifest = model["weightsManifest"]
        raw = b"".join(base64.b64decode(re.findall(r'exports="([A-Za-z0-9+/=]+)"', files[f"{name}.min.js"])[0])
                       for group in manifest for name in group["paths"])
        weights, at = {}, 0
        for one in (one for group in manifest for one in group["weights"]):
            how, count = one["quantization"], int(np.prod(one["shape"]))
            stored = np.frombuffer(raw, np.dtype(how["dtype"]), count, at)
            weights[one["name"]] = (how["min"] + how["scale"] * stored.astype(np.float64)).astype(np.float32).reshape(
                one["shape"])
            at += stored.nbytes
        layers = model["modelTopology"]["model_config"]["config"]["layers"]
        names = [layer["name"] for layer in layers]
        return Network(layers[:names.index(LAST) + 1], weights)
    except (OSError, KeyError, ValueError, IndexError, TypeError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} is not npm's package nsfwjs, or is damaged: {one_line(error)[:200]}") from None


def _literal(script: str) -> dict[str, Any]:
    """The object that a minified script exports, as JSON."""
    text = script[script.index("exports={modelTopology") + len("exports="):]
    text = re.sub(r"([{,])([A-Za-z_]\w*):", r'\1"\2":', text).replace("!0", "true").replace("!1", "false")
    return json.JSONDecoder().raw_decode(re.sub(r"(?<=[:\[,-])\.(?=\d)", "0.", text))[0]


class KerasGraph(nn.Module):
    """[n, 3, height, width] -> the output of the last layer [n, channels, h, w].

    Raises ValueError for a kind of layer that InceptionV3's body does not have.
    """

    def __init__(self, network: Network):
        super().__init__()
        self.layers = network.layers
        for layer in self.layers:
            for weight in ("kernel", "beta", "moving_mean", "moving_variance"):
                if (value := network.weights.get(f"{layer['name']}/{weight}")) is not None:
                    tensor = torch.from_numpy(value)
                    self.register_buffer(f"{layer['name']}_{weight}",
                                         tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor)

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for layer in self.layers:
            inputs = [values[name] for name, *_ in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else [x]
            values[layer["name"]] = self._layer(layer, inputs)
        return values[self.layers[-1]["name"]]

    def _layer(self, layer: Mapping[str, Any], inputs: list[Tensor]) -> Tensor:
        (x, *_), kind, how = inputs, layer["class_name"], layer["config"]

        def own(weight: str) -> Tensor:
            return self.get_buffer(f"{layer['name']}_{weight}")

        def padding(window: list[int]) -> list[int]:
            if how["padding"] == "same" and set(how["strides"]) != {1}:
                raise ValueError(f"{layer['name']} pads and strides at once, which no layer of InceptionV3 does")
            return [side // 2 if how["padding"] == "same" else 0 for side in window]

        if kind == "InputLayer":
            return x
        if kind == "Conv2D" and not how["use_bias"]:
            return F.conv2d(x, own("kernel"), stride=how["strides"], padding=padding(how["kernel_size"]))
        if kind == "BatchNormalization" and not how["scale"]:
            return F.batch_norm(x, own("moving_mean"), own("moving_variance"), bias=own("beta"), eps=how["epsilon"])
        if kind == "Activation" and how["activation"] == "relu":
            return F.relu(x)
        if kind == "MaxPooling2D" and how["padding"] == "valid":
            return F.max_pool2d(x, how["pool_size"], how["strides"])
        if kind == "AveragePooling2D":      # over the positions inside the image, as in TensorFlow
            return F.avg_pool2d(x, how["pool_size"], how["strides"], padding(how["pool_size"]), count_include_pad=False)
        if kind == "Concatenate":
            return torch.cat(inputs, 1)
        raise ValueError(f"{layer['name']} is a {kind} that InceptionV3 does not have")


class IncMixed5(SmallExtractor):
    """uint8 [n, height, width, 3] -> float32 [n, 768]: the mean over positions of the block mixed5.

    Raises UserError if the archive is missing or another file. The network is loaded on first use.
    """
    name = "IncMixed5"
    layers: Mapping[str, int] = MappingProxyType({"pooled": 768})

    def __init__(self, device: torch.device | str = "cpu", archive: Path | None = None):
        super().__init__(device)
        self.archive = archive or ARCHIVE
        if not self.archive.is_file():
            raise UserError(f"no file {self.archive}: fetch it with bash scripts/download.sh incmixed5")
        if (digest := sha256(self.archive)) != SHA256:
            raise UserError(f"{self.archive} is not nsfwjs 4.4.0 as npm publishes it: its sha256 is {digest[:16]}..., "
                            f"not {SHA256[:16]}...")

    @property
    def id(self) -> str:
        return f"IncMixed5:sha256={SHA256}:rgb-bilinear-antialias-{SIZE}px-[0,1]-fp32:768-pooled"

    @cached_property
    def net(self) -> KerasGraph:
        return KerasGraph(read_archive(self.archive)).requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self.net(self.resized(pixels, SIZE) / 255).mean(dim=(2, 3)).cpu().numpy()
