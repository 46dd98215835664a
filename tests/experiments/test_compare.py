"""Comparison of runs in a store, against numbers from scipy, and the report in a real browser."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_store import FakeStore
from scipy import stats

from medseg.experiments.compare import COLUMNS, compare
from medseg.experiments.runs import read_runs
from medseg.experiments.statistics import bootstrap_ci, holm
from medseg.experiments.tables import FORMATS, render

CASES = [f"images/{i:02d}.png" for i in range(20)]
HALVES = {0: CASES[:10], 1: CASES[10:]}


def scores(shift: float, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    base = rng.uniform(0.6, 0.9, 20)
    noise = np.random.default_rng(seed).normal(0, 0.03, 20)
    return {"dice": base + shift + noise, "hausdorff_distance": 40 * (1 - base - shift - noise)}


CONFIGURATIONS = {
    "unet-end_to_end": scores(0.0, 1),
    "unetpp-end_to_end": scores(0.05, 2),
    "swin-transfer": scores(0.0, 4),
}


def write(store: FakeStore, leave_out: tuple[str, int] | None = None, **arguments) -> FakeStore:
    for name, values in CONFIGURATIONS.items():
        for fold, cases in HALVES.items():
            if (name, fold) == leave_out:
                continue
            rows = slice(10 * fold, 10 * fold + 10)
            fields = {
                "patient": [f"p{i // 2}" for i in range(10 * fold, 10 * fold + 10)],
                "style": ["abfm" if i % 2 else "dthp" for i in range(10)],
                "age": np.arange(30 + 10 * fold, 40 + 10 * fold),
            }
            store.run(name, {m: v[rows] for m, v in values.items()}, cases, fold=fold, fields=fields, **arguments)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FakeStore:
    return write(FakeStore(tmp_path_factory.mktemp("store")), pictures=True)


def read(store: FakeStore, **arguments):
    return read_runs(store.experiment, store.uri, **arguments)


def test_the_table_is_what_scipy_says(store):
    comparison = compare(read(store))
    assert list(comparison.table.columns) == COLUMNS
    assert comparison.baseline == "unet-end_to_end"
    table = comparison.table.set_index(["configuration", "metric"])
    for metric in ("dice", "hausdorff_distance"):
        p = []
        for name, values in CONFIGURATIONS.items():
            row = table.loc[(name, metric)]
            assert row["n"] == 20
            assert row["mean"] == pytest.approx(np.mean(values[metric]))
            assert row["sd"] == pytest.approx(np.std(values[metric], ddof=1))
            low, high = bootstrap_ci(values[metric])
            assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low), pytest.approx(high))
            if name != comparison.baseline:
                p.append(stats.wilcoxon(values[metric], CONFIGURATIONS["unet-end_to_end"][metric]).pvalue)
                assert row["p_value"] == pytest.approx(p[-1])
        others = [n for n in CONFIGURATIONS if n != comparison.baseline]
        np.testing.assert_allclose([table.loc[(n, metric)]["p_adjusted"] for n in others], holm(p))
        assert np.isnan(table.loc[(comparison.baseline, metric)]["p_value"])
    ranks = comparison.ranks.set_index(["configuration", "metric"])["mean_rank"]
    # HD falls where Dice rises here, and its direction comes from the bundle: the ranks agree
    assert ranks["unetpp-end_to_end", "dice"] == ranks["unetpp-end_to_end", "hausdorff_distance"] < 1.6
    overview = comparison.overview.set_index("configuration")
    assert overview.loc["unet-end_to_end", ["runs", "failed_runs", "cases", "parameters"]].tolist() == [2, 0, 20, 1004]
    assert overview.loc["unet-end_to_end", "train_seconds"] == 60
    assert 0 < overview.loc["unet-end_to_end", "ece"] < 1


def test_subgroups_of_kinds_and_of_ranges(store):
    table = compare(read(store)).subgroups
    style = table[(table["field"] == "style") & (table["value"] == "abfm")].set_index(["configuration", "metric"])
    values = CONFIGURATIONS["swin-transfer"]["dice"][1::2]
    assert style.loc[("swin-transfer", "dice")]["mean"] == pytest.approx(values.mean())
    ages = table[(table["field"] == "age") & (table["metric"] == "dice")]
    assert ages["value"].drop_duplicates().tolist() == ["30 to 36", "37 to 43", "44 to 49"]
    assert ages.groupby("configuration")["n"].sum().tolist() == [20] * 3
    assert "patient" not in set(table["field"]), "a patient is no subgroup"


def test_one_value_per_patient(store):
    assert any("--unit patient" in note for note in compare(read(store)).notes)
    comparison = compare(read(store), unit="patient")
    row = comparison.table.set_index(["configuration", "metric"]).loc[("unet-end_to_end", "dice")]
    per_patient = CONFIGURATIONS["unet-end_to_end"]["dice"].reshape(10, 2).mean(axis=1)
    assert row["n"] == 10
    assert row["sd"] == pytest.approx(np.std(per_patient, ddof=1))
    assert comparison.notes == []
    with pytest.raises(ValueError, match="no field 'hospital'"):
        compare(read(store), unit="hospital")


def test_a_case_scored_by_several_folds_counts_once(tmp_path):
    store = FakeStore(tmp_path)
    rng = np.random.default_rng(0)
    values = rng.random((3, 20))
    for fold in range(3):
        store.run("unet-end_to_end", {"dice": values[fold]}, CASES, fold=fold, part="held_out")
    row = compare(read(store, part="held_out")).table.iloc[0]
    assert row["n"] == 20
    assert row["sd"] == pytest.approx(values.mean(axis=0).std(ddof=1))


def test_different_cases_are_refused_and_named(tmp_path):
    store = write(FakeStore(tmp_path), leave_out=("swin-transfer", 1))
    store.run("swin-transfer", {"dice": [0.5]}, CASES[:1], fold=1, status="FAILED")
    with pytest.raises(ValueError, match="swin-transfer lacks 10 of 20 cases: images/10") as caught:
        compare(read(store))
    assert "swin-transfer-0-1 (FAILED)" in str(caught.value)
    comparison = compare(read(store), common=True)
    assert set(comparison.table["n"]) == {10}
    assert comparison.overview.set_index("configuration").loc["swin-transfer", "failed_runs"] == 1
    assert "lacks 10 of 20" in comparison.notes[0]


def test_equal_names_of_different_files_are_refused(tmp_path):
    store = FakeStore(tmp_path)
    store.run("unet-end_to_end", {"dice": [0.5, 0.6]}, CASES[:2])
    store.run("unetpp-end_to_end", {"dice": [0.5, 0.6]}, CASES[:2], data="e" * 64)
    with pytest.raises(ValueError, match="different data lists or files"):
        compare(read(store))


def test_runs_of_one_name_are_told_apart_by_their_settings_or_the_newest_counts(tmp_path):
    store = FakeStore(tmp_path)
    for rate in (0.001, 0.01):
        store.run(
            "unet-end_to_end", {"dice": [rate, 0.6]}, CASES[:2], params={"learning_rate": rate, "num_workers": rate}
        )
    store.run("unet-end_to_end", {"dice": [0.9, 0.6]}, CASES[:2], params={"learning_rate": 0.01})
    comparison = compare(read(store))
    assert comparison.runs.configurations == [
        "unet-end_to_end learning_rate=0.001",
        "unet-end_to_end learning_rate=0.01",
    ]
    assert comparison.table.iloc[1]["mean"] == pytest.approx(0.75)
    assert "1 older runs" in comparison.notes[-1]


def test_children_of_one_cross_validation_are_one_configuration(tmp_path):
    store = FakeStore(tmp_path)
    for fold, cases in HALVES.items():
        weights = {"encoder_weights": f"fold{fold}.pt"}
        run_id = store.run("unet-transfer", {"dice": [0.5] * 10}, cases, fold=fold, params=weights)
        store.client.set_tag(run_id, "mlflow.parentRunId", "parent")
    assert read(store).configurations == ["unet-transfer"]


def test_of_two_cross_validations_in_one_experiment_the_newest_counts(tmp_path):
    store = FakeStore(tmp_path)
    for parent, folds, value in (("old", 3, 0.1), ("new", 2, 0.9)):
        for fold in range(folds):
            cases = CASES[fold::folds][:4]
            run_id = store.run("unet-end_to_end", {"dice": [value] * 4}, cases, fold=fold, status="RUNNING")
            store.client.set_tag(run_id, "mlflow.parentRunId", parent)
            store.client.set_terminated(run_id)
    comparison = compare(read(store))
    assert comparison.table["mean"].tolist() == [pytest.approx(0.9)]
    assert "3 runs of earlier cross-validations" in comparison.notes[0]


def test_a_failure_in_a_sweep_is_not_hidden(tmp_path):
    store = FakeStore(tmp_path)
    for rate, status in ((0.001, "FINISHED"), (0.01, "FINISHED"), (0.1, "FAILED")):
        store.run("unet-end_to_end", {"dice": [rate, 0.6]}, CASES[:2], params={"learning_rate": rate}, status=status)
    runs = read(store)
    assert [r.configuration for r in runs.failed] == ["unet-end_to_end learning_rate=0.1"]
    assert compare(runs).overview["failed_runs"].tolist() == [0, 0, 1]


def test_runs_with_other_metrics_and_of_other_kinds(tmp_path):
    store = FakeStore(tmp_path)
    both = {"dice": [0.5, 0.6], "hausdorff_distance": [1.0, 2.0]}
    store.run("unet-end_to_end", both, CASES[:2], params={"run.0": "$@train::trainer.run()"})
    store.run("unet-end_to_end", {"dice": [0.7, 0.8]}, CASES[:2], params={"run.0": "$@validate::evaluator.run()"})
    store.run("unetpp-end_to_end", {"dice": [0.7, 0.6]}, CASES[:2])
    runs = read(store)
    assert runs.configurations == ["unet-end_to_end", "unetpp-end_to_end"]
    assert runs.metrics == ["dice"]
    store.run("swin-transfer", both, CASES[:2])
    comparison = compare(read(store))
    assert comparison.metrics == ["dice"]
    assert "Not all runs have hausdorff_distance" in " ".join(comparison.notes)


def test_undefined_values_and_ties(tmp_path):
    store = FakeStore(tmp_path)
    store.run("unet-end_to_end", {"hausdorff_distance": [np.nan, 3.0, 4.0]}, CASES[:3])
    store.run("unetpp-end_to_end", {"hausdorff_distance": [2.0, 3.0, 4.0]}, CASES[:3])
    table = compare(read(store)).table
    assert table["n"].tolist() == [2, 3]
    assert table.loc[1, "p_value"] == 1.0
    assert "–" not in render(compare(read(store)), "table").splitlines()[2]


def test_wrong_names_say_what_there_is(store, tmp_path):
    with pytest.raises(ValueError, match=r"no experiment 'tril'.*trial"):
        read_runs("tril", store.uri)
    with pytest.raises(FileNotFoundError, match="--tracking-uri"):
        read_runs("trial", f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(ValueError, match="no finished run with scores of the validation part"):
        read(store, part="validation")
    with pytest.raises(ValueError, match="unknown metric dise; the runs have dice, hausdorff_distance"):
        compare(read(store), ["dise"])
    with pytest.raises(ValueError, match="no configuration 'u' to be the baseline"):
        compare(read(store), baseline="u")
    assert compare(read(store), baseline="swin").baseline == "swin-transfer"


def test_formats_hold_the_same_numbers(store):
    comparison = compare(read(store), ["dice"])
    row = comparison.table.iloc[1]
    shown = f"{row['mean']:.4f} ± {row['sd']:.4f}"
    assert shown in render(comparison, "table")
    assert f"| {shown} |" in render(comparison, "markdown")
    assert shown.replace("±", r"$\pm$") in render(comparison, "latex")
    assert r"unet-end\_to\_end" in render(comparison, "latex")
    written = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert float(written[1]["mean"]) == row["mean"]
    assert list(written[0]) == COLUMNS
    assert written[0]["p_value"] == ""
    assert set(FORMATS) == {"table", "markdown", "latex", "csv"}


@pytest.fixture(scope="module")
def written(store, tmp_path_factory) -> Path:
    """What the command writes, with a baseline by its short name."""
    out = tmp_path_factory.mktemp("comparison")
    line = [sys.executable, "-m", "medseg", "compare", store.experiment, "--tracking-uri", store.uri, "--out", str(out)]
    done = subprocess.run([*line, "--baseline", "unetpp"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "unetpp-end_to_end (baseline)" in done.stdout
    return out


def test_the_command_writes_its_files(written):
    names = {p.name for p in written.iterdir()}
    assert names == {"comparison.csv", "comparison.txt", "ranks.csv", "runs.csv", "subgroups.csv", "report.html"}
    assert pd.read_csv(written / "comparison.csv")["baseline"].unique().tolist() == ["unetpp-end_to_end"]


def test_the_command_needs_neither_torch_nor_monai(store):
    code = (
        f"import sys\nsys.argv = ['medseg', 'compare', {store.experiment!r}, '--tracking-uri', {store.uri!r}, "
        "'--format', 'csv']\nfrom medseg.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'monai', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_report_refers_to_nothing_outside_itself(written):
    text = (written / "report.html").read_text()
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]', text)
    assert len(text) < 5_000_000


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
def test_the_report_in_a_browser(written):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get((written / "report.html").as_uri())
        widths = browser.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
        # two metrics: boxes and differences; learning curves; reliability; four worst cases of three configurations
        assert len(widths) == 2 + 2 + 1 + 1 + 12
        assert min(widths) > 0, "a picture did not load"
        table = pd.read_csv(written / "comparison.csv")
        for metric, decimals in (("dice", 4), ("hausdorff_distance", 2)):
            rows = browser.find_elements(By.CSS_SELECTOR, f"#scores-{metric} tbody tr")
            shown = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
            expected = table[table["metric"] == metric].to_dict("records")
            assert len(shown) == len(expected) == 3
            for cells, row in zip(shown, expected, strict=True):
                assert cells[0].removesuffix(" (baseline)") == row["configuration"]
                assert cells[1] == str(row["n"])
                assert cells[2] == f"{row['mean']:.{decimals}f} ± {row['sd']:.{decimals}f}"
                assert cells[3] == f"[{row['ci_low']:.{decimals}f}, {row['ci_high']:.{decimals}f}]"
                for cell, p in zip(cells[5:], (row["p_value"], row["p_adjusted"]), strict=True):
                    assert cell == ("" if np.isnan(p) else "<0.0001" if p < 0.0001 else f"{p:.4f}")
        assert browser.find_element(By.ID, "differences").text.count("network_name") == 1
        assert "output_dir" not in browser.find_element(By.ID, "differences").text
        problems = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert problems == [], json.dumps(problems)
    finally:
        browser.quit()
