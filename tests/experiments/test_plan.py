from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY

from medseg.bundles.catalog import find_bundle
from medseg.experiments.plan import Setting, describe, make_plan, parse_setting

BUNDLE = find_bundle("fluorescence_tumor", REPOSITORY)


def plan(data: Path, out: Path, *settings: str, **arguments):
    chosen = [parse_setting(s) for s in (f"dataset_dir={data}", *settings)]
    return make_plan(BUNDLE, REPOSITORY, out, settings=chosen, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_epochs=5", Setting("max_epochs", "5")),
        ("train::trainer::gradient_clip_val=1.0", Setting("train::trainer::gradient_clip_val", "1.0")),
        ("transfer:encoder_weights=w/{network}.pt", Setting("encoder_weights", "w/{network}.pt", "transfer")),
        ("unet:train::trainer::x=a=b:c", Setting("train::trainer::x", "a=b:c", "unet")),
        ("normalize=%transforms/x.yaml::y", Setting("normalize", "%transforms/x.yaml::y")),
    ],
)
def test_settings(text, expected):
    assert parse_setting(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["max_epochs", "=5", "fold=3", "unet:seed=1", "tags::x=1", "unet:dataset_dir=/x"])
def test_settings_that_are_refused(text):
    with pytest.raises(ValueError, match=text.split("=")[0].split(":")[-1] or "no key=value"):
        parse_setting(text)


def test_the_folds_of_the_list_are_kept_unless_others_are_asked_for(tiny_data, tmp_path):
    own = plan(tiny_data, tmp_path, networks=["unet"])
    assert [(c.repeat, c.fold) for c in own.children] == [(0, f) for f in range(5)]
    listed = {i["image"]: i["fold"] for i in json.loads((tiny_data / "datalist.json").read_text())["training"]}
    first = own.datalists[tmp_path / "folds" / "repeat0-fold0.json"]
    assert {i["image"] for i in first["test"]} == {image for image, fold in listed.items() if fold == 1}
    repeated = plan(tiny_data, tmp_path, networks=["unet"], folds=2, repeats=3)
    assert len(repeated.children) == 6
    assert len({json.dumps(d["test"]) for d in repeated.datalists.values()}) > 2, "each repeat is dealt anew"
    assert [dict(c.arguments)["seed"] for c in repeated.children] == ["0", "0", "1", "1", "2", "2"]


def test_children_are_bundle_commands(tiny_data, tmp_path):
    made = plan(
        tiny_data, tmp_path, "max_epochs=7", "transfer:encoder_weights=w/{network}-{fold}.pt",
        "drlse:image_size=[64,64]", folds=2,
        networks=["unet", "drlse"], modes=["end_to_end", "transfer"], held_out=True,
    )  # fmt: skip
    names = [c.configuration for c in made.children]
    assert names == ["unet-end_to_end", "unet-transfer", "drlse"] * 2
    plain, transfer, drlse = (dict(c.arguments) for c in made.children[:3])
    assert plain["max_epochs"] == "7"
    assert "encoder_weights" not in plain
    assert transfer["encoder_weights"] == "w/unet-0.pt"
    assert drlse["image_size"] == "[64,64]"
    assert drlse["part"] == plain["score"] == "[test,held_out]"
    assert not {"mode", "network_name", "score"} & set(drlse)
    words = made.children[2].command("P")
    assert words[1:5] == ["-m", "monai.bundle", "run", "--config_file"]
    assert words[5].endswith("evaluate.yaml','bundles/fluorescence_tumor/configs/drlse.yaml']")
    assert words[words.index("--tags::mlflow.parentRunId") + 1] == "P"
    resumed = made.children[0].command("P", resume=True)
    assert resumed[5:8] == [str(made.children[0].folder / "configs" / "train.yaml"), "--resume", "True"]
    assert "2 held out" in describe(made)


def test_what_a_bundle_does_not_have(tiny_data, tmp_path):
    for arguments, message in (
        ({"networks": ["unett"]}, "no network unett; choose from unet"),
        ({"networks": ["unet", "unet"]}, "named twice"),
        ({"modes": ["frozen"]}, "no mode frozen"),
        ({"repeats": 0}, "at least 1"),
        ({"folds": 20}, "8 items cannot be dealt"),
        ({"stratify": "sex"}, "no item has the field 'sex'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(tiny_data, tmp_path, **{"folds": 2, **arguments})
    with pytest.raises(ValueError, match="transfr is neither a network nor a mode"):
        plan(tiny_data, tmp_path, "transfr:max_epochs=3")
    with pytest.raises(FileNotFoundError, match="--set dataset_dir=FOLDER"):
        plan(tmp_path / "nowhere", tmp_path)


def test_equal_pictures_are_refused_before_they_are_dealt(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    content = json.loads((tmp_path / "data" / "datalist.json").read_text())
    first, second = content["training"][:2]
    shutil.copy(tmp_path / "data" / first["image"], tmp_path / "data" / second["image"])
    with pytest.raises(ValueError, match="is the same picture as"):
        plan(tmp_path / "data", tmp_path, folds=2)


def test_an_edited_config_is_another_recipe(tiny_data, tmp_path):
    overlay = tmp_path / "mine.yaml"
    digests = []
    for text in ("batch_size: 2\n", "# a comment\nbatch_size: 2\n", "batch_size: 3\n"):
        overlay.write_text(text)
        digests.append(plan(tiny_data, tmp_path, overlays=[str(overlay)]).identity["recipe"])
    assert digests[0] == digests[1] != digests[2]


def test_where_the_store_is_comes_from_the_configs_and_stays_without_credentials(tiny_data, tmp_path):
    overlay = tmp_path / "site.yaml"
    overlay.write_text("tracking_uri: http://server:5000\n")
    assert plan(tiny_data, tmp_path, overlays=[str(overlay)]).tracking_uri == "http://server:5000"
    assert plan(tiny_data, tmp_path).tracking_uri is None
    made = plan(tiny_data, tmp_path, "tracking_uri=http://me:secret@server:5000")
    assert made.tracking_uri == "http://me:secret@server:5000"
    assert "secret" not in json.dumps(made.identity)


def test_a_picture_listed_twice_is_refused(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "data" / "datalist.json"
    content = json.loads(path.read_text())
    content["training"].append({k: v for k, v in content["training"][0].items() if k != "video"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="listed twice"):
        plan(tmp_path / "data", tmp_path, folds=2)
