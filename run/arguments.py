"""The command line: options are dataclasses, each declared once, as a field (unet_caching/options.py).

    @dataclass(frozen=True)
    class Options:
        samples: Path = required("sample folder")
        seeds: str | None = option(None, "which images (default: all)")

    @command                                            # run/cli.py
    def main(options: Options, device: Device) -> None:
"""

import argparse
import dataclasses
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field
from functools import cache
from pathlib import Path
from typing import Any

from unet_caching.errors import UserError
from unet_caching.files.whole import check_replaceable

Flags = Mapping[str, str]       # field -> flag, for flags that differ from the field's name
MANY = 20           # a command with more options does not list them in its usage
_OURS = ("help", "least", "flag", "word", "one_of")     # keys of a field's metadata that argparse does not know


def whole(text: str) -> int:
    """Read a whole number of at most 64 bits from a command line."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if abs(value) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is too large")
    return value


def finite(text: str) -> float:
    """Read a finite number from a command line."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a finite number")
    return value


def out_file(text: str) -> Path:
    """Read the path of a file to write, which must not be a folder or a device."""
    path = Path(text)
    try:
        check_replaceable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


_WORDS = {int: "N", float: "X", Path: "PATH"}      # placeholders in --help, by type
_CHECKED: dict[type, Callable[[str], Any]] = {int: whole, float: finite}


def names(options: Any) -> list[str]:
    """The names of the options of a dataclass, or of an object of one."""
    return [one.name for one in dataclasses.fields(options)]


def flag(name: str, flags: Flags | None = None) -> str:
    """'zero_cache' -> '--zero-cache'."""
    return f"--{(flags or {}).get(name, name).replace('_', '-')}"


def kind(cls: type, name: str) -> type:
    """The type of an option without None; for a tuple, the type of its values."""
    hint = _hints(cls)[name]
    if isinstance(hint, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    return typing.get_args(hint)[0] if _is_tuple(cls, name) else hint


def _is_tuple(cls: type, name: str) -> bool:
    hint = _hints(cls)[name]
    return any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def add(parser: argparse.ArgumentParser, cls: type, flags: Flags | None = None) -> None:
    """Add the options of a dataclass to a parser, in a group for each class with a `title`."""
    groups: dict[str, Any] = {group.title: group for group in parser._action_groups if group.title}
    for one in dataclasses.fields(cls):
        owner = next(base for base in cls.__mro__ if one.name in inspect.get_annotations(base))
        title = getattr(owner, "title", "")
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if title else parser
        together = one.metadata.get("one_of")       # a group of options that exclude each other
        if together and together not in groups:
            groups[together] = groups[title].add_mutually_exclusive_group()
        name, how = _argument(cls, one, flags)
        groups[together or title].add_argument(name, **how)


def _argument(cls: type, one: Field, flags: Flags | None) -> tuple[str, dict[str, Any]]:
    """The arguments of argparse's add_argument for an option."""
    about, of, many = one.metadata, kind(cls, one.name), _is_tuple(cls, one.name)
    needed = one.default is MISSING
    how: dict[str, Any] = {"help": about["help"], "default": None if needed else one.default,
                           **({"action": "store_true"} if of is bool else {"type": _CHECKED.get(of, of)}),
                           **{key: value for key, value in about.items() if key not in _OURS and value}}
    if "type" in how and not about.get("choices") and not about.get("word"):
        how.setdefault("metavar", _WORDS.get(of))
    if about.get("action") == "append":
        how["default"] = list(how["default"] or ())
    elif many:
        how.setdefault("nargs", "+" if needed or not about.get("word") else "*")
    if about.get("word"):
        return one.name, how | ({} if many or needed else {"nargs": "?"})
    return flag(about.get("flag", one.name), flags), how | {"dest": one.name, "required": needed}


def chosen(cls: type, args: argparse.Namespace) -> Any:
    """An object of a dataclass of options, with the values of the command line."""
    values = {name: getattr(args, name) for name in names(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check(options: Any, flags: Flags | None = None) -> None:
    """Raise a UserError for a number below its option's least value."""
    for one in dataclasses.fields(options):
        least, values = one.metadata.get("least"), getattr(options, one.name)
        for value in values if isinstance(values, tuple) else (values,):
            if least is not None and value is not None and value < least:
                name = flag(one.metadata.get("flag", one.name), flags)
                raise UserError(f"{name} must be {least} or more, got {value}")


def program() -> str:
    """The command that runs this program, for messages."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=29)


def build_parser(doc: str | None, *kinds: type, flags: Flags | None = None, defaults: Mapping[str, Any] | None = None,
                 prog: str | None = None) -> argparse.ArgumentParser:
    """A parser of the options of dataclasses. defaults: this command's, instead of the options' own."""
    parser = argparse.ArgumentParser(prog=prog or program(), description=doc, allow_abbrev=False,
                                     formatter_class=_formatter)
    for cls in sorted(kinds, key=lambda cls: getattr(cls, "rare", False)):
        add(parser, cls, flags)
    for action in parser._actions:
        if action.dest in (defaults or {}):
            action.required, action.help = False, re.sub(r"(?<=default: ).*?(?=\))", "%(default)s", action.help or "")
    if len(parser._actions) > MANY:
        needed = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" if action.option_strings
                  else action.dest for action in parser._actions if action.required]
        parser.usage = " ".join(["%(prog)s", *needed, "[option ...]"])
    parser.set_defaults(**defaults or {})
    return parser


def parse(doc: str | None, *kinds: type, words: Sequence[str] | None = None, flags: Flags | None = None,
          defaults: Mapping[str, Any] | None = None, prog: str | None = None) -> list[Any]:
    """Parse a command line into an object of each dataclass of options. words: the command line; None: the program's.

    doc, flags, defaults, prog: as in `build_parser`. Raises UserError for a number below its option's least value.
    """
    args = build_parser(doc, *kinds, flags=flags, defaults=defaults, prog=prog).parse_args(words)
    objects = [chosen(cls, args) for cls in kinds]
    for one in objects:
        check(one, flags)
    return objects


def call(main: Callable[..., None], words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a function, whose parameters are dataclasses of options, with the values of the command line.

    --help shows the function's docstring, or else its module's.
    """
    hints = typing.get_type_hints(main)
    kinds = [hints[name] for name in inspect.signature(main).parameters]
    main(*parse(main.__doc__ or sys.modules[main.__module__].__doc__, *kinds, words=words, prog=prog))


def call_verb(verbs: Mapping[str, Callable[..., None]], otherwise: Callable[..., None]) -> None:
    """Call the function of the verb that the command line starts with; without a verb, `otherwise`."""
    words = sys.argv[1:]
    if words and words[0] in verbs:
        call(verbs[words[0]], words[1:], f"{program()} {words[0]}")
    else:
        call(otherwise, words)


def given(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults, by name."""
    values = {one.name: (one, getattr(options, one.name)) for one in dataclasses.fields(options)}
    return {name: value for name, (one, value) in values.items() if value != one.default}


def words(values: Mapping[str, Any], flags: Flags | None = None) -> Iterator[str]:
    """The words of a command line that set these options."""
    for name, value in values.items():
        yield flag(name, flags)
        if value is not True:
            yield str(value)


def typed(cls: type, name: str, value: Any) -> Any:
    """Convert a value from a file to the type of its option: text to a path, a whole number to a float."""
    wanted: Any = kind(cls, name)
    return wanted(value) if wanted in (Path, float) and isinstance(value, str | int) and value is not True else value
