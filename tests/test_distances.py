"""Distances to converged images: measured once, batch by batch, and never against damaged work."""

import json

import pytest
import torch
from conftest import TINY_UNET, tiny_ddpm
from safetensors.torch import save_file

from lab.plans.distances import Distances, psnr_to
from run.machine import Machine
from run.spec import RunSpec
from unet_caching.errors import UserError

MACHINE = Machine(batch_size=2, device="cpu", threads=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), TINY_UNET, steps=8)


@pytest.fixture
def two_steps(config, tmp_path) -> Distances:
    return Distances(RunSpec.of(config, sampler="ddim", steps=2), MACHINE, tmp_path)


def again(distances, **options) -> Distances:
    return Distances(distances.run.spec.having(**options), MACHINE, distances.folder.parent)


def test_converged_latents_are_made_once_and_batch_by_batch(two_steps):
    first, files = two_steps.converged([3, 4, 5]), two_steps.folder / "converged"
    stamps = {file: file.stat().st_mtime_ns for file in files.iterdir()}
    assert sorted(file.name for file in files.iterdir()) == ["3.safetensors", "5.safetensors"]
    other = again(two_steps)
    assert other.missing([3, 5, 6]) == [6] and torch.equal(other.converged([5, 3]), first[[2, 0]])
    assert stamps == {file: file.stat().st_mtime_ns for file in files.iterdir()}
    assert two_steps.missing([6]) == [6] and (other.converged([6]) == two_steps.converged([6])).all()
    apart = again(two_steps, steps=3)
    assert apart.folder != two_steps.folder and apart.missing([3, 4]) == [3, 4]
    with pytest.raises(UserError, match="eta 0"):
        again(two_steps, eta=1.0)


def test_a_run_that_is_stopped_goes_on_with_its_next_batch(two_steps, config, monkeypatch):
    """Its distances are those of its latents, and the weights are read once for each dtype."""
    run = RunSpec.of(config, sampler="ddim", steps=4, interval=2, forecast=1, branch=0).open()
    model, real, made = type(two_steps.model), type(two_steps.model).latents, []

    def stopped(self, seeds, *args, **options):
        if len(made) == 1 and made[0] != "again":
            raise KeyboardInterrupt
        made.append(seeds)
        return real(self, seeds, *args, **options)

    two_steps.converged(range(3, 9))
    monkeypatch.setattr(model, "latents", stopped)
    with pytest.raises(KeyboardInterrupt):
        two_steps.of(run, range(3, 9))
    assert two_steps.known(run).keys() == {3, 4}
    made[:] = ["again"]
    found = two_steps.of(run, range(3, 9))
    assert made == ["again", [5, 6], [7, 8]]
    monkeypatch.undo()
    opened = two_steps.on(run)
    assert opened.unet is two_steps.model.unet
    wanted = psnr_to(two_steps.converged([7]), opened.latents([7], opened.policy()))
    assert found[4] == pytest.approx(wanted[0], abs=1e-3)
    half, other = (two_steps.on(run.spec.having(dtype="bf16", steps=steps).open()) for steps in (4, 8))
    assert half.unet is not opened.unet and half.unet is other.unet


def test_work_that_is_damaged_or_of_another_run_is_refused(two_steps):
    """By name, with what to do; and never measured against."""
    runs = [two_steps.run.spec.having(steps=steps).open() for steps in (1, 2)]
    for run in runs:
        two_steps.of(run, [5])
    kept = {json.loads(path.read_text())["about"]["run"]["steps"]: path for path in two_steps.folder.glob("psnr/*")}
    good = kept[2].read_text()
    for content in (good[:40], "[]", "{}", good.replace('"5":', '"6":'), kept[1].read_text()):
        kept[2].write_text(content)
        with pytest.raises(UserError, match=f"{kept[2].name} is damaged, or of another run: delete it"):
            two_steps.of(runs[1], [5])
    latents = next(two_steps.folder.glob("converged/*.safetensors"))
    for tensors in ({"seeds": torch.tensor([5]), "latents": torch.zeros(1, 3, 4, 4)}, {"seeds": torch.tensor([5])},
                    {"seeds": torch.tensor([5]), "latents": torch.full((1, 3, 8, 8), torch.nan)}):
        save_file(tensors, latents)
        with pytest.raises(UserError, match=r"5.safetensors is damaged.*\[3, 8, 8\] of each: delete it"):
            again(two_steps).converged([5])


def test_runs_are_compared_that_start_where_the_converged_one_does(config, tmp_path):
    """With another spacing of timesteps, too."""
    converged = Distances(RunSpec.of(config, sampler="unipc", steps=8, timesteps="trailing"), MACHINE, tmp_path)
    for timesteps in ("karras", "999,600,300,80"):
        converged.check(converged.run.spec.having(steps=4, timesteps=timesteps).open())
    for timesteps in ("leading", "900,600,300,80"):
        with pytest.raises(UserError, match="they differ in timesteps"):
            converged.check(converged.run.spec.having(steps=4, timesteps=timesteps).open())
