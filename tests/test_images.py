"""Sets of images: what is read, in which order, and what is refused in one line."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import save_samples
from PIL import Image

from eval.metrics.images import check_finished, open_images
from run.folder import seeds_there
from unet_caching.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (14, 8, 10, 3), np.uint8)
SETTINGS = {"interval": 5}


def read(images, n=4, ranges=None):
    return np.concatenate(list(images.batches(n, ranges)))


def test_a_sample_folder_is_read_by_seed_in_batches(tmp_path):
    save_samples(tmp_path, PIXELS[:5], first=998, settings=SETTINGS)
    (tmp_path / "grid.png").write_bytes(b"a picture of all samples, not one of them")
    images = open_images(tmp_path)
    assert (len(images), images.seeds, images.size) == (5, [998, 999, 1000, 1001, 1002], (8, 10))
    assert [len(batch) for batch in images.batches(2)] == [2, 2, 1]
    assert np.array_equal(read(images, 2), PIXELS[:5]) and images.run() == {"settings": SETTINGS}


def test_a_plain_folder_is_read_by_name(tmp_path):
    """It holds PNG and JPEG, text and the like beside them, and no images of other kinds."""
    for name, image in zip("cab", PIXELS, strict=False):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    images = open_images(tmp_path)
    assert images.names == ["a.png", "b.png", "c.png"] and images.seeds is None and images.run() is None
    assert np.array_equal(read(images, 2), PIXELS[[1, 2, 0]])
    Image.fromarray(PIXELS[1]).save(tmp_path / "d.JPG", quality=100)
    (tmp_path / "notes.txt").write_text("not an image")
    assert open_images(tmp_path).names[3:] == ["d.JPG"]
    Image.fromarray(PIXELS[2]).save(tmp_path / "c.webp")
    with pytest.raises(UserError, match=r"c.webp .* in an image format that is not read here"):
        open_images(tmp_path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed, save_samples])
@pytest.mark.parametrize("ranges", [None, [range(3, 5), range(9, 14)], [range(13, 14)]])
def test_ranges_of_images(tmp_path, write, ranges):
    path = tmp_path / "x.npz"
    write(path, PIXELS)
    batches = list(open_images(path).batches(3, ranges))
    wanted = PIXELS if ranges is None else np.concatenate([PIXELS[r.start:r.stop] for r in ranges])
    assert np.array_equal(np.concatenate(batches), wanted) and max(map(len, batches)) <= 3


@pytest.mark.parametrize("seeds", [range(3), [1, 2], [4, 0, 2]])
def test_exactly_the_seeds_of_the_command_line(tmp_path, seeds):
    """Whatever else is there, of a folder and of an npz alike."""
    folder = save_samples(tmp_path / "x", PIXELS[:6])
    (folder / "000/000001 copy.png").write_bytes(b"anything")
    np.savez_compressed(tmp_path / "x.npz", PIXELS[:6])
    for path in (folder, tmp_path / "x.npz"):
        images = open_images(path, seeds)
        assert images.seeds == sorted(seeds) and len(images) == len(seeds)
        assert np.array_equal(read(images, 2), PIXELS[sorted(seeds)])
        assert images.reopen().fingerprint == images.fingerprint != open_images(path, [0, 5]).fingerprint
    assert seeds_there(folder) == list(range(6))


def png_of_16_bits(path):
    """RGB of 16 bits a channel, which Pillow reads but does not write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS[0] * np.uint16(257))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 8, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def claiming(size: int) -> bytes:
    """A PNG whose header claims so many pixels a side."""
    with io.BytesIO() as buffer:
        Image.new("RGB", (1, 1)).save(buffer, format="PNG")
        content = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", size, size) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def picture(path, seed=2):
    Image.fromarray(PIXELS[seed]).save(path)


@pytest.mark.parametrize("spoil, call, message", [
    (lambda d: [path.unlink() for path in d.glob("000/*")], {}, "no PNG images"),
    (lambda d: None, {"seeds": range(5)}, r"2 of 5 images; missing seeds 2-4"),
    (lambda d: None, {"seeds": [7]}, r"0 of 1 images; missing seeds 7"),
    (lambda d: save_samples(d, PIXELS[:1, :5], first=2), {}, r"mixed sizes: .*000002.png is 10x5"),
    (lambda d: (d / "000/000001.png").write_bytes((d / "000/000001.png").read_bytes()[:150]), {},
     "000001.png is truncated"),
    (lambda d: (d / "000/000001.png").write_bytes(b"text"), {}, "000001.png is truncated or not"),
    (lambda d: (d / "000/000001.png").write_bytes(claiming(60_000)), {}, "truncated or not an"),
    (lambda d: (d / "000/000001.png").write_bytes(claiming(9_000)), {}, "claims to have 9000x9000"),
    (lambda d: Image.fromarray(PIXELS[0]).convert("RGBA").save(d / "000/000000.png"), {}, "mode RGBA"),
    (lambda d: Image.fromarray(PIXELS[0, :, :, 0].astype(np.uint16)).save(d / "000/000000.png"), {}, "mode I;16"),
    (lambda d: png_of_16_bits(d / "000/000000.png"), {}, "000000.png has 16 bits a channel"),
    (lambda d: picture(d / "000/1.png"), {}, "two images of seed 1"),
    (lambda d: picture(d / "000/000002.jpg"), {}, "000002.jpg and 0 more lie among"),
    (lambda d: picture(d / "000/000002.PNG"), {}, "000002.PNG and 0 more lie among"),
    (lambda d: picture(d / "000/000001 copy.png"), {},
     "000001 copy.png and 0 more lie among the images of seeds, like 000000.png"),
    (lambda d: os.mkfifo(d / "000/000002.png"), {}, "000002.png is not a regular file"),
    (lambda d: (d / "run.json").write_text('{"settings": null}'), {},
     r"run.json is damaged: settings is None and should be keys with values"),
    (lambda d: picture(d / "cat.png"), {}, "holds images itself and in 000/"),
])
def test_bad_folders_are_named_in_one_line(tmp_path, spoil, call, message):
    save_samples(tmp_path, PIXELS[:2], settings=None if "itself" in message else SETTINGS)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        images = open_images(tmp_path, **call)
        read(images)
        images.run()
    assert "\n" not in str(caught.value)


def test_bad_npz_are_named_in_one_line(tmp_path):
    path = tmp_path / "x.npz"

    def refused(message):
        with pytest.raises(UserError, match=message):
            read(open_images(path))

    refused("no images at")
    for array, message in ((PIXELS / 255, "float64"), (PIXELS[0], r"\[8, 10, 3\]"), (PIXELS[:0], "no images")):
        np.savez(path, array)
        refused(message)
    np.savez(path, samples=PIXELS)
    refused("no arr_0")
    np.savez(path, PIXELS.repeat(20, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused("truncated or not an npz")
    path.write_bytes(whole[:50_000] + bytes(9) + whole[50_009:])
    refused("damaged")


def test_an_unfinished_folder_is_refused(tmp_path):
    folder = save_samples(tmp_path / "x", PIXELS[:5])
    sessions = [{"seeds": "0-3"}, {"seeds": "4-9"}]
    (folder / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions) + '{"se')
    with pytest.raises(UserError, match=r"lacks 5 images of its own runs, seeds 5-9: it is still being written"):
        check_finished(open_images(folder))
    assert "seeds 5-9" in check_finished(open_images(folder), allow_fewer=True)[0]
    save_samples(folder, PIXELS[5:10], first=5)
    assert check_finished(open_images(folder)) == []
