"""``medseg check``: a broken copy of a real bundle must be found broken, at the right place."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medseg.bundles.check import check_bundle, check_path
from medseg.bundles.config_check import config_problems, override_problems
from medseg.bundles.configs import MAX_DEPTH, lay_over, parse_config, read_config, walk

NAME = "fluorescence_tumor"
CONFIGS = f"bundles/{NAME}/configs"


@pytest.fixture
def checkout(tmp_path) -> Path:
    shutil.copytree("bundles", tmp_path / "bundles")
    shutil.copytree("transforms", tmp_path / "transforms")
    return tmp_path


def problems_of(checkout: Path) -> str:
    return "\n".join(map(str, check_bundle(checkout / "bundles" / NAME, checkout)))


#: file, text to replace, its replacement, what the check must say
BROKEN = {
    "macro file": (
        "train.yaml",
        "%transforms/fluorescence.yaml::load",
        "%transforms/gone.yaml::load",
        "load: .*gone.yaml",
    ),
    "macro key": ("train.yaml", "::augment'", "::augmnt'", "augment: .*not there: augmnt"),
    "reference": ("train.yaml", "'@loss'", "'@los'", "module::loss: @los is not there\n.*did you mean @loss"),
    "reference in expression": (
        "train.yaml",
        "$@load + @normalize + @resize_pair",
        "$@load + @normalise + @resize_pair",
        "@normalise is not there",
    ),
    "syntax": ("train.yaml", "$@max_epochs", "$@max_epochs +", None),
    "import": ("inference.yaml", "- $import glob\n", "", "files: nothing defines glob"),
    "target": ("train.yaml", "torch.optim.Adam,", "torch.optim.Adm,", "_target_: torch.optim.Adm does not exist"),
    "short target": (
        "train.yaml",
        "_target_: DiceCELoss",
        "_target_: DiceCELos",
        "loss::_target_: MONAI has no DiceCELos",
    ),
    "package": (
        "train.yaml",
        "segmentation_models_pytorch.Unet\n",
        "segmentation_models.Unet\n",
        "pip install segmentation_models",
    ),
    "argument": (
        "train.yaml",
        "sigmoid: true}",
        "sigmod: true}",
        "loss::sigmod: DiceCELoss takes no argument sigmod\n.*sigmoid",
    ),
    "argument handed on": (
        "train.yaml",
        "    max_epochs: '@max_epochs'",
        "    max_epoch: '@max_epochs'",
        "train::trainer::max_epoch: Trainer takes no argument max_epoch",
    ),
    "missing argument": (
        "train.yaml",
        "    dataset: '@train::dataset'\n",
        "",
        "train::dataloader: SeededDataLoader needs dataset",
    ),
    "unused key": ("train.yaml", "seed: 0", "sead: 0\nseed: 0", "sead: nothing uses this key\n.*did you mean seed"),
    "overlay key": ("demo.yaml", "batch_size: 8", "batch_sise: 8", "demo.yaml: batch_sise: nothing uses this key"),
    "overlay parent": (
        "evaluate.yaml",
        "validate::dataset::cache_rate",
        "validate::data_set::cache_rate",
        "data_set is not there",
    ),
    "property": ("inference.yaml", "inferer: '%", "inferrer: '%", "MONAI's tools need inferer"),
    "agreement": (
        "inference.yaml",
        f"'%{CONFIGS}/train.yaml::threshold'",
        "0.4",
        "threshold: 0.4 here, but 0.5 in training",
    ),
    "channels": (
        "train.yaml",
        "    in_channels: 1\n    out_channels: 1",
        "    in_channels: 3\n    out_channels: 1",
        "swin_unetr::in_channels: 3, but metadata.json says 1",
    ),
    "metadata": (
        "metadata.json",
        '"version": "0.1.0"',
        '"version": "new"',
        "metadata.json: version: 'new' does not match",
    ),
    "changelog": ("metadata.json", '"version": "0.1.0"', '"version": "0.3.0"', "says nothing about version 0.3.0"),
    "networks": (
        "metadata.json",
        '"swin_unetr"]',
        '"swin"]',
        r"networks: \['unet', 'unetpp', 'deeplabv3plus', 'swin'\], but",
    ),
    "json": ("metadata.json", '"task":', '"task"', "metadata.json: .*delimiter"),
    "yaml": ("train.yaml", "fold: 0 ", "fold: [0 ", "train.yaml: "),
    "key twice": ("train.yaml", "fold: 0 ", "seed: 1\nfold: 0 ", "train.yaml: line .*: key seed is there twice"),
    "circle": ("train.yaml", "threshold: 0.5 ", "threshold: '@overlap' #", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_finds(name, checkout):
    file, before, after, expected = BROKEN[name]
    path = checkout / CONFIGS / file
    if name == "syntax":
        path, before, after, expected = (
            checkout / CONFIGS / "demo.yaml",
            "$@max_epochs *",
            "$@max_epochs * *",
            "total_steps: .*no Python",
        )
    if name == "circle":
        path.write_text(path.read_text().replace("overlap: 0.25 ", "overlap: '@threshold' #"))
        expected = "goes in a circle: .*(threshold -> overlap|overlap -> threshold)"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    found = problems_of(checkout)
    assert re.search(expected, found), found


def test_a_sound_bundle_and_all_problems_at_once(checkout):
    assert problems_of(checkout) == ""
    train = checkout / CONFIGS / "train.yaml"
    train.write_text(train.read_text().replace("sigmoid: true}", "sigmod: true}").replace("'@loss'", "'@los'"))
    (checkout / f"bundles/{NAME}/LICENSE").unlink()
    found = problems_of(checkout)
    assert "sigmod" in found
    assert "@los " in found
    assert "LICENSE: is missing" in found


def test_command(checkout, tmp_path):
    """Exit code, JSON, time, and no heavy import: a subprocess each time, as a user has it."""
    code = """import sys; from medseg.cli import main
