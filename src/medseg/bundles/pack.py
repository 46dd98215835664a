"""``medseg pack``: one self-contained, reproducible zip in the layout of MONAI's model zoo."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib import metadata as installed
from pathlib import Path
from typing import Any

from medseg.bundles.archive import SUMS, write_zip
from medseg.bundles.card import card_markdown
from medseg.bundles.catalog import Bundle, find_bundle, repository_root
from medseg.bundles.check import schema_problems
from medseg.bundles.config_check import unused_keys
from medseg.bundles.configs import Config, walk
from medseg.bundles.release import OVERLAYS, Release, describe_data, read_release
from medseg.bundles.self_test import SELF_TEST, is_empty, run_inference
from medseg.io.files import file_sha256

#: What is said of the files of a packed bundle, in the card.
FILES = {
    "configs/inference.json": "segments a folder; plain MONAI",
    "configs/train.json": "the training of these weights; needs medseg",
    "configs/evaluate.json": "scores a data list; needs medseg",
    "configs/metadata.json": "what the bundle is, in the model zoo's form",
    "models/model.pt": "",
    "models/model.safetensors": "",
    "models/model.ts": "",
    "models/model.onnx": "",
    "models/network_layout.json": "name, type and shape of every tensor that the network has",
    "models/provenance.json": "run, data, code, packages and scores, for machines",
    "self_test/": "one tiny simulated case and the mask that it must give",
    "docs/environment.txt": "every package, with its version, that the self-test ran with",
    SUMS: "SHA-256 of every file",
}

__all__ = ["Packed", "chosen_network", "pack"]


@dataclass(frozen=True)
class Packed:
    """A packed bundle: the zip, its SHA-256, and remarks for its maker."""

    path: Path
    sha256: str
    remarks: list[str]


def pack(
    task: str,
    weights: Path | None = None,
    out: Path = Path("dist"),
    *,
    version: str | None = None,
    onnx: bool = False,
    overlays: bool = True,
) -> Packed:
    """Pack a bundle with its weights. The same weights and packages give the same bytes.

    Args:
        task: bundle of this checkout.
        weights: ``models/model.pt`` of a run's folder, or another weight file; the promoted ones by default.
        out: folder of the zip, which is named ``NAME_vVERSION.zip`` as in the model zoo.
        version: version of this release, for weights that were not promoted.
        onnx: bring ``model.onnx`` as well.
        overlays: bring pictures of scored cases. They are the user's data.

    Raises:
        FileNotFoundError: without weights.
        FileExistsError: if another zip of the same version is there.
        ValueError: if the weights do not fit, the metadata break the schema, or the packed bundle does not run.
    """
    root = repository_root()
    bundle = find_bundle(task, root)
    release = read_release(weights or bundle.path / "models" / "model.pt", bundle, root, ".")
    if not overlays:
        release.overlays = []
    metadata = _complete(bundle, release, version)
    name = f"{bundle.name}_v{metadata['version']}.zip"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=out) as staging:
        folder = Path(staging, bundle.name)
        remarks = _fill(folder, bundle, release, metadata, onnx)
        new = Path(staging, name)
        digest = write_zip(folder, new)
        if (out / name).exists() and file_sha256(out / name) != digest:
            raise FileExistsError(
                f"{out / name} is there with other content; a version is published once: raise it "
                "(`medseg promote`, or --version), or delete the file"
            )
        new.replace(out / name)
    return Packed(out / name, digest, remarks)


def _fill(folder: Path, bundle: Bundle, release: Release, metadata: Config, onnx: bool) -> list[str]:
    """Write everything that the zip holds into a folder."""
    from medseg.training.export import export_weights

    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    shutil.copyfile(bundle.path / "LICENSE", folder / "LICENSE")
    configs = {name: chosen_network(config) for name, config in release.configs.items()}
    inference = packed = configs["inference"]
    if _is_own(inference) and not _needs_medseg(metadata):  # what trains and scores it is medseg's, and stays there
        packed = _load_program(inference)
        configs = {"inference": packed}
    for name, config in configs.items():
        for key, *_ in list(unused_keys(config)):  # pieces that were copied by macro, and what an overlay replaced
            config.pop(key, None)
        _write_json(folder / "configs" / f"{name}.json", config)
    _write_json(folder / "configs" / "metadata.json", metadata)
    if (bundle.path / "configs" / "logging.conf").is_file():
        shutil.copyfile(bundle.path / "configs" / "logging.conf", folder / "configs" / "logging.conf")
    extra = {"metadata": metadata, "inference": packed}
    remarks = export_weights(inference, metadata, release.weights, folder / "models", onnx, extra)
    if packed is not inference and not (folder / "models" / "model.ts").is_file():
        raise ValueError(f"the network is medseg's own and cannot be exported: model.ts {remarks['model.ts']}")
    _write_json(folder / "models" / "provenance.json", {**release.provenance, "metrics": release.metrics})
    (folder / "docs" / "environment.txt").write_text("".join(f"{line}\n" for line in _environment(metadata)))
    for picture in release.overlays:
        (folder / "docs" / OVERLAYS).mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "docs" / OVERLAYS / picture.name)
    tested = _self_test(folder, bundle)
    notes = [f"{file}: {remark}" for file, remark in remarks.items() if remark.startswith("left out")] + tested
    described = FILES | {f"models/{file}": remark for file, remark in remarks.items()}
    if _needs_medseg(metadata):
        described["configs/inference.json"] = "segments a folder; needs medseg"
    files = [(f, text) for f, text in described.items() if f == SUMS or (folder / f).exists()]
    readme = (bundle.path / "docs" / "README.md").read_text(encoding="utf-8")
    card = card_markdown(readme, metadata, release, files, notes, _brings(inference, metadata))
    (folder / "docs" / "README.md").write_text(card, encoding="utf-8")
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    (folder / SUMS).write_text("".join(f"{file_sha256(folder / n)}  {n}\n" for n in names))
    if release.overlays:
        shown = ", ".join(p.name for p in release.overlays)
        notes.append(f"pictures of your data are inside (docs/overlays: {shown}); --no-overlays leaves them out")
    if not release.metrics:
        notes.append("no scores are known for these weights: they come from no run's folder")
    return notes


def _complete(bundle: Bundle, release: Release, version: str | None) -> Config:
    """The metadata with versions as installed, scores and data."""
    metadata = json.loads(json.dumps(bundle.metadata))
    if version is not None:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"--version {version} must be three numbers, e.g. 0.2.0")
        run = release.provenance.get("run_id", "no known run")
        metadata["changelog"] = {version: f"weights of {run}", **metadata["changelog"]}
        metadata["version"] = version
    for key, package in (("monai_version", "monai"), ("pytorch_version", "torch"), ("numpy_version", "numpy")):
        metadata[key] = _version(package)
    metadata["required_packages_version"] = {p: _version(p) for p in metadata["required_packages_version"]}
    metadata["eval_metrics"] = release.metrics
    if release.provenance:
        metadata["data_source"] = describe_data(release.provenance)
    metadata.setdefault("data_source", "not known: the weights came without their run")
    problems = schema_problems(metadata)
    if problems:
        raise ValueError(
            f"{bundle.name}: {'; '.join(': '.join(p) for p in problems)}; run `medseg check {bundle.name}`"
        )
    return dict(metadata)


def _version(package: str) -> str:
    """Installed version without its local part (``+cu128``), which no index knows."""
    try:
        return installed.version(package).partition("+")[0]
    except installed.PackageNotFoundError as error:
        raise ValueError(f"the bundle needs {package}, which is not installed here: pip install {package}") from error


def _needs_medseg(metadata: Mapping[str, Any]) -> bool:
    """Whether not only the network but what surrounds it at inference is medseg's: a traced program would not do."""
    return "medseg" in metadata["required_packages_version"]


