"""What the programs that fit something to a model have in common."""

import pytest
from conftest import run_command

from lab.fit import calibrate_adaptive, train_adaptor, train_router
from lab.plans import search


@pytest.mark.parametrize("program", [calibrate_adaptive, search, train_adaptor, train_router],
                         ids=lambda program: program.__name__)
@pytest.mark.parametrize("config", ["ddpm_cifar10", "ldm_cin256", "sd_v15", "sdxl"])
def test_each_takes_the_options_of_every_model(program, config, capsys):
    """Its own beside those of sampling, under names that do not meet."""
    assert run_command(program.main, "--config", f"configs/{config}.yaml", "--help") == 0
    assert "--seeds" in capsys.readouterr().out
