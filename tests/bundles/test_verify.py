"""``medseg verify``: what is harmless passes, every attack is named, and nothing of a bundle is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sample_bundle import INFERENCE, write_sums

from medseg.bundles.archive import write_zip
from medseg.bundles.verify import verify

SENTINEL = Path(tempfile.gettempdir(), "medseg-attack-sentinel")


@pytest.fixture(autouse=True)
def _nothing_runs():
    SENTINEL.unlink(missing_ok=True)
    before = set(sys.modules)
    yield
    assert not SENTINEL.exists(), "something of the bundle was run"
    new = {m.split(".")[0] for m in set(sys.modules) - before}
    assert not new & {"subprocess_attack", "antigravity", "evil"}


def reasons(report) -> str:
    return "\n".join(f"{f.level} {f.place}: {f.message}" for f in report.findings)


def test_a_sound_bundle_of_the_zoo_is_trusted(small_bundle, tmp_path):
    report = verify(small_bundle)
    assert report.verdict == "trusted", reasons(report)
    assert (report.name, report.version) == ("blobs", "0.1.0")
    digest = write_zip(small_bundle, tmp_path / "blobs_v0.1.0.zip")
    packed = verify(tmp_path / "blobs_v0.1.0.zip")
    assert packed.verdict == "trusted", reasons(packed)
    assert packed.sha256 == digest
    assert "with equal values" in packed.checked["weights"]
    listed = {u.text for u in report.uses}
    assert {"UNet", "$@evaluator.run()", "$import glob"} <= listed, "everything that would run is listed"
    assert "+ expression" in report.table(everything=True)
    assert json.loads(report.to_json())["verdict"] == "trusted"


@pytest.mark.parametrize(
    "text",
    [
        "$torch.load(@ckpt_path, map_location=@device, weights_only=True)",
        "$np.stack([np.asarray(x) for x in @datalist]).astype(np.float32)",
        "$monai.utils.CommonKeys.IMAGE",
        "$monai.networks.layers.Norm.BATCH",
        "$torch.nn.SyncBatchNorm.convert_sync_batchnorm(@network)",
        "$[p for p in @network.parameters() if p.requires_grad]",
        "$@dataset_dir + '/labels/' + 'x'.replace('a', 'b')",
        '$os.path.join(@bundle_root, "models", f"{@dataset_dir}/x.pt")',
        "$lambda x, y=1: {k: v for k, v in x.items()}",
        "$torch.distributed.init_process_group(backend='nccl')",
    ],
)
def test_harmless_expressions(text, edit):
    report = verify(edit(extra=text))
    assert report.verdict == "trusted", reasons(report)


RUN = f"touch {SENTINEL}"

#: What an attacker may put under a key of a config, and what must be said of it.
ATTACKS: dict[str, tuple[object, str]] = {
    "import in an expression": (f"$__import__('os').system('{RUN}')", "__import__"),
    "target": ({"_target_": "os.system", "command": RUN}, "os.system is not on the list"),
    "subprocess": ({"_target_": "subprocess.run", "args": RUN, "shell": True}, "subprocess.run is not on the list"),
    "eval": (f"$eval('{RUN}')", "builtins.eval"),
    "exec": ({"_target_": "builtins.exec", "source": "1"}, "builtins.exec"),
    "short builtin": ({"_target_": "exec"}, "MONAI has no exec"),
    "open": (f"$open('{SENTINEL}', 'w')", "builtins.open"),
    "getattr": ("$getattr(os, 'system')('x')", "builtins.getattr"),
    "os by name": (f"$os.system('{RUN}')", "os.system is not on the list"),
    "os through MONAI": (f"$monai.utils.misc.os.system('{RUN}')", "really os.system"),
    "os through torch": (f"$torch.os.system('{RUN}')", "is not on the list"),
    "target through MONAI": ({"_target_": "monai.utils.misc.os.system", "command": RUN}, "really os.system"),
    "optional_import": ("$monai.utils.optional_import('os')[0]", "optional_import"),
    "instantiate": ({"_target_": "monai.utils.instantiate", "path": "os.system"}, "is not on the list"),
    "bundle run": ("$monai.bundle.run(config_file='x.json')", "is not on the list"),
    "unpickle": ("$torch.load(@ckpt_path, weights_only=False)", "unpickling runs code"),
    "unpickle by a variable": ("$torch.load(@ckpt_path, **{'weights_only': False})", "unpickling"),
    "unpickle by a computed name": ("$torch.load(@ckpt_path, **{'weights' + '_only': False})", "computed"),
    "unpickle later": ("$functools.partial(torch.load, weights_only=False)", "unpickling"),
    "builtins of a module": ("$os.path.__builtins__['eval']('1')", "private"),
    "module of a module": ("$os.path.os.replace('a.txt', 'nrrd.py')", "os.path.os"),
    "globals of a function": ("$torch.backends.disable_global_flags.__globals__", "private"),
    "imported module by reference": ("$@imports::1.replace('a', 'b')", "refers to an import"),
    "names of references": ("$__local_refs.update({'device': 1})", "private"),
    "reader in an expression": ("$monai.transforms.LoadImage('torch.os.system', command='x')", "component"),
    "reader by a keyword": ("$@make(reader='exec')", "imported by its name"),
    "computed reader": ({"_target_": "LoadImage", "reader": "$'torch.os.' + 'system'"}, "computed"),
    "built reader": ({"_target_": "LoadImage", "reader": {"_target_": "builtins.str", "object": "x"}}, "computed"),
    "reader for later": ({"_target_": "LoadImage", "_mode_": "callable"}, "arguments are not seen"),
    "numpy's reader": ({"_target_": "LoadImage", "reader": "NumpyReader"}, "none of MONAI's"),
    "debug switch": ({"_target_": "UNet", "_debug_": True}, "debugger"),
    "traced operations": ("$torch.utils.data.datapipes.dataframe.dataframes.Capture()", "not on the list"),
    "log file of code": ({"_target_": "LogfileHandler", "output_dir": ".", "filename": "nrrd.py"}, "not on the list"),
    "registering by name": ({"_target_": "monai.networks.nets.FlexUNetEncoderRegister"}, "not on the list"),
    "default download": ({"_target_": "EfficientNetBN", "model_name": "efficientnet-b0"}, "unless pretrained says no"),
    "default download of smp": ({"_target_": "segmentation_models_pytorch.Unet"}, "unless encoder_weights says no"),
    "download by reference": ({"_target_": "DenseNet121", "pretrained": "@amp"}, "download"),
    "table from the network": ({"_target_": "CSVDataset", "src": "x.csv"}, "not on the list"),
    "process group": ("$torch.distributed.init_process_group('gloo', init_method='tcp:' + '//x')", "address"),
    "import by find_spec": ("$find_spec('antigravity.x')", "find_spec"),
    "named import carried by a list": (["@imports::1"], "refers to an import"),
    "named import as an argument": ({"_target_": "Lambda", "func": "@imports::0"}, "refers to an import"),
    "process group by target": ({"_target_": "torch.distributed.init_process_group", "init_method": "x"}, "address"),
    "address in pieces": ("$'tcp:' + '//127.0.0.1:4'", "part of an address"),
    "default download of FCN": ({"_target_": "monai.networks.blocks.fcn.FCN"}, "unless pretrained says no"),
    "download later": ({"_target_": "torchvision.models.resnet18", "_mode_": "callable"}, "arguments are not seen"),
    "getattr by a container": ("$torch.nn.ParameterDict({'a': 1})['get_buffer']", "ParameterDict"),
    "copying by its own rules": ("$copy.copy(@network)", "copy.copy"),
    "private argument": ({"_target_": "PILWriter", "__reduce_ex__": "$lambda p: 0"}, "private argument"),
    "loading handed over": ("$list(map(torch.load, ['x']))", "handed over"),
    "loading for later": ({"_target_": "torch.load", "_mode_": "callable"}, "arguments are not seen"),
    "connecting handed over": ("$map(torch.distributed.init_process_group, ['gloo'])", "handed over"),
    "find_spec handed over": ("$list(map(find_spec, ['anti' + 'gravity.x']))", "handed over"),
    "merger by name": ({"_target_": "PatchInferer", "merger_cls": "antigravity"}, "imported by its name"),
    "weights of torchvision": ({"_target_": "TorchVisionFCModel", "weights": "DEFAULT"}, "downloads weights"),
    "pretrained by position": ("$monai.networks.nets.resnet10(True, spatial_dims=3)", "as a component"),
    "smp for later": (
        {"_target_": "segmentation_models_pytorch.Unet", "_mode_": "callable", "encoder_weights": None},
        "arguments are not seen",
    ),
    "hidden metadata": ("_meta_", "hides the metadata"),
    "numpy pickle": ("$np.load('x.npy', allow_pickle=True)", "numpy.load"),
    "pickle": ({"_target_": "pickle.loads", "data": "x"}, "pickle.loads"),
    "hub": ("$torch.hub.load('a/b', 'c')", "torch.hub"),
    "download": ({"_target_": "monai.apps.download_url", "url": "x"}, "is not on the list"),
    "pretrained": ({"_target_": "torchvision.models.resnet18", "pretrained": True}, "download"),
    "address": ("https://example.org/upload", "address outside"),
    "address in an expression": ("$str('https://example.org')", "address outside"),
    "subclasses": ("$[c for c in ().__class__.__base__.__subclasses__()]", ".__class__"),
    "frames": ("$(x for x in [1]).gi_frame.f_builtins", ".gi_frame"),
    "builtins": ("$__builtins__['eval']('1')", "__builtins__"),
    "hidden name": ("$(lambda eval: 0)(1) or eval('1')", "another meaning to eval"),
    "hidden module": ("$(lambda os: 0)(1) or os.system('x')", "another meaning to os"),
    "import": ("$import subprocess", "subprocess is not on the list"),
    "import from": ("$from os import system", "os.system is not on the list"),
    "import under a known name": ("$import os as torch", "torch already means torch"),
    "import of the bundle's code": ("$import scripts.evil", "scripts is not installed here"),
    "reader": ({"_target_": "LoadImaged", "keys": "image", "reader": "subprocess.Popen"}, "none of MONAI's"),
    "debugger": ({"_target_": "UNet", "_mode_": "debug"}, "debugger"),
    "computed target": ({"_target_": "$@name"}, "computed"),
    "referenced target": ({"_target_": "@name"}, "computed"),
    "path": ("/etc/passwd", "path outside"),
    "home": ("~/.ssh/id_ed25519", "path outside"),
    "path upwards": ("$'x' + '/../../etc'", "leads out"),
    "path in join": ("$os.path.join(@bundle_root, '/etc/cron.d')", "path outside"),
    "no Python": ("$import os; os.system('x') +", "cannot be read"),
    "unknown package": ({"_target_": "evil_package.Run"}, "not installed here"),
    "unknown name": ({"_target_": "monai.transforms.Evil"}, "does not exist"),
    "attribute of a value": ("$@network.__init__.__globals__", ".__globals__"),
    "writing tensor": ("$@network.save('x')", ".save"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_by_config(name, edit):
    value, expected = ATTACKS[name]
    is_import = str(value).startswith(("$import ", "$from "))
    imports = [*INFERENCE["imports"], value] if is_import else INFERENCE["imports"]
    if "functools" in str(value):
        imports = [*imports, "$import functools"]
    if "copy." in str(value):
        imports = [*imports, "$import copy"]
    if "find_spec" in str(value):
        imports = [*imports, "$from importlib.util import find_spec"]
    more = {"_meta_": {"version": "1"}} if value == "_meta_" else {}
    run = ["$@evaluator.run()", "$@extra"]
    report = verify(edit(imports=imports, name="UNet", amp=True, extra=value, run=run, **more))
    assert report.verdict != "trusted", reasons(report)
    assert expected in reasons(report)
    assert "configs/inference.json: " in reasons(report), "the place is named"
    shutil.rmtree(report.path)


def test_what_is_put_together_from_several_places(edit, small_bundle):
    """References, keys that are laid over others, metadata and other configs: all are seen before MONAI sees them."""
    load = {"_target_": "LoadImaged", "keys": "image", "reader": "@which"}
    assert verify(edit(which="PILReader", preprocessing=load)).verdict == "trusted"
    assert "none of MONAI's" in reasons(verify(edit(which="breakpoint", preprocessing=load)))
    assert "none of MONAI's" in reasons(verify(edit(which="@other", other="exec", preprocessing=load)))
    edit(which="PILReader", preprocessing=load)
    other = small_bundle / "configs" / "other.json"
    for content, expected in (
        ({"which": "exec"}, "none of MONAI's"),
        ({"preprocessing::reader": "exec"}, "none of MONAI's"),
        ({"preprocessing#_target_": "torch.os.system"}, "os.system"),
        ({"imports": ["$from math import sqrt as f", "$import os as glob"]}, "glob already means glob"),
        ({"imports": ["$from subprocess import run as glob"]}, "glob already means glob"),
    ):
        other.write_text(json.dumps(content))
        write_sums(small_bundle)
        report = verify(small_bundle)
        assert report.verdict == "untrusted"
        assert expected in reasons(report)
    other.unlink()
    report = verify(edit(**{"extra": {"_target_": "UNet"}, "extra::_target_": "monai.utils.misc.os.system"}))
    assert "really os.system" in reasons(report)
    metadata = small_bundle / "configs" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "which": "exec", "run": "$eval('1')"}))
    report = verify(edit(preprocessing={**load, "reader": "@_meta_::which"}))
    assert "none of MONAI's" in reasons(report)
    assert "builtins.eval" in reasons(report)
    refused(edit(extra="%::::which"), "not written plainly", sums=False)
    refused(edit(extra="%a\nconfigs/e.json::k"), "not written plainly", sums=False)


#: A config, or metadata, that breaks or wears out its reader: it has to be refused, soon and without a traceback.
WEARING = {
    "list as a key": ("configs/extra.yaml", "? [a]\n: 1", "a key is a word"),
    "blank in a key": ("configs/extra.json", '{"a": {"b": 1}, "a ::b": 2}', "read differently"),
    "path inside": ("configs/extra.json", '{"a": {"b::c": 1}}', "read differently"),
    "negative place": ("configs/extra.json", '{"a": [1], "a::-1": 2}', "read differently"),
    "long key": ("configs/extra.json", json.dumps({"k" * 10_000: [0] * 100_000}), "read differently"),
    "long text": ("configs/extra.json", json.dumps({"x": "a." * 50_000}), "longer than"),
    "long expression": ("configs/extra.json", json.dumps({"x": "$" + "@::" * 100_000}), "longer than"),
    "many references": ("configs/extra.json", json.dumps({"x": "$[" + "@a," * 30_000 + "]"}), "longer than"),
    "deep attributes": (
        "configs/extra.json",
        json.dumps({"x": "$setattr(torch" + ".a" * 900 + ", 'x', 1)"}),
        "torch.a",
    ),
    "long macro": ("configs/extra.json", json.dumps({"x": "%" + ".json::" * 20_000 + "\n\nx"}), "not written plainly"),
    "branching references": (
        "configs/extra.json",
        json.dumps({**{f"a{i}": [f"@a{i + 1}"] * 8 for i in range(19)}, "a19": 1, "x": "@a0", "y": "$eval('1')"}),
        "builtins.eval",
    ),
    "names of many parts": (
        "configs/extra.json",
        json.dumps({str(i): "$torch." + ".".join(f"a{i}" for _ in range(60)) for i in range(1500)}),
        "more parts than any name",
    ),
    "many unknown names": (
        "configs/extra.json",
        json.dumps([{"_target_": f"Nope{i}"} for i in range(300)]),
        "a mapping",
    ),
    "unknown targets": (
        "configs/extra.json",
        json.dumps({str(i): {"_target_": f"Nope{i}"} for i in range(300)}),
        "no Nope7",
    ),
    "same key": ("configs/extra.json", "{" + '"a":1,' * 15_000 + '"a":1}', "key a is there twice"),
    "big data": ("docs/extra.yaml", "[" + "0," * 10**6 + "0]", "bytes, more than"),
    "endless sizes": ("models/network_layout.json", '{"a": ["float32", [1e999]]}', "no layout"),
    "long name": ("configs/" + "a" * 200 + ".json", "{", "Expecting"),
}


@pytest.mark.parametrize("name", WEARING)
def test_wearing_files(name, small_bundle):
    file, text, expected = WEARING[name]
    (small_bundle / file).write_text(text)
    write_sums(small_bundle)
    start = time.perf_counter()
    report = verify(small_bundle)
    assert time.perf_counter() - start < 20
    assert report.verdict != "trusted"
    assert expected in reasons(report)


def test_metadata_made_to_break_its_reader(small_bundle):
    file = small_bundle / "configs" / "metadata.json"
    before = json.loads(file.read_text())
    for change in ({"changelog": 5}, {"network_data_format": []}, {"a": {"b": 1}, "a ::b": 2}):
        file.write_text(json.dumps({**before, **change}))
        write_sums(small_bundle)
        assert verify(small_bundle).verdict == "refused"


def test_pickles_made_to_break_their_reader(small_bundle):
    doubled = b"\x80\x02ctorch\nSize\n]" + b"q\x01h\x01h\x01\x86" * 60 + b"\x85R."
    with zipfile.ZipFile(small_bundle / "models" / "other.pt", "w") as archive:
        archive.writestr("other/data.pkl", doubled)
    start = time.perf_counter()
    refused(small_bundle, "other.pt")
    assert time.perf_counter() - start < 10
    (small_bundle / "models" / "other.pt").unlink()
    with tarfile.open(small_bundle / "docs" / "b.txt", "w") as archive:  # torch's oldest format, under any name
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(small_bundle, "docs/b.txt: is a tar archive")
    (small_bundle / "docs" / "b.txt").unlink()
    (small_bundle / "docs" / "a.txt").write_bytes(b"\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.")
    refused(small_bundle, "docs/a.txt")


@pytest.mark.parametrize("name", [".pdbrc", ".git/config", "docs/.hidden", "models/plain", "nrrd.pyc"])
def test_hidden_and_nameless_files(name, small_bundle):
    (small_bundle / name).parent.mkdir(exist_ok=True)
    (small_bundle / name).write_text("import os")
    refused(small_bundle, f"{name}: a bundle has no use for")


def test_arrays_that_are_none(small_bundle):
    """NumPy unpickles what has not its magic, whatever the pickle's protocol is."""
    (small_bundle / "docs" / "case.npy").write_bytes(b"S'" + b"a" * 5000 + b"'\n0cos\nsystem\n(S'x'\ntR.")
    refused(small_bundle, "docs/case.npy: is no array")


