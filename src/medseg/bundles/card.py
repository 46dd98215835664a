"""The model card: written from the metadata and what is known of the weights, never by hand; shown as HTML."""

from __future__ import annotations

import base64
import html
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as installed
from pathlib import Path
from typing import Any

from medseg.bundles.archive import open_bundle
from medseg.bundles.catalog import find_bundle, repository_root
from medseg.bundles.release import OVERLAYS, Release, read_release
from medseg.io.files import write_atomically

#: What to show of the provenance, and how to call it.
SHOWN = {
    "run_id": "MLflow run", "experiment": "experiment", "run_name": "run", "tags": "configuration", "seed": "seed",
    "git_commit": "commit of medseg", "config_sha256": "SHA-256 of the training config",
    "datalist_sha256": "SHA-256 of the data", "packages": "packages", "device": "device",
}  # fmt: skip

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}

#: A picture in a card is a preview.
MAX_PICTURE = 5 * 2**20

__all__ = ["card_html", "card_markdown", "write_card"]


def card_markdown(
    readme: str,
    metadata: Mapping[str, Any],
    release: Release | None,
    files: Sequence[tuple[str, str]] = (),
    remarks: Sequence[str] = (),
    brings: str = "",
) -> str:
    """The card as Markdown.

    Args:
        readme: the bundle's hand-written ``docs/README.md``.
        metadata: content of ``metadata.json``.
        release: the weights; ``None`` for a bundle without.
        files: files of a packed bundle and what they are; empty for one in source form.
        remarks: what else has to be known of a packed bundle.
        brings: what the bundle brings of its network, in a sentence.
    """
    from jinja2 import Environment

    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    requirements = " ".join(f"{k}=={v}" for k, v in metadata["required_packages_version"].items() if k != "medseg")
    text: str = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(template).render(
        readme=readme.strip(),
        metadata=metadata,
        scores=list(_scores(release.metrics)) if release else [],
        overlays=[p.name for p in release.overlays] if release else [],
        simulated="simulated" in str(metadata.get("data_source", "")),
        packed=bool(files),
        trains=any(file == "configs/train.json" for file, _ in files),
        python=".".join(platform.python_version_tuple()[:2]),
        requirements=requirements,
        medseg=installed.version("medseg"),
        files=files,
        remarks=remarks,
        brings=brings,
        provenance=list(_provenance(release.provenance)) if release else [],
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" if release else readme.strip() + "\n"


def write_card(name: str, out: Path | None = None) -> Path:
    """Write the card of a bundle as one HTML page.

    Args:
        name: task of this checkout, folder of a bundle, or packed zip.
        out: file to write; ``NAME_card.html`` in the working directory by default.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: if there is no such bundle.
        ValueError: if it has no card, or its zip must not be opened.
    """
    path = Path(name)
    if not path.exists() and name.isidentifier():
        title, text, pictures = _of_source(name)
        page = card_html(text, title, lambda file: pictures[file].read_bytes() if file in pictures else None)
    else:
        with open_bundle(path) as bundle:
            title, names = bundle.name, set(bundle.names())
            file = next((f for f in ("docs/README.md", "README.md") if f in names), None)
            if file is None:
                raise ValueError(f"{path} has no model card docs/README.md")
            folder = "docs/" if file.startswith("docs/") else ""

            def look_up(picture: str) -> bytes | None:
                inside = _inside(folder + picture)
                return bundle.read_bytes(inside, MAX_PICTURE) if inside in names else None

            page = card_html(bundle.read_bytes(file).decode("utf-8"), title, look_up)
    target = out or Path(f"{title}_card.html")
    write_atomically(target, page.encode())
    return target


def card_html(text: str, title: str, look_up: Callable[[str], bytes | None]) -> str:
    """A card as one HTML page that needs nothing outside itself.

    HTML in the text is shown, not used, and pictures come from the bundle only: the card may be a stranger's.

    Args:
        text: the card in Markdown.
        title: title of the page, if the card has none.
        look_up: gives a picture's content by the name that the card has for it.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt

    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a hub's front matter
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def picture(match: re.Match[str]) -> str:
        kind = MIME.get(Path(match[1]).suffix.lower())
        content = look_up(match[1]) if kind else None
        if content is None:
            return ' title="not in the bundle"'
        return f' src="data:{kind};base64,{base64.b64encode(content).decode()}"'

    body = re.sub(r' src="([^"]*)"', picture, body)
    heading = next(iter(re.findall(r"^# (.+)$", text, re.MULTILINE)), title)
    template = Path(__file__).with_name("card.html.j2").read_text(encoding="utf-8")
    page: str = Environment(autoescape=False).from_string(template).render(title=html.escape(heading), body=body)
    return page


def _of_source(name: str) -> tuple[str, str, dict[str, Path]]:
    """Name, card and pictures of a bundle of this checkout, with what was promoted into it."""
    root = repository_root()
    bundle = find_bundle(name, root)
    weights = bundle.path / "models" / "model.pt"
    release = read_release(weights, bundle, root, f"bundles/{name}") if weights.is_file() else None
    readme = (bundle.path / "docs" / "README.md").read_text(encoding="utf-8")
    text = card_markdown(readme, bundle.metadata, release)
    return name, text, {f"{OVERLAYS}/{p.name}": p for p in (release.overlays if release else [])}


def _inside(name: str) -> str:
    """A relative path without its dots."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for part, scores in metrics.items():
        for name, value in scores.items():
            numbers = ["" if value.get(k) is None else f"{value[k]:.4f}" for k in ("mean", "sd")]
            rows.append((part, name, *numbers, str(value.get("n", ""))))
    return [(a, b, c, d, e) for a, b, c, d, e in rows]


def _provenance(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, title in SHOWN.items():
        value = known.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value not in (None, ""):
            rows.append((title, str(value).replace("|", "\\|")))
    return rows
