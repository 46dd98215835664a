"""Splits for cross-validation: stratified, and grouped so that no patient or video is on two sides.

Fold ``f`` of ``k`` validates on part ``f``, is tested on part ``(f + 1) mod k`` and trains on the others, so that
every case is tested exactly once and never by a model that saw it (Hou et al. 2024: of five parts three train, one
validates, one tests). With two folds nothing would be left to train: there a quarter of the untested part validates.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg.io.datalist import GROUP_FIELDS, Item

__all__ = ["assign_folds", "fold_datalist", "group_ids"]


def assign_folds(
    items: Sequence[Item],
    folds: int,
    seed: int = 0,
    stratify: str | None = None,
    group_fields: Sequence[str] = GROUP_FIELDS,
) -> list[int]:
    """Deal items to folds, every class evenly, every group whole.

    Args:
        items: of a data list. Items that share a value of one of ``group_fields`` form a group.
        folds: number of folds, at least 2.
        seed: seed of the shuffle.
        stratify: field that holds the class of an item; without it folds are only balanced in size.
        group_fields: ``patient`` and ``video``, and what else must stay on one side.

    Returns:
        A fold in 0 .. folds - 1 per item. Without groups the number of items of a class differs by at most one
        between folds; with groups of one class each by at most the largest group.

    Raises:
        ValueError: if there are fewer groups than folds, or ``stratify`` is a field that no item has.

    The dealing is scikit-learn's ``StratifiedKFold`` and ``StratifiedGroupKFold``.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if folds < 2:
        raise ValueError(f"{folds} folds cannot be cross-validated; ask for at least 2")
    if stratify and not any(stratify in item for item in items):
        raise ValueError(f"no item has the field {stratify!r} to stratify by; leave it out or add it to the data list")
    groups = group_ids(items, group_fields)
    if len(set(groups)) < folds:
        what = "items" if len(set(groups)) == len(items) else f"groups (same {' or '.join(group_fields)})"
        raise ValueError(f"{len(set(groups))} {what} cannot be dealt to {folds} folds; use fewer folds or more data")
    grouped = len(set(groups)) < len(items)
    splitter = StratifiedGroupKFold if grouped else StratifiedKFold
    classes = [str(item.get(stratify, "")) if stratify else "" for item in items]
    if max(Counter(classes).values()) < folds:  # every class is rarer than the folds: there is nothing to keep even
        classes = [""] * len(items)
    assigned = np.full(len(items), -1)
    arguments = (np.zeros(len(items)), classes, groups if grouped else None)
    with warnings.catch_warnings():  # a rare class is spread as far as it goes
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = splitter(folds, shuffle=True, random_state=seed).split(*arguments)
        for fold, (_, tested) in enumerate(parts):
            assigned[tested] = fold
    empty = sorted(set(range(folds)) - set(assigned.tolist()))
    if empty:
        raise ValueError(f"the groups are too unequal for {folds} folds (fold {empty[0]} got nothing); use fewer folds")
    result: list[int] = assigned.tolist()
    return result


def group_ids(items: Sequence[Item], group_fields: Sequence[str] = GROUP_FIELDS) -> list[int]:
    """A number per item, equal for items that must stay together: those that share a patient or a video, in chains."""
    owner = list(range(len(items)))

    def find(i: int) -> int:
        while owner[i] != i:
            owner[i] = owner[owner[i]]
            i = owner[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        for field in group_fields:
            if item.get(field) not in (None, ""):
                owner[find(i)] = find(first.setdefault((field, str(item[field])), i))
    return [find(i) for i in range(len(items))]


def fold_datalist(
    items: Sequence[Item],
    assigned: Sequence[int],
    fold: int,
    seed: int = 0,
    stratify: str | None = None,
    held_out: Sequence[Item] = (),
    group_fields: Sequence[str] = GROUP_FIELDS,
) -> dict[str, Any]:
    """The data list of one fold, for ``--datalist``; train it with ``--fold`` of the same number.

    Args:
        items: all items.
        assigned: their folds, from :func:`assign_folds` or the data list itself.
        fold: which one, in 0 .. k - 1.
        seed: as in :func:`assign_folds`; with two folds it deals the validation items.
        stratify: as in :func:`assign_folds`.
        held_out: items that no fold trains, validates or tests on; a further part to score.
        group_fields: as in :func:`assign_folds`.

    Returns:
        ``training`` (with ``fold``), ``test`` and ``held_out``, ready to be written as JSON.
    """
    folds = max(assigned) + 1
    tested = (fold + 1) % folds
    rest = [i for i, f in enumerate(assigned) if f != tested]
    numbers = {i: assigned[i] for i in rest}
    if folds == 2:
        kept = [items[i] for i in rest]
        dealt = _quarters(kept, seed, stratify, group_fields)
        numbers = {i: fold if part == 0 else folds for i, part in zip(rest, dealt, strict=True)}
    return {
        "training": [{**items[i], "fold": numbers[i]} for i in rest],
        "test": [_without_fold(items[i]) for i, f in enumerate(assigned) if f == tested],
        "held_out": [_without_fold(item) for item in held_out],
    }


def _quarters(items: Sequence[Item], seed: int, stratify: str | None, group_fields: Sequence[str]) -> list[int]:
    """Deal items to four parts, or to three or two where their groups are too few or too unequal for more."""
    for parts in range(min(4, len(set(group_ids(items, group_fields)))), 2, -1):
        try:
            return assign_folds(items, parts, seed, stratify, group_fields)
        except ValueError:  # a part got nothing
            continue
    return assign_folds(items, 2, seed, stratify, group_fields)


def _without_fold(item: Item) -> Item:
    return {k: v for k, v in item.items() if k != "fold"}
