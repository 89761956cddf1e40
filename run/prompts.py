"""Read prompts from the files of public prompt sets. Prompt i belongs to image i."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from unet_caching.errors import UserError, one_line

_FIELDS = ("prompt", "caption")     # names of a column or JSON key, in upper or lower case; the first one found counts


def read_prompts(path: Path | str) -> list[str]:
    """The prompts of a file, in its order. White space within a prompt becomes one space.

    .txt            one per line
    .csv, .tsv      the column prompt or caption, in any case, as in PartiPrompts.tsv (Prompt; 1,632 rows)
    .json           a list of strings, or of objects with the key prompt or caption;
                    or COCO's captions_val2017.json: the first caption in `annotations` of each image in `images`

    Raises UserError for a file that is missing, empty or unreadable, and for an empty prompt, with its place.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str], Iterator[tuple[str, object]]]] = {
        ".txt": _lines, ".csv": _csv, ".tsv": _tsv, ".json": _json}
    if not path.is_file():
        raise UserError(f"no prompts file {path}")
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: prompts are read from {', '.join(readers)}")
    prompts = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        for place, prompt in readers[path.suffix.lower()](path, text):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{path}, {place}: no prompt there, and each image needs one")
            prompt.encode()                                 # fails for half a surrogate pair, which UTF-8 cannot write
            prompts.append(" ".join(prompt.split()))
    except (OSError, ValueError, csv.Error, RecursionError) as error:       # ValueError: from JSON or UTF-8
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def prompts_sha256(prompts: Sequence[str]) -> str:
    """The digest of a list of prompts: sha256 (hex) of the prompts, joined by line breaks."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    # splitlines would also break at other characters, which a prompt may contain.
    for number, line in enumerate(text.rstrip("\r\n").split("\n") if text.strip() else (), 1):
        yield f"line {number}", line


def _csv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    rows = csv.reader(io.StringIO(text.rstrip("\r\n")), strict=True)
    column = _column(path, next(rows, []))
    for row in rows:
        yield f"line {rows.line_num}", row[column] if column < len(row) else None


def _tsv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Quotes belong to a prompt, as in PartiPrompts.tsv, unless they enclose the field, as spreadsheets write them."""
    lines = _lines(path, text)
    column = _column(path, next(lines, ("", ""))[1].split("\t"))
    for place, line in lines:
        row = line.split("\t")
        yield place, _unquoted(row[column]) if column < len(row) else None


def _unquoted(field: str) -> str:
    quoted = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', field)
    return quoted[1].replace('""', '"') if quoted else field


def _column(path: Path, header: Sequence[str]) -> int:
    names = [name.strip().lower() for name in header]
    for field in _FIELDS:
        if field in names:
            return names.index(field)
    raise UserError(f"{path} has no column {' or '.join(_FIELDS)}; its first line is {', '.join(header)!r:.80}")


def _json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    content = json.loads(text) if text.strip() else []
    if isinstance(content, Mapping) and {"images", "annotations"} <= content.keys():
        yield from _coco(path, content)
    elif isinstance(content, list):
        for i, entry in enumerate(content):
            if isinstance(entry, Mapping):
                named = {key.lower(): value for key, value in entry.items()}
                entry = next((named[field] for field in _FIELDS if field in named), None)
            yield f"entry {i}", entry
    else:
        raise UserError(f"{path} is neither a list of prompts nor COCO's captions (images, annotations)")


def _coco(path: Path, content: Mapping) -> Iterator[tuple[str, object]]:
    first: dict = {}
    try:
        for annotation in content["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"])
        images = [image["id"] for image in content["images"]]
    except (KeyError, TypeError):
        raise UserError(f"{path} has images and annotations, but not in the form of COCO's captions_val2017.json"
                        ) from None
    for image in images:
        yield f"image {image}", first.get(image)
