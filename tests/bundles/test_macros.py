from __future__ import annotations

import pytest
import yaml
from monai.bundle import ConfigParser

from medseg.bundles.macros import resolve_macros


def test_macros_resolve_as_in_monai(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"list": [{"x": "@free"}, {"y": 2}], "deep": "%r.yaml::list::1"}))
    config = {"free": 1, "one": "%r.yaml::list", "two": "%one::1", "three": "%r.yaml::deep"}
    expected = ConfigParser(dict(config))
    expected.parse()
    expected.parse()  # MONAI resolves one level at a time
    resolved = resolve_macros(config, tmp_path)
    assert resolved == expected.get()
    assert resolved["two"] == resolved["three"] == {"y": 2}


def test_bad_macros(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.yaml"):
        resolve_macros({"a": "%gone.yaml::b"}, tmp_path)
    with pytest.raises(KeyError, match="not there"):
        resolve_macros({"a": "%b::c", "b": {}}, tmp_path)
    with pytest.raises(ValueError, match="circle"):
        resolve_macros({"a": "%b", "b": "%a"}, tmp_path)
