"""Prompts from the files they come in."""

import csv
import json

import pytest

from run.prompts import prompts_sha256, read_prompts
from unet_caching.errors import UserError

PROMPTS = ["a red cube", 'the words "Fly an airplane", on a wall', "Salvador Dalí"]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_text_is_a_prompt_per_line(tmp_path):
    text = "\n".join(PROMPTS)
    for name, content in (("a.txt", text), ("b.txt", text + "\n\n"), ("c.TXT", text.replace("\n", "\r\n") + "\r\n")):
        assert read_prompts(write(tmp_path / name, content)) == PROMPTS
    assert read_prompts(write(tmp_path / "bom.txt", text, "utf-8-sig")) == PROMPTS
    assert read_prompts(write(tmp_path / "space.txt", " a \t red  cube\nNo.\u20281\n")) == ["a red cube", "No. 1"]


def test_partiprompts_tsv_keeps_the_quotes_of_its_prompts(tmp_path):
    rows = ["Prompt\tCategory\tChallenge\tNote", "bond\tAbstract\tBasic\tBiology-inspired concepts",
            '"Hi" she said\tPeople\tBasic\t', 'a wall that says "Hi"\tArts\tBasic\t', 'a 5" box, "open\tArts\tBasic\t',
            '"Hi" and "ho"\tArts\tBasic\t', '"the ""big"" one"\tArts\tBasic\t', '"whole"\tArts\tBasic\t']
    expected = ["bond", '"Hi" she said', 'a wall that says "Hi"', 'a 5" box, "open', '"Hi" and "ho"', 'the "big" one',
                "whole"]
    assert read_prompts(write(tmp_path / "PartiPrompts.tsv", "\n".join(rows) + "\n")) == expected


def test_csv_has_a_column_of_prompts(tmp_path):
    for header in ("prompt", "Prompt", "caption"):
        path = tmp_path / f"{header}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", header], *enumerate(PROMPTS)])
        assert read_prompts(path) == PROMPTS
    path = write(tmp_path / "both.csv", 'caption,prompt\nno,"a\nred cube"\n')
    assert read_prompts(path) == ["a red cube"]
    path = write(tmp_path / "odd.csv", "prompt\nNo.\u20281\nNo. 2\n\n")
    assert read_prompts(path) == ["No. 1", "No. 2"]


def test_json_is_a_list_of_strings_or_objects(tmp_path):
    for content in (PROMPTS, [{"prompt": p, "seed": 1} for p in PROMPTS], [{"Caption": p} for p in PROMPTS]):
        assert read_prompts(write(tmp_path / "x.json", json.dumps(content))) == PROMPTS


def test_coco_takes_the_first_caption_of_each_image_in_the_order_of_the_images(tmp_path):
    content = {"info": {}, "images": [{"id": 7}, {"id": 3}],
               "annotations": [{"id": 9, "image_id": 3, "caption": "a cat. \n"}, {"image_id": 7, "caption": "a dog"},
                               {"id": 1, "image_id": 3, "caption": "another"}]}
    assert read_prompts(write(tmp_path / "captions_val2017.json", json.dumps(content))) == ["a dog", "a cat."]
    content["images"].append({"id": 5})
    with pytest.raises(UserError, match="image 5: no prompt"):
        read_prompts(write(tmp_path / "captions_val2017.json", json.dumps(content)))


def test_the_digest_depends_on_every_prompt_and_their_order():
    assert prompts_sha256(PROMPTS) == prompts_sha256(tuple(PROMPTS)) and len(prompts_sha256(PROMPTS)) == 64
    assert len({prompts_sha256(p) for p in (PROMPTS, PROMPTS[::-1], PROMPTS[:2], [*PROMPTS[:2], "x"])}) == 4


@pytest.mark.parametrize("name, content, message", [
    ("x.txt", None, "no prompts file"),
    ("x.txt", b"", "has no prompts"),
    ("x.txt", b"a\n\nb\n", "line 2: no prompt"),
    ("x.txt", b"a\n\xff\n", "cannot be read.*utf-8"),
    ("x.tsv", b"", "no column prompt or caption"),
    ("x.tsv", b"Prompt\tNote\nbond\t\n\t\n", "line 3: no prompt"),
    ("x.tsv", b"Note\tPrompt\na\n", "line 2: no prompt"),
    ("x.csv", b"id,text\n1,a\n", "no column prompt or caption; its first line is 'id, text'"),
    ("x.csv", b'prompt\n"a\n', "cannot be read"),
    ("x.json", b"[1", "cannot be read"),
    ("x.json", b'["a", 1]', "entry 1: no prompt"),
    ("x.json", b'[{"text": "a"}]', "entry 0: no prompt"),
    ("x.json", b'{"a": 1}', "neither a list"),
    ("x.json", b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": 1}]}', "not in the form of COCO's"),
    ("x.md", b"a", "prompts are read from .txt, .csv, .tsv, .json"),
])
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
