"""Cross-validation of a task that is tested on classes it has never seen: a class is whole on one side."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.bundles.catalog import find_bundle
from medseg.experiments.folds import assign_folds, fold_datalist, group_ids
from medseg.experiments.plan import Plan, make_plan, parse_setting

BUNDLE = find_bundle("cryoet_one_shot", REPOSITORY)
FIELDS = ("patient", "video", "class")


@st.composite
def item_lists(draw):
    """Volumes of 8 to 14 classes at two noise levels."""
    items = []
    for number in range(draw(st.integers(8, 14))):
        for volume in range(draw(st.integers(2, 5))):
            style = ("snr-inf", "snr-1000")[volume % 2]
            items.append({"image": f"{len(items)}.mrc", "class": f"c{number}", "style": style})
    return items


def sides(parts: dict, fold: int) -> list[set[str]]:
    """Classes that are trained on, that validate, and that are tested on."""
    training = [{i["class"] for i in parts["training"] if (i["fold"] == fold) == wanted} for wanted in (False, True)]
    return [*training, {i["class"] for i in parts["test"]}]


@settings(deadline=None, max_examples=60)
@given(item_lists(), st.integers(2, 4), st.integers(0, 5), st.sampled_from([None, "style"]))
def test_a_class_is_whole_on_one_side(items, k, seed, stratify):
    assigned = assign_folds(items, k, seed, stratify, FIELDS)
    folds_of: dict[str, set[int]] = {}
    for fold, item in zip(assigned, items, strict=True):
        folds_of.setdefault(item["class"], set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert set(assigned) == set(range(k))
    tested = Counter()
    for fold in range(k):
        parts = fold_datalist(items, assigned, fold, seed, stratify, group_fields=FIELDS)
        train, validation, test = sides(parts, fold)
        assert train, "something is left to train on, with two folds as well"
        assert validation
        assert test
        assert len(train) + len(validation) + len(test) == len(train | validation | test), "a class is on two sides"
        assert len(parts["training"]) + len(parts["test"]) == len(items)
        tested.update(i["image"] for i in parts["test"])
    assert tested == Counter(i["image"] for i in items)


def test_without_the_field_classes_are_divided():
    """The test above can fail: patients and videos alone know nothing of classes."""
    items = [{"image": f"{i}.mrc", "class": f"c{i % 4}"} for i in range(40)]
    folds_of = [set() for _ in range(4)]
    for fold, item in zip(assign_folds(items, 2), items, strict=True):
        folds_of[int(item["class"][1])].add(fold)
    assert folds_of == [{0, 1}] * 4


def test_patients_and_classes_tie_in_chains():
    items = [
        {"class": "a", "patient": "1"}, {"class": "b", "patient": "1"}, {"class": "b"}, {"class": "c", "video": "x"},
        {"class": "d", "video": "x"}, {"class": "e"},
    ]  # fmt: skip
    first, second, third, fourth, fifth, sixth = group_ids(items, FIELDS)
    assert first == second == third
    assert fourth == fifth
    assert len({first, fourth, sixth}) == 3


def test_fewer_classes_than_folds_are_named():
    items = [{"image": f"{i}.mrc", "class": f"c{i % 3}"} for i in range(30)]
    with pytest.raises(ValueError, match=r"3 groups \(same patient or video or class\) cannot be dealt to 4 folds"):
        assign_folds(items, 4, group_fields=FIELDS)
    # and two folds need two classes beside the tested ones: one trains, the other validates
    few = [i for i in items if i["class"] != "c2"]
    assigned = assign_folds(few, 2, group_fields=FIELDS)
    with pytest.raises(ValueError, match=r"1 groups .* cannot be dealt to 2 folds"):
        fold_datalist(few, assigned, 0, group_fields=FIELDS)


def plan(data: Path, out: Path, **arguments) -> Plan:
    chosen = [parse_setting(f"dataset_dir={data}")]
    return make_plan(BUNDLE, REPOSITORY, out, networks=["duse_scnn"], settings=chosen, **arguments)


@pytest.mark.parametrize(("folds", "children"), [(None, 5), (3, 3), (2, 2)])
def test_the_plan_of_the_bundle_keeps_classes_whole(tiny_subtomograms, tmp_path, folds, children):
    content = json.loads((tiny_subtomograms / "datalist.json").read_text())
    own = {}
    for item in content["training"]:
        own.setdefault(item["class"], set()).add(item["fold"])
    assert set(map(len, own.values())) == {3}, "the list's own folds divide the volumes of every class"
    made = plan(tiny_subtomograms, tmp_path, folds=folds, held_out=True)
    assert len(made.children) == len(made.datalists) == children
    tested = Counter()
    for child in made.children:
        parts = made.datalists[tmp_path / "folds" / f"repeat0-fold{child.fold}.json"]
        train, validation, test = sides(parts, child.fold)
        assert len(train) + len(validation) + len(test) == len(train | validation | test), "a class is on two sides"
        assert train | validation | test == set(content["classes"]["training"])
        assert len(train) >= 2, "an episode needs classes to tell apart"
        tested.update(test)
        held_out = {i["class"] for i in parts["held_out"]}
        assert held_out == set(content["classes"]["test"])
        assert len(parts["training"]) + len(parts["test"]) == 42
        assert dict(child.arguments)["score"] == "[test,held_out]"
    assert tested == Counter(content["classes"]["training"]), "every class is tested once"


def test_folds_of_whole_classes_are_kept(tiny_subtomograms, tmp_path):
    content = json.loads((tiny_subtomograms / "datalist.json").read_text())
    names = content["classes"]["training"]
    content["training"] = [{**i, "fold": names.index(i["class"]) % 3} for i in content["training"]]
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    listed = parse_setting(f"datalist={tmp_path / 'datalist.json'}")
    data = parse_setting(f"dataset_dir={tiny_subtomograms}")
    made = make_plan(BUNDLE, REPOSITORY, tmp_path, networks=["scnn"], settings=[data, listed])
    assert len(made.children) == 3
    for fold in range(3):
        _, validation, test = sides(made.datalists[tmp_path / "folds" / f"repeat0-fold{fold}.json"], fold)
        assert validation == set(names[fold::3])
        assert test == set(names[(fold + 1) % 3 :: 3])


def test_repeats_deal_the_classes_anew(tiny_subtomograms, tmp_path):
    made = plan(tiny_subtomograms, tmp_path, folds=3, repeats=3)
    tested = [frozenset(i["class"] for i in parts["test"]) for parts in made.datalists.values()]
    assert len(made.datalists) == 9
    assert len(set(tested)) > 3
