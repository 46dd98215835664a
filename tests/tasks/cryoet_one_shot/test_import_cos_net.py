from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medseg.io.datalist import load_datalist
from medseg.io.mrc import read_mrc
from medseg.tasks.cryoet_one_shot.import_cos_net import import_cos_net

CLASSES, SLOTS, SIZE = 6, 4, 8
COUNTS = [3, 4, 1, 2, 4, 2]


def release() -> dict[str, np.ndarray]:
    """Arrays as the authors lay them out, small; slots past the count are empty (zero)."""
    rng = np.random.default_rng(0)
    data = rng.normal(5, 2, (CLASSES, SLOTS, SIZE, SIZE, SIZE))
    masks = (rng.random(data.shape) < 0.2).astype(np.float64)
    for c, count in enumerate(COUNTS):
        data[c, count:] = masks[c, count:] = 0
    return {"data": data, "data_seg": masks, "cnt": np.array(COUNTS, np.float64)[:, None]}


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_every_filled_slot_is_converted(tmp_path):
    arrays = release()
    path = import_cos_net(save(tmp_path / "in", arrays), tmp_path / "out", train_classes=4, folds=2, voxel_size=12.0)
    lists = load_datalist(path, tmp_path / "out")
    assert len(lists["training"]) == sum(COUNTS[:4])
    assert len(lists["test"]) == sum(COUNTS[4:])
    assert {i["class"] for i in lists["training"]} == {f"class_0{c}" for c in range(4)}
    assert [i["fold"] for i in lists["training"]] == [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    volume, spacing = read_mrc(tmp_path / "out/subtomograms/class_01_0002.mrc")
    mask, _ = read_mrc(tmp_path / "out/masks/class_01_0002.mrc")
    original = arrays["data"][1, 2]
    np.testing.assert_allclose(volume, (original - original.mean()) / original.std(), atol=1e-5)
    np.testing.assert_array_equal(mask, arrays["data_seg"][1, 2])
    assert spacing == (12.0, 12.0, 12.0)
    assert not (tmp_path / "out/subtomograms/class_00_0003.mrc").exists()
    assert json.loads(path.read_text())["classes"]["test"] == ["class_04", "class_05"]


def test_names_integers_and_masks_of_255(tmp_path):
    arrays = release()
    arrays = {
        "data": (100 * arrays["data"]).astype(np.int16),
        "data_seg": (255 * arrays["data_seg"]).astype(np.uint8),
        "cnt": arrays["cnt"].astype(np.int64).ravel(),
    }
    path = import_cos_net(save(tmp_path / "in", arrays), tmp_path / "out", train_classes=3, names="a,b,c,d,e, f")
    assert json.loads(path.read_text())["classes"] == {"training": ["a", "b", "c"], "test": ["d", "e", "f"]}
    assert set(np.unique(read_mrc(tmp_path / "out/masks/f_0001.mrc")[0])) == {0, 1}


def change(name: str, value: object, place: object = ...):
    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][place] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("data", np.nan, (1, 2, 0, 0, 0)), r"data\.npy, class 1, slot 2 holds NaN"),
        (change("data_seg", np.inf, (4, 0, 0, 0, 0)), r"data_seg\.npy, class 4, slot 0 holds NaN"),
        (change("data", 7.0, (3, 1)), r"class 3, slot 1 is constant \(7\)"),
        (change("data_seg", 0.5, (0, 1, 0, 0, 0)), r"class 0, slot 1 is not binary \(values 0, 0\.5, 1\)"),
        (change("cnt", 0, (2, 0)), r"class 2 is missing \(count 0\)"),
        (change("cnt", 5, (2, 0)), "class 2 counts 5 of 4 slots"),
        (change("cnt", 2, (2, 0)), "class 2, slot 1 is constant"),
        (change("cnt", 1.5, (2, 0)), "whole number"),
        (change("cnt", np.nan, (2, 0)), "whole number"),
        (lambda a: a.update(data=a["data"][0]), "expected \\(classes, slots, n, n, n\\)"),
        (lambda a: a.update(data=a["data"][..., :6]), "expected \\(classes, slots, n, n, n\\)"),
        (lambda a: a.update(data_seg=a["data_seg"][:, :3]), "they must agree"),
        (lambda a: a.update(cnt=a["cnt"].T), r"expected \(6, 1\)"),
        (lambda a: a.update(data=a["data"].astype(complex)), "not real numbers"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path, damage, message):
    arrays = release()
    damage(arrays)
    with pytest.raises(ValueError, match=message):
        import_cos_net(save(tmp_path / "in", arrays), tmp_path / "out", train_classes=4)
    assert not (tmp_path / "out").exists()


def test_missing_and_cut_files(tmp_path):
    folder = save(tmp_path / "in", release())
    (folder / "data.npy").write_bytes((folder / "data.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"data\.npy is no readable NumPy array"):
        import_cos_net(folder, tmp_path / "out")
    (folder / "cnt.npy").unlink()
    np.save(folder / "data.npy", release()["data"])
    with pytest.raises(FileNotFoundError, match=r"cnt\.npy is missing"):
        import_cos_net(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_classes": 5}, "both sides need at least 2"),
        ({"train_classes": 1}, "both sides need at least 2"),
        ({"folds": 0}, "folds is 0"),
        ({"voxel_size": 0.0}, "voxel_size"),
        ({"names": "a,b"}, "gives 2 different names; the release has 6"),
        ({"names": "a,b,c,d,e,x/y"}, "become file names"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        import_cos_net(save(tmp_path / "in", release()), tmp_path / "out", **{"train_classes": 4, **arguments})


def test_a_list_of_something_else_is_kept(tmp_path):
    folder = save(tmp_path / "in", release())
    for _ in range(2):  # its own output may be written again
        import_cos_net(folder, tmp_path / "out", train_classes=4)
    (tmp_path / "out/datalist.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="not written by this converter"):
        import_cos_net(folder, tmp_path / "out", train_classes=4)