def test_logging_config_is_code(small_bundle):
    file = small_bundle / "configs" / "logging.conf"
    shutil.copy("bundles/fluorescence_tumor/configs/logging.conf", file)
    write_sums(small_bundle)
    assert verify(small_bundle).verdict == "trusted"
    file.write_text(file.read_text().replace("(sys.stdout,)", f"(__import__('os').system('{RUN}'),)"))
    write_sums(small_bundle)
    assert "logging evaluates this" in reasons(verify(small_bundle))


class Payload:
    def __reduce__(self):
        return os.system, (RUN,)


def refused(folder: Path, because: str, sums: bool = True) -> None:
    if sums:
        write_sums(folder)
    report = verify(folder)
    assert report.verdict == "refused", reasons(report)
    assert because in reasons(report)


@pytest.mark.parametrize("file", ["models/model.pt", "models/other.pt", "docs/README.md", "self_test/case.png"])
def test_pickles(file, small_bundle):
    (small_bundle / file).parent.mkdir(exist_ok=True)
    with (small_bundle / file).open("wb") as target:
        if file.endswith(".pt"):
            torch.save({"weight": Payload()}, target)
        else:
            pickle.dump(Payload(), target)
    refused(small_bundle, "system" if file.endswith(".pt") else file)


def test_files_that_no_bundle_needs(small_bundle):
    (small_bundle / "models" / "lib.so").write_bytes(b"\x7fELF")
    refused(small_bundle, "no use for a .so file")
    (small_bundle / "models" / "lib.so").unlink()
    (small_bundle / "scripts").mkdir()
    (small_bundle / "scripts" / "evil.py").write_text("import os")
    write_sums(small_bundle)
    report = verify(small_bundle)
    assert (report.verdict, "Python code" in reasons(report)) == ("untrusted", True)
    (small_bundle / "docs" / "link.md").symlink_to("/etc/passwd")
    refused(small_bundle, "link.md", sums=False)


