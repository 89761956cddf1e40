"""Fetch what the papers' tables need (scripts/downloads.yaml), by name. bash scripts/download.sh calls it.

    python -m scripts.download --list
    python -m scripts.download ddpm_cifar10 inception

A file arrives beside its place as NAME.part, is checked, and only then moved there; a transfer that broke off goes on
where it stopped. What is there already is checked and kept: nothing is ever overwritten. Where no digest is published,
a file must at least be of its kind, and whole as far as that tells. Of several commands at once each file is fetched by
one; the others wait for it.
"""

import argparse
import fcntl
import hashlib
import http.client
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from run.cli import command
from run.files import ROOT
from run.settings import read_yaml_dict
from unet_caching.errors import UserError, one_line

CATALOGUE = Path(__file__).with_name("downloads.yaml")
_CHUNK = 1 << 20
# What Python's own modules raise for an archive that is damaged, encrypted, or packed in a way that they do not know.
_UNPACKING = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, LookupError, ValueError,
              NotImplementedError, RuntimeError, shutil.ReadError)


class File(NamedTuple):
    """One file of the web. digest: (md5 or sha256, hex, or the start of it); unpack, npm, instead: see
    downloads.yaml."""
    url: str
    path: Path
    digest: tuple[str, str] | None = None
    size: int | None = None
    unpack: dict[str, str] | str | None = None
    npm: str | None = None
    instead: str | None = None

    @property
    def by_hand(self) -> str:
        """What a user can do where the address does not serve the file."""
        return (f"{f'try {self.instead} instead, or ' if self.instead else ''}fetch it by hand and put it at "
                f"{self.path}")

    def results(self) -> list[Path]:
        """The paths that are there in the end: of the file, or of what is unpacked from it."""
        if self.unpack is None:
            return [self.path]
        return [Path(p) for p in (self.unpack.values() if isinstance(self.unpack, dict) else [self.unpack])]

    def there(self, root: Path) -> bool:
        return all((root / path).exists() for path in self.results())


class Item(NamedTuple):
    """What one name fetches."""
    name: str
    about: str
    unsure: bool
    files: list[File]

    def there(self, root: Path = ROOT) -> bool:
        return all(file.there(root) for file in self.files)


@dataclass
class _FileEntry:
    """A file as downloads.yaml says it."""
    url: str
    path: str | None = None
    md5: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    unpack: Any = None
    npm: str | None = None


@dataclass
class _Entry:
    """An item as downloads.yaml says it."""
    about: str
    files: list[_FileEntry]
    base: str = ""
    to: str = ""
    unsure: bool = False
    instead: str | None = None


def catalogue(path: Path = CATALOGUE) -> dict[str, Item]:
    """All items of a YAML file, by name. Raises UserError for one that is not like downloads.yaml."""
    return {name: Item(name, entry.about, entry.unsure, [_file(f"{path}, {name}", entry, file)
                                                         for file in entry.files])
            for name, entry in read_yaml_dict(path, _Entry).items()}


def _file(where: str, entry: _Entry, file: _FileEntry) -> File:
    url, to = entry.base + file.url, Path(file.path or entry.to + file.url)
    digest = ("md5", file.md5) if file.md5 else ("sha256", file.sha256) if file.sha256 else None
    unpack = file.unpack
    of_strings = isinstance(unpack, dict) and all(isinstance(text, str) for pair in unpack.items() for text in pair)
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{where}: url is {url!r} and should begin with http:// or https://")
    if not (unpack is None or isinstance(unpack, str) or of_strings):
        raise UserError(f"{where}: unpack is {unpack!r} and should be a folder, or {{member: path}}")
    found = File(url, to, digest, file.bytes, unpack, file.npm, entry.instead)
    for path in (to, *found.results()):
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise UserError(f"{where}: {path} is no path below the repository")
    return found


