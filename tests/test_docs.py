"""README and docs: every command parses, every link leads to something, and what README says in short is measured."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import HERE, main_of, run_command

ROOT = HERE.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"),
                *ROOT.glob("scripts/slurm/*.md")])
PROGRAMS = ("python", ".venv/bin/python")
LINES = 900         # of docs/


class Parsed(BaseException):
    """The command line has been read, and the command's work would begin."""


def lines_of(page: Path) -> Iterator[str]:
    """The lines of a page's blocks of shell commands, those that go on put together."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if language == "bash":
            yield from (line for line in re.sub(r"\\\n\s*", "", block).splitlines() if "..." not in line)


def commands(page: Path) -> list[list[str]]:
    """The programs of the project that a page calls, and their words."""
    found = []
    for line in lines_of(page):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|"):
                words.append(word)
                continue
            if words[:1] == ["bash"] or (words[:1] and words[0] in PROGRAMS and words[1:2] == ["-m"]):
                found.append(words)
            words = []
    return found


CALLS = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page)]
MODULES = [(page, words) for page, words in CALLS if words[0] != "bash" and words[2] != "venv"]


def test_pages_have_commands():
    assert len(MODULES) > 25 and {words[2] for _, words in MODULES} >= {"ddpm.sample", "eval.fid", "lab.plans"}


@pytest.mark.parametrize(("page", "words"), MODULES, ids=lambda one: " ".join(one) if isinstance(one, list) else None)
def test_every_command_parses(page, words, monkeypatch, capsys):
    def parsed(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    read = argparse.ArgumentParser.parse_args
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr("sys.argv", words[2:])
    try:
        main_of(words[2])()
    except Parsed:
        return
    except SystemExit:
        pytest.fail(f"{page}: {capsys.readouterr().err}")
    pytest.fail(f"{page}: {words[2]} has no command line")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_script_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, place = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{page}: {target}"
            if place:
                headings = [re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-")
                            for one in re.findall(r"^#+ (.+)$", file.read_text(), re.M)]
                assert place in headings, f"{page}: {target}"
    for script in re.findall(r"\b(?:scripts|tests)/[\w/]+\.(?:sh|py|sbatch)\b", text):
        assert (ROOT / script).is_file(), f"{page}: {script}"
    for module in re.findall(r"python -m ((?:\w+\.)+\w+)", text):
        name = module.removeprefix("unet_caching.")
        assert importlib.util.find_spec(name) is not None, f"{page}: {module}"


def sentences(page: Path) -> list[int]:
    """The words of each sentence of a page's prose: no code, tables, headings, pictures or addresses."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"^(\||#+ |!\[).*$|(?<=\])\([^)]*\)", "", text, flags=re.M)
    prose = re.sub(r"`[^`]*`", "CODE", text)
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", prose))
    counts = [len(re.findall(r"[^\W_]+(?:[.,'-][^\W_]+)*", one)) for part in parts
              for one in re.split(r"(?<=[.!?:])[*)\]]* (?=[*(\[]*[A-Z0-9])", part)]
    return [count for count in counts if count]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name)
def test_pages_are_short_and_so_are_their_sentences(page):
    counts = sentences(page)
    assert len(page.read_text().splitlines()) <= (140 if page.name == "README.md" else 120)
    assert max(counts) <= 40 and sum(counts) <= 20 * len(counts)


def test_docs_are_short():
    assert sum(page.read_text().count("\n") for page in ROOT.glob("docs/*.md")) <= LINES


@pytest.mark.parametrize("package", ["ddpm", "ldm", "stable_diffusion"])
def test_help_of_sampling_fits_two_screens(package, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(main_of(f"{package}.sample"), "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and text.index("--seeds") < text.index("--block-schedule")