def _brings(inference: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    if _needs_medseg(metadata):
        return "Network and inference are medseg's own: install medseg in the version that metadata.json names."
    if _is_own(inference):
        return (
            "The network is medseg's own and comes as a program, `models/model.ts`: neither medseg nor its network's "
            "source is needed to segment."
        )
    return "The network comes from these packages: medseg is not needed to segment."


def _is_own(config: Mapping[str, Any]) -> bool:
    """Whether the network is defined in medseg itself."""
    network = walk(config["network_def"], "network_def")
    return any(str(v).startswith("medseg.") for k, v in network if k.endswith("_target_"))


def chosen_network(config: Config) -> Config:
    """The config with the network that the weights are of, written out; its alternatives are of no use with them."""
    networks, name = config.get("networks"), config.get("network_name")
    if config.get("network_def") != "$@networks[@network_name]()" or not isinstance(networks, dict):
        return dict(config)
    chosen = {k: v for k, v in networks[name].items() if k != "_mode_"}
    return {k: chosen if k == "network_def" else v for k, v in config.items() if k != "networks"}


def _load_program(config: Config) -> Config:
    """The inference config with the exported program as its network, for a network that only medseg defines."""
    program = "$os.path.join(@bundle_root, 'models', 'model.ts')"
    network = {"_target_": "torch.jit.load", "f": program, "map_location": "@device"}
    return {k: network if k == "network_def" else v for k, v in config.items() if k != "networks"}


def _environment(metadata: Mapping[str, Any]) -> Iterable[str]:
    """Names and versions of everything that inference needs, directly or not."""
    wanted = ["monai", "torch", "numpy", *metadata["required_packages_version"]]
    found: dict[str, str] = {}
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            distribution = installed.distribution(name)
        except installed.PackageNotFoundError:
            continue  # for another platform
        found[name] = distribution.version
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                wanted.append(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0])
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _self_test(folder: Path, bundle: Bundle) -> list[str]:
    """Segment one tiny simulated case with the packed config, as a collaborator would."""
    module = import_module(f"medseg.tasks.{bundle.name}.simulate")
    case = folder / SELF_TEST / "input"
    case.mkdir(parents=True)
    module.self_test_case(case)
    run_inference(folder, case, folder / SELF_TEST / "expected")
    if all(is_empty(mask) for mask in (folder / SELF_TEST / "expected").rglob("*") if mask.is_file()):
        return ["the self-test's mask is empty, so it shows little more than that the bundle runs"]
    return []


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