def digest_of(path: Path, kind: str) -> str:
    """The md5 or sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def fits(path: Path, digest: tuple[str, str] | None) -> bool:
    """Whether a file has a digest; true where none is known."""
    return digest is None or digest_of(path, digest[0]).startswith(digest[1].lower())


def fetch(file: File, root: Path = ROOT, tries: int = 5, pause: float = 2.0) -> str:
    """Bring one file to its place; returns what was done, in words.

    Raises UserError for a file that is there and another one, for what the server refuses, and for a transfer that
    broke off `tries` times or arrived damaged.
    """
    done, path = _there(file, root), root / file.path
    if done is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            done = _there(file, root) or _bring(file, root, tries, pause)
    return f"{', '.join(map(str, file.results()))}: {done}"


def _there(file: File, root: Path) -> str | None:
    """What is said of a file that needs nothing more; None where it does. Raises UserError for another file there."""
    path = root / file.path
    if file.unpack is not None and file.there(root):
        return "there already"
    if not path.exists():
        return None
    if file.digest and not fits(path, file.digest):
        raise UserError(f"{path} is there and its {file.digest[0]} is not the published {file.digest[1]}: "
                        "move it away, and it is fetched anew")
    if not file.digest and (why := fault(file, path)):
        raise UserError(f"{path} is there and {why}: move it away, and it is fetched anew")
    return f"there already, {_checked(file)}" if file.unpack is None else None


def _checked(file: File) -> str:
    return f"{file.digest[0]} right" if file.digest else "no digest to check it by"


def _bring(file: File, root: Path, tries: int, pause: float) -> str:
    """Fetch and unpack what is not there; returns what was done, in words."""
    path = root / file.path
    part, ours = path.with_name(f"{path.name}.part"), not path.exists()
    if ours:
        if not _packed(file, part):
            _complete(file, part, tries, pause)
        if file.digest and not fits(part, file.digest):
            part.unlink()
            raise UserError(f"{file.url} arrived with another {file.digest[0]} than the published {file.digest[1]}: "
                            "removed; the same command fetches it anew")
        if not file.digest and (why := fault(file, part)):
            part.unlink()
            raise UserError(f"{file.url}: what arrived {why}: removed; {file.by_hand}")
        part.replace(path)
    done = f"{'fetched' if ours else 'there already'}, {_checked(file)}"
    if file.unpack is None:
        return done
    _unpack(path, file, root, ours)
    return f"{done}, unpacked"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is being fetched; wait for another process that has it.

    Where the file system has no locks nothing is held: two commands must not fetch the same file there.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path}: waiting for another process that fetches it", flush=True)
                fcntl.flock(held, fcntl.LOCK_EX)
            except OSError:
                pass
            try:
                if not lock.exists() or not os.path.samestat(os.fstat(held.fileno()), lock.stat()):
                    continue            # removed by the process that had it; others may be at a new one
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".zip": (b"PK",), ".npz": (b"PK",), ".tgz": (b"\x1f\x8b",), ".gz": (b"\x1f\x8b",),
    **dict.fromkeys((".ckpt", ".pth", ".pt", ".bin"), (b"PK", b"\x80"))}      # before torch 1.6: a pickle


def fault(file: File, path: Path) -> str | None:
    """What is wrong with a file that no digest is known of, as its kind and size tell; None where nothing is seen."""
    size = path.stat().st_size
    with open(path, "rb") as opened:
        begin = opened.read(512)
    if not size:
        return "is empty"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (a login, or an error?)"
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes and should have {file.size:,}"
    kind = file.path.suffix.lower()
    if kind in _MAGIC and not begin.startswith(_MAGIC[kind]):
        return f"is no {kind} file: it begins with {begin[:8]!r}"
    try:
        if begin.startswith(b"PK") and kind in _MAGIC:
            with zipfile.ZipFile(path):             # the directory at its end
                pass
        elif kind == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif kind == ".safetensors":
            return _cut_short(path, size)
        elif kind in (".txt", ".tsv"):
            path.read_text(encoding="utf-8")
    except (zipfile.BadZipFile, ValueError, OSError, RecursionError, NotImplementedError) as error:
        return f"is a damaged {kind} file ({one_line(error)[:100]})"
    return None


def _cut_short(path: Path, size: int) -> str | None:
    """What is wrong with the length of a safetensors file, by its header."""
    with open(path, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            return "is no .safetensors file, or cut short"
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"has {size:,} bytes and says that it has {wanted:,}"


def _packed(file: File, part: Path) -> bool:
    """Let npm fetch a package of its own, from whichever registry its configuration names; False where it does not."""
    if file.npm is None or shutil.which("npm") is None:
        return False
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        done = subprocess.run(["npm", "pack", file.npm, "--silent"], cwd=folder, capture_output=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            return False
        packed[0].replace(part)
    return True


def _complete(file: File, part: Path, tries: int, pause: float) -> None:
    """Fetch until the whole file is in `part`."""
    for attempt in range(tries):
        try:
            if _transfer(file, part):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(f"{file.url}: the server says {error.code} {error.reason}; {file.by_hand}") from None
            reason = f"the server says {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = one_line(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < tries:
            time.sleep(pause * 2 ** attempt)
    have = part.stat().st_size if part.exists() else 0
    raise UserError(f"{file.url}: {reason}, {tries} times; {have:,} bytes are kept, and the same command goes on from "
                    "there")


def _transfer(file: File, part: Path) -> bool:
    """One request, from where `part` ends. Returns whether all bytes are there now."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(file.url, headers={"User-Agent": "Mozilla/5.0 (scripts/download.py)"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:      # nothing after what we have: complete, or no part of this file
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                return True
            part.unlink()
            return False
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else file.size
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - have > free:
            raise UserError(f"{file.path} needs {total - have:,} bytes more and its disk has {free:,} free")
        with (open(part, "ab" if resumed else "wb") as out,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file.path.name, disable=None) as bar):
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def _unpack(archive: Path, file: File, root: Path, ours: bool) -> None:
    """Take what is wanted out of an archive, each thing whole or not at all; then remove the archive.

    ours: whether it was fetched just now: a damaged one is removed then.
    """
    try:
        if isinstance(file.unpack, dict):
            _unpack_members(archive, {member: root / path for member, path in file.unpack.items()})
        elif file.unpack is not None:
            _unpack_folder(archive, root / file.unpack)
    except _UNPACKING as error:
        if ours:
            archive.unlink()
        raise UserError(f"{archive} does not unpack: {one_line(error)[:200]}; "
                        + (f"removed; {file.by_hand}" if ours else "move it away, and it is fetched anew")) from None
    archive.unlink()


