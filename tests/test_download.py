"""Downloads against a server of this machine that breaks off."""

import hashlib
import http.server
import io
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from forked import Forked

from eval.tables.arms import runs_of
from eval.tables.paper import find
from scripts import download
from scripts.download import File, catalogue, fetch
from unet_caching.errors import UserError

CONTENT = bytes(range(256)) * 4096      # 1 MiB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` by path, byte ranges included; each answer stops after `limit` bytes; `log`: the ranges asked."""
    files: ClassVar[dict] = {}
    log: ClassVar[list] = []
    limit, ranges, slow = None, True, False

    def do_GET(self):
        data, wanted = self.files.get(self.path), self.headers.get("Range")
        self.log.append(wanted)
        if data is None:
            self.send_error(404)
            return
        first = int(wanted[6:-1]) if wanted and self.ranges else None
        code = 200 if first is None else 206 if first < len(data) else 416
        self.send_response(code)
        if code != 200:
            self.send_header("Content-Range", f"bytes {f'{first}-{len(data) - 1}' if code == 206 else '*'}/{len(data)}")
        data = b"" if code == 416 else data[first or 0:]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for at in range(0, len(data[:self.limit]), 1 << 16):
            self.wfile.write(data[:self.limit][at:at + (1 << 16)])
            time.sleep(0.05 * self.slow)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"files": {"/x": CONTENT}, "log": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()
        thread.join()


def one(server, **other) -> File:
    return File(**{"url": f"{server.url}/x", "path": Path("a/b.bin"), "md5": MD5} | other)


