"""Schemas of files that a person may edit. Dataclasses are the schemas, and content is checked before it is used.

Errors are ValueErrors that name the key and what would be right.
"""

import json
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_WORDS: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false",
                          Path: "a path", dict: "keys with values", list: "a list", tuple: "a list",
                          types.NoneType: "null"}
_NUMBERS = re.compile(r"\[\s+(-?\d[\d.e+-]*(?:,\s+-?\d[\d.e+-]*)*)\s+\]")
Built = TypeVar("Built")


class AtLeast(NamedTuple):
    """The least value of a number: Annotated[int, AtLeast(1)]."""
    value: float


def read_json(path: Path | str) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, if it is missing or damaged."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(text, path)


def parse_json(text: str | bytes, path: Path | str) -> Any:
    """Parse JSON from a file. Raises ValueError, naming the file, if it is damaged."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def readable(content: object) -> str:
    """Format JSON with each list of numbers on one line."""
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(content, indent=1))


def fault(value: object, wanted: Any, where: str = "") -> str | None:
    """What is wrong with a value from a JSON file, and where; None if it has the type `wanted`.

    wanted: a type of JSON's values, list[...], tuple[a, b], tuple[a, ...], dict[str, ...], a union, Annotated[...,
    AtLeast(n)], Path (text), or a dataclass, for an object with its fields as keys. Numbers must be finite. where: the
    value's name in the message.
    """
    return next(_faults(value, wanted, where), None)


def check(value: object, wanted: Any, path: Path | str) -> None:
    """Raise a ValueError, naming the file, if a value does not have the type `wanted` (`fault`)."""
    if found := fault(value, wanted):
        raise ValueError(f"{path} is damaged: {found}")


def build(value: Any, wanted: type[Built]) -> Built:
    """Convert a value without fault to the type `wanted`: to dataclasses, tuples, paths and floats.

    Raises what a dataclass raises for values that do not go together.
    """
    return _built(value, wanted)


def _built(value: Any, wanted: Any) -> Any:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _built(value, args[0])
    if origin in (types.UnionType, typing.Union):
        return _built(value, next(one for one in args if fault(value, one) is None))
    if is_dataclass(wanted):
        hints = typing.get_type_hints(wanted)
        return typing.cast(Any, wanted)(**{name: _built(one, hints[name]) for name, one in value.items()})
    if origin is list:
        return [_built(one, args[0]) for one in value]
    if origin is tuple:
        return tuple(map(_built, value, args[:1] * len(value) if ... in args else args))
    if origin is dict:
        return {key: _built(one, args[1]) for key, one in value.items()}
    return wanted(value) if wanted in (float, Path) else value


def _faults(value: object, wanted: Any, where: str) -> Iterator[str]:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return
    if origin in (types.UnionType, typing.Union):
        inner = [one for one in args if one is not types.NoneType]
        if value is None and len(inner) < len(args):
            return
        if len(inner) == 1:
            yield from _faults(value, inner[0], where)
        elif all(fault(value, one) for one in inner):
            yield _said(value, wanted, where)
    elif origin is typing.Annotated:
        yield from _faults(value, args[0], where)
        if isinstance(value, int | float) and value < args[1].value:
            yield f"{_named(where)} is {value} and should be {args[1].value} or more"
    elif is_dataclass(wanted):
        yield from _of_dataclass(value, wanted, where)
    elif not _is(value, origin or wanted):
        yield _said(value, wanted, where)
    elif origin is tuple and ... not in args:
        if len(typing.cast(list, value)) != len(args):
            yield _said(value, wanted, where)
            return
        for i, (one, kind) in enumerate(zip(typing.cast(list, value), args, strict=True)):
            yield from _faults(one, kind, f"{where}[{i}]")
    elif origin in (list, tuple):
        for i, one in enumerate(typing.cast(list, value)):
            yield from _faults(one, args[0], f"{where}[{i}]")
    elif origin is dict:
        for key, one in typing.cast(dict, value).items():
            yield from _faults(one, args[1], f"{where}.{key}" if where else str(key))


def _of_dataclass(value: object, wanted: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _said(value, dict, where)
        return
    hints, known = typing.get_type_hints(wanted, include_extras=True), {one.name: one for one in fields(wanted)}
    inside = f"{where} " if where else "it "
    for name, one in known.items():
        if name in value:
            yield from _faults(value[name], hints[name], f"{where}.{name}" if where else name)
        elif one.default is MISSING and one.default_factory is MISSING:
            yield f"{inside}has no {name}"
    yield from (f"{inside}has an unknown key {key}" for key in value if key not in known)


def _is(value: object, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    kind = {tuple: list, Path: str}.get(kind, kind)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _said(value: object, wanted: Any, where: str) -> str:
    return f"{_named(where)} is {_short(value)} and should be {_words(wanted)}"


def _named(where: str) -> str:
    return where or "what it holds"


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return _WORDS[type(value)]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(wanted: Any) -> str:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    if origin is typing.Annotated:
        return _words(args[0])
    if origin is tuple and ... not in args:
        return f"a list of {len(args)}"
    return "keys with values" if is_dataclass(wanted) else _WORDS[origin or wanted]