def _unpack_members(archive: Path, wanted: dict[str, Path]) -> None:
    """Single files of a zip, to their places."""
    with zipfile.ZipFile(archive) as opened:
        for member, to in wanted.items():
            if to.exists():
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            part = to.with_name(f"{to.name}.part")
            try:
                with opened.open(member) as source, open(part, "wb") as out:
                    shutil.copyfileobj(source, out)
                part.replace(to)
            finally:
                part.unlink(missing_ok=True)


def _unpack_folder(archive: Path, to: Path) -> None:
    """The archive's folder of the name of `to`. Raises ValueError where it has none."""
    to.parent.mkdir(parents=True, exist_ok=True)
    work = to.with_name(f"{to.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened:
                opened.extractall(work, filter="data")
        else:
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(work)
        if not (work / to.name).is_dir():
            raise ValueError(f"it has no folder {to.name}")
        (work / to.name).replace(to)
    finally:
        with suppress(OSError):
            shutil.rmtree(work)


def listing(items: dict[str, Item], root: Path = ROOT) -> Iterator[str]:
    """A line or two per item."""
    for item in items.values():
        state = "here" if item.there(root) else "missing"
        yield f"{item.name:20}{state:9}{item.about}{' (address unsure)' if item.unsure else ''}"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch (--list)")
    parser.add_argument("--list", action="store_true", help="all names, and what is here")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, help="another list (default: %(default)s)")
    parser.add_argument("--into", type=Path, default=ROOT, help="another folder than the repository")
    args = parser.parse_args()
    items = catalogue(args.catalogue)
    if args.list == bool(args.names):
        raise UserError("give names of what to fetch, or --list")
    unknown = [name for name in args.names if name not in items]
    if unknown:
        raise UserError(f"there is no {', '.join(unknown)}: choose from {', '.join(items)}")
    if args.list:
        print("\n".join(listing(items, args.into)))
    for name in args.names:
        if items[name].unsure:
            print(f"{name}: nobody has seen these files at their addresses; the host's pattern gave them", flush=True)
        for file in items[name].files:
            print(fetch(file, args.into), flush=True)


if __name__ == "__main__":
    main()