def test_checksums(small_bundle):
    text = small_bundle / "docs" / "README.md"
    text.write_text("# blobs\n")
    refused(small_bundle, "docs/README.md: has changed", sums=False)
    write_sums(small_bundle)
    (small_bundle / "docs" / "more.md").write_text("x")
    refused(small_bundle, "docs/more.md: is not in SHA256SUMS", sums=False)
    (small_bundle / "docs" / "more.md").unlink()
    text.unlink()
    refused(small_bundle, "docs/README.md: is missing", sums=False)
    (small_bundle / "SHA256SUMS").unlink()
    report = verify(small_bundle)
    assert report.verdict == "trusted", "a bundle of the zoo has none"
    assert "SHA256SUMS: there is none" in reasons(report)


def test_weights_that_do_not_fit(small_bundle):
    models = small_bundle / "models"
    state = torch.load(models / "model.pt", weights_only=True)
    first = next(iter(state))
    torch.save({**state, first: state[first] + 1}, models / "model.pt")
    refused(small_bundle, f"holds other weights than models/model.pt: {first}")
    wide = {**state, first: torch.zeros(5, 1, 3, 3)}
    torch.save(wide, models / "model.pt")
    save_file(wide, models / "model.safetensors")
    refused(small_bundle, f"does not fit the network: {first} is float32 [5, 1, 3, 3] in the file")
    (models / "network_layout.json").write_text("[1, 2")
    refused(small_bundle, "network_layout.json")


