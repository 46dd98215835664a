"""Fetching one file from an address by the standard library: whole, bounded, and by http and https only."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from medseg import __version__
from medseg.progress import track

#: For each answer of a server, not for the whole download.
TIMEOUT_SECONDS = 30.0
#: Ten times the largest bundle of MONAI's zoo; more is a wrong address or an attack on the disk.
LIMIT_BYTES = 20 * 2**30
CHUNK_BYTES = 2**20

__all__ = ["download", "shown"]


def _address(url: str) -> SplitResult:
    """The parts of a URL, checked."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        # Not shown: with a broken address nobody knows which part of it is a password.
        raise ValueError("the address is not http://HOST/FILE or https://HOST/FILE; a / in a password is written %2F")
    return parts


def shown(url: str) -> str:
    """An address for messages and records: passwords and the query, which often is a token, are left out."""
    return _shown(_address(url))


def _shown(parts: SplitResult) -> str:
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(url: str, folder: Path, with_signature: bool) -> Path:
    """Fetch a file, under its own name, and the signature beside it if there is one.

    Args:
        url: http or https address.
        folder: where to.
        with_signature: fetch ``URL.sig`` as well.

    Raises:
        ValueError: if the address is none, or names no file.
        FileNotFoundError: if the server has no such file.
        ConnectionError: if it does not answer, breaks off, or sends too much.
    """
    parts = _address(url)
    name = Path(unquote(parts.path)).name
    if not name or "\0" in name:
        raise ValueError(f"{_shown(parts)} names no file; give the address of the bundle's zip")
    _stream(parts, folder / name)
    if with_signature:
        # A signature that is missing is for the check to report.
        with suppress(FileNotFoundError):
            _stream(parts._replace(path=f"{parts.path}.sig"), folder / f"{name}.sig")
    return folder / name


def _stream(parts: SplitResult, file: Path) -> None:
    """Write what the address answers into a file.

    Raises:
        FileNotFoundError: if the server says 404 or 410.
        ConnectionError: if it says another error, nothing, too much or too little.
    """
    address = _shown(parts)
    with _open(parts, address) as response, file.open("wb") as out:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdigit() else None
        done = 0
        total = -(-expected // CHUNK_BYTES) if expected is not None else None
        for chunk in track(_chunks(response, address), f"downloading {file.name}", total):
            done += len(chunk)
            if max(done, expected or 0) > LIMIT_BYTES:
                raise ConnectionError(f"{address} is larger than {LIMIT_BYTES / 2**30:g} GiB; is it a bundle's zip?")
            out.write(chunk)
    if expected is not None and done != expected:
        raise ConnectionError(f"{address} broke off after {done} of {expected} bytes; try again")


def _open(parts: SplitResult, address: str) -> Any:
    query = f"?{parts.query}" if parts.query else ""
    request = Request(address + query, headers={"User-Agent": f"medseg/{__version__}"})
    user_info, at, _ = parts.netloc.rpartition("@")
    if at:
        token = base64.b64encode(unquote(user_info).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        return build_opener(_HttpOnly).open(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        kind = FileNotFoundError if error.code in (404, 410) else ConnectionError
        raise kind(f"{address}: the server answers {error.code} {error.reason}; check the address") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ConnectionError(f"{address} does not answer: {reason}; check the address and the network") from error


def _chunks(response: IO[bytes], address: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"{address} broke off: {error or type(error).__name__}; try again") from error
        if not chunk:
            return
        yield chunk


class _HttpOnly(HTTPRedirectHandler):
    """Follows redirects to web addresses only, and never from an encrypted one to a plain one."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """Refuse what urllib would follow: ftp, and http after https."""
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise HTTPError(req.full_url, code, f"redirect to {scheme}: refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
