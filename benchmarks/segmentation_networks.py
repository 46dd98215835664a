"""Networks of the fluorescence bundle: medseg's inference and training against the script one would write without it.

Inference: one 1024x1024 PNG, read and segmented in sliding windows of 512, by the objects of ``inference.yaml`` and by
PIL, torch and MONAI's inferer. Training: epochs over cached images with the bundle's augmentation, by medseg's module,
loader and trainer as ``train.yaml`` builds them, and by a loop over MONAI's own transforms and loader.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from race import Result, arguments, prepare, print_table, race

CONFIGS = "bundles/fluorescence_tumor/configs"
NETWORKS = ("unet", "unetpp", "deeplabv3plus", "swin_unetr")
EPOCHS = 2  # per round of the training race


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks to race")
    parser.add_argument("--races", nargs="+", choices=tuple(RACES), default=tuple(RACES), help="races to run")
    parser.add_argument("--roi", type=int, default=256, help="side of the training crops, a multiple of 32")
    parser.add_argument("--batch", type=int, default=4, help="images per training batch")
    options = parser.parse_args()
    prepare(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(options, _simulated(Path(folder), 2 * options.batch)))
    header = ["network", "race", "CPU s/image: medseg", "plain", "images/s: medseg", "plain"]
    print_table([*header, "speed medseg / plain (CPU)", "(wall)"], rows)


def _simulated(folder: Path, training_images: int) -> Path:
    from medseg.tasks.fluorescence_tumor.simulate import simulate

    # Fold 0 (every fifth image) validates, the other four train.
    simulate(folder, training_images + -(-training_images // 4), test_fraction=0.0)
    return folder


def _rows(options: Any, data: Path) -> Iterator[list[str]]:
    for name in options.networks:
        for kind in options.races:
            candidates, images = RACES[kind](name, data, options)
            result = race(candidates, options.rounds)
            yield [name, kind, *_numbers(result["medseg"], result["plain"], images)]


def _numbers(medseg: Result, plain: Result, images: int) -> list[str]:
    return [
        *(f"{result.cpu / images:.3f}" for result in (medseg, plain)),
        *(f"{images / result.wall:.3f}" for result in (medseg, plain)),
        f"{plain.cpu / medseg.cpu:.2f}",
        f"{plain.wall / medseg.wall:.2f}",
    ]


def _bundle(config: str, data: Path, **changes: Any) -> Any:
    """The parser of a config as ``monai.bundle run`` has it, with weights drawn from a fixed seed."""
    import torch
    from monai.bundle import ConfigParser

    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config(f"{CONFIGS}/{config}.yaml")
    parser.update({"device": "cpu", "output_dir": str(data / "run"), **changes})
    parser.parse()  # macros that name macros take two passes, and MONAI's workflow makes them: here and on first use
    return parser


def _plain_network(name: str, weights_of: Any) -> Any:
    """The network as its own library makes it, with the bundle's weights."""
    import segmentation_models_pytorch as smp
    from monai.networks.nets import SwinUNETR

    if name == "swin_unetr":
        network = SwinUNETR(in_channels=1, out_channels=1, feature_size=24, spatial_dims=2)
    else:
        model = {"unet": smp.Unet, "unetpp": smp.UnetPlusPlus, "deeplabv3plus": smp.DeepLabV3Plus}[name]
        network = model("efficientnet-b3", encoder_weights=None, in_channels=1, classes=1)
    network.load_state_dict(copy.deepcopy(weights_of.state_dict()))
    return network


def _inference(name: str, data: Path, options: Any) -> tuple[dict[str, Callable[[], Any]], int]:
    import numpy as np
    import torch
    from monai.inferers import SlidingWindowInferer
    from PIL import Image

    parser = _bundle("inference", data, network_name=name, dataset_dir=str(data / "images"), pattern="abfm_0000.png")
    network, inferer, dataset = (parser.get_parsed_content(key) for key in ("network", "inferer", "dataset"))
    network.eval()

    @torch.inference_mode()
    def medseg() -> torch.Tensor:
        logits: torch.Tensor = inferer(dataset[0]["image"][None], network)
        return logits

    peer = _plain_network(name, network).eval()
    windows = SlidingWindowInferer(roi_size=(512, 512), sw_batch_size=4, overlap=0.25, mode="gaussian")

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        pixels = np.asarray(Image.open(data / "images" / "abfm_0000.png"), dtype=np.float32).T.copy()
        image = torch.from_numpy((pixels - pixels.mean()) / pixels.std())
        logits: torch.Tensor = windows(image[None, None], peer)
        return logits

    torch.testing.assert_close(medseg().as_tensor(), plain(), rtol=1e-3, atol=1e-3)
    return {"medseg": medseg, "plain": plain}, 1


