"""diffusers' own fast pipeline tests with our forward in their U-Nets: what they say, and what pipelines then return.

    git clone --depth 1 https://github.com/huggingface/diffusers ../diffusers
    python -m scripts.diffusers_own_tests ../diffusers
    python -m scripts.diffusers_own_tests ../diffusers tests/pipelines/stable_diffusion_xl --stand-ins

Each test of the checkout runs twice on the diffusers that is installed here: as it is, and with caching at interval 1
switched on in every pipeline as it is made (scripts/diffusers_plugin.py). Nothing of theirs is copied. A test is

    same        ends as it does without us, and its pipelines return the same bits; by the nest, for some call at least
    untouched   likewise, but no pipeline of it calls a U-Net that caching is on in
    refused     caching was refused in it, at construction or at the call, with a reason
    differs     ends as before, and a pipeline returns something else
    broken      passes without us, and not with us
    skipped

Tests that fail without us too (they want downloads, an accelerator or other versions) are `same` where they fail with
us in the same way. Needs what diffusers' tests import, beside pytest: parameterized and requests_mock, which are no
requirements here (`pip install --target FOLDER parameterized requests_mock`, and PYTHONPATH=FOLDER). Ends with 1
where a test differs or is broken.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from run.cli import command
from run.files import ROOT, write_json
from run.provenance import provenance
from unet_caching.errors import UserError

FOLDERS = ("controlnet", "ddim", "ddpm", "latent_consistency_models", "latent_diffusion", "pag", "stable_diffusion",
           "stable_diffusion_2", "stable_diffusion_adapter", "stable_diffusion_image_variation", "stable_diffusion_xl")
KINDS = ("same", "untouched", "refused", "differs", "broken", "skipped")


def run_tests(checkout: Path, words: Sequence[str], stand_ins: bool) -> list[dict[str, dict]]:
    """Run tests of a checkout: {test: what was seen} as they are, and with caching switched on.

    words: for pytest. Raises UserError where there were none.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "UNET_CACHING_RECORD": str(record), "UNET_CACHING_STAND_INS": str(int(stand_ins))}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", "-W", "ignore", "--tb=short",
                               "-p", "no:cacheprovider", "-p", "scripts.diffusers_plugin", *words], cwd=checkout,
                              env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not record.exists():        # what tests import is missing, say
            lines = (done.stdout + done.stderr).strip().splitlines()
            errors = list(dict.fromkeys(line[1:].strip() for line in lines if line.startswith("E  "))) or lines[-3:]
            raise UserError(f"pytest ended with {done.returncode} in {checkout}: {'; '.join(errors[:5])}")
        seen = [json.loads(line) for line in record.read_text().splitlines()]
        return [{one["test"]: one for one in seen if one["nest"] == nest} for nest in (False, True)]


def kind(plain: dict, ours: dict) -> str:
    """Which of KINDS a test is, by what was seen of it without us and with us."""
    if ours["refused"]:
        return "refused"
    if plain["outcome"] == ours["outcome"] == "skipped":
        return "skipped"
    if plain["outcome"] != ours["outcome"]:
        return "broken" if plain["outcome"] == "passed" else "differs"
    if plain["outputs"] != ours["outputs"] or plain["reason"] != ours["reason"]:
        return "differs"
    return "same" if ours["calls"] else "untouched"


def report(plain: dict[str, dict], ours: dict[str, dict]) -> dict:
    """All tests by kind, with what one needs to know of them."""
    found: dict[str, dict] = {name: {} for name in KINDS}
    for test, seen in ours.items():
        before = plain.get(test)
        if before is not None:
            why = "; ".join(dict.fromkeys(seen["refused"])) or seen["reason"]
            found[kind(before, seen)][test] = {"outcome": seen["outcome"], "without us": before["outcome"], "why": why,
                                               "calls": seen["calls"], "outputs": len(seen["outputs"])}
    return found


def summary(found: dict[str, dict]) -> str:
    """The report as text: how many of each kind; of the kinds that matter, which and why."""
    lines = []
    for name, tests in found.items():
        passed = sum(one["outcome"] == "passed" for one in tests.values())
        calls, outputs = (sum(one[key] for one in tests.values()) for key in ("calls", "outputs"))
        lines.append(f"{name:10}{len(tests):5}   {passed} passed, {outputs} outputs, {calls} network calls by the nest")
    for name in ("refused", "differs", "broken"):
        lines += [f"{name}: {test}: {one['why']}" for test, one in found[name].items()]
    return "\n".join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a working tree of diffusers")
    parser.add_argument("tests", nargs="*", help="files or folders there (default: the pipelines with U-Nets that can "
                                                 "be cached)")
    parser.add_argument("-k", metavar="EXPRESSION", help="which of their tests, as pytest's -k")
    parser.add_argument("--stand-ins", action="store_true", help="a tokenizer of letters for those that tests "
                        "download; numbers that tests expect are not met then, outputs are compared all the same")
    parser.add_argument("--out", type=Path, help="a JSON file with all tests")
    args = parser.parse_intermixed_args()
    folder = args.checkout / "tests" / "pipelines"
    if not folder.is_dir():
        raise UserError(f"{args.checkout} is no checkout of diffusers: no {folder}")
    words = args.tests or [f"tests/pipelines/{name}" for name in FOLDERS if (folder / name).is_dir()]
    if not words:
        raise UserError(f"none of {', '.join(FOLDERS)} in {folder}: name the tests to run")
    plain, ours = run_tests(args.checkout, [*words, *(["-k", args.k] if args.k else [])], args.stand_ins)
    found = report(plain, ours)
    if args.out:
        write_json(args.out, {"tests": found, "stand_ins": args.stand_ins, "provenance": provenance("cpu")})
    print(summary(found))
    sys.exit(bool(found["differs"] or found["broken"]))


if __name__ == "__main__":
    main()
