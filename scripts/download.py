"""Fetch what the papers' tables need (scripts/downloads.yaml), by name. bash scripts/download.sh calls it.

    python -m scripts.download --list
    python -m scripts.download ddpm_cifar10 inception

A file arrives beside its place as NAME.part, is checked, and only then moved there; a transfer that broke off goes on
where it stopped. What is there already is checked and kept: nothing is ever overwritten.
"""

import argparse
import hashlib
import http.client
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from tqdm import tqdm

from runs.cli import command
from runs.errors import UserError, one_line
from runs.files import ROOT

CATALOGUE = Path(__file__).with_name("downloads.yaml")
_CHUNK = 1 << 20


class File(NamedTuple):
    """One file of the web. digest: (md5 or sha256, hex, or the start of it); unpack, npm: see downloads.yaml."""
    url: str
    path: Path
    digest: tuple[str, str] | None = None
    size: int | None = None
    unpack: dict[str, str] | str | None = None
    npm: str | None = None

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


def catalogue(path: Path = CATALOGUE) -> dict[str, Item]:
    """All items of a YAML file, by name. Raises UserError for one that is not like downloads.yaml."""
    items = {}
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        for name, entry in content.items():
            base, to = entry.get("base", ""), entry.get("to", "")
            files = []
            for file in entry["files"]:
                digest = next(((kind, file[kind]) for kind in ("md5", "sha256") if kind in file), None)
                files.append(File(base + file["url"], Path(file.get("path") or to + file["url"]), digest,
                                  file.get("bytes"), file.get("unpack"), file.get("npm")))
            items[name] = Item(name, entry["about"], entry.get("unsure", False), files)
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no list of downloads: {one_line(error)}") from None
    return items


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
    path = root / file.path
    if file.unpack is not None and file.there(root):
        return f"{', '.join(map(str, file.results()))}: there already"
    if path.exists():
        if file.digest and not fits(path, file.digest):
            raise UserError(f"{path} is there and its {file.digest[0]} is not the published {file.digest[1]}: "
                            "move it away, and it is fetched anew")
        done = "there already" + (f", {file.digest[0]} right" if file.digest else ", no digest to check it by")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        if not _packed(file, part):
            _complete(file, part, tries, pause)
        if file.digest and not fits(part, file.digest):
            part.unlink()
            raise UserError(f"{file.url} arrived with another {file.digest[0]} than the published {file.digest[1]}: "
                            "removed; the same command fetches it anew")
        part.replace(path)
        done = "fetched" + (f", {file.digest[0]} right" if file.digest else ", no digest to check it by")
    if file.unpack is not None:
        _unpack(path, file, root)
        done += ", unpacked"
    return f"{', '.join(map(str, file.results()))}: {done}"


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
                raise UserError(f"{file.url}: the server says {error.code} {error.reason}; fetch it by hand and put "
                                f"it at {file.path}") from None
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


def _unpack(archive: Path, file: File, root: Path) -> None:
    """Take what is wanted out of an archive, each thing whole or not at all; then remove the archive."""
    try:
        if isinstance(file.unpack, dict):
            with zipfile.ZipFile(archive) as opened:
                for member, path in file.unpack.items():
                    to = root / path
                    if to.exists():
                        continue
                    to.parent.mkdir(parents=True, exist_ok=True)
                    part = to.with_name(f"{to.name}.part")
                    with opened.open(member) as source, open(part, "wb") as out:
                        shutil.copyfileobj(source, out)
                    part.replace(to)
        elif file.unpack is not None:
            _unpack_folder(archive, root / file.unpack)
    except (zipfile.BadZipFile, tarfile.TarError, KeyError, EOFError) as error:
        raise UserError(f"{archive} does not unpack: {one_line(error)}") from None
    archive.unlink()


def _unpack_folder(archive: Path, to: Path) -> None:
    """The archive's folder of the name of `to`."""
    work = to.with_name(f"{to.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            opened.extractall(work, filter="data")
    else:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(work)
    if not (work / to.name).is_dir():
        raise UserError(f"{archive} has no folder {to.name}; it was unpacked in {work}")
    (work / to.name).replace(to)
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
