"""The search: its support set, how often it encodes, its scores against a loop over pairs, and its report."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose
from PIL import Image

from medseg.bundles.configs import read_config
from medseg.crf import DenseCRF3D
from medseg.io.mrc import SUFFIXES, write_mrc
from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.tasks.cryoet_one_shot.refine import MaskRefiner, grey_levels
from medseg.tasks.cryoet_one_shot.report import CheckTargets, SearchReport, match_figure
from medseg.tasks.cryoet_one_shot.search import OneShotSearch
from medseg.tasks.cryoet_one_shot.support import SupportSet, find_support

SIZE = 8
SPACING = (2.0, 3.0, 4.0)


@pytest.fixture(scope="module")
def transform() -> Compose:
    """What the bundle's targets and supports go through."""
    load = read_config(Path("transforms/cryoet.yaml"))["load"]
    return Compose(ConfigParser({"load": load, "keys": ["image"], "size": SIZE}).get_parsed_content("load"))


def write(path: Path, seed: int, size: int = SIZE) -> Path:
    write_mrc(path, np.random.default_rng(seed).normal(2, 3, (size,) * 3), SPACING)
    return path


@pytest.fixture
def support_folder(tmp_path: Path) -> Path:
    """Three structures: one shot, three shots in a folder, one compressed shot."""
    folder = tmp_path / "support"
    write(folder / "ribosome.mrc", 1)
    for shot in range(3):
        write(folder / "fatty_acid.synthase" / f"shot{shot}.rec", 10 + shot)
    plain = write(tmp_path / "plain.mrc", 2)
    (folder / "GroEL.MRC.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (folder / "README.txt").write_text("where these are from")
    (folder / "._ribosome.mrc").write_bytes(b"what a Mac leaves on a shared disk")
    (folder / ".snapshot").mkdir()
    return folder


@pytest.fixture
def network() -> COSNet:
    torch.manual_seed(0)
    net = COSNet(4, size=SIZE, feature_size=6)
    net.score.weight.data.uniform_(-2, 0)  # nearer is better
    for layer in (1, 2):  # fresh weights tell noise apart by 1e-4
        net.feature_encoder[layer].weight.data *= 30
    with torch.no_grad():  # batch norms with statistics of their own
        net.train().embed(torch.randn(8, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    return net.eval()


@pytest.fixture
def encoded(network: COSNet) -> list[int]:
    """The number of volumes of every call of the encoder."""
    calls: list[int] = []
    network.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


def targets(folder: Path, count: int) -> list[str]:
    return [str(write(folder / f"t{i}.mrc", 100 + i)) for i in range(count)]


def batches(paths: list[str], transform: Compose, size: int) -> DataLoader:
    return DataLoader(Dataset([{"image": p} for p in paths], transform), batch_size=size)


def test_a_structure_is_a_file_or_a_folder(support_folder, transform):
    found = find_support(support_folder)
    assert {name: [f.name for f in files] for name, files in found.items()} == {
        "GroEL": ["GroEL.MRC.gz"],
        "fatty_acid.synthase": ["shot0.rec", "shot1.rec", "shot2.rec"],
        "ribosome": ["ribosome.mrc"],
    }
    support = SupportSet(support_folder, transform, SIZE)
    assert support.names == list(found) == sorted(found)
    volumes = support.volumes("fatty_acid.synthase")
    assert volumes.shape == (3, 1, SIZE, SIZE, SIZE)
    for shot, volume in enumerate(volumes):
        raw = np.random.default_rng(10 + shot).normal(2, 3, (SIZE,) * 3).astype(np.float32)
        np.testing.assert_allclose(volume[0].numpy(), (raw - raw.mean()) / raw.std(), atol=1e-5)
    assert support.volumes("GroEL").shape == (1, 1, SIZE, SIZE, SIZE)
    assert type(volumes) is torch.Tensor


def test_support_sets_that_cannot_be_used(tmp_path, transform):
    with pytest.raises(FileNotFoundError, match=r"no support set at .*nowhere; put one subtomogram per structure"):
        find_support(tmp_path / "nowhere")
    folder = tmp_path / "support"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"support holds 0 structure\(s\) \(none\); at least 2 are needed"):
        find_support(folder)
    write(folder / "a.mrc", 0)
    with pytest.raises(ValueError, match=r"support holds 1 structure\(s\) \(a\); at least 2 are needed"):
        find_support(folder)
    (folder / "b").mkdir()
    (folder / "b" / "mask.nii").write_bytes(b"")
    with pytest.raises(ValueError, match="support/b holds no MRC file"):
        find_support(folder)
    write(folder / "b" / "1.mrc", 0)
    assert list(find_support(folder)) == ["a", "b"]
    write(folder / "b.mrc", 0)
    with pytest.raises(ValueError, match=r"holds the structure b twice \(b/1.mrc and b.mrc\); keep one"):
        find_support(folder)
    (folder / "b.mrc").rename(folder / "a.rec")
    with pytest.raises(ValueError, match=r"holds the structure a twice \(a.mrc and a.rec\); keep one"):
        find_support(folder)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.ones((SIZE,) * 3), r"bad.mrc is constant \(1 everywhere\)"),
        (np.random.default_rng(0).normal(size=(SIZE, SIZE, 2 * SIZE)), "bad.mrc is 8 x 8 x 16; the network takes 8"),
    ],
)
def test_a_bad_volume_of_the_support_set_is_named(support_folder, transform, volume, message):
    write_mrc(support_folder / "fatty_acid.synthase" / "bad.mrc", volume, 1.0)
    with pytest.raises(ValueError, match=message):
        SupportSet(support_folder, transform, SIZE)
    (support_folder / "fatty_acid.synthase" / "bad.mrc").write_bytes(b"not a volume")
    with pytest.raises(ValueError, match=r"bad.mrc is no readable MRC file"):
        SupportSet(support_folder, transform, SIZE)