def test_structure(small_bundle, edit):
    refused(edit(a="@b", b="$@a + 1"), "goes in a circle")
    refused(edit(a=1, b="@nothing"), "@nothing is not there")
    refused(edit(b=1, c="%../../secret.json::key"), "outside of blobs")
    refused(edit(c="%/etc/hostname.json"), "outside of blobs")
    refused(edit(c="%configs/gone.json::key"), "not in the bundle")
    refused(edit(c="%d", d="%c"), "circle")
    config = small_bundle / "configs" / "inference.json"
    before = config.read_text()
    config.write_text('{"a":' * 10**6 + "1" + "}" * 10**6)
    refused(small_bundle, "more than the 1,048,576 it may have")
    config.write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    refused(small_bundle, "nested deeper")
    config.write_text(before)
    (small_bundle / "configs" / "extra.yaml").write_text("[" * 10**6)
    refused(small_bundle, "nested deeper")
    (small_bundle / "configs" / "extra.yaml").write_text("a: !!python/object/apply:os.system [x]")
    refused(small_bundle, "could not determine a constructor")
    (small_bundle / "configs" / "extra.yaml").unlink()
    metadata = json.loads((small_bundle / "configs" / "metadata.json").read_text())
    (small_bundle / "configs" / "metadata.json").write_text(json.dumps({**metadata, "version": 3, "task": ""}))
    refused(small_bundle, "metadata.json: version")
    (small_bundle / "configs" / "metadata.json").unlink()
    refused(small_bundle, "no MONAI bundle")