try: main()
finally: print([m for m in ('torch', 'monai', 'numpy') if m in sys.modules], file=sys.stderr)"""
    line = [sys.executable, "-c", code, "check"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*line, NAME], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert (done.returncode, done.stdout) == (0, f"{NAME}: no problems\n")
        assert done.stderr.endswith("[]\n")
    assert min(times) < 1.5, times  # 0.3 s on a quiet machine (benchmarks/sharing.py); CI is not quiet
    inference = checkout / CONFIGS / "inference.yaml"
    inference.write_text(inference.read_text() + "\nextra: '@nothing'\n")
    done = subprocess.run([*line, str(checkout / "bundles" / NAME), "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert {p["key"] for p in json.loads(done.stdout)} == {"extra"}
    done = subprocess.run([*line, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no config at" in done.stderr


def test_one_config_file_alone():
    assert check_path(f"{CONFIGS}/inference.yaml") == []
    assert check_path(f"{CONFIGS}/evaluate.yaml") == [], "an overlay is checked on what it lies on"


def test_overrides():
    files = {"train.yaml": read_config(Path(CONFIGS) / "train.yaml")}
    others = {"evaluate.yaml": read_config(Path(CONFIGS) / "evaluate.yaml")}

    def refused(*keys: str) -> list[str]:
        return override_problems(keys, files, others, Path.cwd())

    assert refused("max_epochs", "tags::site", "train::trainer::limit_train_batches", "train#trainer#max_epochs",
                   "networks::unet::decoder_attention_type", "loss::lambda_dice", "+train::handlers",
                   "train::dataset::cache_num", "network_def") == []  # fmt: skip
    assert refused("max_epoch") == ["--max_epoch (did you mean --max_epochs?)"]
    assert refused("train::trainer::max_epoch") == [
        "--train::trainer::max_epoch (did you mean --train::trainer::max_epochs?)"
    ]
    assert refused("ckpt_path") == ["--ckpt_path belongs to evaluate.yaml, which is not among the configs of this run"]
    assert refused("train::datasets::cache_rate") == [
        "--train::datasets::cache_rate (did you mean --train::dataset::cache_rate?)"
    ]
    assert refused("loss::nonsense") == ["--loss::nonsense"]


def test_laying_over_is_monais(tmp_path):
    from monai.bundle import ConfigParser

    base = {"a": {"b": [1, {"c": 2}], "d": 3}, "e": [1], "f": {"g": 1}}
    overlay = {"a::d": 4, "a::b::1::c": 5, "+e": [2], "+f": {"h": 2}, "i": {"j": 1}, "a#b#0": 9}
    for name, content in (("base", base), ("overlay", overlay)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    expected = ConfigParser.load_config_files([tmp_path / "base.yaml", tmp_path / "overlay.yaml"])
    merged, lost = lay_over(base, overlay)
    assert merged == expected
    assert lost == []
    assert base["a"]["d"] == 3, "the base is left as it was"
    assert [key for key, _ in lay_over(base, {"x::y": 1, "a::b::7": 1, "+e": {}})[1]] == ["x::y", "a::b::7", "+e"]


def laughs() -> str:
    """Ten lists, each of which holds the one before nine times."""
    letters = "bcdefghijk"
    lines = [f"{a}: &{a} [{', '.join([f'*{b}'] * 9)}]" for b, a in itertools.pairwise(letters)]
    return "\n".join(["b: &b [x, x]", *lines])


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("[" * 10**6, "a.yaml", "nested deeper"),
        ("- " * 3000 + "x", "a.yaml", "nested deeper"),
        ('{"a":' * 10**6 + "1" + "}" * 10**6, "a.json", "nested deeper"),
        (laughs(), "a.yaml", "unfolds to more"),
        ("a: &a\n  - *a\n", "a.yaml", "holds itself|nested deeper"),
        ("a: !!python/object/apply:os.system [true]", "a.yaml", "could not determine a constructor"),
        ("- a", "a.yaml", "a mapping"),
        ('{"a": 1, "a": 2}', "a.json", "key a is there twice"),
    ],
)  # fmt: skip
def test_hostile_text(text, name, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        parse_config(text, name)
    assert time.perf_counter() - start < 20


def test_a_macro_bomb_ends(tmp_path):
    config = {"a": "x", **{f"k{i}": [f"%k{i - 1}" if i else "%a"] * 10 for i in range(12)}}
    _, found = config_problems({"a.json": config}, tmp_path, {})
    assert any("unfold to more" in p.message for p in found)


def test_depth_limit_leaves_real_configs_alone():
    train = read_config(Path(CONFIGS) / "train.yaml")
    assert 5 * max(key.count("::") for key, _ in walk(train)) < MAX_DEPTH
