"""A training loop that can be killed at any moment and resumed: EMA, atomic checkpoints, a log, sample grids."""

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from run.weights import read_tensors
from unet_caching.errors import UserError, one_line
from unet_caching.files.schema import fault

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Model, Tensor, torch.Generator], Tensor]       # loss(model, batch, generator) -> scalar
Grid = Callable[[Model], np.ndarray]                            # grid(model) -> uint8 [n, height, width, 3]


@dataclass
class TrainConfig:
    """How long and how fast a model is trained."""
    images: int = 300_000           # training images seen in all
    batch_size: int = 32
    lr: float = 5e-4                # AdamW; warmed up linearly, cooled linearly over the last `cooldown` of the run
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 6_400             # images
    cooldown: float = 0.2           # fraction of the run
    ema: float = 0.9985             # per optimiser step
    grad_clip: float = 1.0
    seed: int = 0
    save_every: float = 120.0       # seconds
    grid_every: int = 25_000        # images

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "lr", "warmup", "save_every", "grid_every"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        for name in ("cooldown", "ema"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class Section:
    """The section of a config that says how a model is trained, beside its data."""
    bf16: bool = True               # autocast
    loop: TrainConfig = field(default_factory=TrainConfig)


WHEN = ("images", "save_every", "grid_every")       # of a run that may change when it goes on


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM inside only make the yielded function return True, so that no step is cut in half."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for all parameters and buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for kept, now in zip(ema.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def learning_rate(config: TrainConfig, seen: int) -> float:
    """The learning rate after so many images: a linear warm-up, constant, a linear cool-down."""
    cool = config.images * config.cooldown
    return config.lr * min(1.0, (seen + config.batch_size) / config.warmup, max(0.02, (config.images - seen) / cool))


def save_grid(images: np.ndarray, path: Path, columns: int) -> None:
    """Write uint8 [n, height, width, 3] as one PNG, row by row."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top:top + height, left:left + width] = image
    Image.fromarray(sheet).save(path)


def read_state(path: Path, config: TrainConfig) -> dict[str, Any]:
    """What a run that was stopped goes on from. Raises UserError for a file that is damaged or of other settings."""
    state = read_tensors(path)
    if not isinstance(state, dict) or fault(state.get("config"), dict) or fault(state.get("seen"), int) or fault(
            state.get("seconds"), float):
        raise UserError(f"{path} holds no training run: name another --out")
    before, now = (json.loads(json.dumps(one)) for one in (state["config"], asdict(config)))
    unlike = [f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if key not in WHEN
              and before.get(key) != now[key]]
    if unlike:
        raise UserError(f"{path} was trained with other settings: {'; '.join(unlike)}; name another --out")
    return state


def train(model: Model, loss: Loss[Model], images: Tensor, config: TrainConfig, out: Path,
          grid: Grid[Model] | None = None, device: str = "cpu",
          parameters: Iterable[nn.Parameter] | None = None) -> Model:
    """Train `model` on `images` and return its EMA copy. Resumes from out/state.pt where there is one.

    images: [n, ...], the training set, held in memory; `loss` is given batches of it.
    grid: called with the EMA copy every `grid_every` images; written to out/grid-IMAGES.png.
    out/log.jsonl gets a line per 1,000 images: images, loss, lr, seconds (of training, over all restarts).
    """
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    generator = torch.Generator(device).manual_seed(config.seed)
    seen, seconds = 0, 0.0

    state_path = out / "state.pt"
    if state_path.exists():
        state = read_state(state_path, config)
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"].cpu())
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{state_path} is damaged, or of another model: {one_line(error)[:200]}; name another "
                            "--out") from None
        seen, seconds = state["seen"], state["seconds"]
        print(f"resuming at {seen:,} images")

    def save() -> None:
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                 "generator": generator.get_state(), "seen": seen, "seconds": seconds, "config": asdict(config)}
        torch.save(state, out / "state.pt.tmp")
        os.replace(out / "state.pt.tmp", state_path)

    bar = tqdm(total=config.images, initial=seen, unit="img", smoothing=0.02, mininterval=2)
    saved, losses = time.monotonic(), []
    with bar, deferred_interrupt() as interrupted:
        while seen < config.images:
            if interrupted():
                save()
                print(f"\ninterrupted at {seen:,} of {config.images:,} images; the same command goes on from there")
                raise KeyboardInterrupt
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, seen)
            chosen = torch.randint(len(images), (config.batch_size,), generator=generator, device=device)
            value = loss(model, images[chosen], generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, config.grad_clip)
            optimizer.step()
            steps = seen // config.batch_size
            update_ema(ema, model, min(config.ema, (1 + steps) / (10 + steps)))
            losses.append(value.detach())
            before, seen = seen, seen + config.batch_size
            seconds += time.monotonic() - start
            bar.update(config.batch_size)
            if seen // 1000 > before // 1000:
                mean = torch.stack(losses).mean().item()
                losses = []
                bar.set_postfix(loss=f"{mean:.4f}")
                with open(out / "log.jsonl", "a") as file:
                    line = {"images": seen, "loss": round(mean, 6), "lr": optimizer.param_groups[0]["lr"],
                            "seconds": round(seconds, 3)}
                    file.write(json.dumps(line) + "\n")
                if not mean < 1e4:
                    raise UserError(f"the loss is {mean} at {seen:,} images: lower the learning rate")
            if grid and seen // config.grid_every > before // config.grid_every:
                save_grid(grid(ema), out / f"grid-{seen:08d}.png", columns=10)
            if time.monotonic() - saved > config.save_every:
                save()
                saved = time.monotonic()
    save()
    return ema
