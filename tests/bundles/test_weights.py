from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from safetensors.torch import save_file

from medseg.bundles import pickles
from medseg.bundles.archive import RefusedError, open_bundle, write_zip
from medseg.bundles.pickles import has_pickled_objects, looks_like_pickle
from medseg.bundles.programs import scan_program
from medseg.bundles.weights import Layout, read_layout, tensor_digests


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def attack(tmp_path: Path):
    (tmp_path / "sentinel").mkdir()
    yield Attack(tmp_path / "sentinel" / "appeared")
    assert not list((tmp_path / "sentinel").iterdir())


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return OrderedDict(
        weight=torch.rand(4, 3, 3, 3),
        half=torch.rand(5).bfloat16(),
        steps=torch.tensor(7),
        empty=torch.zeros(0, 3),
        wide=torch.arange(6, dtype=torch.int64).reshape(2, 3),
        mask=torch.tensor([True, False]),
        bytes=torch.arange(4, dtype=torch.uint8),
        phase=torch.tensor([1 + 2j], dtype=torch.complex64),
        counts=torch.tensor([1, 2], dtype=torch.uint16),
        small=torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
    )


def layout(path: Path) -> Layout:
    with path.open("rb") as file:
        return read_layout(path.name, file)


def digests(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return tensor_digests(path.name, file)


def expected(state: dict[str, torch.Tensor]) -> tuple[Layout, dict[str, str]]:
    """By torch itself."""
    raw = {k: bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) for k, t in state.items()}
    shapes = {k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in state.items()}
    return shapes, {k: hashlib.sha256(data).hexdigest() for k, data in raw.items()}