def packed(**files: bytes) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)      # without the time
        return buffer.getvalue()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(download, "_TRIES", 2)
    monkeypatch.setattr(download, "_PAUSE", 0)


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.limit = 300_000
    with pytest.raises(UserError, match=r"2 times; 600,000 bytes are kept, and the same command goes on from there"):
        fetch(one(server), tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin.part"]
    assert fetch(one(server), tmp_path).endswith("fetched, md5 right")
    assert (tmp_path / "a/b.bin").read_bytes() == CONTENT
    assert server.log == [None, *(f"bytes={n}-" for n in (300_000, 600_000, 900_000))]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_a_server_without_ranges_is_started_over(server, tmp_path):
    server.limit, server.ranges = 300_000, False
    with pytest.raises(UserError, match="300,000 bytes are kept"):
        fetch(one(server), tmp_path)
    server.limit = None
    assert "fetched, md5 right" in fetch(one(server), tmp_path)


def test_a_part_that_is_there_is_taken_or_thrown_away(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.bin.part").write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match="removed: run the same command again"):
        fetch(one(server), tmp_path)
    (tmp_path / "a/b.bin.part").write_bytes(CONTENT)
    assert "fetched" in fetch(one(server), tmp_path) and len(server.log) == 2
    assert (tmp_path / "a/b.bin").read_bytes() == CONTENT


def test_what_is_there_is_kept_and_never_overwritten(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and has another md5 than the published"):
        fetch(one(server), tmp_path)
    assert fetch(one(server, md5=None), tmp_path).endswith("there already, no digest to check it by")
    assert (tmp_path / "a/b.bin").read_bytes() == b"mine" and server.log == []


def test_damage_is_not_kept(server, tmp_path):
    with pytest.raises(UserError, match="the file that arrived has another sha256 than the published 00ff"):
        fetch(one(server, md5=None, sha256="00ff"), tmp_path)
    with pytest.raises(UserError, match="the server says 404"):
        fetch(one(server, url=f"{server.url}/none"), tmp_path)
    with pytest.raises(UserError, match="refused"):
        fetch(one(server, url="http://127.0.0.1:9/x"), tmp_path)
    assert not any((tmp_path / "a").iterdir())
    begin = hashlib.sha256(CONTENT).hexdigest()[:8]
    assert fetch(one(server, md5=None, sha256=begin), tmp_path).endswith("sha256 right")


def test_archives_are_unpacked(server, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/one.txt").write_text("one")
    tarred = shutil.make_archive(str(tmp_path / "set"), "gztar", tmp_path, "set")
    server.files |= {"/z": packed(**{"in/side.json": b"[]"}), "/t": Path(tarred).read_bytes()}
    tmp_path /= "there"
    single = File(f"{server.url}/z", Path("z.zip"), unpack={"in/side.json": Path("p/out.json")})
    assert fetch(single, tmp_path) == "p/out.json: fetched, no digest to check it by, unpacked"
    folder = File(f"{server.url}/t", Path("t.tar.gz"), unpack={"set": Path("q/set")})
    fetch(folder, tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["p/out.json",
                                                                                               "q/set/one.txt"]
    asked = len(server.log)
    assert "there already" in fetch(single, tmp_path) and "there already" in fetch(folder, tmp_path)
    assert len(server.log) == asked


def test_two_commands_at_once_fetch_one_file_once(server, tmp_path):
    """Each with its own process; the others begin in the middle of the first's transfer."""
    server.slow = True
    listed = tmp_path / "list.yaml"
    listed.write_text(yaml.safe_dump({"x": {"about": "a", "base": f"{server.url}/", "to": "d/",
                                            "files": [{"url": "x", "md5": MD5}]}}))

    def start(name: str) -> Forked:
        return Forked(download.main, "x", "--catalogue", listed, "--into", tmp_path, log=tmp_path / name)

    first = start("first")
    while not (tmp_path / "d/x.part").exists():
        assert first.running()
        time.sleep(0.01)
    others = [start("second"), start("third")]
    assert [process.wait() for process in (first, *others)] == [0, 0, 0]
    assert (tmp_path / "d/x").read_bytes() == CONTENT and len(server.log) == 1
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["x"]
    assert first.output.endswith("fetched, md5 right\n")
    assert all("waiting for another process" in one.output and "there already, md5 right" in one.output
               for one in others)


@pytest.mark.parametrize(("content", "message"), [
    (b"<!DOCTYPE html><title>Log in</title>", "a web page"), (b"\n  <html><body>Not here", "a web page"),
    (b"", "is empty"), (b"abc", "has 3 bytes and should have 4")])
def test_without_a_digest_what_is_no_such_file_is_refused(server, tmp_path, content, message):
    server.files["/y"] = content
    file = File(f"{server.url}/y", Path("d/model.ckpt"), instead="the other one",
                bytes=4 if content == b"abc" else None)
    with pytest.raises(UserError, match=f"{message}.*try the other one instead, or fetch it by hand and put it at d/"):
        fetch(file, tmp_path)
    assert not any((tmp_path / "d").iterdir())
    (tmp_path / "d/model.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=f"exists and .*{message}.*move it away"):
        fetch(file, tmp_path)


def changed(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + bytes([value]) + content[at + 1:]


_ZIP = packed(**{"set/a": b"abc" * 999})


@pytest.mark.parametrize("content", [changed(_ZIP, 45, 0xff), packed(other=b"1")], ids=["damaged", "another"])
def test_archives_that_do_not_unpack_leave_nothing_beside(server, tmp_path, content):
    server.files["/z"] = content
    for unpack in ({"set": Path("set")}, {"set/a": Path("a")}):
        with pytest.raises(UserError, match=r"does not unpack: .*move it away"):
            fetch(File(f"{server.url}/z", Path("z.zip"), unpack=unpack), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["z.zip"]


@pytest.mark.parametrize(("content", "message"), [
    ("- a\n- b", "holds a list: write keys"), ("a: 5", "list.yaml, a: .* is 5 and should be keys with values"),
    ("a: {about: x}", "it has no files"),
    ("a: {about: x, files: [{url: ftp://x, path: y}]}", "should begin with http"),
    ("a: {about: x, files: [{url: http://x, path: ../y}]}", "not a path below the repository"),
    ("a: {about: x, files: [{url: http://x, path: y, md6: z}]}", "md6"),
    ("a: {about: x, files: [{url: http://x, path: y, unpack: [1]}]}", "list.yaml, a: ")])
def test_lists_that_are_none(tmp_path, content, message):
    (tmp_path / "list.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        catalogue(tmp_path / "list.yaml")


def test_npm_fetches_its_packages(monkeypatch, tmp_path):
    """From the registry that it is set up for; where it cannot, the error says what to do."""
    file = File("npm:x@1", Path("d/x.tgz"), md5=MD5)
    (tmp_path / "content").write_bytes(CONTENT)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$*" = "pack x@1 --silent" ] && cp "{tmp_path}/content" x-1.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    fetch(file, tmp_path / "a")
    assert (tmp_path / "a/d/x.tgz").read_bytes() == CONTENT
    npm.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match=r"npm cannot fetch it: fetch it by hand and put it at d/x\.tgz"):
        fetch(file, tmp_path / "b")
    npm.unlink()
    monkeypatch.setenv("PATH", str(npm.parent))
    with pytest.raises(UserError, match="npm:x@1 needs npm"):
        fetch(file, tmp_path / "b")


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["scripts.download", *args])
    download.main()


def test_the_command(server, monkeypatch, capsys, tmp_path):
    listed = tmp_path / "list.yaml"
    thing = {"about": "a thing", "base": f"{server.url}/", "to": "d/", "unsure": True,
             "files": [{"url": "x", "md5": MD5}]}
    listed.write_text(yaml.safe_dump({"thing": thing}))
    where = ["--catalogue", str(listed), "--into", str(tmp_path)]
    run(monkeypatch, "thing", *where)
    assert (tmp_path / "d/x").read_bytes() == CONTENT
    run(monkeypatch, "--list", *where)
    assert re.search(r"thing +here +a thing \(address unsure\)", capsys.readouterr().out)
    for bad in (["nothing", *where], where, ["thing", "--list", *where]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *bad)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_downloads_agree_with_the_configs():
    """Paths and md5 of the published checkpoints are said in configs/ too, where they are checked when loaded."""
    files = {file.path: file for item in catalogue().values() for file in item.files}
    seen = set()
    for row in runs_of(find("2")).arms:
        assert files[Path(row.run.config.checkpoint)].digest == ("md5", row.run.config.md5)
        assert files[Path(row.run.config.checkpoint)].url in row.run.spec.config.read_text()
        seen.add(row.run.config.name)
    assert len(seen) == 3
    for item in catalogue().values():
        for file in item.files:
            assert file.url.startswith(("http", "npm:")) and not file.path.is_absolute()
            assert file.path.parts[0] in ("checkpoints", "data")      # which git ignores
            assert not file.digest or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{32}|[0-9a-f]{64}", file.digest[1])
