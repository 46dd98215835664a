from __future__ import annotations

from importlib import metadata

from medseg.doctor import _missing, examine, report


def test_a_missing_and_an_old_package_are_named(monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "itk":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "monai" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = _missing({"required_packages_version": {"itk": "5.4"}})
    assert len(found) == 2
    assert found[0].startswith("monai 1.0 does not fit monai>=")
    assert found[1] == "itk is not installed (pip install itk)"


def test_the_report_says_where_mlflow_writes(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    text = report(examine())
    assert "http://127.0.0.1:5000 (a server" in text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "mlflow.db" in report(examine())
