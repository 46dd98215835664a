"""``medseg verify``: look into a bundle from a stranger. Nothing of it is run, imported or unpickled."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medseg.bundles.archive import SUMS, BundleFiles, RefusedError, copy_texts, open_bundle
from medseg.bundles.check import schema_problems
from medseg.bundles.config_check import cycles, missing_references
from medseg.bundles.configs import MAX_DEPTH, SUFFIXES, Config, lay_over, parse_config, walk
from medseg.bundles.macros import resolve_macros
from medseg.bundles.pickles import has_pickled_objects
from medseg.bundles.programs import scan_program
from medseg.bundles.trust import Use, judge_configs, judge_logging
from medseg.bundles.weights import Layout, read_layout, tensor_digests
from medseg.io.files import file_sha256

LAYOUT = "models/network_layout.json"

#: Files of tensors, programs for a runtime of their own, and what else a bundle may hold.
WEIGHTS = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}
PROGRAMS = {".ts", ".pt2", ".onnx"}
DATA = {
    "", ".json", ".yaml", ".yml", ".conf", ".md", ".txt", ".csv", ".tsv", ".cff", ".bib", ".png", ".jpg", ".jpeg",
    ".gif", ".tif", ".tiff", ".bmp", ".nii", ".gz", ".nrrd", ".mha", ".mhd", ".dcm", ".mrc", ".npy", ".npz", ".sig",
    ".pdf",
}  # fmt: skip

#: Files without a suffix that have a meaning, and hidden ones that the hub adds.
PLAIN_NAMES = {"LICENSE", "NOTICE", "README", "CITATION", "VERSION", SUMS, ".gitattributes", ".gitignore"}

#: A config of the zoo has some 20 kB; the largest data lists that are packed with one have less than this.
MAX_CONFIG = 2**20
MAX_KEY = 200

_PLAIN_PATH = re.compile(r"\+?\w+((::|#)\w+)*")
_PLAIN_MACRO = re.compile(r"%[\w./-]+((::|#)[\w-]+)*")

__all__ = ["Finding", "Report", "verify"]


@dataclass(frozen=True)
class Finding:
    """Something to know of a bundle.

    Attributes:
        level: ``refused``: it is damaged or does harm; ``untrusted``: it would run what is not known to be harmless;
            ``note``: worth knowing.
        place: file, and key in it.
        message: what it is.
    """

    level: str
    place: str
    message: str


@dataclass
class Report:
    """What :func:`verify` found.

    Attributes:
        path: the bundle.
        name: its name.
        version: from its metadata; empty if there is none.
        sha256: of the zip; of a folder, of the list of its files' hashes.
        signed_by: fingerprint of the key whose signature was checked.
        files: number of files.
        checked: what was looked at, in words.
        findings: what was found.
        uses: every target, expression and import of the configs, each with its reason not to be trusted, if any.
    """

    path: Path
    name: str = ""
    version: str = ""
    sha256: str = ""
    signed_by: str | None = None
    files: int = 0
    checked: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``trusted``, ``untrusted`` or ``refused``."""
        levels = {f.level for f in self.findings}
        return next((v for v in ("refused", "untrusted") if v in levels), "trusted")

    def add(self, level: str, place: str, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, place, message))

    def table(self, everything: bool = False) -> str:
        """The report for people.

        Args:
            everything: list what is trusted as well.
        """
        lines = [f"{self.name or self.path.name} {self.version}".rstrip(), f"  {'sha256':<12}{self.sha256}"]
        lines += [f"  {what:<12}{result}" for what, result in self.checked.items()]
        lines += [f"  {f.level.upper():<10}  {f.place}: {f.message}" for f in self._sorted()]
        if everything:
            for use in self.uses:
                lines.append(f"  {'-' if use.reason else '+'} {use.kind:<10} {use.file}: {use.key}: {use.text}")
        meaning = {
            "trusted": "nothing in it is outside of what is known to be harmless",
            "untrusted": "it would run what is not known to be harmless: read the places above before you run it",
            "refused": "it is damaged or does harm: do not use it",
        }
        return "\n".join([*lines, f"verdict: {self.verdict} ({meaning[self.verdict]})"])

    def to_json(self) -> str:
        """The report for machines."""
        content = {**asdict(self), "path": str(self.path), "verdict": self.verdict}
        return json.dumps(content, indent=1)

    def _sorted(self) -> Iterable[Finding]:
        order = {"refused": 0, "untrusted": 1, "note": 2}
        return sorted(self.findings, key=lambda f: order[f.level])


