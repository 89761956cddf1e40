"""Fetch the files of the papers' tables (scripts/downloads.yaml), by name. bash scripts/download.sh calls it.

    python -m scripts.download --list
    python -m scripts.download ddpm_cifar10 inception

A file arrives beside its place as NAME.part, is checked, and is then moved there. A transfer that broke off goes on
where it stopped. Existing files are checked and kept: nothing is ever overwritten. If several commands run at once, one
fetches a file, and the others wait for it.
"""

import hashlib
import http.client
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

from tqdm import tqdm

from run.claims import only_one
from run.cli import command
from run.files import ROOT
from run.settings import read_yaml_dict
from unet_caching.errors import UserError, one_line
from unet_caching.options import option

CATALOGUE = Path(__file__).with_name("downloads.yaml")
_CHUNK = 1 << 20
NPM = "npm:"             # before the name of a package that npm fetches
_TRIES, _PAUSE = 5, 2.0     # of a transfer, and seconds between the first two


@dataclass
class File:
    """A file to download, in downloads.yaml."""
    url: str                            # http(s)://..., or npm:NAME@VERSION
    path: Path = Path()                 # below the repository
    md5: str | None = None
    sha256: str | None = None           # the start of either digest is enough
    bytes: int | None = None
    unpack: dict[str, Path] = field(default_factory=dict)       # {member of the archive, a file or folder: its path}
    instead: str | None = None          # what to try if the address does not serve it

    @property
    def digest(self) -> tuple[str, str] | None:
        """(md5 or sha256, hex)."""
        return ("md5", self.md5) if self.md5 else ("sha256", self.sha256) if self.sha256 else None

    @property
    def results(self) -> list[Path]:
        """The final paths: of the file, or of the members unpacked from it."""
        return list(self.unpack.values()) or [self.path]

    def there(self, root: Path) -> bool:
        return all((root / path).exists() for path in self.results)

    @property
    def checked(self) -> str:
        """How a file without a fault was checked."""
        return f"{self.digest[0]} right" if self.digest else "no digest to check it by"

    def fault(self, path: Path) -> str | None:
        """The fault of a copy of the file; None if none is seen."""
        if self.digest:
            kind, wanted = self.digest
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            return None if found.startswith(wanted.lower()) else f"has another {kind} than the published {wanted}"
        if self.bytes is not None and self.bytes != path.stat().st_size:
            return f"has {path.stat().st_size:,} bytes and should have {self.bytes:,}"
        with open(path, "rb") as file:
            begin = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower()
        if begin.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "is a web page (a login, or an error?)"
        return None if begin else "is empty"


@dataclass
class Item:
    """The files of one name in downloads.yaml."""
    about: str
    files: list[File]
    base: str = ""                      # the start of the files' urls, as `to` is of their paths
    to: str = ""
    unsure: bool = False                # nobody has seen the files at their addresses
    instead: str | None = None

    def there(self, root: Path = ROOT) -> bool:
        return all(file.there(root) for file in self.files)


def catalogue(path: Path = CATALOGUE) -> dict[str, Item]:
    """All items of a YAML file, by name. Raises UserError for a file unlike downloads.yaml."""
    items = read_yaml_dict(path, Item)
    for name, item in items.items():
        for file in item.files:
            file.path = file.path if file.path.name else Path(item.to + file.url)
            file.url, file.instead = item.base + file.url, item.instead
            if not file.url.startswith(("http://", "https://", NPM)):
                raise UserError(f"{path}, {name}: url is {file.url!r} and should begin with http:// or https://")
            for one in (file.path, *file.results):
                if one.is_absolute() or ".." in one.parts or not one.name:
                    raise UserError(f"{path}, {name}: {one} is not a path below the repository")
    return items


def fetch(file: File, root: Path = ROOT) -> str:
    """Bring one file to its place. Returns what was done, in words.

    Raises UserError if another file is in its place, if the server refuses, and if the transfer broke off too often or
    the file arrived damaged.
    """
    path = root / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(CATALOGUE, zlib.crc32(str(path.resolve()).encode()),
                  f"{path}: waiting for another process that fetches it"):
        if file.unpack and file.there(root):
            done = "there already"
        elif path.exists():
            if fault := file.fault(path):
                raise UserError(f"{path} exists and {fault}: move it away, and run the same command again")
            done = f"there already, {file.checked}"
        else:
            _bring(file, path)
            done = f"fetched, {file.checked}"
        if path.exists() and file.unpack:
            _unpack(path, {member: root / to for member, to in file.unpack.items()})
            done += ", unpacked"
    return f"{', '.join(map(str, file.results))}: {done}"


def _bring(file: File, path: Path) -> None:
    """Fetch a missing file, and check it."""
    part = path.with_name(f"{path.name}.part")
    by_hand = f"{f'try {file.instead} instead, or ' if file.instead else ''}fetch it by hand and put it at {file.path}"
    if file.url.startswith(NPM):
        _pack(file, part, by_hand)
    else:
        _complete(file, part, by_hand)
    if fault := file.fault(part):
        part.unlink()
        raise UserError(f"{file.url}: the file that arrived {fault}, and was removed: run the same command again, or "
                        f"{by_hand}")
    part.replace(path)


def _unpack(archive: Path, wanted: dict[str, Path]) -> None:
    """Move members of an archive, files or folders, to their places, each whole or not at all, and remove the archive.
    """
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
    except Exception as error:      # a damaged, encrypted or unknown archive may raise anything
        if isinstance(error, OSError) and error.errno:
            raise                   # the disk's error
        raise UserError(f"{archive} does not unpack: {one_line(error)[:200]}: move it away, and run the same command "
                        "again") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    archive.unlink()


def _pack(file: File, part: Path, by_hand: str) -> None:
    """Let npm fetch a package, from the registry of its own settings."""
    if shutil.which("npm") is None:
        raise UserError(f"{file.url} needs npm, which is part of Node.js: install it, or {by_hand}")
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        done = subprocess.run(["npm", "pack", file.url.removeprefix(NPM), "--silent"], cwd=folder, capture_output=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            raise UserError(f"{file.url}: npm cannot fetch it: {by_hand}")
        packed[0].replace(part)


def _complete(file: File, part: Path, by_hand: str) -> None:
    """Fetch until the whole file is in `part`."""
    for attempt in range(_TRIES):
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
        if attempt + 1 < _TRIES:
            time.sleep(_PAUSE * 2 ** attempt)
    have = part.stat().st_size if part.exists() else 0
    raise UserError(f"{file.url}: {reason}, {_TRIES} times; {have:,} bytes are kept, and the same command goes on from "
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
        if error.code == 416 and have:      # nothing is left to send; the file is checked later
            return True
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else file.bytes
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - have > free:
            raise UserError(f"{file.path} needs {total - have:,} bytes more, and its disk has {free:,} free")
        with (open(part, "ab" if resumed else "wb") as out,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file.path.name, disable=None) as bar):
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


@dataclass(frozen=True)
class Options:
    names: tuple[str, ...] = option((), "what to fetch (--list shows the names)", word=True, metavar="NAME")
    listing: bool = option(False, "print all names, and which files are here", flag="list")
    catalogue: Path = option(CATALOGUE, "list of files (default: scripts/downloads.yaml)")
    into: Path = option(ROOT, "folder (default: the repository)")


@command
def main(options: Options) -> None:
    items = catalogue(options.catalogue)
    if options.listing == bool(options.names):
        raise UserError("name what to fetch, or use --list")
    if unknown := [name for name in options.names if name not in items]:
        raise UserError(f"no download {', '.join(unknown)}: choose from {', '.join(items)}")
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
