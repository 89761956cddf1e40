"""Fetch what the papers' tables need (scripts/downloads.yaml), by name. bash scripts/download.sh calls it.

    python -m scripts.download --list
    python -m scripts.download ddpm_cifar10 inception

A file arrives beside its place as NAME.part, is checked, and only then moved there; a transfer that broke off goes on
where it stopped. What is there already is checked and kept: nothing is ever overwritten. Where no digest is published,
a file must at least be of its kind, and whole as far as that tells. Of several commands at once each file is fetched by
one; the others wait for it.
"""

import hashlib
import http.client
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from run.claims import only_one
from run.cli import command
from run.files import ROOT
from run.settings import read_yaml_dict
from unet_caching.errors import UserError, one_line
from unet_caching.options import option

CATALOGUE = Path(__file__).with_name("downloads.yaml")
_CHUNK = 1 << 20
_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".zip": (b"PK",), ".npz": (b"PK",), ".tgz": (b"\x1f\x8b",), ".gz": (b"\x1f\x8b",),
    **dict.fromkeys((".ckpt", ".pth", ".pt", ".bin"), (b"PK", b"\x80"))}      # before torch 1.6: a pickle


@dataclass
class File:
    """A file of the web, as downloads.yaml has it."""
    url: str
    path: Path = Path()                 # below the repository
    md5: str | None = None
    sha256: str | None = None           # of both, the start is enough
    bytes: int | None = None
    unpack: dict[str, Path] = field(default_factory=dict)       # {member of the archive, a file or folder: its path}
    npm: str | None = None              # the package that it is of
    instead: str | None = None          # what to try where the address does not serve it

    @property
    def digest(self) -> tuple[str, str] | None:
        """(md5 or sha256, hex)."""
        return ("md5", self.md5) if self.md5 else ("sha256", self.sha256) if self.sha256 else None

    @property
    def results(self) -> list[Path]:
        """The paths that are there in the end: of the file, or of what is unpacked from it."""
        return list(self.unpack.values()) or [self.path]

    def there(self, root: Path) -> bool:
        return all((root / path).exists() for path in self.results)

    def fault(self, path: Path) -> str | None:
        """What is wrong with a copy of it; None where nothing is seen."""
        if self.digest:
            kind, wanted = self.digest
            fits = digest_of(path, kind).startswith(wanted.lower())
            return None if fits else f"has another {kind} than the published {wanted}"
        return fault_of_kind(path, self.path.suffix.lower(), self.bytes)


@dataclass
class Item:
    """What one name fetches, as downloads.yaml has it."""
    about: str
    files: list[File]
    base: str = ""                      # put before the urls of files, `to` before their paths
    to: str = ""
    unsure: bool = False                # nobody has seen the files at their addresses
    instead: str | None = None

    def there(self, root: Path = ROOT) -> bool:
        return all(file.there(root) for file in self.files)


def catalogue(path: Path = CATALOGUE) -> dict[str, Item]:
    """All items of a YAML file, by name. Raises UserError for one that is not like downloads.yaml."""
    items = read_yaml_dict(path, Item)
    for name, item in items.items():
        for file in item.files:
            file.path = file.path if file.path.name else Path(item.to + file.url)
            file.url, file.instead = item.base + file.url, item.instead
            if not file.url.startswith(("http://", "https://")):
                raise UserError(f"{path}, {name}: url is {file.url!r} and should begin with http:// or https://")
            for one in (file.path, *file.results):
                if one.is_absolute() or ".." in one.parts or not one.name:
                    raise UserError(f"{path}, {name}: {one} is no path below the repository")
    return items


