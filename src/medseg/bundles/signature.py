"""Detached Ed25519 signatures over a bundle's SHA-256, which openssl can make and check without medseg."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from medseg.bundles.archive import RefusedError

SIGNATURE_BYTES = 64
#: No key file comes near this size; whatever does was named by mistake.
MAX_KEY_FILE = 64 * 2**10

__all__ = ["sign", "verify_signature"]


def sign(digest: str, key_file: Path, password: bytes | None = None) -> bytes:
    """Sign a bundle's digest.

    The signed message is ``digest`` and a line feed, so that openssl checks it, too::

        sha256sum X.zip | cut -c1-64 > d
        openssl pkeyutl -verify -pubin -inkey KEY.pub -rawin -in d -sigfile X.zip.sig

    Args:
        digest: the zip's SHA-256, 64 lower-case hexadecimal digits.
        key_file: Ed25519 private key, PEM or OpenSSH.
        password: the key's, if it is encrypted.

    Returns:
        The signature, 64 bytes.

    Raises:
        FileNotFoundError: if there is no key file.
        ValueError: if the digest is none, the file holds no Ed25519 private key, or the password is missing or wrong.
    """
    return _private_key(key_file, password).sign(_message(digest))


def verify_signature(digest: str, signature: bytes, trusted: Path) -> str:
    """Check a bundle's signature against a key that the user trusts.

    Args:
        digest: the zip's SHA-256, computed from the zip itself, 64 lower-case hexadecimal digits.
        signature: the contents of the ``.sig`` file.
        trusted: Ed25519 public key, PEM or a line ``ssh-ed25519 AAAA...``.

    Returns:
        The key's fingerprint as ``ssh-keygen -l`` prints it, ``SHA256:...``.

    Raises:
        FileNotFoundError: if there is no key file.
        ValueError: if the digest is none or ``trusted`` holds no Ed25519 public key.
        RefusedError: if the signature is not by this key over this digest.
    """
    key = _public_key(trusted)
    ssh = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    fingerprint = "SHA256:" + base64.b64encode(hashlib.sha256(base64.b64decode(ssh)).digest()).decode().rstrip("=")
    if len(signature) != SIGNATURE_BYTES:
        raise RefusedError(
            f"the signature has {len(signature)} bytes instead of {SIGNATURE_BYTES}: no raw Ed25519 signature;"
            " get the .sig file again from the author"
        )
    try:
        key.verify(signature, _message(digest))
    except InvalidSignature:
        raise RefusedError(
            f"the signature is not by {trusted} ({fingerprint}) over {digest}: the bundle was changed, or somebody"
            " else signed it; ask the author for the digest and the key"
        ) from None
    return fingerprint


def _message(digest: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{digest[:80]!r} is no SHA-256; pass 64 lower-case hexadecimal digits")
    return f"{digest}\n".encode("ascii")


def _private_key(path: Path, password: bytes | None) -> Ed25519PrivateKey:
    text = _read(path)
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in text else load_pem_private_key
    try:
        key = load(text, password)
    except TypeError as error:
        hint = "has no password; leave it out" if password else "needs its password"
        raise ValueError(f"{path}: the key {hint}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if "bcrypt" in str(error):
            raise ValueError(f"{path}: OpenSSH keys with a password need bcrypt; pip install bcrypt") from error
        if password is None and load is load_ssh_private_key and "assword" in str(error):
            raise ValueError(f"{path}: the key needs its password") from error
        reason = "wrong password or no" if password else "no"
        raise ValueError(f"{path}: {reason} {_how_to_make('private', path)}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: no {_how_to_make('private', path)}")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    text = _read(path)
    try:
        key = load_ssh_public_key(text.strip()) if text.lstrip().startswith(b"ssh-") else load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path}: no {_how_to_make('public', path)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{path}: no {_how_to_make('public', path)}")
    return key


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no key file {path}")
    with path.open("rb") as file:
        text = file.read(MAX_KEY_FILE + 1)
    if len(text) > MAX_KEY_FILE:
        raise ValueError(f"{path}: more than {MAX_KEY_FILE:,} bytes, so it is no key file; name the key")
    return text


def _how_to_make(kind: str, path: Path) -> str:
    command = (
        f"openssl genpkey -algorithm ed25519 -out {path.with_suffix('.pem').name}` or `ssh-keygen -t ed25519"
        if kind == "private"
        else f"openssl pkey -in PRIVATE_KEY -pubout -out {path.with_suffix('.pub').name}"
    )
    return f"Ed25519 {kind} key in PEM or OpenSSH form; make one with `{command}`"
