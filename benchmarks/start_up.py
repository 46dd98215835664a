"""How long a fresh process takes to start: medseg's command, the packages below it, and a whole bundle run.

The bundle run segments one 64x64 image by a small U-Net with random weights. CPU time is that of the child processes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from race import ROOT, arguments, prepare, print_table, race

CONFIG = "bundles/fluorescence_tumor/configs/inference.yaml"
NETWORK = {"network_name": "unet", "encoder": "resnet18"}


def main() -> None:
    options = arguments(__doc__, rounds=5).parse_args()
    prepare(options.threads)
    python, medseg = sys.executable, str(Path(sys.executable).with_name("medseg"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "python -c pass": [python, "-c", "pass"],
            "python -c 'import medseg'": [python, "-c", "import medseg"],
            "medseg --help": [medseg, "--help"],
            "medseg list": [medseg, "list"],
            "python -c 'import torch'": [python, "-c", "import torch"],
            "python -c 'import monai'": [python, "-c", "import monai"],
            "python -m monai.bundle run (inference)": [python, "-m", "monai.bundle", "run", *_inference(folder)],
        }
        for command in commands.values():  # every candidate works, and the bundle run segments the image
            _run(command)
        if not (folder / "predictions" / "image_seg.png").is_file():
            raise RuntimeError("the bundle run wrote no mask")
        results = race({name: partial(_run, c) for name, c in commands.items()}, options.rounds, _children_cpu)
    rows = [
        [name, f"{r.wall:.3f}", f"{r.min_wall:.3f}", f"{r.cpu:.3f}", f"{r.min_cpu:.3f}"] for name, r in results.items()
    ]
    print_table(["process", "wall s", "shortest", "CPU s", "least"], rows)


def _inference(folder: Path) -> list[str]:
    """Arguments of a bundle run, with the image and the weights that they name made in ``folder``."""
    import torch
    from monai.bundle import ConfigParser

    from medseg.io.images import write_png

    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({**NETWORK, "device": "cpu"})
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    write_png(folder / "images" / "image.png", np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    given = {
        "config_file": CONFIG,
        **NETWORK,
        "roi_size": "[64, 64]",
        "device": "cpu",
        "dataset_dir": str(folder / "images"),
        "output_dir": str(folder / "predictions"),
        "ckpt_path": str(folder / "model.pt"),
    }
    return [text for key, value in given.items() for text in (f"--{key}", value)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