def _training(name: str, data: Path, options: Any) -> tuple[dict[str, Callable[[], Any]], int]:
    import torch
    from medseg.training.trainer import Trainer

    where = {"dataset_dir": str(data), "network_name": name, "precision": "32-true", "bundle_root": CONFIGS}
    recipe = {"roi_size": [options.roi, options.roi], "batch_size": options.batch}
    parser = _bundle("train", data, **where, **recipe)
    items = parser.get_parsed_content("train::dataset::data")
    peer = _plain_network(name, parser.get_parsed_content("network"))
    module, loader = (parser.get_parsed_content(key) for key in ("module", "train::dataloader"))

    def medseg() -> None:
        machine = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "enable_progress_bar": False}
        where = {"output_dir": str(data / "run"), "bundle_root": CONFIGS}
        parts = {"module": module, "train_dataloader": loader, "val_dataloader": None}
        Trainer(**parts, **where, **machine, max_epochs=EPOCHS).fit(module, loader)

    plain, plain_dataset, plain_loss = _plain_training(peer, items, options.roi, options.batch)
    _check_training(module, parser.get_parsed_content("train::dataset"), peer, plain_dataset, plain_loss)
    return {"medseg": medseg, "plain": plain}, EPOCHS * len(items)


def _plain_training(network: Any, items: list[dict[str, Any]], roi: int, batch: int) -> tuple[Any, Any, Any]:
    import torch
    from monai import transforms as mt
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceCELoss

    keys, size = ["image", "label"], (roi, roi)
    steps = [
        mt.LoadImaged(keys, reader="ITKReader", image_only=True),
        mt.EnsureChannelFirstd(keys),
        mt.Lambdad("label", lambda x: (x > 0).float()),
        mt.NormalizeIntensityd("image"),
        mt.SpatialPadd(keys, size),
        mt.RandCropByPosNegLabeld(keys, label_key="label", spatial_size=size, pos=1, neg=0, num_samples=1),
        mt.RandRotate90d(keys, prob=0.75, max_k=3),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=0),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
    ]
    dataset = CacheDataset(items, mt.Compose(steps), progress=False)
    loader = DataLoader(dataset, batch_size=batch, shuffle=True)
    loss_function = DiceCELoss(sigmoid=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)

    def train() -> None:
        torch.use_deterministic_algorithms(False)  # torch's default, which medseg's trainer changes
        network.train()
        for _ in range(EPOCHS):
            for data in loader:
                optimizer.zero_grad()
                loss = loss_function(network(data["image"]), data["label"])
                loss.backward()
                optimizer.step()

    return train, dataset, loss_function


def _check_training(module: Any, dataset: Any, peer: Any, plain_dataset: Any, plain_loss: Any) -> None:
    """Both sides cut the same regions from the same images, and get the same loss and gradients from them."""
    import torch

    for of in (dataset, plain_dataset):
        of.transform.set_random_state(seed=0)
    pairs = [([a] if isinstance(a, dict) else a) for a in (dataset[0], plain_dataset[0])]
    ours, theirs = ({k: pair[0][k].as_tensor()[None].repeat(2, 1, 1, 1) for k in ("image", "label")} for pair in pairs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])
    torch.manual_seed(0)  # dropped paths are drawn alike
    ours_gradients = _gradients(module.train().training_step(ours, 0), module.network)
    torch.manual_seed(0)
    plain_gradients = _gradients(plain_loss(peer.train()(theirs["image"]), theirs["label"]), peer)
    close = float(torch.nn.functional.cosine_similarity(ours_gradients, plain_gradients, dim=0))
    if close < 0.999:
        raise RuntimeError(f"the gradients of the two sides differ: cosine {close:.4f}")


def _gradients(loss: Any, network: Any) -> Any:
    import torch

    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    return gradients


RACES = {"inference": _inference, "training": _training}

if __name__ == "__main__":
    main()
