"""The command line that options declared as dataclasses make."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from run import arguments
from run.cli import command
from run.machine import Device
from unet_caching.errors import UserError
from unet_caching.options import option, required


@dataclass(frozen=True)
class Options:
    """Options of every kind."""
    title: ClassVar[str] = "what is made"
    out: Path = required("a file", type=arguments.out_file)
    names: tuple[str, ...] = option((), "words", word=True)
    intervals: tuple[int, ...] = option((2, 3), "several numbers", least=1)
    reference: tuple[str, ...] = option((), "repeatable", action="append")
    source: Path | None = option(None, "another flag", flag="from")
    delta: float | None = option(None, "this", one_of="aim")
    macs: float | None = option(None, "or that", one_of="aim")
    quick: bool = option(False, "a switch")


def test_words_become_objects():
    words = "a b --out x --intervals 4 5 --reference p --reference q --from f --macs 0.5 --quick --threads 2"
    options, device = arguments.parse("doc", Options, Device, words=words.split())
    assert options == Options(out=Path("x"), names=("a", "b"), intervals=(4, 5), reference=("p", "q"),
                              source=Path("f"), macs=0.5, quick=True)
    assert device.threads == 2
    assert arguments.parse("doc", Options, words=["--out", "x"]) == [Options(out=Path("x"))]
    assert arguments.parse("doc", Options, words=[], defaults={"out": Path("y")}) == [Options(out=Path("y"))]


@pytest.mark.parametrize(("words", "message"), [
    ("", "required: --out"), ("--out x --delta 1 --macs 1", "not allowed with"), ("--out x --quic", "unrecognized"),
    ("--out x --intervals 2.5", "not a whole number"), ("--out x --macs nan", "not a finite"),
    ("--out /dev", "not a regular")])
def test_wrong_words_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        arguments.parse("doc", Options, words=words.split())
    assert message in capsys.readouterr().err


def test_numbers_have_a_least():
    with pytest.raises(UserError, match="--intervals must be 1 or more, got 0"):
        arguments.parse("doc", Options, words=["--out", "x", "--intervals", "3", "0"])
    with pytest.raises(UserError, match="--threads must be 1 or more, got -1"):
        Device(threads=-1)


def test_a_command_is_a_function_of_its_options(monkeypatch, capsys):
    def first(options: Options) -> None:
        print("first", options.names)

    def second(options: Options, device: Device) -> None:
        print("second", options.out, device.device)

    @command
    def main() -> None:
        arguments.call_verb({"other": second}, first)

    for words, line in ((["a", "--out", "x"], "first ('a',)\n"),
                        (["other", "--out", "x", "--device", "cuda:7"], "second x cuda:7\n")):
        monkeypatch.setattr("sys.argv", ["program", *words])
        main()
        assert capsys.readouterr().out == line


def test_help_says_it_all(capsys):
    with pytest.raises(SystemExit):
        arguments.parse("What it does.", Options, Device, words=["--help"])
    out = capsys.readouterr().out
    assert all(text in out for text in ("What it does.", "what is made:", "the machine:", "--from", "repeatable"))
