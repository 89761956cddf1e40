"""What the programs that fit something to a model have in common."""

import pytest
from conftest import main_of, run_command

from lab.fit.__main__ import FITS


@pytest.mark.parametrize("program", [("lab.plans", "search"), *(("lab.fit", kind) for kind in FITS)], ids=" ".join)
@pytest.mark.parametrize("config", ["ddpm_cifar10", "ldm_cin256", "sd_v15", "sdxl"])
def test_each_takes_the_options_of_every_model(program, config, capsys):
    """Its own beside those of sampling, under names that do not meet."""
    module, *words = program
    assert run_command(main_of(module), *words, "--config", f"configs/{config}.yaml", "--help") == 0
    assert "--seeds" in capsys.readouterr().out


def test_kinds_are_listed(capsys):
    assert run_command(main_of("lab.fit"), "--help") == 0
    text = capsys.readouterr().out
    assert all(f"python -m lab.fit {kind}" in text for kind in FITS)
    assert run_command(main_of("lab.fit"), "scale") == 2 and "say what to fit: changes, " in capsys.readouterr().err
