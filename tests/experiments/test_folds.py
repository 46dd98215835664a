"""Properties that make a cross-validation honest."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.experiments.folds import assign_folds, fold_datalist, group_ids


@st.composite
def item_lists(draw, grouped: bool):
    """Items of 1 to 3 classes; groups are of one class, as a patient has one diagnosis."""
    items = []
    for group in range(draw(st.integers(6, 25))):
        label = draw(st.sampled_from("abc"))
        for _ in range(draw(st.integers(1, 4)) if grouped else 1):
            item = {"image": f"{len(items)}.png", "style": label}
            if grouped:
                # a patient, a video, or both: a video alone ties its frames as well
                item |= draw(
                    st.sampled_from([{"patient": f"p{group}"}, {"patient": f"p{group}", "video": f"v{group}"}])
                )
            items.append(item)
    return items


@settings(deadline=None, max_examples=60)
@given(item_lists(grouped=True), st.integers(2, 5), st.integers(0, 5))
def test_no_group_leaks_and_every_case_is_tested_once(items, k, seed):
    assigned = assign_folds(items, k, seed, "style")
    tested = Counter()
    for fold in range(k):
        parts = fold_datalist(items, assigned, fold, seed, "style")
        validation = [i for i in parts["training"] if i["fold"] == fold]
        training = [i for i in parts["training"] if i["fold"] != fold]
        assert validation
        assert training
        sides = [{i["patient"] for i in side} for side in (training, validation, parts["test"])]
        assert sum(map(len, sides)) == len(set.union(*sides)), "a patient is on two sides"
        assert len(parts["training"]) + len(parts["test"]) == len(items)
        tested.update(i["image"] for i in parts["test"])
    assert tested == Counter(i["image"] for i in items)


def test_two_folds_of_unequal_groups_have_something_to_validate():
    """Four parts of what is not tested cannot be made of these; three can."""
    styles, patients = "aaaaaacccaacccaa", [0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 6]
    items = [
        {"image": f"{i}.png", "style": s, "patient": f"p{p}"}
        for i, (s, p) in enumerate(zip(styles, patients, strict=True))
    ]
    for seed in range(20):
        assigned = assign_folds(items, 2, seed, "style")
        for fold in range(2):
            numbers = {i["fold"] for i in fold_datalist(items, assigned, fold, seed, "style")["training"]}
            assert fold in numbers
            assert len(numbers) > 1


@settings(deadline=None, max_examples=60)
@given(item_lists(grouped=False), st.integers(2, 5), st.integers(0, 5))
def test_classes_stay_even_without_groups(items, k, seed):
    assigned = assign_folds(items, k, seed, "style")
    sizes = Counter(i["style"] for i in items)
    for label, size in sizes.items():
        counts = Counter(f for f, i in zip(assigned, items, strict=True) if i["style"] == label)
        per_fold = [counts[f] for f in range(k)]
        if max(sizes.values()) >= k:
            assert max(per_fold) - min(per_fold) <= 1, (label, size)
    assert set(assigned) == set(range(k))


@settings(deadline=None, max_examples=60)
@given(item_lists(grouped=True), st.integers(2, 5), st.integers(0, 5))
def test_classes_stay_even_up_to_the_largest_group(items, k, seed):
    assigned = assign_folds(items, k, seed, "style")
    largest = max(Counter(group_ids(items)).values())
    sizes = Counter(i["style"] for i in items)
    if max(sizes.values()) < k:
        return
    for label in sizes:
        counts = Counter(f for f, i in zip(assigned, items, strict=True) if i["style"] == label)
        per_fold = [counts[f] for f in range(k)]
        assert max(per_fold) - min(per_fold) <= largest


def test_the_paper_protocol_of_five_folds():
    items = [{"image": f"{i}.png"} for i in range(25)]
    assigned = assign_folds(items, 5)
    for fold in range(5):
        parts = fold_datalist(items, assigned, fold)
        sizes = Counter(i["fold"] == fold for i in parts["training"])
        assert (sizes[False], sizes[True], len(parts["test"])) == (15, 5, 5)
        assert {i["image"] for i in parts["test"]} == {
            i["image"] for i, f in zip(items, assigned, strict=True) if f == (fold + 1) % 5
        }


def test_repeats_are_dealt_anew_and_seeds_reproduce():
    items = [{"image": f"{i}.png"} for i in range(40)]
    assert assign_folds(items, 5, seed=1) == assign_folds(items, 5, seed=1)
    assert assign_folds(items, 5, seed=1) != assign_folds(items, 5, seed=2)


def test_groups_are_chained_through_patient_and_video():
    items = [{"patient": "a", "video": "1"}, {"patient": "a", "video": "2"}, {"video": "2"}, {"patient": "b"}, {}]
    first, *rest = group_ids(items)
    assert rest[:2] == [first, first]
    assert len(set(group_ids(items))) == 3


def test_held_out_items_are_kept_apart():
    items = [{"image": f"{i}.png"} for i in range(6)]
    parts = fold_datalist(items, assign_folds(items, 3), 0, held_out=[{"image": "x.png", "fold": 2}])
    assert parts["held_out"] == [{"image": "x.png"}]


@pytest.mark.parametrize(
    ("items", "k", "stratify", "message"),
    [
        ([{"patient": "a"}, {"patient": "a"}, {"patient": "b"}], 3, None, "2 groups"),
        ([{}, {}], 3, None, "2 items cannot be dealt to 3 folds"),
        ([{}, {}, {}], 1, None, "at least 2"),
        ([{}, {}, {}], 2, "sex", "no item has the field 'sex'"),
    ],
)
def test_what_cannot_be_dealt(items, k, stratify, message):
    with pytest.raises(ValueError, match=message):
        assign_folds(items, k, 0, stratify)