def torch_zip(path: Path, content: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in {"data.pkl": content, "version": b"3\n", **members}.items():
            out.writestr(f"archive/{name}", data)
    return path


def rewrite(path: Path, **changes: bytes | None) -> Path:
    """Change or add members of a zip (None: leave out); ``__`` in a name stands for a slash."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    top = next(iter(members)).partition("/")[0]
    members |= {f"{top}/{name.replace('__', '/')}": data for name, data in changes.items()}
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            if data is not None:
                out.writestr(name, data)
    return path


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Memory that Python may take within."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_what_torch_saved(state, tmp_path, legacy, key):
    value = state if key is None else {key: state, "epoch": 3, "lr": 1e-3, "name": "unet", "optimizer": {0: {"a": [1]}}}
    torch.save(value, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert (layout(tmp_path / "m.pt"), digests(tmp_path / "m.pt")) == expected(state)


def test_what_safetensors_saved_has_the_same_layout_and_digests(state, tmp_path):
    state = {name: tensor for name, tensor in state.items() if tensor.dtype != torch.complex64}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    torch.save(state, tmp_path / "m.pt")
    assert layout(tmp_path / "m.safetensors") == layout(tmp_path / "m.pt") == expected(state)[0]
    assert digests(tmp_path / "m.safetensors") == digests(tmp_path / "m.pt") == expected(state)[1]


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_views_and_tied_weights(tmp_path, legacy):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"parameter": torch.nn.Parameter(whole), "tied": whole, "row": whole[1], "turned": whole.T}
    state |= {"column": whole[:, :1], "expanded": torch.ones(1).expand(5), "one": whole[1:2, 2:3]}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    shapes, hashes = expected(state)
    assert layout(tmp_path / "m.pt") == shapes
    contiguous = {name for name, tensor in state.items() if tensor.is_contiguous()}
    assert digests(tmp_path / "m.pt") == {name: hashes[name] for name in contiguous}
    assert contiguous == {"parameter", "tied", "row", "one"}


def test_a_module_is_read_inside_of_a_bundle(tmp_path):
    network = UNet(2, 1, 2, (4, 8), (2,))
    (tmp_path / "unet" / "models").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "unet" / "models" / "model.pt")
    write_zip(tmp_path / "unet", tmp_path / "unet.zip")
    with open_bundle(tmp_path / "unet.zip") as files, files.open("models/model.pt") as file:
        assert read_layout("models/model.pt", file) == expected(network.state_dict())[0]
        assert tensor_digests("models/model.pt", file) == expected(network.state_dict())[1]


def test_memory_stays_small_beside_the_weights(tmp_path):
    torch.save({"a": torch.zeros(16 * 2**20)}, tmp_path / "m.pt")
    with at_most(5 * 2**20):
        found = digests(tmp_path / "m.pt")
    assert found == {"a": hashlib.sha256(bytes(64 * 2**20)).hexdigest()}


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_raw_and_in_a_zip(attack, tmp_path, protocol):
    raw, packed = tmp_path / "raw.pt", torch_zip(tmp_path / "m.pt", pickle.dumps({"w": attack}, protocol))
    raw.write_bytes(pickle.dumps(attack, protocol))
    for path in (packed, raw) if protocol > 1 else (raw,):
        with pytest.raises(
            RefusedError, match=rf"{path.name}: (pickle calls (posix|os|nt)\.system; a weight|pickle does )"
        ):
            layout(path)
        with pytest.raises(RefusedError, match=path.name):
            digests(path)
    assert "pickle" in str(has_pickled_objects("raw.pt", raw.open("rb")))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_command_that_torch_saved_is_refused(attack, tmp_path, legacy):
    torch.save({"w": torch.ones(2), "x": attack}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RefusedError, match=r"m\.pt: pickle calls posix\.system; a weight file may hold tensors only"):
        layout(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "value", [UNet(2, 1, 1, (4, 8), (2,)), {"a": torch.eye(2).to_sparse()}, {"a": np.float64(1)}, {"a": Path("x")}]
)
def test_whole_modules_and_other_objects_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(RefusedError, match=r"pickle calls [\w.]+; a weight file may hold tensors only"):
        layout(tmp_path / "m.pt")


def test_a_second_pickle_in_the_zip_is_refused(attack, tmp_path):
    for place, name in enumerate(["extra", "data__nested", "hidden.pkl", "array.npy"]):
        torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
        buffer = io.BytesIO()
        np.save(buffer, np.array([attack], dtype=object))
        rewrite(tmp_path / "m.pt", **{name: buffer.getvalue() if place == 3 else pickle.dumps(attack)})
        with pytest.raises(RefusedError, match=rf"{name.replace('__', '/')}: a"):
            layout(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\2}q\0r\xff\xff\xff\x7f.", None),  # a memo index for which Python's Unpickler takes 16 GB
        (b"\x80\2]q\0h\0a.", "no dict of tensors"),  # a list that holds itself
        (b"\x80\2X\xff\xff\xff\xffabc.", "bad pickle"),
        (b"\x80\2h\7.", "bad pickle"),
        (b"\x80\2u.", "bad pickle"),
        (b"\x80\2.", "bad pickle"),
        (b"\x80\2}", "bad pickle"),
        (b"\x80\2\x82\1.", "pickle does EXT1"),
        (b"\x80\2}(]K\1u.", "keys that are neither"),
        (b"\x80\2K\1}b.", "fills a int like a dict"),
        (b"\x80\2ctorch\nSize\n)R.", "calls .*Size.* as torch never does"),
        (b"\x80\2ctorch\nhub.load\n)R.", r"pickle calls torch\.hub\.load"),
        (b"\x80\2ctorch\nSize\n}b.", "fills a Global like a dict"),
        (b"\x80\2X\7\0\0\0storageQ.", "refers to something that is no storage"),
        (b"\x80\2K\1.", "no dict of tensors"),
    ],
)
def test_odd_pickles_are_refused_at_little_cost(tmp_path, content, why):
    path = torch_zip(tmp_path / "m.pt", content)
    with at_most(5 * 2**20):
        if why is None:
            assert layout(path) == {}
        else:
            with pytest.raises(RefusedError, match=why):
                layout(path)


def test_a_pickle_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(RefusedError, match="more than 1,000 steps"):
        layout(torch_zip(tmp_path / "m.pt", b"\x80\2" + b"N" * 2000 + b"."))
    monkeypatch.setattr(pickles, "MAX_HEADER", 1000)
    (tmp_path / "raw.pt").write_bytes(b"\x80\2c" + b"a" * 10**6)
    with pytest.raises(RefusedError, match="more than 1,000 bytes"):
        layout(tmp_path / "raw.pt")


def test_tensors_that_reach_out_of_their_storage_are_refused(tmp_path):
    whole = torch.arange(200.0)
    torch.save({"w": whole[:100]}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old:
        content = old.read("m/data.pkl")
    assert content.count(b"Kd\x85") == 1
    rewrite(tmp_path / "m.pt", **{"data.pkl": content.replace(b"Kd\x85", b"K\xc9\x85")})
    with pytest.raises(
        RefusedError, match=r"shape \(201,\), stride \(1,\) and offset 0 does not fit into its storage of 800"
    ):
        layout(tmp_path / "m.pt")


@pytest.mark.parametrize("record", [None, b"", b"1234567", b"123456789"])
def test_a_storage_without_its_bytes_is_refused(tmp_path, record):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", data__0=record)
    with pytest.raises(RefusedError, match=r"storage data/0 has \w+ bytes instead of 8"):
        layout(tmp_path / "m.pt")


def test_legacy_files_are_read_to_their_last_byte_and_no_further(tmp_path):
    torch.save({"w": torch.ones(9)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "m.pt").read_bytes()
    for changed in [*(data[:n] for n in range(len(data))), data + b"x"]:
        (tmp_path / "m.pt").write_bytes(changed)
        with pytest.raises(RefusedError, match=r"m\.pt"):
            layout(tmp_path / "m.pt")


def safetensors(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "b begins at 4 instead of 8"),
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, "b begins at 12 instead of 8"),
        ({"a": tensor(0, 8), "b": tensor(8, 16), "c": tensor(16, 24)}, "end at 24, the file's data at 16"),
        ({"a": tensor(0, 8)}, "end at 8, the file's data at 16"),
        ({"a": tensor(0, 16)}, r"a has 16 bytes, which is not shape \(2,\) of float32"),
        ({"a": tensor(8, 0)}, "a has -8 bytes"),
        ({"a": tensor(0, 16, [-4, -1])}, "are no sizes"),
        ({"a": tensor(0, 16, [True, 4])}, "are no sizes"),
        ({"a": tensor(0, 16, [2**70])}, "are no sizes"),
        ({"a": tensor(0, 16, dtype="O")}, "a needs a known dtype"),
        ({"a": [1]}, "bad safetensors header"),
        ([], "bad safetensors header"),
        (b'{"a": 1, "a": 2}', "a name is there twice"),
        (b"[" * 100_000, "bad safetensors header"),
        (b"{\xff}", "bad safetensors header"),
    ],
)
def test_bad_safetensors_are_refused(tmp_path, header, why):
    with pytest.raises(RefusedError, match=why):
        layout(safetensors(tmp_path / "m.safetensors", header))


def test_safetensors_with_a_lie_about_the_header_are_refused(tmp_path):
    for length in (10**6, 2**63):
        with pytest.raises(RefusedError, match="its header would have"):
            layout(safetensors(tmp_path / "m.safetensors", {}, length=length))
    for data in (b"", b"PK\3\4", b"\x93NUMPY\1\0", b"hello, I am no weight file"):
        for name in ("m.pt", "m.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(RefusedError, match=name):
                layout(tmp_path / name)


def test_a_pickle_named_safetensors_is_refused(attack, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(pickle.dumps(attack))
    with pytest.raises(RefusedError, match=r"m\.safetensors"):
        layout(tmp_path / "m.safetensors")


class Saver(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "never-written")
        return x


class Reader(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("/etc/passwd", False, 4)


def scan(path: Path) -> list[str]:
    with path.open("rb") as file:
        return scan_program(path.name, file)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import segmentation_models_pytorch as smp

    folder = tmp_path_factory.mktemp("programs")
    image = torch.rand(1, 1, 32, 32)
    unet = UNet(2, 1, 1, (4, 8), (2,), num_res_units=1).eval()
    other = smp.Unet("resnet18", encoder_depth=3, decoder_channels=(8, 8, 4), encoder_weights=None, in_channels=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(unet, image).save(folder / "traced.ts")
        torch.jit.script(unet).save(folder / "scripted.ts")
        torch.jit.trace(other.eval(), image).save(folder / "smp.ts")
        for name, network in (("saver", Saver()), ("reader", Reader())):
            torch.jit.script(network).save(folder / f"{name}.ts")
        height = {2: 2 * torch.export.Dim("h", min=4, max=64)}
        torch.export.save(torch.export.export(unet, (image,), dynamic_shapes=(height,)), folder / "unet.pt2")
    return folder


@pytest.mark.parametrize("name", ["traced.ts", "scripted.ts", "smp.ts", "unet.pt2"])
def test_what_segmentation_networks_hold_passes(programs, name):
    assert scan(programs / name) == []


def test_a_layer_called_ops_passes(tmp_path):
    network = torch.nn.Sequential(OrderedDict(ops=torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(tmp_path / "x.ts")
    assert scan(tmp_path / "x.ts") == []


@pytest.mark.parametrize(("name", "operator"), [("saver.ts", "save"), ("reader.ts", "from_file")])
def test_programs_that_touch_files_are_found(programs, name, operator):
    assert any(f"uses the operator {operator}," in finding and "code/" in finding for finding in scan(programs / name))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("torch . save(x)", "operator save"),
        ("t = torch", "passes torch itself"),
        ('getattr(torch, "\\x73ave")', "passes torch itself"),
        ('getattr(ops.aten, "save")', "uses ops.aten"),
        ("ops.image.read_file(x)", "operator read_file"),
        ("ops.mylib.f(x)", "uses ops.mylib.f"),
        ("ops", "uses ops,"),
        ("__torch__.torch.classes.mylib.Thing()", "compiled library"),
        ("import os", "import os"),
        ('""" " """ torch.save(x) "', "edited by hand"),
        ("'a' + x", "edited by hand"),
        ("torch.add(x, 1) # torch", "edited by hand"),
        ("ops.prim.rpc_sync(x)", "rpc_sync"),
        ("é", "not plain ASCII"),
    ],
)
def test_hidden_operators_are_found(programs, tmp_path, line, why):
    path = tmp_path / "x.ts"
    path.write_bytes((programs / "traced.ts").read_bytes())
    rewrite(path, **{"code__more.py": f"def f(x):\n  y = {line}\n".encode()})
    assert any(why in finding for finding in scan(path)), scan(path)


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl", "traced_inputs.pkl", "code__more.py.debug_pkl"])
def test_foreign_pickles_in_a_program_are_found(attack, programs, tmp_path, member):
    path = tmp_path / "x.ts"
    path.write_bytes((programs / "traced.ts").read_bytes())
    rewrite(path, **{member: pickle.dumps(attack, 2)})
    assert any("pickle calls posix.system" in finding for finding in scan(path))


