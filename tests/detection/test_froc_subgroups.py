"""Subgroups of breasts."""

from __future__ import annotations

import pytest
from froc_cases import MASS, TWO, truths, views

from medseg.detection.froc_subgroups import subgroups


def test_subgroups_of_the_paper():
    known = views(*((f"v{i}", f"p{i}", f"b{i}") for i in range(6)), age=[39, 40, 49.9, 69, 70, None],
                  density=["1", "2.0", 3, "d", "A", "unknown"], histology=["benign"] * 5 + [""])  # fmt: skip
    found = {(g.field, g.value): list(g.breasts) for g in subgroups(known, truths())}
    assert found == {
        ("age", "<40"): ["b0"], ("age", "40-49"): ["b1", "b2"], ("age", "60-69"): ["b3"], ("age", ">=70"): ["b4"],
        ("histology", "benign"): ["b0", "b1", "b2", "b3", "b4"],
        ("density", "non-dense"): ["b0", "b1", "b4"], ("density", "dense"): ["b2", "b3"],
        ("density", "unknown"): ["b5"],
    }  # fmt: skip
    assert [g.field for g in subgroups(known, truths())][:4] == ["age"] * 4


def test_a_breast_has_the_largest_diameter_and_all_types_of_its_masses():
    true = truths(("cc", "a", MASS), ("mlo", "a", MASS), ("other", "a", MASS)).assign(
        diameter_mm=[29, 31, 50], mass_type=["spiculated", "irregular", "round"]
    )
    found = {(g.field, g.value): list(g.breasts) for g in subgroups(TWO.assign(diameter_mm=5), true)}
    assert found == {
        ("diameter_mm", "30-50"): ["1L"], ("diameter_mm", ">=50"): ["2R"],
        ("mass_type", "irregular/spiculated"): ["1L"], ("mass_type", "round"): ["2R"],
    }  # fmt: skip


def test_other_fields_are_text_with_few_shared_values():
    known = views(*((f"v{i}", f"p{i}", f"b{i}") for i in range(30)))
    known = known.assign(
        site=["north", "south"] * 15, file=[f"f{i}" for i in range(30)], vendor="x", dice=[0.1, 0.2] * 15
    )
    assert [(g.field, g.value, len(g.breasts)) for g in subgroups(known, truths())] == [
        ("site", "north", 15), ("site", "south", 15),
    ]  # fmt: skip
    assert [g.value for g in subgroups(known, truths(), ["dice"])] == ["0.1", "0.2"]
    with pytest.raises(ValueError, match="no field 'sitte'"):
        subgroups(known, truths(), ["sitte"])
    with pytest.raises(ValueError, match="30 values"):
        subgroups(known, truths(), ["file"])
    with pytest.raises(ValueError, match="'age' is not a number"):
        subgroups(known.assign(age="old"), truths())
