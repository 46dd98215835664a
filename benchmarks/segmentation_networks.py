"""Networks of the fluorescence bundle: medseg's inference and training against the script one would write without it.

Inference: one 1024x1024 PNG, read and segmented in sliding windows of 512 by the objects of ``inference.yaml``.
Training: epochs over cached images, cut and turned anew, by the module and the loader of ``train.yaml`` in medseg's
trainer. The peer is ``plain_fluorescence.py``. Both have the same weights; outputs, crops and gradients are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import plain_fluorescence as peer
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.losses import DiceCELoss
from race import Result, arguments, prepare, print_table, race

from medseg.tasks.fluorescence_tumor.simulate import simulate
from medseg.training.trainer import Trainer

BUNDLE = "bundles/fluorescence_tumor"
NETWORKS = ("unet", "unetpp", "deeplabv3plus", "swin_unetr")
EPOCHS = 2  # of two batches each, in one round of the training race

Candidates = dict[str, Callable[[], object]]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="networks to race")
    parser.add_argument("--races", nargs="+", choices=tuple(RACES), default=tuple(RACES), help="races to run")
    parser.add_argument("--roi", type=int, default=256, help="side of the training crops, a multiple of 32")
    parser.add_argument("--batch", type=int, default=4, help="images per training batch")
    options = parser.parse_args()
    prepare(options.threads)
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Fold 0, every fifth image, validates; the others are two training batches.
        simulate(Path(folder), -(-2 * options.batch * 5 // 4), test_fraction=0.0)
        for name in options.networks:
            for kind in options.races:
                candidates, images = RACES[kind](name, Path(folder), options)
                results = race(candidates, options.rounds)
                rows.append([name, kind, *_numbers(results["medseg"], results["plain"], images)])
    header = ["network", "race", "CPU s/image: medseg", "plain", "images/s: medseg", "plain"]
    print_table([*header, "speed medseg / plain: CPU", "wall"], rows)


def _numbers(medseg: Result, plain: Result, images: int) -> list[str]:
    return [
        *(f"{result.cpu / images:.3f}" for result in (medseg, plain)),
        *(f"{images / result.wall:.3f}" for result in (medseg, plain)),
        f"{plain.cpu / medseg.cpu:.2f}",
        f"{plain.wall / medseg.wall:.2f}",
    ]


def _bundle(config: str, **changes: Any) -> ConfigParser:
    """A config of the bundle with other arguments, as ``monai.bundle run`` would read it."""
    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config(f"{BUNDLE}/configs/{config}.yaml")
    parser.update({"device": "cpu", **changes})
    parser.parse()  # a macro that names a macro takes two passes: this one, and that of the first object
    return parser


def _inference(name: str, folder: Path, _: argparse.Namespace) -> tuple[Candidates, int]:
    file = folder / "images" / "abfm_0000.png"
    parser = _bundle("inference", network_name=name, dataset_dir=str(file.parent), pattern=file.name)
    network, inferer, dataset = (parser.get_parsed_content(key) for key in ("network", "inferer", "dataset"))
    network.eval()

    def medseg() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = inferer(dataset[0]["image"][None], network)
        return logits

    plain = partial(peer.segment, _same_weights(name, network).eval(), file)
    torch.testing.assert_close(medseg(), plain(), rtol=1e-3, atol=1e-3)
    return {"medseg": medseg, "plain": plain}, 1


def _training(name: str, folder: Path, options: argparse.Namespace) -> tuple[Candidates, int]:
    recipe = {"roi_size": [options.roi, options.roi], "batch_size": options.batch, "precision": "32-true"}
    parser = _bundle("train", network_name=name, dataset_dir=str(folder), output_dir=str(folder / "run"), **recipe)
    network = _same_weights(name, parser.get_parsed_content("network"))
    module, loader = (parser.get_parsed_content(key) for key in ("module", "train::dataloader"))
    dataset = peer.cached(parser.get_parsed_content("train::dataset::data"), options.roi)
    loss_function = DiceCELoss(sigmoid=True)
    _check_training(module, parser.get_parsed_content("train::dataset"), network, dataset, loss_function)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    batches = DataLoader(dataset, batch_size=options.batch, shuffle=True)

    def medseg() -> None:
        Trainer(
            module=module,
            train_dataloader=loader,
            val_dataloader=None,
            output_dir=str(folder / "run"),
            bundle_root=BUNDLE,
            max_epochs=EPOCHS,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
        ).fit(module, loader)

    def plain() -> None:
        torch.use_deterministic_algorithms(False)  # torch's default, which medseg's trainer has changed
        peer.train(network, batches, loss_function, optimizer, EPOCHS)

    return {"medseg": medseg, "plain": plain}, EPOCHS * len(dataset)


def _same_weights(name: str, network: torch.nn.Module) -> torch.nn.Module:
    plain = peer.build(name)
    plain.load_state_dict({key: value.clone() for key, value in network.state_dict().items()})
    return plain


def _check_training(
    module: Any, dataset: Any, network: torch.nn.Module, plain_dataset: Any, loss_function: Any
) -> None:
    """With the same seed both sides cut the same regions, and get the same gradients from them."""
    batches, gradients = [], []
    for of in (dataset, plain_dataset):
        of.transform.set_random_state(seed=0)
        items = [item[0] if isinstance(item, list) else item for item in (of[0], of[1])]
        batches.append({key: torch.stack([item[key].as_tensor() for item in items]) for key in ("image", "label")})
    torch.testing.assert_close(*batches)
    steps = (
        (module.network, lambda batch: module.training_step(batch, 0)),
        (network, lambda batch: loss_function(network(batch["image"]), batch["label"])),
    )
    for (trained, step), batch in zip(steps, batches, strict=True):
        trained.eval()  # dropout would draw in the order of the memory, which channels-last changes
        step(batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None]))
        trained.zero_grad()
    ours, theirs = gradients
    similarity = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    if similarity < 0.999:
        raise RuntimeError(f"the gradients of the two sides differ: cosine similarity {similarity:.4f}")


RACES = {"inference": _inference, "training": _training}

if __name__ == "__main__":
    main()