def test_every_volume_is_encoded_once(support_folder, network, encoded, transform, tmp_path):
    search = OneShotSearch(network, SupportSet(support_folder, transform, SIZE))
    assert encoded == [], "the weights may still be loaded"
    with torch.no_grad():
        for batch in batches(targets(tmp_path, 7), transform, 3):
            search(batch["image"])
    # five supports before the first batch, then nothing but targets
    assert sum(encoded[:3]) == 5
    assert encoded[3:] == [3, 3, 1]


def test_more_structures_cost_no_more_encodings(tmp_path, network, encoded, transform):
    paths = targets(tmp_path, 4)
    for ways in (2, 6):
        folder = tmp_path / f"support{ways}"
        for i in range(ways):
            write(folder / f"s{i}.mrc", i)
        search = OneShotSearch(network, SupportSet(folder, transform, SIZE))
        encoded.clear()
        with torch.no_grad():
            for batch in batches(paths, transform, 2):
                assert search(batch["image"])["match"].shape == (2, ways)
        assert sum(encoded) == ways + 4, "not ways x 4 pairs"


def naive_scores(network: COSNet, support: SupportSet, images: list[torch.Tensor]) -> np.ndarray:
    """Every pair by itself: both encoded anew, the shots' features averaged, equations (7) and (8)."""
    weight, bias = network.score.weight.detach().double().numpy()[0], network.score.bias.item()
    scores = np.zeros((len(images), len(support.names)))
    for t, image in enumerate(images):
        for s, name in enumerate(support.names):
            target = network.embed(image[None])[0][0].double().numpy()
            shots = [network.embed(v[None])[0][0].double().numpy() for v in support.volumes(name)]
            scores[t, s] = (weight * np.abs(sum(shots) / len(shots) - target)).sum() + bias
    return scores


def test_scores_are_those_of_every_pair_by_itself(support_folder, network, transform, tmp_path):
    support = SupportSet(support_folder, transform, SIZE)
    search = OneShotSearch(network, support)
    paths = targets(tmp_path, 5)
    paths[2] = str(support_folder / "ribosome.mrc")
    with torch.no_grad():
        found = torch.cat([search(batch["image"])["match"] for batch in batches(paths, transform, 2)])
        expected = naive_scores(network, support, [transform({"image": p})["image"].as_tensor() for p in paths])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected, axis=1).min() > 0.03, "the structures differ"
    assert support.names[int(found[2].argmax())] == "ribosome", "a copy of a support is found"
    # the score's weights are negative: no distance is the best there is
    assert float(found[2].max()) == pytest.approx(network.score.bias.item(), abs=1e-4)


