from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medseg.bundles.archive import RefusedError
from medseg.bundles.signature import sign, verify_signature

DIGEST = hashlib.sha256(b"a bundle").hexdigest()


def write_keys(folder: Path, form: str, password: bytes | None = None, key: object = None) -> tuple[Path, Path]:
    key = key or Ed25519PrivateKey.generate()
    secret = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    private, public = folder / f"{form}.key", folder / f"{form}.pub"
    if form == "ssh":
        private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, secret))
        public.write_bytes(key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH) + b" me@here\n")
    else:
        private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, secret))
        public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.mark.parametrize("form", ["pem", "ssh"])
def test_a_signature_verifies_and_only_over_its_digest(tmp_path, form):
    private, public = write_keys(tmp_path, form)
    signature = sign(DIGEST, private)
    assert len(signature) == 64
    assert verify_signature(DIGEST, signature, public).startswith("SHA256:")
    with pytest.raises(RefusedError, match=r"the bundle was changed, or somebody"):
        verify_signature(hashlib.sha256(b"another").hexdigest(), signature, public)
    (tmp_path / "other").mkdir()
    other = write_keys(tmp_path / "other", "pem")[1]
    with pytest.raises(RefusedError, match=r"not by .*other"):
        verify_signature(DIGEST, signature, other)
    with pytest.raises(RefusedError, match="not by"):
        verify_signature(DIGEST, bytes(64), public)
    with pytest.raises(RefusedError, match="has 63 bytes instead of 64"):
        verify_signature(DIGEST, signature[:-1], public)


def test_a_key_with_a_password(tmp_path):
    private, public = write_keys(tmp_path, "pem", b"secret")
    assert verify_signature(DIGEST, sign(DIGEST, private, b"secret"), public)
    with pytest.raises(ValueError, match="needs its password"):
        sign(DIGEST, private)
    with pytest.raises(ValueError, match="wrong password"):
        sign(DIGEST, private, b"guess")


@pytest.mark.parametrize("form", ["pem", "ssh"])
def test_a_needless_password_is_named(tmp_path, form):
    private, _ = write_keys(tmp_path, form)
    with pytest.raises(ValueError, match="has no password"):
        sign(DIGEST, private, b"needless")


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen")
def test_an_openssh_key_with_a_password_signs_or_says_what_is_missing(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "id"], check=True)
    with pytest.raises(ValueError, match="needs its password"):
        sign(DIGEST, tmp_path / "id")
    try:
        import bcrypt  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install bcrypt"):
            sign(DIGEST, tmp_path / "id", b"secret")
    else:
        assert verify_signature(DIGEST, sign(DIGEST, tmp_path / "id", b"secret"), tmp_path / "id.pub")


def test_files_that_are_no_ed25519_key_are_named_with_the_command_to_make_one(tmp_path):
    private, public = write_keys(tmp_path, "pem")
    ecdsa_private, ecdsa_public = write_keys(tmp_path, "ecdsa", key=generate_private_key(SECP256R1()))
    for wrong in (public, ecdsa_private):
        with pytest.raises(ValueError, match=rf"{wrong.name}: no Ed25519 private key .*openssl genpkey"):
            sign(DIGEST, wrong)
    for wrong in (private, ecdsa_public):
        with pytest.raises(ValueError, match=rf"{wrong.name}: no Ed25519 public key .*openssl pkey"):
            verify_signature(DIGEST, bytes(64), wrong)
    (tmp_path / "big").write_bytes(bytes(2**17))
    with pytest.raises(ValueError, match="no key file"):
        verify_signature(DIGEST, bytes(64), tmp_path / "big")
    with pytest.raises(FileNotFoundError, match="missing"):
        sign(DIGEST, tmp_path / "missing")


@pytest.mark.parametrize("digest", ["", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", "z" * 64])
def test_only_a_sha256_can_be_signed(tmp_path, digest):
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        sign(digest, write_keys(tmp_path, "pem")[0])


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")
def test_openssl_makes_keys_and_checks_and_makes_signatures(tmp_path):
    def openssl(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True, check=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pub")
    (tmp_path / "X.zip").write_bytes(b"a bundle")
    subprocess.run("sha256sum X.zip | cut -c1-64 > d", shell=True, cwd=tmp_path, check=True)
    (tmp_path / "X.zip.sig").write_bytes(sign(DIGEST, tmp_path / "key.pem"))
    check = "pkeyutl -verify -pubin -inkey key.pub -rawin -in d -sigfile X.zip.sig"
    assert b"Verified Successfully" in openssl(*check.split()).stdout
    openssl("pkeyutl", "-sign", "-inkey", "key.pem", "-rawin", "-in", "d", "-out", "theirs.sig")
    assert verify_signature(DIGEST, (tmp_path / "theirs.sig").read_bytes(), tmp_path / "key.pub")


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen")
def test_ssh_keygen_makes_keys_and_prints_the_same_fingerprint(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    printed = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "id.pub"], capture_output=True, text=True).stdout
    assert verify_signature(DIGEST, sign(DIGEST, tmp_path / "id"), tmp_path / "id.pub") == printed.split()[1]
