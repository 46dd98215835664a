"""The paper's table, from a store with known numbers."""

from __future__ import annotations

import csv

import pytest
from fake_store import FakeStore

from medseg.tasks.fluorescence_tumor.paper import METRICS, PUBLISHED, _data, _write_table


def test_the_published_numbers_obey_the_identity_of_the_metrics():
    """Dice + FPSR + FNSR is 100 % in every row of the paper: a slip of the pen would break it."""
    for configurations in PUBLISHED.values():
        assert len(configurations) == 9
        for dice, _, fpsr, fnsr in configurations.values():
            if fpsr is not None:
                assert dice + fpsr + fnsr == pytest.approx(100, abs=0.025)


def test_the_table_has_measured_and_published_numbers_side_by_side(tmp_path, monkeypatch):
    out = tmp_path / "paper"
    for style, shift in (("abfm", 0.0), ("dthp", 0.1)):
        store = FakeStore(tmp_path, f"fluorescence_tumor-paper-{style}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
        for name in ("drlse", "unet-end_to_end", "unet-transfer"):
            for part in ("test", "held_out"):
                scores = {m: [0.5 + shift, 0.7 + shift] for m in METRICS}
                store.run(name, scores, ["images/a.png", "images/b.png"], part=part, fold=int(part == "held_out"))
    table = _write_table(out, count=2, folds=2, full=False)
    assert "| UNet, end to end | 60.00 (14.14) | *80.41* | 0.6 (0.1) | *35.83* |" in table
    assert "| UNet++, transfer | failed | *82.17* |" in table
    assert "| DRLSE | 70.00 (14.14) | *54.12* | 0.7 (0.1) | – |" in table
    assert "Simulated data" in table
    rows = list(csv.DictReader((out / "paper_table.csv").open()))
    assert len(rows) == 4 * 9 * 4
    assert {(r["trained_on"], r["tested_on"]) for r in rows} == {
        ("abfm", "abfm"), ("dthp", "dthp"), ("abfm", "dthl"), ("dthp", "dthl"),
    }  # fmt: skip
    assert (out / "comparison" / "dthp-dthl" / "report.html").is_file()


def test_no_image_of_the_unseen_organ_is_trained_on(tmp_path):
    from medseg.io.datalist import load_datalist

    for style, path in _data(tmp_path, count=2, seed=0, size=32).items():
        lists = load_datalist(path, tmp_path)
        assert {i["style"] for i in lists["training"]} == {style}
        assert [i["style"] for i in lists["test"]] == ["dthl", "dthl"]
