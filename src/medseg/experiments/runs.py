"""Reading back what runs left in an MLflow store: one record per run, one table of all cases. No torch, no MONAI."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pandas as pd

from medseg.progress import track
from medseg.tracking.store import absolute_uri, connect, find_runs, local_path, tracking_uri, without_credentials
from medseg.training.run_folder import MAY_CHANGE

#: Columns of ``per_image.csv`` that are neither metrics nor fields of the data list.
CASE_COLUMNS = ("image", "empty_prediction", "empty_truth", "overlay")

#: Settings that say where, when and on which fold a run ran, not what was trained.
PER_RUN = (MAY_CHANGE - {"max_epochs"}) | {
    "fold",
    "seed",
    "experiment_name",
    "part",
    "ckpt_path",
    "network_name",
    "mode",
}

#: A top-level setting, or one value of a top-level list such as ``image_size.0``.
TOP_LEVEL = re.compile(r"[A-Za-z_]\w*(\.\d+)*")

__all__ = ["RunRecord", "Runs", "read_runs"]


@dataclass
class RunRecord:
    """One run that scored a part of a data list.

    Attributes:
        run: MLflow's run.
        configuration: what is compared; runs of one configuration differ only in fold, repeat and machine.
        cases: one row per case: ``case`` (path from the data's folder), metrics, fields; empty for a run that failed.
        calibration: (3, bins) of its pixels, or ``None``.
    """

    run: Any
    configuration: str
    cases: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibration: np.ndarray[Any, Any] | None = None

    @property
    def run_id(self) -> str:
        """MLflow's id."""
        return str(self.run.info.run_id)

    @property
    def name(self) -> str:
        """MLflow's name of the run."""
        return str(self.run.info.run_name)

    @property
    def split(self) -> tuple[str, str]:
        """Repeat and fold."""
        tags = self.run.data.tags
        return tags.get("repeat", "0"), tags.get("fold", "0")


@dataclass
class Runs:
    """What was read.

    Attributes:
        experiment: its name.
        uri: tracking URI, without credentials.
        part: the part of the data list that was scored.
        finished: runs with results, by start time.
        failed: runs that ended without results and have not been repeated since.
        notes: which runs were left out, and why.
        metrics: metric names in the bundle's order.
        modes: ``max`` or ``min`` by metric: which direction is better.
        client: MLflow's client of the store.
    """

    experiment: str
    uri: str
    part: str
    finished: list[RunRecord]
    failed: list[RunRecord]
    notes: list[str]
    metrics: list[str]
    modes: dict[str, str]
    client: Any

    @property
    def configurations(self) -> list[str]:
        """Names of the configurations, the one that was run first first."""
        return list(dict.fromkeys(r.configuration for r in self.finished))

    def cases(self) -> pd.DataFrame:
        """All cases of all runs, with ``configuration``, ``repeat`` and ``fold``."""
        frames = []
        for record in self.finished:
            repeat, fold = record.split
            frames.append(record.cases.assign(configuration=record.configuration, repeat=repeat, fold=fold))
        cases = pd.concat(frames, ignore_index=True)
        fields = cases.columns.difference(self.metrics)
        return cases.assign(**{f: cases[f].fillna("") for f in fields if cases[f].isna().any()})


def read_runs(
    experiment: str, uri: str | None = None, part: str = "test", filter_string: str = "", root: Path | None = None
) -> Runs:
    """Read the runs of an experiment that scored a part of a data list.

    Args:
        experiment: name or id.
        uri: tracking URI; ``MLFLOW_TRACKING_URI`` or the ``mlflow.db`` of the working directory by default.
        part: ``test``, ``held_out``, ``validation``, ...
        filter_string: in MLflow's language, e.g. ``tags.network = 'unet'``.
        root: folder that a relative SQLite file starts from; the working directory by default.

    Raises:
        FileNotFoundError: if the store's file does not exist.
        ConnectionError: if the store does not answer.
        ValueError: if there is no such experiment, or no finished run with results in it.
    """
    from mlflow.exceptions import MlflowException

    address = absolute_uri(uri or tracking_uri(), root or Path.cwd())
    database = local_path(address)
    if database is not None and not database.is_file():  # MLflow would make an empty one
        raise FileNotFoundError(
            f"no MLflow store at {database}; run it where your mlflow.db is, or pass --tracking-uri"
        )
    client = connect(address)
    known = client.get_experiment_by_name(experiment)
    if known is None:
        try:
            known = client.get_experiment(experiment)
        except MlflowException:
            names = ", ".join(sorted(e.name for e in client.search_experiments()))
            raise ValueError(
                f"no experiment {experiment!r} in {without_credentials(address)}; there are: {names}"
            ) from None
    known_name = str(known.name)
    runs = find_runs(client, known.experiment_id, filter_string)
    by_id = {r.info.run_id: r for r in runs}
    runs = [r for r in runs if r.data.tags.get("kind") in ("train", "evaluate")]
    scored = [r for r in runs if r.info.status == "FINISHED" and f"{part}_cases" in r.data.metrics]
    if not scored:
        raise ValueError(
            f"experiment {known.name} has no finished run with scores of the {part} part ({len(runs)} runs); "
            f"`medseg crossval` makes some, or run RUN/configs/evaluate.yaml"
        )
    labels = _configurations(runs)
    families = {labels[r.info.run_id]: _crossval(r) for r in scored}  # by start time: the newest one stays
    kept = [r for r in scored if _crossval(r) == families[labels[r.info.run_id]]]
    latest: dict[tuple[str, tuple[str, str]], RunRecord] = {}
    for run in kept:
        record = RunRecord(_with_training(run, by_id), labels[run.info.run_id])
        latest[record.configuration, record.split] = record
    finished = sorted(latest.values(), key=lambda r: (r.run.info.start_time, r.run_id))
    metrics, lacking = _metric_names(finished, part)
    _read_cases(finished, client, part, metrics, lacking)
    failed: list[RunRecord] = []
    known_splits = set(latest)
    for run in runs:
        record = RunRecord(run, labels[run.info.run_id])
        stale = record.configuration in families and _crossval(run) != families[record.configuration]
        split = (record.configuration, record.split)
        if run.info.status in ("FAILED", "KILLED") and split not in known_splits and not stale:
            failed.append(record)
            known_splits.add(split)
    notes = []
    if len(scored) > len(kept):
        notes.append(
            f"{len(scored) - len(kept)} runs of earlier cross-validations of the same configurations are left out; "
            "choose others with --filter."
        )
    if len(kept) > len(finished):
        notes.append(f"{len(kept) - len(finished)} older runs of the same configuration and fold are left out.")
    if running := sum(r.info.status == "RUNNING" for r in runs):
        notes.append(f"{running} runs have not ended yet.")
    if lacking:
        notes.append(f"Not all runs have {', '.join(lacking)}: left out.")
    modes = {m: finished[0].run.data.params.get(f"validate.metric_modes.{m}", "max") for m in metrics}
    return Runs(known_name, without_credentials(address), part, finished, failed, notes, metrics, modes, client)


def _base_name(run: Any) -> str:
    tags = run.data.tags
    network, mode = tags.get("network", ""), tags.get("mode", "")
    return str(tags.get("configuration") or "-".join(w for w in (network, mode) if w) or run.info.run_name)


def _configurations(runs: Sequence[Any]) -> dict[str, str]:
    """Network and mode of each run; settings in which runs of one name differ are added to the name.

    Children of one cross-validation have the same settings, but for paths with the fold in them: their first one
    stands for all.
    """
    by_name: dict[str, list[Any]] = {}
    for run in runs:
        by_name.setdefault(_base_name(run), []).append(run)
    names = {}
    for name, group in by_name.items():
        settings: dict[str, dict[str, str]] = {}
        for run in group:
            own = {k: v for k, v in run.data.params.items() if _distinguishes(k)}
            settings.setdefault(_crossval(run) or run.info.run_id, own)
        keys = sorted({k for own in settings.values() for k in own})
        # A run that failed early has recorded no settings: what it lacks does not differ.
        differing = [k for k in keys if len({own[k] for own in settings.values() if k in own}) > 1]
        for run in group:
            own = settings[_crossval(run) or run.info.run_id]
            names[run.info.run_id] = " ".join([name, *(f"{k}={own[k]}" for k in differing if k in own)])
    return names


def _crossval(run: Any) -> str:
    """The cross-validation that a run is a child of, or nothing."""
    return str(run.data.tags.get("mlflow.parentRunId", ""))


def _distinguishes(key: str) -> bool:
    if not TOP_LEVEL.fullmatch(key) or key.split(".")[0] in PER_RUN:
        return False
    return key.split(".")[0] not in ("parameters", "trainable_parameters", "run", "initialize", "finalize", "imports")


def _with_training(run: Any, by_id: Mapping[str, Any]) -> Any:
    """An evaluation knows the seconds of the training whose weights it scored."""
    trained = by_id.get(run.data.tags.get("training_run_id", ""))
    if trained is not None and "train_seconds" in trained.data.metrics:
        run.data.metrics["train_seconds"] = trained.data.metrics["train_seconds"]
    return run


def _metric_names(records: Sequence[RunRecord], part: str) -> tuple[list[str], list[str]]:
    """Metrics that all runs have, in the config's order, and those that only some have."""
    found = []
    for record in records:  # each has a mean and a standard deviation
        names = [
            k[len(part) + 1 : -3] for k in record.run.data.metrics if k.startswith(f"{part}_") and k.endswith("_sd")
        ]
        found.append(set(names))
    common, every = set.intersection(*found), set.union(*found)
    if not common:
        raise ValueError(f"the runs have no metric in common: {', '.join(sorted(every))}; choose runs with --filter")
    order = [k.rpartition(".")[2] for k in records[0].run.data.params if k.startswith("validate.metric_modes.")]
    ranked = sorted(common, key=lambda m: (order.index(m) if m in order else len(order), m))
    return ranked, sorted(every - common)


def _read_cases(
    records: Sequence[RunRecord], client: Any, part: str, metrics: Sequence[str], left_out: Sequence[str]
) -> None:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each of many small files
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(8) as pool:

        def read(record: RunRecord) -> None:
            fetch = _fetcher(record.run, client, Path(scratch))
            try:
                table = pd.read_csv(io.BytesIO(fetch(f"{part}/per_image.csv")), dtype=str, keep_default_na=False)
                summary = json.loads(fetch(f"{part}/metrics.json"))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"run {record.name} ({record.run_id}) has no readable {part}/per_image.csv: {error}"
                ) from error
            for metric in metrics:
                table[metric] = pd.to_numeric(table[metric], errors="coerce")
            for column in ("empty_prediction", "empty_truth"):
                table[column] = table[column] == "True"
            # Path from the data's folder: the same case has the same name on every machine.
            dataset_dir = record.run.data.params.get("dataset_dir", "")
            prefix = f"{Path(dataset_dir).resolve()}/" if dataset_dir else ""
            table["case"] = [path.removeprefix(prefix) for path in table["image"]]
            record.cases = table.drop(columns=list(left_out), errors="ignore")
            if summary.get("calibration"):
                record.calibration = np.array([summary["calibration"][k] for k in ("count", "probability", "true")])

        for _ in track(pool.map(read, records), "read runs", len(records)):
            pass


def fetch_artifact(record: RunRecord, client: Any, name: str) -> bytes:
    """The content of one artifact of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        return _fetcher(record.run, client, Path(scratch))(name)


def _fetcher(run: Any, client: Any, scratch: Path) -> Callable[[str], bytes]:
    """Artifacts of a local store are files; those of a server are fetched."""
    location = urlparse(run.info.artifact_uri)
    if location.scheme in ("", "file"):
        folder = Path(unquote(location.path))
        return lambda name: (folder / name).read_bytes()

    def fetch(name: str) -> bytes:
        from mlflow.exceptions import MlflowException

        target = scratch / run.info.run_id / PurePosixPath(name).parent
        target.mkdir(parents=True, exist_ok=True)
        try:
            return Path(client.download_artifacts(run.info.run_id, name, str(target))).read_bytes()
        except MlflowException as error:
            raise OSError(str(error)) from error

    return fetch
