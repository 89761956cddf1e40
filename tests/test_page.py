"""The page to look at: what it holds, and that it works in a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE
from PIL import Image

from eval.tables import page, svg
from eval.tables.calls import COMPUTED, FORECAST, REUSED, calls_of
from eval.tables.page import Page, Section, pictures_among
from eval.tables.svg import Line, Mark, Plot, ticks
from run.spec import RunSpec
from unet_caching.methods.block_caching import BlockSchedule

ROOT = HERE.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
LDM = {"config": ROOT / "configs" / "ldm_emoji.yaml", "steps": 12, "sampler": "unipc"}


def calls(**options):
    options = LDM | options
    return calls_of(RunSpec.of(options.pop("config"), **options).open())


def images(shift: int) -> np.ndarray:
    """12 images that ever more differ from those of shift 0."""
    base = np.random.default_rng(0).integers(60, 190, (12, 16, 16, 3))
    return (base + shift * np.arange(12)[:, None, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def shown() -> Page:
    arms = {"uncached": images(0), "reuse </script>": images(2), "forecast": images(1)}
    plot = Plot("Cost against distance", "calls", "dB", [
        Line("fewer steps", [Mark(8, 33, 32, 34, "seeds 0-11\npython -m x"), Mark(18, 46, 45, 47), Mark(26, 50)]),
        Line("reuse", [Mark(18, 41.5, 40, 43)])], log=True)
    section = Section("Latent <model>", ["Made by `python -m y`."], [("arm", "dB"), ("reuse", "4 < 5")], [plot],
                      pictures_among(arms, range(100, 112)), {"reuse": calls(interval=4)}, {"reuse": "python -m z"})
    return Page("A <page>", ["Lead."], [section, Section("Empty")], ["the foot"])


@pytest.fixture(scope="module")
def written(shown, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "sub" / "index.html"
    page.write(shown, path)
    return path


def data_of(path: Path) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', path.read_text(), re.S)[1])


def test_a_page_needs_nothing_else_and_says_all(written):
    text = written.read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', text) and "http" not in text and "@import" not in text
    for said in ("A &lt;page&gt;", "Latent &lt;model&gt;", "4 &lt; 5", "<code>python -m y</code>", "python -m z",
                 "seeds 0-11", "the foot", "3 of 12 calls compute everything", "prefers-color-scheme: dark"):
        assert said in text, said
    assert text.count("<h2>") == 2 and [file.name for file in written.parent.iterdir()] == ["index.html"]


def test_images_are_those_that_were_given_and_the_worst_are_among_them(written):
    first, reuse, forecast = data_of(written)
    assert first["distances"] == {} and reuse["label"] == "reuse </script>"
    assert {"109", "110", "111"} <= reuse["images"].keys() == first["images"].keys() and len(first["images"]) < 12
    assert reuse["distances"]["100"] is None and reuse["distances"]["111"] < reuse["distances"]["101"]
    assert forecast["distances"]["111"] == pytest.approx(10 * np.log10(255**2 / 11**2), abs=0.01)
    picture = Image.open(io.BytesIO(base64.b64decode(reuse["images"]["111"].split(",")[1]))).convert("RGB")
    assert (np.asarray(picture) == images(2)[11]).all()


def test_images_that_are_too_many_are_left_out_and_large_ones_made_smaller(tmp_path, monkeypatch):
    large = np.random.default_rng(0).integers(0, 255, (8, 300, 300, 3)).astype(np.uint8)
    arms = pictures_among({"a": large, "b": np.roll(large, 1, 0)}, range(8))
    for limit, count in ((10**9, 8), (100_000, 2)):
        monkeypatch.setattr(page, "MOST_BYTES", limit)
        page.write(Page("", [], [Section("", pictures=arms)]), tmp_path / "x.html")
        found = data_of(tmp_path / "x.html")
        assert [len(arm["images"]) for arm in found] == [count, count]
        picture = Image.open(io.BytesIO(base64.b64decode(next(iter(found[0]["images"].values())).split(",")[1])))
        assert max(picture.size) == page.LARGE


def test_calls_of_runs():
    """The ten levels of the small latent model, and the middle block."""
    assert {state for row in calls().states for state in row} == {COMPUTED} and calls().full == list(range(12))
    reuse = calls(interval=4)
    assert reuse.full == [0, 4, 8] and len(reuse.parts) == len(reuse.states) > 8
    assert set(reuse.states[0]) == {COMPUTED}
    assert all(row == [COMPUTED, REUSED, REUSED, REUSED] * 3 for row in reuse.states[1:])
    forecast = calls(interval=4, forecast=1)                        # of the first gap there is nothing to extrapolate
    assert forecast.states[-1] == [COMPUTED, *[REUSED] * 3, *[COMPUTED, *[FORECAST] * 3] * 2]
    deep = calls(interval=4, branch=2)
    assert set(deep.states[2]) == {COMPUTED} and set(deep.states[3]) == {COMPUTED, REUSED}
    planned = calls(steps=None, sampler=None, plan=ROOT / "checkpoints" / "plans" / "ldm_emoji_12.json")
    assert len(planned.full) == 11 and FORECAST in planned.states[1] and len(planned.states[0]) == 22


def test_calls_of_single_blocks():
    file = ROOT / "checkpoints" / "block_caching" / "ldm_all_50.json"
    schedule = BlockSchedule.load(file).blocks
    found = calls(sampler=None, steps=50, block_schedule=file)
    assert set(found.parts) >= set(schedule)
    for name, row in zip(found.parts, found.states, strict=True):
        inside = next((other for other in schedule if name != other and name.startswith(f"{other}.")), name)
        if inside == name and name in schedule:
            assert [step for step, state in enumerate(row) if state == COMPUTED] == schedule[name]


@pytest.mark.parametrize(("low", "high", "log", "expected"), [
    (0, 10, False, [0, 2, 4, 6, 8, 10]), (31.2, 50.1, False, [35, 40, 45, 50]), (5, 5, False, [5]),
    (7, 55, True, [8, 10, 15, 20, 30, 40, 50]), (1, 1000, True, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])])
def test_ticks_are_round(low, high, log, expected):
    assert ticks(low, high, log) == pytest.approx(expected)


def test_a_plot_keeps_its_marks_inside():
    drawn = svg.plot(Plot("t", "x", "y", [Line("a", [Mark(1, -3, -9, 9), Mark(1000, 5)]), Line("b", [Mark(1, -3)])]))
    assert re.findall(r'class="name"[^>]*>(.)<', drawn) == ["a", "b"]       # beside their ends, from above
    marks = "".join(re.findall(r'<g class="mark".*?</g>', drawn, re.S))
    places = [(float(x), float(y)) for x, y in re.findall(r"translate\(([\d.]+),([\d.]+)\)\" d=", marks)]
    assert len(places) == 3 and len(set(places)) == 3               # what would cover each other stands side by side
    assert all(0 < x < svg.WIDTH and 0 < y < svg.HEIGHT for x, y in places)
    assert svg.plot(Plot("t", "x", "y", [Line("a", [])])) == ""


class Browser:
    """A headless browser that is spoken to over two pipes, by the protocol of its developer tools."""

    def __init__(self, program: str, profile: Path):
        theirs_in, self.out = os.pipe()
        self.inward, theirs_out = os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", *command],
                                        pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.events = 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def next(self) -> dict:
        """What it says next."""
        while b"\0" not in self.rest:
            read = os.read(self.inward, 1 << 16)
            assert read, "the browser has ended"
            self.rest += read
        said, _, self.rest = self.rest.partition(b"\0")
        return json.loads(said)

    def call(self, method: str, **words) -> dict:
        """What a method answers."""
        self.number += 1
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        message = {"id": self.number, "method": method, "params": words, **session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (said := self.next()).get("id") != self.number:
            self.events.append(said)
        assert "error" not in said, said
        return said["result"]

    def done(self, path: Path, script: str, width: int = 1280, height: int = 900, dark: bool = False) -> dict:
        """What a script that runs in a page puts into `told`; nothing may go wrong on the way."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next())
        answer = self.call("Runtime.evaluate", awaitPromise=True, returnByValue=True, expression=f"""(async () => {{
            const told = {{}}, at = name => document.querySelector(name);
            await Promise.all([...document.images].map(image => {{ image.loading = "eager"; return image.decode(); }}));
            {script}
            return told; }})()""")
        assert "exceptionDetails" not in answer, answer
        wrong = [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"
                 or event.get("params", {}).get("entry", {}).get("level") == "error"
                 or event.get("params", {}).get("type") == "error"]
        assert not wrong, wrong
        return answer["result"]["value"]

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is here (Debian has the first as a package)")
    started = Browser(found, tmp_path_factory.mktemp("profile"))
    yield started
    started.process.terminate()
    started.process.wait()


