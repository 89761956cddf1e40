"""Options as dataclasses and as words of a command line: each is declared once, as a field (options.py)."""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

Flags = Mapping[str, str]       # field -> its flag, where that is not the field's name


class Options(Protocol):
    """A dataclass of options. title: what --help calls their group."""
    title: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


def whole(text: str) -> int:
    """A whole number of a command line, within 64 bits."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from None
    if abs(value) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is too large")
    return value


def finite(text: str) -> float:
    """A finite number of a command line."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a finite number")
    return value


def out_file(text: str) -> Path:
    """A file to write: no folder and no device."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no regular file: nothing is written there; name another")
    return path


_CHECKED: dict[type, Callable[[str], Any]] = {int: whole, float: finite}


def names(options: Any) -> list[str]:
    """The names of the options of a dataclass, or of one of its objects."""
    return [one.name for one in dataclasses.fields(options)]


def flag(name: str, flags: Flags | None = None) -> str:
    """'zero_cache' -> '--zero-cache'."""
    return f"--{(flags or {}).get(name, name).replace('_', '-')}"


def kind(cls: type[Options], name: str) -> type:
    """The type of an option, without its None."""
    hint = _hints(cls)[name]
    if isinstance(hint, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


@cache
def _hints(cls: type[Options]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def add(parser: argparse.ArgumentParser, cls: type[Options], flags: Flags | None = None) -> None:
    """Add the options of a dataclass to a command line, as a group."""
    group = parser.add_argument_group(cls.title) if dataclasses.fields(cls) else parser
    for one in dataclasses.fields(cls):
        about = dict(one.metadata)
        if kind(cls, one.name) is bool:
            group.add_argument(flag(one.name, flags), dest=one.name, action="store_true", help=about["help"])
        else:
            of = kind(cls, one.name)
            group.add_argument(flag(one.name, flags), dest=one.name, type=_CHECKED.get(of, of), default=one.default,
                               choices=about.get("choices") or None, metavar=about.get("metavar"), help=about["help"])


def chosen(cls: type[Options], args: argparse.Namespace) -> Any:
    """An object of a dataclass of options, with what the command line said."""
    return cls(**{one.name: getattr(args, one.name) for one in dataclasses.fields(cls)})


def given(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults, by name."""
    values = {one.name: (one, getattr(options, one.name)) for one in dataclasses.fields(options)}
    return {name: value for name, (one, value) in values.items() if value != one.default}


def words(values: Mapping[str, Any], flags: Flags | None = None) -> Iterator[str]:
    """The words of a command line that say these options."""
    for name, value in values.items():
        yield flag(name, flags)
        if value is not True:
            yield str(value)


def typed(cls: type[Options], name: str, value: Any) -> Any:
    """A value from a file in the type of its option: paths come as text, whole numbers may stand for others."""
    wanted: Any = kind(cls, name)
    return wanted(value) if wanted in (Path, float) and isinstance(value, str | int) and value is not True else value
