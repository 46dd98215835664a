from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fake_hub import FakeHub

from medseg import __version__
from medseg.bundles import download, signature
from medseg.bundles import install as module
from medseg.bundles.archive import RefusedError
from medseg.bundles.install import install
from medseg.bundles.verify import Finding

TENSOR = {
    "type": "image", "format": "magnitude", "num_channels": 1, "spatial_shape": ["*", "*"], "dtype": "float32",
    "value_range": [],
}  # fmt: skip
METADATA = {
    "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
    "monai_version": "1.6.0", "pytorch_version": "2.13.0", "numpy_version": "2.0.0", "required_packages_version": {},
    "task": "nothing", "description": "nothing", "authors": "nobody", "copyright": "none",
    "network_data_format": {"inputs": {"image": TENSOR}, "outputs": {"pred": TENSOR}},
}  # fmt: skip


def make_bundle(parent: Path, name: str = "tiny", version: str = "0.1.0", value: float = 1.0) -> Path:
    """The least that the check trusts."""
    folder = parent / name
    metadata = {**METADATA, "version": version, "changelog": {version: "made"}}
    header = json.dumps({"w": {"dtype": "F32", "shape": [500], "data_offsets": [0, 2000]}}).encode()
    files = {
        "configs/metadata.json": json.dumps(metadata).encode(),
        "docs/README.md": b"# Tiny\n",
        "LICENSE": b"Apache License\nVersion 2.0\n",
        "models/model.safetensors": struct.pack("<Q", len(header)) + header + struct.pack("<500f", *[value] * 500),
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in sorted(files.items())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def make_zip(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return file


def sign(digest: str, key: ed25519.Ed25519PrivateKey, folder: Path) -> bytes:
    file = folder / "key.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return signature.sign(digest, file)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Checker:
    """Says the verdict that a test is about; the real check is in the last tests, and has tests of its own."""

    def __init__(self) -> None:
        self.verdict = "trusted"
        self.name = "tiny"
        self.findings: list[Any] = []
        self.then: Callable[[], object] = lambda: None
        self.seen: list[str] = []

    def __call__(self, path: Path, trusted_key: Path | None = None) -> SimpleNamespace:
        self.seen = sorted(p.name for p in path.parent.iterdir())
        if path.is_dir():
            metadata, digest = (path / "configs/metadata.json").read_bytes(), "f" * 64
        else:
            with zipfile.ZipFile(path) as archive:
                metadata = archive.read(next(n for n in archive.namelist() if n.endswith("metadata.json")))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.then()
        return SimpleNamespace(
            verdict=self.verdict, findings=self.findings, name=self.name, version=json.loads(metadata)["version"],
            signed_by="alice" if trusted_key else None, sha256=digest,
        )  # fmt: skip


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Checker:
    checker = Checker()
    monkeypatch.setattr(module, "verify", checker)
    return checker


class Server:
    """Serves one zip in all the ways that a server can fail."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, []
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of_test: Server

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        server = self.server_of_test
        server.asked.append((self.path, self.headers.get("Authorization")))
        way = self.path.partition("?")[0].split("/")[1]
        targets = {"moved": "/good/tiny.zip", "to_file": "file:///etc/passwd", "to_ftp": "ftp://127.0.0.1/tiny.zip"}
        if way == "silent":
            server.released.wait(20)
        elif way in targets:
            self._head(302, Location=targets[way])
        elif way == "good" and not self.path.partition("?")[0].endswith(".sig"):
            self._head(200, **{"Content-Length": str(len(server.content))})
            self.wfile.write(server.content)
        elif way == "short":
            self._head(200, **{"Content-Length": str(len(server.content) + 10)})
            self.wfile.write(server.content)
        elif way == "chunked":
            self._head(200, **{"Transfer-Encoding": "chunked"})
            self.wfile.write(b"ff\r\nshort")
        elif way == "endless":
            self._head(200)
            self.wfile.write(b"x" * 5000)
        elif way == "stalled":
            self._head(200, **{"Content-Length": "5000"})
            self.wfile.write(b"x" * 10)
            self.wfile.flush()
            server.released.wait(20)
        else:
            self._head(500 if way == "broken" else 404)

    def _head(self, status: int, **headers: str) -> None:
        self.protocol_version = "HTTP/1.1" if "Transfer-Encoding" in headers else "HTTP/1.0"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(make_zip(make_bundle(tmp_path / "served"), tmp_path / "served.zip").read_bytes())
    yield server
    server.close()


def test_a_file_is_installed_with_its_record(tmp_path: Path, checker: Checker) -> None:
    folder = make_bundle(tmp_path / "made")
    file = make_zip(folder, tmp_path / "tiny-0.1.0.zip")
    (tmp_path / "tiny-0.1.0.zip.sig").write_bytes(b"signature")
    into = tmp_path / "new" / "bundles"
    done = install(str(file), into)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert done == module.Installed(into / "tiny", "tiny", "0.1.0", str(file), digest, "trusted")
    assert contents(into / "tiny") == contents(folder)
    assert checker.seen == ["tiny-0.1.0.zip", "tiny-0.1.0.zip.sig"]  # the signature lies beside what is checked
    assert sorted(p.name for p in into.iterdir()) == ["tiny", "tiny.origin.json"]
    record = json.loads((into / "tiny.origin.json").read_text())
    assert record.pop("installed").endswith("+00:00")
    assert record == {
        "name": "tiny", "version": "0.1.0", "origin": str(file), "sha256": digest, "verdict": "trusted",
        "signed_by": None, "medseg_version": __version__,
    }  # fmt: skip


def test_a_folder_is_installed_and_itself_left_alone(tmp_path: Path, checker: Checker) -> None:
    folder = make_bundle(tmp_path / "made")
    before = contents(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "evil.pyc").write_bytes(b"no check reads this")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_bytes(b"of a clone")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").touch()
    (folder / ".gitattributes").write_bytes(b"*.pt filter=lfs")
    assert contents(install(str(folder), tmp_path / "bundles").path) == before
    assert (folder / "__pycache__" / "evil.pyc").exists()


@pytest.mark.parametrize(
    ("card", "listed", "kept"),
    [
        ("---\ntags:\n- monai\n---\n# Tiny\n", False, False),
        ("---\ntags:\n- monai\n---\n# Tiny\n", True, True),
        ("---\ntags:\n- monai\n---\n# Another\n", False, True),
        ("# Tiny\n", False, True),
    ],
)
def test_only_the_hubs_copy_of_the_card_is_left_out(
    tmp_path: Path, checker: Checker, card: str, listed: bool, kept: bool
) -> None:
    folder = make_bundle(tmp_path / "made")
    (folder / "README.md").write_text(card)
    if listed:
        with (folder / "SHA256SUMS").open("a") as sums:
            sums.write(f"{hashlib.sha256(card.encode()).hexdigest()}  README.md\n")
    done = install(str(folder), tmp_path / "bundles")
    assert (done.path / "README.md").exists() == kept


def test_a_folder_with_links_is_refused(tmp_path: Path, checker: Checker) -> None:
    folder = make_bundle(tmp_path / "made")
    (folder / "models" / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError, match="models/passwords is a symbolic link"):
        install(str(folder), tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_what_was_checked_is_installed(tmp_path: Path, checker: Checker, as_zip: bool) -> None:
    folder = make_bundle(tmp_path / "made")
    good = contents(folder)
    file = make_zip(folder, tmp_path / "tiny.zip")
    evil = make_bundle(tmp_path / "evil", value=666.0)

    def swap() -> None:
        make_zip(evil, file)
        shutil.copytree(evil, folder, dirs_exist_ok=True)

    checker.then = swap
    assert contents(install(str(file if as_zip else folder), tmp_path / "bundles").path) == good


def test_installing_the_same_again_changes_nothing(tmp_path: Path, checker: Checker) -> None:
    folder = make_bundle(tmp_path / "made")
    into = tmp_path / "bundles"
    assert not install(str(make_zip(folder, tmp_path / "tiny.zip")), into).already
    (into / "tiny" / "__pycache__").mkdir()
    (into / "tiny" / "__pycache__" / "net.pyc").write_bytes(b"left by running it")
    before = contents(into)
    again = install(str(folder), into)
    assert again.already
    assert again.path == into / "tiny"
    assert contents(into) == before


def test_nothing_is_overwritten(tmp_path: Path, checker: Checker) -> None:
    into = tmp_path / "bundles"
    install(str(make_bundle(tmp_path / "a")), into)
    before = contents(into)
    with pytest.raises(FileExistsError, match=r"is there in version 0\.1\.0, this is 0\.2\.0; move it away"):
        install(str(make_bundle(tmp_path / "b", version="0.2.0")), into)
    with pytest.raises(FileExistsError, match=r"0\.1\.0 too, but differs in SHA256SUMS, models/model\.safetensors;"):
        install(str(make_bundle(tmp_path / "c", value=2.0)), into)
    assert contents(into) == before


@pytest.mark.parametrize("way", ["folder", "file", "record"])
def test_what_is_not_ours_is_not_touched(tmp_path: Path, checker: Checker, way: str) -> None:
    into = tmp_path / "bundles"
    into.mkdir()
    if way == "folder":
        (into / "tiny").mkdir()
        (into / "tiny" / "notes.txt").write_text("mine")
    else:
        (into / ("tiny" if way == "file" else "tiny.origin.json")).write_text("mine")
    before = contents(into)
    with pytest.raises(FileExistsError, match="in the way"):
        install(str(make_bundle(tmp_path / "a")), into)
    assert contents(into) == before
    assert not list(into.glob(".*"))


def test_a_record_that_outlived_its_bundle_is_replaced(tmp_path: Path, checker: Checker) -> None:
    into = tmp_path / "bundles"
    shutil.rmtree(install(str(make_bundle(tmp_path / "a")), into).path)
    install(str(make_bundle(tmp_path / "b", version="0.2.0")), into)
    assert json.loads((into / "tiny.origin.json").read_text())["version"] == "0.2.0"


def test_an_untrusted_bundle_needs_a_word(tmp_path: Path, checker: Checker) -> None:
    checker.verdict = "untrusted"
    checker.findings = [Finding("untrusted", f"train.yaml: k{i}", "runs") for i in range(13)]
    checker.findings.insert(0, Finding("note", "models", "there are no weights"))
    folder = make_bundle(tmp_path / "made")
    with pytest.raises(RefusedError) as caught:
        install(str(folder), tmp_path / "bundles")
    text = str(caught.value)
    assert "is untrusted:\n  train.yaml: k0: runs\n" in text
    assert "k9" in text
    assert "k10" not in text
    assert "and 3 more" in text
    assert "unpacking it runs nothing, but running it would" in text
    assert not (tmp_path / "bundles").exists()
    assert install(str(folder), tmp_path / "bundles", allow_untrusted=True).verdict == "untrusted"


def test_a_refused_bundle_is_never_installed(tmp_path: Path, checker: Checker) -> None:
    checker.verdict = "refused"
    checker.findings = [Finding("refused", "model.pt", "pickle")]
    with pytest.raises(RefusedError, match=r"(?s)is refused:.*pickle.*--allow-untrusted does not help"):
        install(str(make_bundle(tmp_path / "made")), tmp_path / "bundles", allow_untrusted=True)
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", ".hidden", "-rf", "a\nb"])
def test_a_name_cannot_lead_elsewhere(tmp_path: Path, checker: Checker, name: str) -> None:
    checker.name = name
    with pytest.raises(RefusedError, match="letters, digits"):
        install(str(make_bundle(tmp_path / "made")), tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("nowhere.zip", FileNotFoundError, "nowhere.zip: no such file or folder; give"),
        ("ftp://example.org/a.zip", ValueError, "http"),
        ("http://alice:sec/ret@example.org/a.zip", ValueError, "%2F"),
        ("https://example.org/", ValueError, "names no file"),
        ("hf:alice", ValueError, "hf:OWNER/NAME"),
        ("hf:alice/..", ValueError, "hf:OWNER/NAME"),
        ("zoo:../up", ValueError, "zoo:NAME"),
        ("hf:alice/tiny", ConnectionError, "HF_HUB_OFFLINE is set"),
        ("zoo:tiny", ConnectionError, "HF_HUB_OFFLINE is set"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, source: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        install(source, tmp_path / "bundles")
    assert words in str(caught.value)
    assert "sec/ret" not in str(caught.value)
    assert not (tmp_path / "bundles").exists()


def test_a_folder_from_the_hub_has_no_signature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a signature is over the zip"):
        install("hf:alice/tiny", tmp_path / "bundles", trusted_key=tmp_path / "key.pub")
    assert not (tmp_path / "bundles").exists()


def test_another_version_and_a_bundle_in_itself(tmp_path: Path, checker: Checker) -> None:
    folder = make_bundle(tmp_path / "made")
    with pytest.raises(ValueError, match=r"is version 0\.1\.0, not 0\.3\.0"):
        install(str(folder), tmp_path / "bundles", version="0.3.0")
    with pytest.raises(ValueError, match="into itself"):
        install(str(folder), folder / "installed")
    assert sorted(p.name for p in folder.iterdir()) == ["LICENSE", "SHA256SUMS", "configs", "docs", "models"]


def test_an_address_keeps_its_secrets(tmp_path: Path, checker: Checker, server: Server) -> None:
    into = tmp_path / "bundles"
    done = install(f"http://alice:p%40ss@{server.host}/good/tiny.zip?token=secret", into)
    assert done.origin == f"http://{server.host}/good/tiny.zip"
    assert server.asked == [("/good/tiny.zip?token=secret", "Basic " + base64.b64encode(b"alice:p@ss").decode())]
    assert checker.seen == ["tiny.zip"]
    assert "ss@" not in (into / "tiny.origin.json").read_text()
    assert "secret" not in (into / "tiny.origin.json").read_text()
    assert json.loads((into / "tiny.origin.json").read_text())["sha256"] == hashlib.sha256(server.content).hexdigest()


def test_a_redirect_does_not_carry_the_password_and_the_signature_is_asked_for(
    tmp_path: Path, checker: Checker, server: Server
) -> None:
    done = install(f"http://a:b@{server.host}/moved/tiny.zip", tmp_path / "bundles", trusted_key=tmp_path / "key.pub")
    assert done.origin == f"http://{server.host}/moved/tiny.zip"
    assert [path for path, _ in server.asked] == [
        "/moved/tiny.zip", "/good/tiny.zip", "/moved/tiny.zip.sig", "/good/tiny.zip"
    ]  # fmt: skip
    assert server.asked[1][1] is None


def test_a_missing_signature_is_for_the_check(tmp_path: Path, checker: Checker, server: Server) -> None:
    into = tmp_path / "bundles"
    install(f"http://{server.host}/good/tiny.zip", into, trusted_key=tmp_path / "key.pub")
    assert json.loads((into / "tiny.origin.json").read_text())["signed_by"] == "alice"
    assert [path for path, _ in server.asked] == ["/good/tiny.zip", "/good/tiny.zip.sig"]
    assert checker.seen == ["tiny.zip"]


@pytest.mark.parametrize(
    ("way", "error", "words"),
    [
        ("short", ConnectionError, "broke off after"),
        ("chunked", ConnectionError, "broke off"),
        ("missing", FileNotFoundError, "the server answers 404"),
        ("broken", ConnectionError, "the server answers 500"),
        ("silent", ConnectionError, "does not answer: timed out"),
        ("stalled", ConnectionError, "broke off: timed out"),
        ("to_file", ConnectionError, "302"),
        ("to_ftp", ConnectionError, "redirect to ftp: refused"),
        ("endless", ConnectionError, "is larger than"),
    ],
)
def test_downloads_that_fail(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, way: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.4)
    monkeypatch.setattr(download, "LIMIT_BYTES", 4900 if way == "endless" else 10**6)
    with pytest.raises(error) as caught:
        install(f"http://alice:pass@{server.host}/{way}/tiny.zip?token=secret", tmp_path / "bundles")
    assert words in str(caught.value)
    assert f"http://{server.host}/{way}/tiny.zip" in str(caught.value)
    assert "pass@" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "bundles").exists()


def test_a_size_over_the_limit_is_not_even_read(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LIMIT_BYTES", 100)
    with pytest.raises(ConnectionError, match="is larger than"):
        install(f"http://{server.host}/good/tiny.zip", tmp_path / "bundles")
    server.close()
    with pytest.raises(ConnectionError, match="does not answer"):
        install(f"http://{server.host}/good/tiny.zip", tmp_path / "bundles")


@pytest.mark.parametrize("way", ["full", "interrupted", "terminated"])
@pytest.mark.parametrize("step", ["copyfile", "extract", "write_atomically"])
def test_an_end_in_the_middle_leaves_nothing(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch, way: str, step: str
) -> None:
    def stop(*arguments: Any) -> None:
        if step == "extract":
            (arguments[1] / "configs").mkdir(parents=True)
        if way == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if way == "interrupted":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    file = make_zip(make_bundle(tmp_path / "made"), tmp_path / "tiny.zip")
    monkeypatch.setattr(shutil if step == "copyfile" else module, step, stop)
    with pytest.raises((OSError, KeyboardInterrupt, SystemExit)):
        install(str(file), tmp_path / "new" / "bundles")
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises((OSError, KeyboardInterrupt, SystemExit)):
        install(str(file), tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_then_stop(chunks: Iterator[bytes], *_: object) -> Iterator[bytes]:
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "track", one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        install(f"http://{server.host}/good/tiny.zip", tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()


def test_with_the_real_check(tmp_path: Path, server: Server) -> None:
    into = tmp_path / "bundles"
    key, public = ed25519.Ed25519PrivateKey.generate(), tmp_path / "key.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    file = make_zip(make_bundle(tmp_path / "made"), tmp_path / "tiny.zip")
    with pytest.raises(RefusedError, match=r"tiny\.zip: is not signed: tiny\.zip\.sig is missing"):
        install(str(file), into, trusted_key=public)
    (tmp_path / "tiny.zip.sig").write_bytes(sign(hashlib.sha256(file.read_bytes()).hexdigest(), key, tmp_path))
    assert install(str(file), into, trusted_key=public).verdict == "trusted"
    assert json.loads((into / "tiny.origin.json").read_text())["signed_by"].startswith("SHA256:")
    assert install(f"http://{server.host}/good/tiny.zip", into).already
    for damaged in (file.read_bytes()[:-30], b"no zip"):
        file.write_bytes(damaged)
        with pytest.raises(RefusedError, match="is refused"):
            install(str(file), tmp_path / "other")
    folder = make_bundle(tmp_path / "changed")
    (folder / "docs" / "README.md").write_text("# Another\n")
    with pytest.raises(RefusedError, match=r"docs/README\.md: has changed"):
        install(str(folder), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_local_bundles_load_no_heavy_package(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medseg.bundles.install import install\n"
        "for source in sys.argv[2:]: install(source, Path(sys.argv[1]))\n"
        "print(sorted({'requests', 'httpx2', 'huggingface_hub', 'monai', 'torch', 'numpy'} & set(sys.modules)))"
    )
    folder = make_bundle(tmp_path / "made")
    line = [sys.executable, "-c", code, tmp_path / "bundles", make_zip(folder, tmp_path / "tiny.zip"), folder]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


#: One child process for all of it: MONAI's import takes seconds, and the hub's address is read only there.
HUB_SCRIPT = """
import json, sys
from pathlib import Path
import monai.bundle
from monai.bundle import scripts
from medseg.bundles.install import install

made, into = map(Path, sys.argv[1:3])
scripts.MONAI_HOSTING_BASE_URL = sys.argv[3]
scripts.get_bundle_versions = lambda name, **_: {"latest_version": "0.1.0", "all_versions": ["0.1.0"]}
push = monai.bundle.push_to_hf_hub
results = {}

def attempt(key, source, **options):
    try:
        done = install(source, into / key, **options)
        results[key] = {"name": done.name, "version": done.version, "origin": done.origin, "already": done.already}
    except Exception as error:
        results[key] = {"error": type(error).__name__, "text": str(error)}

push("alice/tiny", "tiny", str(made / "first"), version="0.1.0", tag_as_latest_version=True)
push("MONAI/tiny", "tiny", str(made / "first"), version="0.1.0")
attempt("latest", "hf:alice/tiny")
attempt("latest", "hf:alice/tiny")
attempt("tagged", "hf:alice/tiny", version="0.1.0")
push("alice/tiny", "tiny", str(made / "second"), version="0.2.0", tag_as_latest_version=True)
attempt("newer", "hf:alice/tiny", version="0.2.0")
attempt("latest_after", "hf:alice/tiny")
attempt("no_version", "hf:alice/tiny", version="9.9.9")
attempt("no_repository", "hf:alice/nothing")
attempt("zoo", "zoo:tiny", version="0.1.0")
attempt("zoo_latest", "zoo:tiny")
attempt("zoo_nothing", "zoo:nothing", version="0.1.0")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub_round_trip(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("hub")
    first = make_bundle(root / "made" / "first")
    make_bundle(root / "made" / "second", version="0.2.0")
    before = contents(first)
    with FakeHub() as hub:
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
        environment |= hub.environment(str(root / "home"))
        line = [sys.executable, "-c", HUB_SCRIPT, root / "made", root / "into", f"{hub.endpoint}/ngc"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert "RESULTS" in done.stdout, done.stderr[-4000:]
    results = json.loads(done.stdout.rpartition("RESULTS")[2])
    return SimpleNamespace(results=results, into=root / "into", made=root / "made", before=before, hub=hub)


def test_what_monai_pushed_comes_back(hub_round_trip: SimpleNamespace) -> None:
    results, into = hub_round_trip.results, hub_round_trip.into
    assert results["latest"] == {"name": "tiny", "version": "0.1.0", "origin": "hf:alice/tiny", "already": True}
    assert results["tagged"]["origin"] == "hf:alice/tiny@0.1.0"
    assert results["newer"]["version"] == "0.2.0"
    assert results["zoo"]["origin"] == "zoo:tiny@0.1.0"
    assert results["zoo_latest"]["version"] == "0.1.0"
    for key in ("latest", "tagged", "zoo", "zoo_latest"):
        assert contents(into / key / "tiny") == hub_round_trip.before
        assert sorted(p.name for p in (into / key).iterdir()) == ["tiny", "tiny.origin.json"]


def test_what_the_hub_does_not_have(hub_round_trip: SimpleNamespace) -> None:
    results, into = hub_round_trip.results, hub_round_trip.into
    assert results["no_version"]["text"].startswith("version 9.9.9 of hf:alice/tiny was not downloaded")
    assert results["no_repository"]["text"].startswith("hf:alice/nothing was not downloaded")
    assert results["zoo_nothing"]["text"].startswith("version 0.1.0 of zoo:nothing was not downloaded")
    for key in ("no_version", "no_repository", "zoo_nothing"):
        assert results[key]["error"] == "ConnectionError"
        assert "\n" not in results[key]["text"]
        assert not (into / key).exists()


def test_what_pushing_does_to_a_bundle(hub_round_trip: SimpleNamespace) -> None:
    """MONAI's behaviour that the checksum list and the release notes have to know."""
    first = hub_round_trip.made / "first" / "tiny"
    added = contents(first)
    card = added.pop("README.md")
    assert added == hub_round_trip.before
    assert card == (
        b"---\ntags:\n- monai\n- medical\nlibrary_name: monai\nlicense: apache-2.0\n---\n"
        + hub_round_trip.before["docs/README.md"]
    )
    repository = hub_round_trip.hub.repositories["alice/tiny"]
    on_hub = repository.commits[repository.tags["0.1.0"]]
    assert set(on_hub) == {*hub_round_trip.before, "README.md", ".gitattributes"}
    # A tag that exists is not moved: latest_version stays at the first version that was pushed with it.
    assert repository.tags["latest_version"] == repository.tags["0.1.0"] != repository.tags["0.2.0"]
    assert hub_round_trip.results["latest_after"]["version"] == "0.1.0"