def verify(path: Path, trusted_key: Path | None = None) -> Report:
    """Check a packed or unpacked bundle without running anything of it.

    Args:
        path: zip or folder.
        trusted_key: public Ed25519 key (PEM or OpenSSH) whose signature ``PATH.sig`` the zip must have.

    Returns:
        The report. Whatever is wrong with the bundle is a finding, not an error.

    Raises:
        FileNotFoundError: if there is nothing at ``path``, or no key.
        ValueError: if the key is none.
    """
    report = Report(path)
    try:
        with open_bundle(path) as bundle:
            report.name, report.files = bundle.name, len(bundle.names())
            for look_at in (_check_files, _check_sums, _check_metadata, _check_configs, _check_weights):
                try:
                    look_at(bundle, report)
                except RefusedError:
                    raise
                except Exception as error:  # a file made to break its reader: whatever it is, it is not to be used
                    what = f"{type(error).__name__}: {str(error)[:200]}"
                    report.add("refused", path.name, f"something in it cannot be read ({what})")
    except RefusedError as error:
        report.add("refused", path.name, str(error).removeprefix(f"{path}: "))
        report.sha256 = report.sha256 or (file_sha256(path) if path.is_file() else "")
    if trusted_key is not None:
        _check_signature(path, trusted_key, report)
    return report


def _check_signature(path: Path, key: Path, report: Report) -> None:
    from medseg.bundles.signature import verify_signature

    file = path.with_name(f"{path.name}.sig")
    if not path.is_file():
        report.add("refused", path.name, "a signature is over the zip, and this is a folder; verify the zip")
    elif not file.is_file():
        report.add("refused", path.name, f"is not signed: {file.name} is missing")
    else:
        try:
            report.signed_by = verify_signature(report.sha256, file.read_bytes(), key)
            report.checked["signature"] = f"good, by {report.signed_by}"
        except RefusedError as error:
            report.add("refused", file.name, str(error))


def _check_files(bundle: BundleFiles, report: Report) -> None:
    """Kinds of files, and pickles in any of them."""
    names = bundle.names()
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts) and name not in PLAIN_NAMES
        if hidden or (not suffix and PurePosixPath(name).name not in PLAIN_NAMES):
            report.add("refused", name, "a bundle has no use for a hidden file, or one without a known name")
        elif suffix == ".py":
            report.add("untrusted", name, "Python code, which a config can name and run")
        elif suffix not in WEIGHTS | PROGRAMS | DATA:
            report.add("refused", name, f"a bundle has no use for a {suffix} file")
        if suffix not in WEIGHTS | PROGRAMS:
            with bundle.open(name) as file:
                pickled = has_pickled_objects(name, file)
                file.seek(257)
                if file.read(5) == b"ustar":  # torch.load reads pickles out of a tar of any name
                    report.add("refused", name, "is a tar archive")
                file.seek(0)
                is_array = suffix != ".npy" or file.read(6) == b"\x93NUMPY"
            if pickled:
                report.add("refused", name, pickled.removeprefix(f"{name}: "))
            elif not is_array:
                report.add("refused", name, "is no array of NumPy, which would then be unpickled")
    if "configs/metadata.json" not in names:
        report.add("refused", "configs/metadata.json", "is missing, so this is no MONAI bundle")
    report.checked["files"] = f"{len(names)}, of expected kinds" if not report.findings else f"{len(names)}"