def test_several_shots_are_one_structure_at_their_mean(support_folder, network, transform):
    support = SupportSet(support_folder, transform, SIZE)
    with torch.no_grad():
        features = OneShotSearch(network, support).encoded_support(torch.device("cpu"))
        shots = network.embed(support.volumes("fatty_acid.synthase"))[0]
    assert features.shape == (3, 6)
    torch.testing.assert_close(features[support.names.index("fatty_acid.synthase")], shots.sum(0) / 3)


def test_masks_before_and_after_the_crf(support_folder, network, transform, tmp_path):
    support, refine = SupportSet(support_folder, transform, SIZE), MaskRefiner(DenseCRF3D(2.0, 1.0, 2.0, 2.0, 30.0))
    (batch,) = batches(targets(tmp_path, 3), transform, 3)
    image = batch["image"]
    with torch.no_grad():
        plain, refined = OneShotSearch(network, support)(image), OneShotSearch(network, support, refine)(image)
        logits = network(image.as_tensor())
        marginals = refine(logits.sigmoid(), image.as_tensor())
    assert set(plain) == set(refined) == {"match", "mask", "mask_before_crf"}
    for found in (plain, refined):
        torch.testing.assert_close(found["mask_before_crf"].as_tensor(), logits)
    torch.testing.assert_close(plain["mask"].as_tensor(), logits)
    torch.testing.assert_close(refined["mask"].as_tensor().sigmoid(), marginals, atol=2e-6, rtol=1e-5)
    assert (marginals - logits.sigmoid()).abs().max() > 0.01, "the CRF does something"
    torch.testing.assert_close(plain["match"], refined["match"])


def test_without_a_decoder_there_is_nothing_but_the_match(support_folder, transform, tmp_path):
    network = COSNet(4, decoder=False, size=SIZE, feature_size=6).eval()
    search = OneShotSearch(network, SupportSet(support_folder, transform, SIZE), MaskRefiner(DenseCRF3D()))
    (batch,) = batches(targets(tmp_path, 2), transform, 2)
    with torch.no_grad():
        found = search(batch["image"])
    assert set(found) == {"match"}
    assert found["match"].shape == (2, 3)


def test_masks_keep_the_names_and_the_geometry_of_their_targets(support_folder, network, transform, tmp_path):
    search = OneShotSearch(network, SupportSet(support_folder, transform, SIZE), MaskRefiner(DenseCRF3D()))
    paths = targets(tmp_path, 3)
    (batch,) = batches(paths, transform, 3)
    with torch.no_grad():
        items = decollate_batch(search(batch["image"]))
        tensors = search(batch["image"].as_tensor())
    for item, path in zip(items, paths, strict=True):
        for key in ("mask", "mask_before_crf"):
            assert item[key].meta["filename_or_obj"] == path
            assert item[key].pixdim.tolist() == list(SPACING)
    assert type(tensors["mask"]) is torch.Tensor, "without metadata there is none to keep"