def test_zips(small_bundle, tmp_path):
    """What only a zip can do to its reader; more of it in test_archive.py."""
    good = tmp_path / "good.zip"
    write_zip(small_bundle, good)
    for name in ("../evil.txt", "/evil/evil.txt", "blobs/../../evil.txt"):
        bad = tmp_path / "bad.zip"
        shutil.copy(good, bad)
        with zipfile.ZipFile(bad, "a") as archive:
            archive.writestr(name, "x")
        assert verify(bad).verdict == "refused"
    content = good.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    assert verify(tmp_path / "cut.zip").verdict == "refused"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("blobs/zeros.png", "w") as big:
        for _ in range(160):
            big.write(bytes(2**20))
    (tmp_path / "bomb.zip").write_bytes(buffer.getvalue())
    start = time.perf_counter()
    report = verify(tmp_path / "bomb.zip")
    assert report.verdict == "refused", reasons(report)
    assert time.perf_counter() - start < 5
    changed = bytearray(content)
    changed[len(changed) // 3] ^= 1
    (tmp_path / "bit.zip").write_bytes(changed)
    assert verify(tmp_path / "bit.zip").verdict == "refused", "one changed bit"


def test_signature(small_bundle, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    from medseg.bundles.signature import sign

    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        (tmp_path / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    target = tmp_path / "blobs_v0.1.0.zip"
    digest = write_zip(small_bundle, target)
    public = tmp_path / "mine.pub"
    assert "is not signed" in reasons(verify(target, public))
    signature = target.with_name(f"{target.name}.sig")
    signature.write_bytes(sign(digest, tmp_path / "mine"))
    report = verify(target, public)
    assert (report.verdict, report.signed_by.startswith("SHA256:")) == ("trusted", True)
    assert verify(target, tmp_path / "other.pub").verdict == "refused"
    assert "over the zip" in reasons(verify(small_bundle, public))
    # the same files in another zip, and another weight file with its checksums made right
    with zipfile.ZipFile(target) as archive, zipfile.ZipFile(tmp_path / "again.zip", "w") as again:
        for name in archive.namelist():
            again.writestr(zipfile.ZipInfo(name), archive.read(name))
    shutil.copy(tmp_path / "again.zip", target)
    assert verify(target).verdict == "trusted"
    assert verify(target, public).verdict == "refused", "re-zipped"
    state = torch.load(small_bundle / "models" / "model.pt", weights_only=True)
    swapped = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save(swapped, small_bundle / "models" / "model.pt")
    save_file(swapped, small_bundle / "models" / "model.safetensors")
    write_sums(small_bundle)
    write_zip(small_bundle, target)
    assert verify(target).verdict == "trusted", "no check but the signature can know the author's weights"
    assert verify(target, public).verdict == "refused", "swapped weights"
