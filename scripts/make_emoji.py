"""Render the emoji images of data/emoji/ from the Iconify packages that carry the artwork.

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat \\
             @iconify-json/fluent-emoji @iconify-json/twemoji
    pip install resvg-py
    python -m scripts.make_emoji --packages . --out data/emoji

Every visible glyph without a skin-tone modifier is rasterised at each size on white and laid, in the order of
index.csv, into one lossless WebP mosaic per size. The split is by NAME, since one glyph recurs across styles.
"""

import csv
import hashlib
import io
import json
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from run.cli import command
from unet_caching.errors import UserError
from unet_caching.options import option, required

STYLES = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji")
HELD_OUT_PERCENT = 12


def read_package(folder: Path, style: str) -> list[dict]:
    """icons.json, metadata.json and package.json of the npm tarball of one style in `folder`. Raises UserError."""
    found = list(folder.glob(f"iconify-json-{style}-[0-9]*.tgz"))
    if len(found) != 1:
        raise UserError(f"expected one iconify-json-{style}-VERSION.tgz in {folder}, found {len(found)}; "
                        f"fetch it with: npm pack @iconify-json/{style}")
    with tarfile.open(found[0]) as tar:
        return [json.loads(tar.extractfile(f"package/{name}.json").read())     # type: ignore[union-attr]
                for name in ("icons", "metadata", "package")]


def split_of(name: str) -> str:
    """The split that a name is in, 'train' or 'held-out': it decides alone."""
    return "held-out" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT else "train"


def svg(icon: dict, sheet: dict) -> str:
    box = [icon.get(key, sheet.get(key, default)) for key, default in
           (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>')


def rasterise(source: str, size: int) -> Image.Image:
    """The drawing centred on a white square of `size` pixels."""
    import resvg_py
    png = resvg_py.svg_to_bytes(svg_string=source, width=4 * size, height=4 * size)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (max(drawing.size),) * 2, "white")
    square.alpha_composite(drawing, ((square.width - drawing.width) // 2, (square.height - drawing.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BOX)


@dataclass(frozen=True)
class Options:
    """The command line."""
    packages: Path = required("folder with the five iconify-json-*.tgz files")
    out: Path = option(Path("data/emoji"), "folder (default: %(default)s)")
    sizes: tuple[int, ...] = option((32, 64), "pixels per image", least=1)


@command
def main(options: Options) -> None:
    packages = {style: read_package(options.packages, style) for style in STYLES}
    # style -> {name: group}; fluent-emoji has no groups of its own and takes those of the same name
    groups = {style: {name: group for group, names in metadata.get("categories", {}).items() for name in names}
              for style, (_, metadata, _) in packages.items()}
    any_group = {name: group for own in reversed(groups.values()) for name, group in own.items()}
    rows, sources = [], []
    for style, (sheet, _, _) in packages.items():
        for name, icon in sorted(sheet["icons"].items()):
            if not icon.get("hidden") and "skin-tone" not in name:
                rows.append((name, groups[style].get(name, any_group.get(name, "")), style, split_of(name)))
                sources.append(svg(icon, sheet))

    options.out.mkdir(parents=True, exist_ok=True)
    columns = math.ceil(math.sqrt(len(rows)))
    for size in options.sizes:
        mosaic = Image.new("RGB", (columns * size, math.ceil(len(rows) / columns) * size), "white")
        for i, source in enumerate(tqdm(sources, desc=f"{size} px", unit="image")):
            mosaic.paste(rasterise(source, size), (i % columns * size, i // columns * size))
        mosaic.save(options.out / f"emoji_{size}.webp", lossless=True, quality=100, method=6)
    with open(options.out / "index.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("name", "group", "style", "split"), *rows])
    print(f"{len(rows)} images of {len({r[0] for r in rows})} names from",
          ", ".join(f"@iconify-json/{style} {package['version']}" for style, (_, _, package) in packages.items()))


if __name__ == "__main__":
    main()