def digest_of(path: Path, kind: str) -> str:
    """The md5 or sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def fault_of_kind(path: Path, kind: str, size: int | None) -> str | None:
    """What is wrong with a file that no digest is known of, as its suffix and size tell; None where nothing is seen."""
    with open(path, "rb") as opened:
        begin = opened.read(512)
    if not begin:
        return "is empty"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (a login, or an error?)"
    if size is not None and size != path.stat().st_size:
        return f"has {path.stat().st_size:,} bytes and should have {size:,}"
    if kind in _MAGIC and not begin.startswith(_MAGIC[kind]):
        return f"is no {kind} file: it begins with {begin[:8]!r}"
    try:
        if begin.startswith(b"PK") and kind in _MAGIC:
            zipfile.ZipFile(path).close()           # reads the directory at its end
        elif kind == ".safetensors":
            with safe_open(path, "pt"):             # compares its size with the header
                pass
        elif kind == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif kind in (".txt", ".tsv"):
            path.read_text(encoding="utf-8")
    except (zipfile.BadZipFile, SafetensorError, ValueError, OSError, RecursionError, NotImplementedError) as error:
        return f"is a damaged {kind} file ({one_line(error)[:100]})"
    return None


def fetch(file: File, root: Path = ROOT, tries: int = 5, pause: float = 2.0) -> str:
    """Bring one file to its place; returns what was done, in words.

    Raises UserError for a file that is there and another one, for what the server refuses, and for a transfer that
    broke off `tries` times or arrived damaged.
    """
    done, path = _there(file, root), root / file.path
    if done is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{path}: waiting for another process that fetches it"
        with only_one(CATALOGUE, zlib.crc32(str(path.resolve()).encode()), waiting):
            done = _there(file, root) or _bring(file, root, tries, pause)
    return f"{', '.join(map(str, file.results))}: {done}"


def _there(file: File, root: Path) -> str | None:
    """What is said of a file that needs nothing more; None where it does. Raises UserError for another file there."""
    path = root / file.path
    if file.unpack and file.there(root):
        return "there already"
    if not path.exists():
        return None
    if fault := file.fault(path):
        raise UserError(f"{path} is there and {fault}: move it away, and it is fetched anew")
    return None if file.unpack else f"there already, {_checked(file)}"


def _checked(file: File) -> str:
    return f"{file.digest[0]} right" if file.digest else "no digest to check it by"


def _bring(file: File, root: Path, tries: int, pause: float) -> str:
    """Fetch and unpack what is not there; returns what was done, in words."""
    path = root / file.path
    part, ours = path.with_name(f"{path.name}.part"), not path.exists()
    by_hand = f"{f'try {file.instead} instead, or ' if file.instead else ''}fetch it by hand and put it at {file.path}"
    if ours:
        if not _packed(file, part):
            _complete(file, part, tries, pause, by_hand)
        if fault := file.fault(part):
            part.unlink()
            raise UserError(f"{file.url}: what arrived {fault}: removed; run the same command again, or {by_hand}")
        part.replace(path)
    done = f"{'fetched' if ours else 'there already'}, {_checked(file)}"
    if not file.unpack:
        return done
    try:
        _unpack(path, {member: root / to for member, to in file.unpack.items()})
    except Exception as error:      # what Python's modules raise for damaged, encrypted or unknown archives has no end
        if isinstance(error, OSError) and error.errno:
            raise                   # of the disk
        if ours:
            path.unlink()
        raise UserError(f"{path} does not unpack: {one_line(error)[:200]}; "
                        + (f"removed; {by_hand}" if ours else "move it away, and it is fetched anew")) from None
    path.unlink()
    return f"{done}, unpacked"


def _unpack(archive: Path, wanted: dict[str, Path]) -> None:
    """Members of an archive, files or folders, to their places; each whole or not at all."""
    work = archive.with_name(f"{archive.name}.part")
    try:
        if zipfile.is_zipfile(archive):
            shutil.unpack_archive(archive, work, "zip")
        else:
            shutil.unpack_archive(archive, work, "tar", filter="data")
        for member, to in wanted.items():
            if not (work / member).exists():
                raise ValueError(f"it has no {member}")
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists():
                (work / member).replace(to)
    finally:
        shutil.rmtree(work, ignore_errors=True)


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


def _complete(file: File, part: Path, tries: int, pause: float, by_hand: str) -> None:
    """Fetch until the whole file is in `part`."""
    for attempt in range(tries):
        try:
            if _transfer(file, part):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            reason = f"the server says {error.code} {error.reason}"
            if error.code < 500:
                raise UserError(f"{file.url}: {reason}; {by_hand}") from None
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
        if error.code != 416 or not have:
            raise
        whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)      # nothing comes after it
        if not whole:
            part.unlink()           # no part of this file
        return whole
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else file.bytes
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - have > free:
            raise UserError(f"{file.path} needs {total - have:,} bytes more and its disk has {free:,} free")
        with (open(part, "ab" if resumed else "wb") as out,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file.path.name, disable=None) as bar):
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


@dataclass(frozen=True)
class Options:
    """The command line."""
    names: tuple[str, ...] = option((), "what to fetch (--list)", word=True, metavar="NAME")
    listing: bool = option(False, "all names, and what is here", flag="list")
    catalogue: Path = option(CATALOGUE, "another list (default: %(default)s)")
    into: Path = option(ROOT, "another folder than the repository")


@command
def main(options: Options) -> None:
    items = catalogue(options.catalogue)
    if options.listing == bool(options.names):
        raise UserError("give names of what to fetch, or --list")
    if unknown := [name for name in options.names if name not in items]:
        raise UserError(f"there is no {', '.join(unknown)}: choose from {', '.join(items)}")
    for name, item in items.items() if options.listing else ():
        state = "here" if item.there(options.into) else "missing"
        print(f"{name:24}{state:9}{item.about}{' (address unsure)' if item.unsure else ''}")
    for name in options.names:
        if items[name].unsure:
            print(f"{name}: nobody has seen these files at their addresses; the host's pattern gave them", flush=True)
        for file in items[name].files:
            print(fetch(file, options.into), flush=True)


if __name__ == "__main__":
    main()