def test_a_page_works_in_a_browser(browser, written):
    """It renders, the slider moves, images are compared, plots tell their values; by pointer and by keyboard."""
    told = browser.done(written, """
        told.figures = document.querySelectorAll("svg.plot .mark").length;
        told.loaded = [...document.images].every(image => image.complete && image.naturalWidth > 0);
        const top = () => document.querySelectorAll(".stage img")[1];
        told.before = top().style.clipPath;
        const slider = at("input[type=range]");
        slider.value = 80; slider.dispatchEvent(new Event("input"));
        told.after = top().style.clipPath; told.edge = at(".edge").style.left;
        const pick = (i, value) => { const one = document.querySelectorAll("select")[i];
            one.value = value; one.dispatchEvent(new Event("change")); };
        const seeds = () => [...document.querySelectorAll(".grid .seeds span")].map(one => +one.textContent);
        told.worst = seeds();
        pick(2, "seed"); told.inOrder = seeds();
        pick(1, "2"); told.right = at(".stage .right").textContent;
        told.distance = at(".told").textContent;
        pick(3, "111");
        for (let turn = 0; turn < 200 && (told.difference || [255])[0] === 255; turn++) {
            await new Promise(then => setTimeout(then, 50));
            told.difference = [...at("canvas").getContext("2d").getImageData(3, 3, 1, 1).data];
        }
        const button = document.querySelectorAll(".grid button")[1];
        button.click(); told.pressed = button.getAttribute("aria-pressed");
        told.stops = [...document.querySelectorAll(".mark")].filter(mark => mark.tabIndex === 0).length;
        at(".mark").focus(); told.note = at("#note").hidden ? "" : at("#note").textContent;
    """)
    assert told["figures"] == 4 and told["loaded"] and told["pressed"] == "true" and told["stops"] == 1
    assert told["before"] == "inset(0px 50% 0px 0px)" and told["after"] == "inset(0px 20% 0px 0px)"
    assert told["edge"] == "80%"
    assert told["worst"][:3] == [111, 110, 109] and told["inOrder"] == sorted(told["worst"])
    assert told["right"] == "forecast" and re.fullmatch(r"forecast to uncached: [\d.a-z]+( dB)?", told["distance"])
    assert told["difference"][:3] == [255 - 8 * 11] * 3 and "seeds 0-11\npython -m x" in told["note"]

    def shown(expression: str):
        return browser.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    browser.press("ArrowRight")                         # to the next mark; a single stop of the Tab key
    assert shown("[...document.querySelectorAll('.mark')].indexOf(document.activeElement)") == 1
    browser.press("Escape")
    assert shown("document.getElementById('note').hidden")
    shown("document.querySelector('input[type=range]').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
    assert shown("document.querySelector('.edge').style.left") == "79%"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["desktop", "phone, dark"])
def test_a_page_fits(browser, written, width, dark):
    told = browser.done(written, """
        told.wide = document.documentElement.scrollWidth; told.window = innerWidth;
        told.ground = getComputedStyle(document.body).backgroundColor;
    """, width, 780, dark)
    assert told["wide"] <= told["window"] == width
    assert (sum(map(int, re.findall(r"\d+", told["ground"]))) < 150) == dark
