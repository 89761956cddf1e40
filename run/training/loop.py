"""A training loop that can be killed at any moment and resumed: EMA, atomic checkpoints, a log."""

import copy
import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from run.files import write_atomically
from run.folder import differences
from run.stopping import SIGNALS, Stopped, StopRequest
from run.weights import read_tensors
from unet_caching.errors import UserError, one_line
from unet_caching.files.schema import fault

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Model, Tensor, torch.Generator], Tensor]       # loss(model, batch, generator) -> scalar


@dataclass
class TrainConfig:
    """The length, learning rate and other settings of training."""
    images: int = 300_000           # training images seen in all
    batch_size: int = 32
    lr: float = 5e-4                # of AdamW, with linear warm-up and linear cool-down
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 6_400             # images
    cooldown: float = 0.2           # the last fraction of the run
    ema: float = 0.9985             # per optimiser step
    grad_clip: float = 1.0
    seed: int = 0
    save_every: float = 120.0       # seconds

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "lr", "warmup", "save_every"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        for name in ("cooldown", "ema"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class Section:
    """The section of a config about training. Families add the data."""
    bf16: bool = True               # autocast
    loop: TrainConfig = field(default_factory=TrainConfig)


WHEN = ("images", "save_every")     # the settings that may change when a run is resumed


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for all parameters and buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for kept, now in zip(ema.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def learning_rate(config: TrainConfig, seen: int) -> float:
    """The learning rate after `seen` images: a linear warm-up, constant, a linear cool-down."""
    cool = config.images * config.cooldown
    return config.lr * min(1.0, (seen + config.batch_size) / config.warmup, max(0.02, (config.images - seen) / cool))


class Trainer(Generic[Model]):
    """A model in training, its EMA copy, and the rest of the state that a restart needs."""

    def __init__(self, model: Model, config: TrainConfig, device: str):
        self.config, self.device = config, device
        self.model = model.to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas,
                                           weight_decay=config.weight_decay)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.seen, self.seconds = 0, 0.0

    def step(self, loss: Loss[Model], images: Tensor) -> Tensor:
        """Train on a batch drawn from the images; returns the loss."""
        start, config = time.monotonic(), self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.seen)
        drawn = torch.randint(len(images), (config.batch_size,), generator=self.generator, device=self.device)
        value = loss(self.model, images[drawn], self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        steps = self.seen // config.batch_size
        update_ema(self.ema, self.model, min(config.ema, (1 + steps) / (10 + steps)))
        self.seen += config.batch_size
        self.seconds += time.monotonic() - start
        return value.detach()

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "seen": self.seen,
                 "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
                 "seconds": self.seconds, "config": asdict(self.config)}
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Resume from a file. Raises UserError if it is damaged, or another model's or other settings'."""
        state = read_tensors(path)
        if not isinstance(state, dict) or fault([state.get("seen"), state.get("seconds")], list[float]) or fault(
                state.get("config"), dict):
            raise UserError(f"{path} does not hold a training run: name another --out")
        before, now = ({key: value for key, value in json.loads(json.dumps(one)).items() if key not in WHEN}
                       for one in (state["config"], asdict(self.config)))
        if unlike := differences(before, now):
            raise UserError(f"{path} was trained with other settings: {'; '.join(unlike)}; name another --out")
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"].cpu())
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} is damaged, or another model's: {one_line(error)[:200]}; name another --out"
                            ) from None
        self.seen, self.seconds = state["seen"], state["seconds"]
        print(f"resuming at {self.seen:,} images")


def train(model: Model, loss: Loss[Model], images: Tensor, config: TrainConfig, out: Path, device: str = "cpu"
          ) -> Model:
    """Train `model` on `images` and return its EMA copy. Resumes from out/state.pt if it exists.

    images: [n, ...], the training set in memory, from which `loss` gets batches.
    Ctrl-C, SIGTERM and SIGUSR1 stop training after a step, with the state saved: raises Stopped.
    out/log.jsonl gets a line per 1,000 images: images, loss, lr, and seconds of training over all restarts.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer, state = Trainer(model, config, device), out / "state.pt"
    if state.exists():
        trainer.load(state)
    bar = tqdm(total=config.images, initial=trainer.seen, unit="img", smoothing=0.02, mininterval=2)
    saved, losses = time.monotonic(), []
    with bar, StopRequest(*SIGNALS, signal.SIGINT) as stop:
        while trainer.seen < config.images:
            if stop.asked:
                trainer.save(state)
                raise Stopped(f"at {trainer.seen:,} of {config.images:,} images")
            thousands = trainer.seen // 1000
            losses.append(trainer.step(loss, images))
            bar.update(config.batch_size)
            if trainer.seen // 1000 > thousands:
                mean, losses = torch.stack(losses).mean().item(), []
                bar.set_postfix(loss=f"{mean:.4f}")
                line = {"images": trainer.seen, "loss": round(mean, 6),
                        "lr": trainer.optimizer.param_groups[0]["lr"], "seconds": round(trainer.seconds, 3)}
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                if not mean < 1e4:
                    raise UserError(f"the loss is {mean} at {trainer.seen:,} images: lower the learning rate")
            if time.monotonic() - saved > config.save_every:
                trainer.save(state)
                saved = time.monotonic()
    trainer.save(state)
    return trainer.ema
