from __future__ import annotations

import yaml
from monai.bundle import ConfigParser

from medseg.bundles.running import merged_config, running_parser, scalar_settings


class Witness:
    """Built by a config; remembers what it saw."""

    def __init__(self, value: int = 0) -> None:
        self.value, self.parser = value, running_parser()


def test_an_object_finds_the_parser_that_builds_it():
    parser = ConfigParser({"a": 3, "w": {"_target_": f"{__name__}.Witness", "value": "@a"}})
    assert parser.get_parsed_content("w").parser is parser
    assert running_parser() is None


def test_settings_are_the_resolved_scalars():
    parser = ConfigParser(
        {"a": 3, "b": "$@a + 1", "c": ["@b", {"d": None}], "e": "$object()", "imports": ["$import os"]}
    )
    parser.parse()
    parser.get_parsed_content("c")
    assert scalar_settings(parser) == {"a": "3", "b": "4", "c.0": "4", "c.1.d": "None", "e": "$object()"}


def test_merged_config_is_plain_yaml(tmp_path):
    parser = ConfigParser({"path": tmp_path, "pair": (1, 2), "x": "$1 + 1"})
    parser.parse()
    config = merged_config(parser)
    assert yaml.safe_load(yaml.safe_dump(config)) == {"path": str(tmp_path), "pair": [1, 2], "x": "$1 + 1"}
