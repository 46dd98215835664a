"""The report of an FROC analysis, from files to tables and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medseg.detection.free_response import froc, truth_areas
from medseg.detection.froc_report import read_run, write_froc_report
from medseg.detection.froc_statistics import compare_areas
from medseg.detection.hit_rules import BOX

MASS, AWAY = (0, 0, 0, 10, 20, 20), (50, 50, 50, 60, 60, 60)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A run's folder: 12 patients, one breast each, two views, one mass; the better the more hits at high scores."""

    def write(name: str, better: float = 1.0, patients: int = 12) -> Path:
        rng = np.random.default_rng(0)
        images = [f"{p:02}_{v}.dcm" for p in range(patients) for v in ("cc", "mlo")]
        patient = [i[:2] for i in images]
        table = {
            "image": images,
            "patient": patient,
            "breast": [p + "L" for p in patient],
            "view": ["CC", "MLO"] * patients,
        }
        age = [35 + 3 * int(p) for p in patient]
        pd.DataFrame({**table, "age": age, "density": [1, 1, 4, 4] * (patients // 2)}).to_csv(
            _made(tmp_path / name) / "per_image.csv", index=False
        )
        truth = pd.DataFrame([[i, 0, *MASS, "round" if i < "06" else "irregular"] for i in images])
        truth.columns = ["view", "mass", *BOX, "mass_type"]
        truth.to_csv(tmp_path / name / "truths.csv", index=False)
        rows = [[i, *MASS, rng.normal(better)] for i in images if rng.random() < 0.9]
        rows += [[i, *AWAY, s] for i in images for s in rng.normal(size=rng.poisson(2))]
        pd.DataFrame(rows, columns=["view", *BOX, "score"]).to_csv(tmp_path / name / "detections.csv", index=False)
        return tmp_path / name

    return write


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def change(path: Path, **columns: object) -> None:
    """Give columns of a table other values, or take them away."""
    table = pd.read_csv(path, dtype=str).assign(**columns)
    table.drop(columns=[c for c, v in columns.items() if v is None]).to_csv(path, index=False)


def test_the_report_holds_what_the_functions_give(folder, tmp_path):
    runs = {"3D": folder("a", 2.0), "2D | slices": folder("b", 0.5)}
    written = write_froc_report(runs, tmp_path / "out", baseline="2D | slices", resamples=200, seed=1)
    assert [p.name for p in written] == [
        "froc.csv", "areas.csv", "table2.csv", "table3.csv", "truth_areas.csv", "froc_tables.md", "froc.png",
        "froc_subgroups.png",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    tables = {p.stem: pd.read_csv(p) for p in written if p.suffix == ".csv"}
    found, true, views = read_run(runs["3D"])
    other = read_run(runs["2D | slices"])[0]
    for by in ("breast", "lesion"):
        one, points = froc(found, true, views, by), tables["froc"].query("run == '3D' and by == @by")
        np.testing.assert_allclose(points["threshold"], one.thresholds)
        np.testing.assert_allclose(points["sensitivity"], one.sensitivity)
        np.testing.assert_allclose(points["false_positives"], one.false_positives)
        row = tables["table2"].query("run == '3D' and by == @by").iloc[0]
        assert (row["truths"], row["units"]) == (one.truths, one.units)
        for s in (60, 70, 80, 85, 90, 95):
            assert row[str(s)] == pytest.approx(one.false_positives_at(s / 100), nan_ok=True)
        row = tables["areas"].query("run == '3D' and by == @by").iloc[0]
        assert row["area"] == pytest.approx(one.area())
        assert row["sensitivity_0.5"] == pytest.approx(one.at_false_positives(0.5))
        assert row["area_low"] < row["area"] < row["area_high"]
        tested = compare_areas(found, other, true, views, by, resamples=200, seed=1)
        assert row["difference"] == pytest.approx(tested.difference)
        assert (row["p_bootstrap"], row["p_permutation"]) == (tested.p_bootstrap, tested.p_permutation)
        items = tables["truth_areas"].query("run == '3D' and by == @by")
        np.testing.assert_allclose(items["area"], truth_areas(found, true, views, by)["area"])
    assert tables["areas"].query("run != '3D'")[["difference", "p_bootstrap", "p_permutation"]].isna().all(axis=None)


def test_subgroups_have_their_own_truths_and_false_positives(folder, tmp_path):
    run = folder("a")
    write_froc_report({"a": run}, tmp_path / "out", resamples=50)
    table = pd.read_csv(tmp_path / "out" / "table3.csv")
    assert table["field"].unique().tolist() == ["age", "mass_type", "density"]
    assert table.groupby("field")["breasts"].sum().to_dict() == {"age": 12, "mass_type": 12, "density": 12}
    found, true, views = read_run(run)
    kept = views[views["density"].astype(int) == 4]
    one = froc(found[found["view"].isin(kept["view"])], true[true["view"].isin(kept["view"])], kept)
    row = table.query("value == 'dense'").iloc[0]
    assert (row["breasts"], row["masses"]) == (6, 6)
    assert row["area"] == pytest.approx(one.area())
    assert row["80"] == pytest.approx(one.false_positives_at(0.8), nan_ok=True)


def test_the_tables_say_what_is_counted_and_what_the_paper_found(folder, tmp_path):
    runs = {"3D": folder("a", 3.0), "2D | slices": folder("b", -3.0)}
    change(runs["3D"] / "per_image.csv", breast=["", "", *(f"{p:02}L" for p in range(1, 12) for _ in "ab")])
    change(runs["2D | slices"] / "per_image.csv", breast=["", "", *(f"{p:02}L" for p in range(1, 12) for _ in "ab")])
    write_froc_report(runs, tmp_path, "iou>0.3", resamples=99)
    text = (tmp_path / "froc_tables.md").read_text(encoding="utf-8")
    assert "`iou>0.3`" in text
    assert "(11 breasts)" in text
    assert "per mass and view (24)" in text
    assert "2 views have no breast" in text
    assert "| paper: 3D Mask R-CNN |  | 0.08 | 0.22 | 0.34 | 0.57 | 0.83 | 1.02 |" in text
    assert "| paper: 2D Mask R-CNN |  | 0.19 | 0.34 | 0.77 | 1.06 | 1.24 | 2.80 |" in text
    assert "is no reference" in text
    assert "Differences are to 3D" in text
    assert "at least 1 / 100" in text
    assert "2D \\| slices" in text
    assert "–" in text  # 24 masses of which one in ten is never found
    assert "nan" not in text


def test_one_run_without_fields_has_no_tests_and_no_subgroups(folder, tmp_path):
    run = folder("a")
    change(run / "per_image.csv", age=None, density=None, view=None)
    change(run / "truths.csv", mass_type=None)
    written = write_froc_report({"a": run}, tmp_path / "out", resamples=20)
    assert not {p.name for p in written} & {"table3.csv", "froc_subgroups.png"}
    text = (tmp_path / "out" / "froc_tables.md").read_text(encoding="utf-8")
    assert "permutation" not in text


def test_nothing_found_and_nothing_true_are_reported(folder, tmp_path):
    run = folder("a")
    for name in ("detections.csv", "truths.csv"):
        pd.read_csv(run / name, dtype=str)[:0].to_csv(run / name, index=False)
        write_froc_report({"a": run, "again": run}, tmp_path / name, resamples=20)
    table = pd.read_csv(tmp_path / "detections.csv" / "areas.csv")
    assert table["area"].tolist() == [0] * 4
    assert pd.read_csv(tmp_path / "truths.csv" / "areas.csv")["area"].isna().all()


def test_figures_are_pictures_and_the_same_again(folder, tmp_path):
    runs = {"a": folder("a"), "b": folder("b", 2.0)}
    first, again = (write_froc_report(runs, tmp_path / n, resamples=50) for n in ("one", "two"))
    for a, b in zip(first, again, strict=True):
        assert a.read_bytes() == b.read_bytes()
    for name in ("froc.png", "froc_subgroups.png"):
        with Image.open(tmp_path / "one" / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5


def test_rows_may_come_in_another_order(folder, tmp_path):
    a, b = folder("a"), folder("b", 2.0)
    write_froc_report({"a": a, "b": b}, tmp_path / "one", resamples=20)
    for name in ("per_image.csv", "truths.csv"):
        pd.read_csv(b / name, dtype=str)[::-1].to_csv(b / name, index=False)
    write_froc_report({"a": a, "b": b}, tmp_path / "two", resamples=20)
    assert (tmp_path / "one" / "areas.csv").read_text() == (tmp_path / "two" / "areas.csv").read_text()


def test_the_challenge_rule_reads_its_grid_from_the_views(folder, tmp_path):
    run = folder("a")
    change(run / "per_image.csv", slices="40", spacing_h="0.4", spacing_w="0.4", pixel_mm="0.1")
    change(run / "detections.csv", h0="10", h1="40")  # shifted by 15 voxels of 0.4 mm and too large for IoU > 0.5
    write_froc_report({"a": run}, tmp_path / "out", "bcs-dbt", resamples=20)
    assert pd.read_csv(tmp_path / "out" / "areas.csv")["area"].min() > 0
    change(run / "per_image.csv", pixel_mm="")
    with pytest.raises(ValueError, match="'bcs-dbt' needs positive numbers"):
        write_froc_report({"a": run}, tmp_path / "out", "bcs-dbt")


def test_missing_files_and_wrong_columns_are_named(folder, tmp_path):
    run = folder("a")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*per_image\.csv"):
        write_froc_report({"a": tmp_path / "nowhere"}, tmp_path / "out")
    change(run / "detections.csv", score=None)
    with pytest.raises(ValueError, match=r"detections\.csv: no column score; there are view, d0"):
        write_froc_report({"a": run}, tmp_path / "out")
    change(folder("a") / "detections.csv", score="high")
    with pytest.raises(ValueError, match=r"detections\.csv: column score is not a number"):
        write_froc_report({"a": run}, tmp_path / "out")
    change(folder("a") / "detections.csv", score="nan")
    with pytest.raises(ValueError, match=r"a: detections: the score is not a finite number"):
        write_froc_report({"a": run}, tmp_path / "out")
    change(folder("a") / "truths.csv", view="other.dcm")
    with pytest.raises(ValueError, match="a mass has two boxes in one view"):
        write_froc_report({"a": run}, tmp_path / "out")
    (folder("a") / "truths.csv").write_text("")
    with pytest.raises(ValueError, match=r"truths\.csv: the file is empty"):
        write_froc_report({"a": run}, tmp_path / "out")
    (folder("a") / "per_image.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"per_image\.csv: not a CSV table"):
        write_froc_report({"a": run}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_on_other_views_or_truths_are_refused(folder, tmp_path):
    a, b = folder("a"), folder("b", patients=10)
    with pytest.raises(ValueError, match=r"b.per_image\.csv and .*a.per_image\.csv differ: .*10_cc"):
        write_froc_report({"a": a, "b": b}, tmp_path / "out")
    change(folder("b") / "truths.csv", mass="1")
    with pytest.raises(ValueError, match=r"b.truths\.csv and .*a.truths\.csv differ"):
        write_froc_report({"a": a, "b": b}, tmp_path / "out")
    change(folder("b") / "truths.csv", d1="9")
    with pytest.raises(ValueError, match="different boxes"):
        write_froc_report({"a": a, "b": b}, tmp_path / "out")
    with pytest.raises(ValueError, match="none of the runs: a"):
        write_froc_report({"a": a}, tmp_path / "out", baseline="c")
    with pytest.raises(ValueError, match="runs is empty"):
        write_froc_report({}, tmp_path / "out")
