from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from medseg.io.datalist import (
    DatalistError,
    check_binary_masks,
    fingerprint,
    load_datalist,
    scored_items,
    split,
)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (20, 30), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray((rng.random((20, 30)) > 0.5).astype(np.uint8) * 255).save(tmp_path / f"{name}_mask.png")
    return tmp_path


def item(name: str, **fields: object) -> dict:
    return {"image": f"{name}.png", "label": f"{name}_mask.png", **fields}


def good() -> dict:
    return {"training": [item("a", fold=0), item("b", fold=1), item("c", fold=2)], "test": [item("d")]}


def problems(folder, content) -> str:
    path = folder / "datalist.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatalistError) as caught:
        load_datalist(path, folder, check_binary_masks)
    return str(caught.value)


def test_a_good_list(folder, write_list):
    lists = load_datalist(write_list(folder, good()), folder, check_binary_masks)
    assert [len(split(lists, part, fold=1)) for part in ("train", "validation", "test")] == [2, 1, 1]
    assert split(lists, "validation", fold=1)[0]["image"] == str(folder / "b.png")


def test_missing_list_says_what_to_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="--dataset_dir"):
        load_datalist(tmp_path / "datalist.json", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"training": []}'])
def test_no_list_at_all(folder, content):
    assert "datalist.json" in problems(folder, content)


def test_every_broken_item_is_named(folder):
    content = good()
    content["training"][0]["image"] = "gone.png"
    del content["training"][1]["label"]
    content["training"][2]["fold"] = "two"
    content["test"].append("d.png")
    text = problems(folder, content)
    assert "4 problem(s)" in text
    assert "training[0]" in text
    assert "gone.png does not exist" in text
    assert 'training[1] has no "label"' in text
    assert 'training[2] (c.png) has no integer "fold"' in text
    assert "test[1] is a str" in text


def test_mask_of_another_size(folder):
    Image.fromarray(np.zeros((20, 29), np.uint8)).save(folder / "b_mask.png")
    text = problems(folder, good())
    assert "training[1]" in text
    assert "b_mask.png is 29x20 and its image 30x20" in text


def test_mask_that_is_not_binary(folder):
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(folder / "d_mask.png")
    assert "test[0]: mask" in problems(folder, good())
    assert "not binary (values 0, 1, 2, 3, 4, 5, ...)" in problems(folder, good())


def test_empty_and_full_masks_are_masks(folder, write_list):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "a_mask.png")
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(folder / "b_mask.png")
    load_datalist(write_list(folder, good()), folder, check_binary_masks)


def test_unreadable_image(folder):
    (folder / "c.png").write_bytes(b"not a picture")
    assert "c.png cannot be read" in problems(folder, good())


@pytest.mark.parametrize("field", ["video", "patient"])
def test_one_group_on_two_sides_is_a_leak(folder, field):
    content = good()
    content["training"][0][field] = content["test"][0][field] = "v1"
    assert f"{field} v1 is in fold 0 and in test" in problems(folder, content)


def test_one_image_on_two_sides_is_a_leak(folder):
    content = good()
    content["test"].append(item("a"))
    assert "a.png is in fold 0 and in test" in problems(folder, content)


def test_fields_of_some_items_only_become_fields_of_all(folder, write_list):
    content = good()
    content["training"][0] |= {"note": "blurred", "age": 61, "site": None, "tags": ["a", "b"]}
    lists = load_datalist(write_list(folder, content), folder)
    assert all(
        set(i) - {"fold"} == {"image", "label", "note", "age", "site", "tags"} for p in lists.values() for i in p
    )
    assert [i["note"] for i in lists["training"]] == ["blurred", "", ""]
    assert lists["training"][0]["tags"] == '["a", "b"]'


def test_an_empty_part_says_what_there_is(folder, write_list):
    lists = load_datalist(write_list(folder, {"training": [item("a", fold=3)]}), folder)
    with pytest.raises(ValueError, match=r"nothing for validation with fold 0: 1 training items in folds \[3\]"):
        split(lists, "validation", 0)
    with pytest.raises(ValueError, match="unknown part"):
        split(lists, "tset")


def test_fingerprint_follows_content_not_place(folder, tmp_path_factory, write_list):
    before = fingerprint(load_datalist(write_list(folder, good()), folder)["training"])
    other = tmp_path_factory.mktemp("moved")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert fingerprint(load_datalist(write_list(other, good()), other)["training"]) == before
    assert before["items"] == 3
    pixels = np.asarray(Image.open(other / "a.png")).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(other / "a.png")
    assert fingerprint(load_datalist(other / "datalist.json", other)["training"])["sha256"] != before["sha256"]


def test_one_picture_under_two_names_is_a_leak(folder, write_list):
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    text = problems(folder, good())
    assert "b.png in fold 1 is the same picture as" in text
    assert "a.png in fold 0" in text
    content = good()
    content["training"][1]["fold"] = 0
    load_datalist(write_list(folder, content), folder)  # on one side it is no leak
    with pytest.raises(DatalistError, match="it would count twice"):  # but folds could still be dealt between them
        load_datalist(write_list(folder, content), folder, with_folds=False)


def test_a_list_without_folds_is_for_those_who_deal_them(folder, write_list):
    content = good()
    for entry in content["training"]:
        del entry["fold"]
    assert "no integer" in problems(folder, content)
    lists = load_datalist(write_list(folder, content), folder, with_folds=False)
    assert [len(part) for part in lists.values()] == [3, 1, 0]


def test_several_parts_are_scored_at_once(folder, write_list):
    content = good()
    content["held_out"] = [{**content["test"].pop(), "style": "x"}]
    lists = load_datalist(write_list(folder, content), folder)
    items = scored_items(lists, ["validation", "held_out"], fold=1)
    assert [(i["part"], i["image"][-5:]) for i in items] == [("validation", "b.png"), ("held_out", "d.png")]
    assert scored_items(lists, "held_out")[0]["part"] == "held_out"
    assert scored_items(lists, []) == []
    with pytest.raises(ValueError, match="nothing for test"):
        scored_items(lists, ["test"])
    content["held_out"].append(content["training"][0])
    assert "image" in problems(folder, content)


def test_a_field_is_all_text_or_all_numbers(folder, write_list):
    content = good()
    for entry, age in zip(content["training"], (45, None, "unknown"), strict=True):
        entry |= {"age": age, "size": 3.5}
    content["test"][0] |= {"size": 4}
    lists = load_datalist(write_list(folder, content), folder)
    items = lists["training"] + lists["test"]
    assert [i["age"] for i in items] == ["45", "", "unknown", ""]
    assert [i["size"] for i in items] == [3.5, 3.5, 3.5, 4]
