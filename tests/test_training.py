"""The emoji images, and a training run that is interrupted."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from conftest import fails, run_command
from torch import nn

from lab.train import main
from run.stopping import Stopped
from run.training import emoji
from run.training.loop import TrainConfig, learning_rate, train


def test_emoji_are_what_the_index_says():
    images, rows = emoji.load(32)
    assert images.shape == (11163, 32, 32, 3) and images.dtype == np.uint8 and len(rows) == 11163
    assert len({row.name for row in rows}) == 3559
    assert {row.style for row in rows} == {"noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji"}
    assert len({row.group for row in rows}) == 9
    hearts = images[[i for i, row in enumerate(rows) if row.name == "red-heart"]].astype(int)
    assert len(hearts) == 5
    middle = hearts[:, 12:20, 12:20].mean(axis=(1, 2))
    assert (middle[:, 0] > middle[:, 1] + 80).all() and (middle[:, 0] > middle[:, 2] + 50).all()       # they are red
    assert (hearts[:, -1, :4].min(axis=(1, 2)) > 240).all()                                          # on white


def test_held_out_names_are_in_no_style_of_train():
    _, train_rows = emoji.load(32, "train")
    _, held_out = emoji.load(32, "held-out")
    assert not {row.name for row in train_rows} & {row.name for row in held_out}
    assert 0.08 < len(held_out) / (len(held_out) + len(train_rows)) < 0.16
    images, rows = emoji.load(32, "train", "Smileys & Emotion")
    assert len(images) == len(rows) > 600 and {row.group for row in rows} == {"Smileys & Emotion"}


@pytest.mark.parametrize("arguments", [(48,), (32, "test"), (32, None, "Smileys")])
def test_unknown_emoji_are_refused(arguments):
    with pytest.raises(ValueError, match=r"no emoji"):
        emoji.load(*arguments)


def run(out, stop_at=None, images=400):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.0), nn.Linear(8, 4))
    calls = []

    def loss(model, batch, generator):
        calls.append(len(batch))
        if stop_at is not None and len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)     # in the middle of a step
        noise = torch.randn(batch.shape, generator=generator)
        return (model(batch + noise) - batch).square().mean()

    data = torch.linspace(-1, 1, 64).view(16, 4)
    return train(model, loss, data, TrainConfig(images=images, batch_size=8, warmup=80), out)


def test_an_interrupted_training_equals_an_uninterrupted_one(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped, match="at 160 of 400 images"):
        run(tmp_path / "parts", stop_at=20)
    parts = run(tmp_path / "parts")
    assert "resuming at 160 images" in capsys.readouterr().out
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    run(tmp_path / "run", images=24_000)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == list(range(1000, 24_001, 1000))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["seconds"] > lines[0]["seconds"] >= 0


def test_learning_rate_warms_up_and_cools_down():
    config = TrainConfig(images=1000, batch_size=10, lr=1.0, warmup=100, cooldown=0.2)
    rates = [learning_rate(config, seen) for seen in range(0, 1000, 10)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5) and rates[99] < 0.1


@pytest.mark.parametrize("words, message", [
    (["--config", "configs/ddpm_cifar10.yaml"], "no train section"), (["--config", "none.yaml"], "no config file"),
    (["first-stage", "--config", "configs/ldm_cin256.yaml"], "no train_first_stage section"),
    (["first-stage", "--config", "configs/ddpm_emoji.yaml"], "no train_first_stage section")])
def test_training_refuses_a_config_in_one_line(tmp_path, capsys, words, message):
    assert fails(capsys, run_command(main, *words, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