def test_phone_programs_and_machine_code_are_found(programs, tmp_path):
    path = tmp_path / "x.ts"
    path.write_bytes((programs / "traced.ts").read_bytes())
    rewrite(path, **{"bytecode.pkl": b"", "extra__lib.so": b"", "extra__other": b"\x7fELF..."})
    assert len(scan(path)) == 3


def test_nested_pickles_in_an_exported_program_are_found(attack, programs, tmp_path):
    path = tmp_path / "x.pt2"
    path.write_bytes((programs / "unet.pt2").read_bytes())
    torch.save(attack, tmp_path / "a.pt")
    rewrite(path, **{"data__sample_inputs__model.pt": (tmp_path / "a.pt").read_bytes()})
    assert any("sample_inputs/model.pt: pickle calls posix.system" in finding for finding in scan(path))
    path.write_bytes((programs / "unet.pt2").read_bytes())
    table = {"config": {"w": {"path_name": "weight_0", "use_pickle": True}}}
    config = {"data__weights__model_weights_config.json": json.dumps(table).encode()}
    rewrite(path, data__weights__weight_0=pickle.dumps(attack), data__constants__custom_obj_0=b"x", **config)
    found = "\n".join(scan(path))
    assert "weight_0: pickle calls posix.system" in found
    assert "custom_obj_0: an object of a compiled library" in found


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"target": "torch.os.system"}, "calls torch.os.system"),
        ({"target": "torch.ops.aten.save.default"}, "calls torch.ops.aten.save"),
        ({"target": "_operator.methodcaller"}, "calls _operator.methodcaller"),
        ({"target": ["x"]}, "no operator"),
        ({"expr_str": "__import__('os').system('true')"}, "evaluates"),
        ({"expr_str": "Symbol('eval') + eval(s0)"}, "evaluates"),
        ({"range_constraints": {"open(s0)": {}}}, "evaluates"),
        ({"guards_code": ["L['x'].size()[2] >= 8", "exit(1)"]}, "evaluates 'exit"),
        ({"in_spec": '[1, {"context": "k\\"); exit("}]'}, "names an argument"),
    ],
)
def test_calls_and_formulas_of_an_exported_program_are_checked(programs, tmp_path, changed, why):
    path = tmp_path / "x.pt2"
    path.write_bytes((programs / "unet.pt2").read_bytes())
    rewrite(path, **{"models__model.json": json.dumps({"graph": [changed]}).encode()})
    found = scan(path)
    assert len(found) == 1
    assert why in found[0]


