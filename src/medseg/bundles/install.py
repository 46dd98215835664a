"""Installing a bundle: fetched into a private folder, checked there, then put in place whole or not at all.

Nothing of the bundle runs here. What is checked is what is installed: a copy that nobody else can reach in between.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medseg import __version__
from medseg.bundles.archive import SUMS, RefusedError, extract, open_bundle
from medseg.bundles.download import download, shown
from medseg.bundles.verify import Report, verify
from medseg.interruption import ended_by_signals
from medseg.io.files import file_sha256, write_atomically
from medseg.tracking.store import without_credentials

SHOWN_FINDINGS = 10

#: The first sign is none of ``.`` and ``-``: neither ``..`` nor a hidden folder nor an option is a name.
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
HUB_SOURCE = re.compile(rf"hf:(?P<repo>{NAME}/(?P<name>{NAME}))|zoo:(?P<zoo>{NAME})")

__all__ = ["Installed", "install"]


@dataclass(frozen=True)
class Installed:
    """A bundle in its place.

    Attributes:
        path: its folder.
        name: name of the bundle and of the folder.
        version: version from its metadata.
        origin: where it was fetched from, without credentials.
        sha256: of the zip, or of the checksum list if it came as a folder.
        verdict: ``trusted`` or ``untrusted``.
        already: whether the same content was there before, so that nothing was changed.
    """

    path: Path
    name: str
    version: str
    origin: str
    sha256: str
    verdict: str
    already: bool = False


def install(
    source: str,
    into: Path,
    *,
    allow_untrusted: bool = False,
    trusted_key: Path | None = None,
    version: str | None = None,
) -> Installed:
    """Check a bundle and put it into ``into/NAME``, with its origin and hash in ``into/NAME.origin.json``.

    Args:
        source: zip file, bundle folder, http(s) address of a zip, ``hf:OWNER/NAME`` (Hugging Face hub) or ``zoo:NAME``
            (MONAI's model zoo). Only the last three reach the network.
        into: folder of installed bundles; made if it is missing.
        allow_untrusted: install a bundle whose check found nothing forbidden, but code that can do anything.
        trusted_key: public key that has to have signed the zip; ``FILE.sig`` is then fetched from beside it.
        version: version to fetch from the hub or the zoo, the latest by default; of a file, the one it has to be.

    Returns:
        Where it is; ``already`` if the very same content was there before.

    Raises:
        RefusedError: if the check says so, or the bundle is untrusted and that is not allowed; nothing of it is kept.
        FileExistsError: if something else is in the place, or another version of the bundle.
        FileNotFoundError: if there is no such file or folder.
        ConnectionError: if the download fails; the message names the source.
        ValueError: if the source is not understood, or is another version.
    """
    into = into.resolve()
    with ended_by_signals(), _workshop(into) as workshop:
        fetched, origin = _fetch(source, workshop, trusted_key is not None, version)
        report = _checked(fetched, origin, trusted_key, allow_untrusted)
        if version is not None and not HUB_SOURCE.fullmatch(source) and report.version != version:
            raise ValueError(
                f"{origin} is version {report.version}, not {version}; leave the version out to install it"
            )
        unpacked = fetched if fetched.is_dir() else _unpack(fetched, workshop / "unpacked" / report.name)
        target = into / report.name
        there = os.path.lexists(target)
        if there:
            _require_same(unpacked, target, report.version)
        else:
            _place(unpacked, target, _record(report, origin))
    return Installed(target, report.name, report.version, origin, report.sha256, report.verdict, there)


@contextmanager
def _workshop(into: Path) -> Iterator[Path]:
    """A private folder inside ``into``, so that moving out of it is one rename; it is gone afterwards."""
    missing = [folder for folder in (into, *into.parents) if not folder.exists()]
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".medseg-install-", dir=into) as folder:
            yield Path(folder)
    finally:
        for made in missing:
            with suppress(OSError):  # not empty: something was installed
                made.rmdir()


def _fetch(source: str, workshop: Path, with_signature: bool, version: str | None) -> tuple[Path, str]:
    """A private copy of the zip or folder, and its origin in words."""
    folder = workshop / "fetched"
    folder.mkdir()
    if source.startswith(("hf:", "zoo:")):
        if with_signature:
            raise ValueError(
                f"{source} comes as a folder, but a signature is over the zip: install the zip from its address, or "
                "leave the key out"
            )
        return _from_hub(source, folder, version), f"{source}@{version}" if version else source
    if "://" in source:
        return download(source, folder, with_signature), shown(source)
    path = Path(source).resolve()
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; give a bundle's zip or folder, an http(s) address, hf:OWNER/NAME or "
            "zoo:NAME"
        )
    return _copy(path, folder), str(path)


def _copy(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    if path.is_dir():
        if folder.is_relative_to(path):
            raise ValueError(f"{path} would be installed into itself; give a folder outside of it as --into")
        _unpack(path, copy)
        _clear(copy)
        return copy
    for name in (path.name, f"{path.name}.sig"):
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / name)
    return copy


def _unpack(source: Path, target: Path) -> Path:
    with open_bundle(source) as files:
        extract(files, target)
    return target


def _clear(folder: Path) -> None:
    """Remove what Python, git and the hub leave in a folder: it is no part of the bundle, and no checksum knows it."""
    for leftover in [folder / ".git", folder / ".cache" / "huggingface", *folder.rglob("__pycache__")]:
        shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):  # absent, or something else is in it
        (folder / ".cache").rmdir()
    (folder / ".gitattributes").unlink(missing_ok=True)
    if _is_hub_card(folder):
        (folder / "README.md").unlink()


def _is_hub_card(folder: Path) -> bool:
    """Whether ``README.md`` is what ``push_to_hf_hub`` makes of ``docs/README.md``: the same text below a header."""
    try:
        known = [line[66:] for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
        header, _, text = (folder / "README.md").read_text(encoding="utf-8").partition("\n---\n")
        card = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return "README.md" not in known and header.startswith("---\n") and text == card


def _checked(path: Path, origin: str, trusted_key: Path | None, allow_untrusted: bool) -> Report:
    report = verify(path, trusted_key)
    if report.verdict == "trusted" or (report.verdict == "untrusted" and allow_untrusted):
        if not re.fullmatch(NAME, report.name):
            raise RefusedError(
                f"{origin} is called {report.name!r}; a bundle's name has letters, digits, _, - and . only"
            )
        return report
    lines = [f"{f.place}: {f.message}" for f in report.findings if f.level == report.verdict]
    if len(lines) > SHOWN_FINDINGS:
        lines[SHOWN_FINDINGS:] = [f"and {len(lines) - SHOWN_FINDINGS} more; `medseg verify` shows all"]
    advice = "nothing was installed; ask its author for a bundle without them, --allow-untrusted does not help"
    if report.verdict == "untrusted":
        advice = (
            "nothing was installed; unpacking it runs nothing, but running it would run this: read it, and if you "
            "trust its author, give --allow-untrusted"
        )
    raise RefusedError("\n  ".join([f"{origin} is {report.verdict}:", *lines]) + f"\n{advice}")


def _require_same(new: Path, target: Path, version: str) -> None:
    """Raise ``FileExistsError`` unless ``target`` holds the very files of ``new``."""
    way_out = "move it away or delete it, or give another --into"
    try:
        metadata = json.loads((target / "configs" / "metadata.json").read_bytes())
        installed = str(metadata["version"])
    except (OSError, ValueError, LookupError, TypeError):
        raise FileExistsError(f"{target} is in the way and is not an installed bundle; {way_out}") from None
    if installed != version:
        raise FileExistsError(f"{target} is there in version {installed}, this is {version}; {way_out}")
    ours, theirs = _hashes(new), _hashes(target)
    differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise FileExistsError(f"{target} is there in version {version} too, but differs in {shown}; {way_out}")


def _hashes(folder: Path) -> dict[str, str]:
    """Hash per file, without the caches that Python leaves when an installed bundle runs."""
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.relative_to(folder).parts)
    return {f.relative_to(folder).as_posix(): file_sha256(f) for f in files}


def _record(report: Report, origin: str) -> dict[str, Any]:
    return {
        "name": report.name, "version": report.version, "origin": origin, "sha256": report.sha256,
        "verdict": report.verdict, "signed_by": report.signed_by,
        "installed": datetime.now(UTC).isoformat(timespec="seconds"), "medseg_version": __version__,
    }  # fmt: skip


def _place(unpacked: Path, target: Path, record: dict[str, Any]) -> None:
    note = target.with_name(f"{target.name}.origin.json")
    if os.path.lexists(note):
        # A record that outlived its bundle is replaced, somebody else's file is not.
        try:
            ours = json.loads(note.read_bytes())["name"] == record["name"]
        except (OSError, ValueError, LookupError, TypeError):
            ours = False
        if not ours:
            raise FileExistsError(f"{note} is in the way and no record of an installation; move it away")
    try:
        unpacked.rename(target)
        write_atomically(note, (json.dumps(record, indent=1) + "\n").encode())
    except BaseException:
        # Only our own rename can have moved it, so what is taken back is ours; a bundle without a record is half done.
        if not unpacked.exists():
            target.rename(unpacked)
            note.unlink(missing_ok=True)
        raise


def _from_hub(source: str, folder: Path, version: str | None) -> Path:
    """MONAI's own download, without what the hub's client and git leave in the folder."""
    match = HUB_SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"{source} is not understood; write hf:OWNER/NAME or zoo:NAME")
    # The variables that huggingface_hub reads; said before MONAI's import takes its seconds.
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise ConnectionError(f"{source} cannot be downloaded: {variable} is set; unset it to allow downloads")
    from monai import bundle as monai_bundle

    logging.getLogger("monai.bundle.scripts").setLevel(logging.WARNING)  # it lists its arguments
    name = match["name"] or match["zoo"]
    where = {"source": "huggingface_hub", "repo": match["repo"]} if match["repo"] else {"source": "monaihosting"}
    try:
        monai_bundle.download(name=name, bundle_dir=folder, version=version, progress=False, **where)
    except Exception as error:  # urllib, requests, httpx, the hub, MONAI: no common type
        text = without_credentials(" ".join(str(error).split()))[:300] or type(error).__name__
        wanted = f"version {version} of {source}" if version else source
        raise ConnectionError(f"{wanted} was not downloaded; check name, version and network: {text}") from error
    bundle = folder / name
    if not bundle.is_dir():
        raise ConnectionError(f"{source} was not downloaded: the answer holds no folder {name}; tell its author")
    _clear(bundle)
    return bundle
