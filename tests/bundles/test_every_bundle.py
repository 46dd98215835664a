"""The shared battery: what every bundle found in ``bundles/`` must do. A new task adds only its peculiar tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser, create_workflow, verify_metadata, verify_net_in_out

from medseg.bundles.catalog import list_bundles
from medseg.bundles.check import check_bundle

SCHEMA = Path("src/medseg/bundles/metadata_schema.json")
BUNDLES = list_bundles(Path(__file__).resolve().parents[2])

#: Their networks give losses and detections, no dense logits: ``network(images, targets)``.
DETECTORS = {"dbt_mass"}

VARIANTS = [(b, network) for b in BUNDLES for network in b.metadata["networks"]]
SEGMENTERS = [v for v in VARIANTS if v[0].name not in DETECTORS]

#: What makes a detector's networks small, whichever is chosen; its patch has three different sides.
SMALL_DETECTOR = {
    "spacing": [4.0, 2.5, 2.5], "patch_size": [16, 64, 32], "depth": 10, "widths": [8, 8, 16, 16], "fpn_channels": 16,
    "max_pool": False, "stem": 3, "norm": ["instance", {"affine": True}], "anchors_per_level": 1, "box_hidden": 16,
    "box_convolutions": [], "mask_hidden": 8, "mask_convolutions": 1,
    "regions": {"box_size": [2, 3, 3], "mask_size": [4, 4, 4]}, "depth_2d": 18, "slices": 1,
    "anchor_sides_2d": [4, 8, 16, 24, 32],
}  # fmt: skip

#: Of each bundle: the fixture with its data, what makes it small, how many items train and validate, and are segmented.
TINY = {
    "fluorescence_tumor": ("tiny_data", {"roi_size": [32, 32]}, 8, 10),
    "cryoet_one_shot": ("tiny_subtomograms", {"channels": 4}, 42, 66),
    "dbt_mass": ("tiny_breasts", SMALL_DETECTOR, 12, 16),
}

#: Parameters that an output mask does not depend on. An EfficientNet's classifier head stays in the library's encoder,
#: and its forward never uses it; COS-Net's features and their match are tested with the task.
NOT_FOR_MASKS = {
    "fluorescence_tumor": ("encoder._conv_head.", "encoder._bn1."),
    "cryoet_one_shot": ("feature_encoder.", "score."),
}

#: Keys that inference takes from training, by macro.
SHARED = {
    "fluorescence_tumor": ("image_size", "roi_size", "normalize", "inferer"),
    "cryoet_one_shot": ("size", "threshold", "crf", "crf_def", "refine"),
    "dbt_mass": ("spacing", "patch_size", "depth", "widths", "regions", "proposals", "threshold", "inferer"),
}


def configs(bundle) -> str:
    return f"bundles/{bundle.name}/configs"


@pytest.fixture(params=BUNDLES, ids=lambda b: b.name)
def bundle(request):
    return request.param


def input_shape(parser) -> list[int]:
    """A size (1, ...) that the metadata allow, no two sides equal where they may differ."""
    metadata = json.loads(Path(parser["bundle_root"], "configs", "metadata.json").read_text())
    sides = metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]
    return [1, *(s if isinstance(s, int) else 32 * (2 + i) for i, s in enumerate(sides))]


def with_network(bundle, network, **changes):
    """The inference config with one network chosen, as ``--network_name`` does."""
    parser = ConfigParser()
    parser.read_config(f"{configs(bundle)}/inference.yaml")
    parser.update({"network_name": network, **changes})
    return parser


def named(variant) -> str:
    return f"{variant[0].name}-{variant[1]}"


@pytest.fixture(params=SEGMENTERS, ids=named)
def network_parser(request):
    """A segmentation network of a bundle, in full size."""
    return with_network(*request.param)


def test_files_of_the_model_zoo(bundle):
    for name in ("LICENSE", "configs/metadata.json", "configs/train.yaml", "configs/inference.yaml", "docs/README.md"):
        assert (bundle.path / name).is_file(), name
    assert not list(bundle.path.glob("models/*.pt")), "weights are never committed"


def test_static_check(bundle):
    assert list(map(str, check_bundle(bundle.path, bundle.path.parents[1]))) == []


def test_metadata(bundle):
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    problems = [e.message for e in Draft202012Validator(schema).iter_errors(bundle.metadata)]
    assert problems == []
    assert bundle.metadata["version"] in bundle.metadata["changelog"]
    # MONAI's own command, offline: it takes the schema that lies there
    verify_metadata(meta_file=f"{configs(bundle)}/metadata.json", filepath=str(SCHEMA))


def test_metadata_names_the_networks_of_the_config(bundle):
    train = yaml.safe_load((bundle.path / "configs" / "train.yaml").read_text())
    assert list(train["networks"]) == bundle.metadata["networks"]


def test_what_cross_validation_and_comparison_go_by(bundle):
    """``medseg crossval`` and ``medseg compare`` know a bundle only through these names."""
    train = yaml.safe_load((bundle.path / "configs" / "train.yaml").read_text())
    assert {"fold", "seed", "score", "tags", "datalist", "output_dir", "experiment_name", "run_name"} <= set(train)
    assert {"task", "network", "mode", "fold"} <= set(train["tags"])
    assert train["mode"] == bundle.metadata["modes"][0], "the first mode is the default"
    assert set(train["validate"]["metric_modes"]) == set(train["validate"]["metrics"])
    assert set(train["validate"]["metric_modes"].values()) <= {"max", "min"}
    for baseline in bundle.metadata["baselines"]:
        overlay = yaml.safe_load((bundle.path / "configs" / f"{baseline}.yaml").read_text())
        assert overlay["network_name"] == baseline


def test_verify_net_in_out(network_parser):
    name = network_parser["network_name"]
    folder = network_parser["bundle_root"] + "/configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=f"{folder}/metadata.json",
        config_file=f"{folder}/inference.yaml",
        network_name=name,
        device="cpu",
    )


def test_forward_and_backward_reach_every_used_parameter(network_parser):
    torch.manual_seed(0)
    network = network_parser.get_parsed_content("network_def").train()
    images = torch.randn(2, *input_shape(network_parser), requires_grad=True)
    logits = network(images)
    assert logits.shape == images.shape
    logits.square().mean().backward()
    assert torch.isfinite(images.grad).all()
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert [n for n in without if not n.startswith(NOT_FOR_MASKS[Path(network_parser["bundle_root"]).name])] == []


@pytest.fixture(params=[v for v in VARIANTS if v[0].name in DETECTORS], ids=named)
def detector(request):
    """A small detector on the CPU, two patches and their truth: a ball in the first one, two in the second."""
    torch.manual_seed(0)
    network = with_network(*request.param, **SMALL_DETECTOR).get_parsed_content("network_def")
    d, h, w = torch.meshgrid(*map(torch.arange, SMALL_DETECTOR["patch_size"]), indexing="ij")
    balls = [(d - 8) ** 2 + (h - row) ** 2 + (w - 15) ** 2 < 36 for row in (20, 20, 44)]
    boxes = [torch.cat([m.nonzero().amin(0), m.nonzero().amax(0) + 1]).float() for m in balls]
    targets = [{"boxes": torch.stack(boxes[s]), "masks": torch.stack(balls[s])} for s in (slice(1), slice(1, 3))]
    images = torch.stack([balls[0], balls[1] | balls[2]]).float()[:, None] + 0.1
    return network, images + 0.05 * torch.randn(images.shape), targets


def test_losses_of_a_detector_reach_every_parameter(detector):
    network, images, targets = detector
    losses = network.train()(images, targets)
    assert all(torch.isfinite(loss) and loss.shape == () and loss >= 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@torch.no_grad()
def test_detections_of_a_detector_lie_in_the_patch(detector):
    network, images, _ = detector
    for image, found in zip(images, network.eval()(images), strict=True):
        count = len(found.boxes)
        assert found.boxes.shape == (count, 6)
        assert found.scores.shape == (count,)
        assert found.masks.shape[0] == count
        assert (found.boxes[:, 3:] > found.boxes[:, :3]).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 3:] <= torch.tensor(image.shape[1:])).all()
        assert ((found.masks >= 0) & (found.masks <= 1)).all()
        assert (found.scores.diff() <= 0).all()


def test_export_reproduces_the_network(network_parser, tmp_path):
    """``ckpt_export`` traces at the window's size: what the sliding window feeds, whatever the image's size."""
    from monai.bundle import ckpt_export

    torch.manual_seed(0)
    network = network_parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    shape = [1, *([min(input_shape(network_parser)[1:])] * (len(input_shape(network_parser)) - 1))]
    folder = network_parser["bundle_root"] + "/configs"
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=f"{folder}/metadata.json",
        config_file=f"{folder}/inference.yaml",
        network_name=network_parser["network_name"],
        use_trace=True,
        input_shape=[1, *shape],
    )
    exported = torch.jit.load(str(tmp_path / "model.ts"))
    images = torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), network(images), rtol=1e-4, atol=1e-5)


def test_monai_finds_the_properties(bundle, request, tmp_path):
    fixture, small, items, files = TINY[bundle.name]
    data = request.getfixturevalue(fixture)
    train = create_workflow(
        config_file=f"{configs(bundle)}/train.yaml",
        workflow_type="train",
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        **small,
    )
    train.initialize()
    assert train.check_properties() == []
    assert len(train.train_dataset) + len(train.val_dataset) == items
    assert train.trainer.network is train.parser.get_parsed_content("network")
    for name in ("train_inferer", "val_inferer", "train_preprocessing", "val_postprocessing", "train_dataset_data"):
        assert getattr(train, name) is not None, name
    weights = tmp_path / "model.pt"
    weights.touch()  # looked for, not yet read
    where = {"dataset_dir": str(Path(train.train_dataset_data[0]["image"]).parent), "ckpt_path": str(weights)}
    if "support_dir" in (bundle.path / "configs" / "inference.yaml").read_text():
        where["support_dir"] = str(data / "templates")
    infer = create_workflow(config_file=f"{configs(bundle)}/inference.yaml", workflow_type="infer", **where)
    infer.initialize()
    assert infer.check_properties() == []
    assert len(infer.dataset) == files


def test_an_unknown_argument_is_refused_before_any_work(bundle, request, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        create_workflow(
            config_file=f"{configs(bundle)}/train.yaml",
            workflow_type="train",
            dataset_dir=str(request.getfixturevalue(TINY[bundle.name][0])),
            output_dir=str(tmp_path / "run"),
            max_epoch=3,
        ).initialize()
    assert "unknown argument --max_epoch (did you mean --max_epochs?)" in str(caught.value.__cause__)
    assert not (tmp_path / "run").exists()


def test_inference_takes_its_network_and_scale_from_training(bundle):
    """Train and inference cannot drift apart: these keys are macros into train.yaml."""
    inference = yaml.safe_load((bundle.path / "configs" / "inference.yaml").read_text())
    for key in ("network_def", "networks", "network_name", *SHARED[bundle.name]):
        assert inference[key].startswith(f"%{configs(bundle)}/train.yaml::"), key