def test_grey_levels_lie_between_percentiles_of_each_volume():
    volumes = torch.randn(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    volumes[1] = volumes[1] * 50 + 7
    volumes[1, 0, 0, 0, 0] = 1e6  # one bright voxel does not change the others' levels much
    found = grey_levels(volumes).numpy()
    for volume, grey in zip(volumes.numpy(), found, strict=True):
        low, high = np.percentile(volume, [0.5, 99.5])
        np.testing.assert_allclose(grey, np.clip((volume - low) / (high - low), 0, 1) * 255, rtol=1e-10)
    assert found.min() == 0
    assert found.max() == 255
    assert np.median(found[1]) > 40
    assert torch.isfinite(grey_levels(torch.ones(1, 1, 4, 4, 4))).all()


def test_the_refiner_is_the_crf_on_grey_levels():
    generator = torch.Generator().manual_seed(0)
    probability, volumes = torch.rand(2, 1, 5, 6, 7, generator=generator), torch.randn(2, 1, 5, 6, 7)
    crf = DenseCRF3D(1.0, 1.0, 1.0, 2.0, 20.0)
    with torch.no_grad():
        found = MaskRefiner(crf)(probability, volumes)
        expected = crf(torch.cat([1 - probability, probability], 1), grey_levels(volumes))
    assert found.shape == probability.shape
    torch.testing.assert_close(found, expected[:, 1:])
    torch.testing.assert_close(1 - found, expected[:, :1])


# --- what is left beside the masks

NAMES = ["a", "b", "c"]


@pytest.fixture
def run_report(tmp_path) -> Callable[..., tuple[SearchReport, Path]]:
    """Run a report over batches of items; an item may be an error that the search stops with."""

    def run(items: list, paths: list[str], pictures: int = 24, batch_size: int = 2) -> tuple[SearchReport, Path]:
        out, steps = tmp_path / "out", [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

        def step(_: Engine, batch: list) -> list:
            for item in batch:
                if isinstance(item, BaseException):
                    raise item
            return batch

        engine = Engine(step)
        report = SearchReport(str(out), paths, SimpleNamespace(names=NAMES), str(tmp_path / "in"), pictures)
        report.attach(engine)
        engine.run(steps, max_epochs=1)
        return report, out

    return run


def output(path: str, match: list[float], probability: np.ndarray | None = None) -> dict:
    """What an evaluator leaves for a target."""
    image = MetaTensor(torch.zeros(1, SIZE, SIZE, SIZE), meta={"filename_or_obj": path})
    item = {"image": image, "match": torch.tensor(match)}
    if probability is not None:
        p = torch.from_numpy(probability)[None]
        item |= {"mask": (p > 0.5).float(), "probability": p, "mask_before_crf": torch.logit(p.flip(1), eps=1e-6)}
    return item


def softmax(row: list[float]) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "predictions.csv").open()))


def test_a_row_says_which_structure_and_how_sure(run_report, tmp_path):
    paths = targets(tmp_path / "in" / "sub", 3)
    match = [[1.0, 3.5, -2.0], [0.0, 0.0, 1e-3], [-9.0, -8.0, -12.0]]
    run_report([output(p, m) for p, m in zip(paths, match, strict=True)], paths)
    rows = table(tmp_path / "out")
    assert list(rows[0]) == ["file", "structure", "score", "match", "nearest", "score_a", "score_b", "score_c"]
    assert [r["file"] for r in rows] == paths
    assert [r["structure"] for r in rows] == ["b", "c", "b"]
    for row, logits in zip(rows, match, strict=True):
        scores = softmax(logits)
        assert [float(row[f"score_{n}"]) for n in NAMES] == pytest.approx(scores.tolist(), abs=6e-5)
        assert float(row["score"]) == pytest.approx(scores.max(), abs=6e-5)
        assert float(row["match"]) == pytest.approx(1 / (1 + np.exp(-max(logits))), abs=6e-5)
    assert rows[0]["nearest"] == "b 0.921; a 0.076; c 0.004"
    assert {p.name for p in (tmp_path / "out" / "overlays").iterdir()} == {"match_matrix.png"}


def test_masks_are_measured_and_the_first_ones_drawn(run_report, tmp_path):
    paths = targets(tmp_path / "in" / "sub", 3)
    empty, full = np.full((SIZE,) * 3, 0.25), np.full((SIZE,) * 3, 0.25)
    full[:2, 3, 4:] = 0.75
    full[4, 4, 4] = 1.0
    items = [output(p, [0, 1, 2], probability) for p, probability in zip(paths, [full, empty, full], strict=True)]
    run_report(items, paths, pictures=2)
    rows = table(tmp_path / "out")
    confidence = str(round((8 * 0.75 + 1) / 9, 4))
    assert [(r["voxels"], r["confidence"]) for r in rows] == [("9", confidence), ("0", ""), ("9", confidence)]
    overlays = [tmp_path / "out" / "overlays" / "sub" / f"t{i}.mrc.png" for i in range(3)]
    assert [r["overlay"] for r in rows] == [str(overlays[0]), str(overlays[1]), ""]
    assert [p.is_file() for p in overlays] == [True, True, False]
    picture = np.asarray(Image.open(overlays[0]))
    assert picture.shape == (2 * 512 + 8, 3 * 512 + 16, 3)
    yellow = (picture == (255, 225, 0)).all(-1)
    assert yellow[:512].any(), "before the CRF above"
    assert yellow[520:].any(), "after it below"
    assert not np.array_equal(yellow[:512], yellow[520:])