def onnx(location: bytes = b"weights.bin", rest: bytes = b"") -> bytes:
    item = b"\x0a\x08location\x12" + bytes([len(location)]) + location
    item = b"\x6a" + bytes([len(item)]) + item
    return b"\x08\x0a" + b"\x3a" + bytes([len(item)]) + item + rest


def test_onnx_files_may_name_weights_beside_them_only(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx())
    assert scan(path) == []
    for location in (b"/etc/passwd", b"../../secret", b"C:\\x", b"\\\\host\\x"):
        path.write_bytes(onnx(location))
        assert ["outside of the bundle" in finding for finding in scan(path)] == [True]
    for data in (onnx()[:-1], onnx(rest=b"\xff" * 20), b"hello", pickle.dumps({})):
        path.write_bytes(data)
        assert "no ONNX file" in scan(path)[0]
    (tmp_path / "m.ts").write_bytes(b"hello")
    assert scan(tmp_path / "m.ts") == ["m.ts: neither TorchScript, torch.export nor ONNX"]


def test_pickled_objects_are_found_in_other_files(attack, tmp_path):
    def wrong(name: str, data: bytes) -> str | None:
        return has_pickled_objects(name, io.BytesIO(data))

    def saved(save: object, *arrays: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        save(buffer, *arrays)
        return buffer.getvalue()

    objects, fields = np.array([attack], dtype=object), np.zeros(1, dtype=[("a", "f4"), ("b", "O")])
    for array in (objects, fields):
        assert "array of Python objects" in wrong("a.npy", saved(np.save, array))
        assert "arr_1.npy: a NumPy array of Python objects" in wrong("a.npz", saved(np.savez, np.ones(2), array))
        hidden = saved(np.save, array).replace(b"'|O',", b"'\\x4f',").replace(b"'|O')", b"'\\x4f')")
        assert "array of Python objects" in wrong("a.npy", hidden)
    assert "bad header" in wrong("a.npy", saved(np.save, np.ones(2)).replace(b"descr", b"other"))
    for plain in (np.ones(2), np.array(["a"]), np.zeros(1, dtype=[("O", "f4"), ("b", "i2", (2, 2)), ("t", "M8[s]")])):
        assert wrong("a.npy", saved(np.save, plain)) is None
    assert wrong("a.npz", saved(np.savez_compressed, np.ones(2), np.zeros(3))) is None
    assert "cannot be checked" in wrong("a.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff{")
    assert "a pickle" in wrong("scaler.joblib", b"anything")
    for protocol in range(6):
        assert "a pickle" in wrong("notes.txt", pickle.dumps(attack, protocol))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b".",
        b"cat\ndog\nbird\n",
        b"0.5 0.25\n",
        b"{}",
        b"# Title\n",
        b"import os\n",
        b"\x89PNG\r\n\x1a\n",
        b"\x1f\x8b\x08\0",
    ],
)
def test_ordinary_files_are_no_pickles(text):
    assert not looks_like_pickle(text)
    assert has_pickled_objects("file", io.BytesIO(text)) is None