def _check_sums(bundle: BundleFiles, report: Report) -> None:
    """Compare every file with ``SHA256SUMS``."""
    sums = {name: bundle.sha256(name) for name in bundle.names()}
    report.sha256 = file_sha256(bundle.path) if bundle.path.is_file() else _folder_sha256(sums)
    if SUMS not in sums:
        report.add("note", SUMS, "there is none, so nothing says whether the files are those that were published")
        return
    expected = {}
    for line in bundle.read_bytes(SUMS).decode("utf-8", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            report.add("refused", SUMS, f"{line[:80]!r} is no line of sha256sum")
        else:
            expected[match[2]] = match[1]
    wrong = [n for n in expected if n in sums and sums[n] != expected[n]]
    for name in wrong:
        report.add("refused", name, f"has changed: its SHA-256 is {sums[name][:12]}..., not {expected[name][:12]}...")
    for name in sorted(set(expected) - set(sums)):
        report.add("refused", name, f"is missing, though {SUMS} has it")
    for name in sorted(set(sums) - set(expected) - {SUMS}):
        report.add("refused", name, f"is not in {SUMS}: it was added later (results belong outside: --output_dir)")
    report.checked["checksums"] = f"{len(expected) - len(wrong)} of {len(expected)} agree with {SUMS}"


def _folder_sha256(sums: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()).hexdigest()


def _check_metadata(bundle: BundleFiles, report: Report) -> None:
    name = "configs/metadata.json"
    if name not in bundle.names():
        return
    try:
        metadata = parse_config(bundle.read_bytes(name).decode("utf-8"), name)
    except ValueError as error:
        report.add("refused", name, str(error).removeprefix(f"{name}: "))
        return
    report.version = str(metadata.get("version", ""))
    problems = schema_problems(metadata, "monai")
    for key, message in problems:
        report.add("refused", f"{name}: {key}" if key else name, message)
    changelog = metadata.get("changelog", {report.version: ""})
    if isinstance(changelog, dict) and report.version not in changelog:
        report.add("note", f"{name}: changelog", f"says nothing about version {report.version}")
    report.checked["metadata"] = f"{len(problems)} problems" if problems else "keep to MONAI's schema"


def _check_configs(bundle: BundleFiles, report: Report) -> None:
    """Judge everything that the configs would run, and find what is missing in them."""
    texts = [n for n in bundle.names() if PurePosixPath(n).suffix.lower() in SUFFIXES]
    with tempfile.TemporaryDirectory(prefix="medseg-verify-") as temporary:
        root = Path(temporary, bundle.name)  # macros read files: copies of the texts, nothing else is there
        copy_texts(bundle, texts, root, MAX_CONFIG)
        configs = dict(_resolved(texts, root, report))
    metadata = configs.pop("configs/metadata.json", {})
    everything: Config = {}
    for config in configs.values():
        everything = {**everything, **config}
    # files outside of configs/ are only data, but MONAI would take any of them for a config
    judged = judge_configs(configs, metadata)
    report.uses += [u for u in judged if u.file.startswith("configs/") or u.kind != "value"]
    for name, config in configs.items():
        if name.startswith("configs/"):
            for key, message, _ in [*cycles(config), *missing_references(config, everything)]:
                report.add("refused", f"{name}: {key}", message)
    if "configs/logging.conf" in bundle.names():
        text = bundle.read_bytes("configs/logging.conf").decode("utf-8", "replace")
        report.uses += judge_logging(text, "configs/logging.conf")
    for use in report.uses:
        if use.reason:
            report.add("untrusted", f"{use.file}: {use.key}", f"{use.text[:160]}  <- {use.reason}")
    run = [u for u in report.uses if u.kind != "value"]
    good = sum(not u.reason for u in run)
    report.checked["configs"] = f"{good} of {len(run)} targets, expressions and imports are known to be harmless"


def _resolved(texts: list[str], root: Path, report: Report) -> Iterator[tuple[str, Config]]:
    for name in texts:
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if not name.startswith("configs/") and text.lstrip()[:1] == "[":  # a list of numbers, say
            text = f'{{"list": {text}}}'
        try:
            parsed = parse_config(text, name)
            odd = [(key, "a key that tools read differently") for key in _odd_keys(parsed)] or [
                (key, f"macro {value[:80]!r} is not written plainly")
                for key, value in walk(parsed)
                if isinstance(value, str) and value.startswith("%") and not _is_plain_macro(value)
            ]
            for key, message in odd:
                report.add("refused", f"{name}: {key[:80]}", message)
            if odd:  # it may be made to wear out what would look at it further
                continue
            config, lost = lay_over({}, parsed)  # a key `a::b` is laid over the rest of its own file already
            config = resolve_macros(config, root, inside=root, on_problem=_on_problem(name, report))
            yield name, {**config, **{key: parsed[key] for key, _ in lost}}
        except (ValueError, RecursionError) as error:
            message = str(error) or f"nested deeper than {MAX_DEPTH} levels"
            report.add("refused", name, message.removeprefix(f"{name}: "))


def _is_plain_macro(text: str) -> bool:
    return len(text) <= MAX_KEY and _PLAIN_MACRO.fullmatch(text) is not None


def _odd_keys(config: Config) -> Iterator[str]:
    """Keys that MONAI's ids make ambiguous: blanks around them, ``a::b`` inside, negative places, endless length."""
    todo: list[tuple[Any, bool]] = [(config, True)]
    while todo:
        value, is_top = todo.pop()
        if isinstance(value, dict):
            for key, child in value.items():
                key = str(key)
                is_path = "::" in key or "#" in key or key.startswith("+")
                plain = _PLAIN_PATH.fullmatch(key) if is_top else not is_path
                if len(key) > MAX_KEY or key != key.strip() or (is_path and not plain):
                    yield key
                todo.append((child, False))
        elif isinstance(value, list):
            todo += [(child, False) for child in value]


def _on_problem(name: str, report: Report) -> Any:
    def found(key: str, macro: str, error: Exception) -> None:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        missing = f"macro {macro} names a file that is not in the bundle"
        report.add("refused", f"{name}: {key}", missing if isinstance(error, FileNotFoundError) else message)

    return found


def _check_weights(bundle: BundleFiles, report: Report) -> None:
    """Weight files hold tensors only, agree with each other and with the layout of the network."""
    layouts: dict[str, Layout] = {}
    for name in bundle.names():
        suffix = PurePosixPath(name).suffix.lower()
        try:
            if suffix in PROGRAMS:
                with bundle.open(name) as file:
                    for finding in scan_program(name, file):
                        report.add("refused", name, finding)
            elif suffix in WEIGHTS:
                with bundle.open(name) as file:
                    layouts[name] = read_layout(name, file)
        except RefusedError as error:
            report.add("refused", name, str(error).removeprefix(f"{name}: "))
    expected = _layout(bundle, report)
    if expected is None and not layouts:
        report.add("note", "models", "there are no weights")
        return
    for name, layout in layouts.items():
        if expected is not None:
            difference = _difference(layout, expected)
            if difference:
                report.add("refused", name, f"does not fit the network: {difference}")
    if expected is None:
        report.add("note", "models", f"there is no {LAYOUT}: whether the weights fit the network shows `--run` only")
    same = _same_values(bundle, layouts, report)
    files = ", ".join(PurePosixPath(n).name for n in layouts) or "none"
    fit = " and fit the network" if expected is not None else ""
    report.checked["weights"] = f"{files}: tensors only{fit}{same}"


def _layout(bundle: BundleFiles, report: Report) -> Layout | None:
    if LAYOUT not in bundle.names():
        return None
    try:
        content = json.loads(bundle.read_bytes(LAYOUT))
        return {str(k): (str(dtype), tuple(map(int, shape))) for k, (dtype, shape) in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        report.add("refused", LAYOUT, f"is no layout of a network: {error}")
        return None


def _difference(layout: Layout, expected: Layout) -> str:
    """The first difference in words; empty if there is none."""
    for name in [*expected, *layout]:
        if layout.get(name) != expected.get(name):
            here, there = (x.get(name) for x in (layout, expected))
            words = ["absent" if x is None else f"{x[0]} {list(x[1])}" for x in (here, there)]
            return f"{name} is {words[0]} in the file and {words[1]} in the network"
    return ""


def _same_values(bundle: BundleFiles, layouts: dict[str, Layout], report: Report) -> str:
    """Whether ``model.pt`` and ``model.safetensors`` hold the same numbers: tools differ in which they load."""
    pair = [n for n in ("models/model.pt", "models/model.safetensors") if n in layouts]
    if len(pair) < 2:
        return ""
    digests = []
    for name in pair:
        with bundle.open(name) as file:
            digests.append(tensor_digests(name, file))
    different = [k for k in digests[0] if k in digests[1] and digests[0][k] != digests[1][k]]
    missing = set(layouts[pair[0]]) ^ set(layouts[pair[1]])
    if different or missing:
        first = (different or sorted(missing))[0]
        report.add("refused", pair[1], f"holds other weights than {pair[0]}: {first} differs")
        return ""
    return ", with equal values"