def test_the_table_is_written_though_the_search_fails(run_report, tmp_path):
    paths = targets(tmp_path / "in", 4)
    items = [output(p, [0, 1, 2]) for p in paths[:2]]
    with pytest.raises(OSError, match="disk full"):
        run_report([*items, OSError("disk full")], paths)
    assert [r["file"] for r in table(tmp_path / "out")] == paths[:2]
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_search_that_fails_at_once_leaves_an_empty_table(run_report, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_report([KeyboardInterrupt()], targets(tmp_path / "in", 1))
    assert (tmp_path / "out" / "predictions.csv").read_text().strip() == "file,structure,score"
    assert not (tmp_path / "out" / "overlays").exists()


def test_scores_that_are_not_finite_name_the_target(run_report, tmp_path):
    paths = targets(tmp_path / "in", 2)
    with pytest.raises(ValueError, match=rf"{re.escape(paths[1])}: the match scores are not finite"):
        run_report([output(paths[0], [0, 1, 2]), output(paths[1], [0, np.nan, 2])], paths)
    assert [r["file"] for r in table(tmp_path / "out")] == paths[:1]


def test_the_match_matrix_is_grouped_by_best_structure():
    scores = np.asarray([[0.1, 0.9, 0.0], [0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0]])
    figure = match_figure(scores, NAMES, ["t0", "t1", "t2", "t3", "t4"])
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), scores[[3, 1, 0, 2, 4]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["t3", "t1", "t0", "t2", "t4"]
    assert [t.get_text() for t in axes.get_xticklabels()] == NAMES
    assert axes.images[0].get_clim() == (0, 1)


def test_a_large_match_matrix_shows_an_even_choice():
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], size=1000)
    axes = match_figure(scores, NAMES, [f"t{i}" for i in range(1000)]).axes[0]
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (200, 3)
    assert (np.diff(shown.argmax(1)) >= 0).all()
    assert np.bincount(shown.argmax(1)) == pytest.approx(np.bincount(scores.argmax(1)) / 5, abs=1)
    assert axes.get_ylabel() == "200 of 1000 targets, by their best match"
    assert axes.get_yticks().size == 0


@pytest.fixture
def check_targets(tmp_path) -> Callable[[list[str]], CheckTargets]:
    (tmp_path / "model.pt").touch()
    return lambda images: CheckTargets(
        images, SIZE, str(tmp_path / "model.pt"), str(tmp_path / "in"), str(tmp_path / "out")
    )


def test_all_targets_that_cannot_be_searched_are_named(check_targets, tmp_path):
    paths = targets(tmp_path / "in", 3)
    check_targets(paths)
    write_mrc(tmp_path / "in" / "flat.mrc", np.zeros((SIZE,) * 3), 1.0)
    write(tmp_path / "in" / "large.mrc", 0, size=16)
    bad = [str(tmp_path / "in" / name) for name in ("flat.mrc", "large.mrc", "absent.mrc")]
    with pytest.raises(ValueError, match="3 of 6 targets cannot be searched") as error:
        check_targets([*paths, *bad])
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" is ")[0] for line in lines] == [bad[0], bad[1], f"no file {bad[2]}"]
    with pytest.raises(ValueError, match="30 of 30 targets") as error:
        check_targets([bad[0]] * 30)
    assert str(error.value).splitlines()[-1] == "... and 10 more"
    assert len(str(error.value).splitlines()) == 22


def test_nothing_to_search_and_nothing_to_search_with(check_targets, tmp_path):
    with pytest.raises(ValueError, match="check --dataset_dir, --pattern and --suffixes"):
        check_targets([])
    (tmp_path / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model.pt"):
        check_targets(targets(tmp_path / "in", 1))


def test_the_config_knows_the_same_suffixes():
    config = read_config(Path("bundles/cryoet_one_shot/configs/inference.yaml"))
    assert config["suffixes"] == list(SUFFIXES)


@pytest.mark.parametrize("config", ["train", "inference"])
def test_the_crf_can_be_left_out(config):
    parser = ConfigParser()
    parser.read_config(f"bundles/cryoet_one_shot/configs/{config}.yaml")
    assert isinstance(parser.get_parsed_content("refine"), MaskRefiner)
    parser = ConfigParser(parser.get())
    parser["use_crf"] = False
    assert parser.get_parsed_content("refine") is None
