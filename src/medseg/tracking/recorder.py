"""The Lightning callback that records a run in MLflow: one batch of metrics per epoch, everything else once."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from medseg.bundles.running import running_parser, scalar_settings
from medseg.io.datalist import GROUP_FIELDS, fingerprint
from medseg.io.files import write_atomically
from medseg.tracking.provenance import provenance_tags
from medseg.tracking.store import StoreWriter, without_credentials
from medseg.training.epoch_log import epoch_metrics
from medseg.training.module import Case

RUN_FILE = "mlflow_run.json"

#: Limits of MLflow's ``log_batch``.
MAX_PARAMS, MAX_VALUE = 100, 6000

#: Pictures that one part puts into the store; the run's folder has all of them.
MAX_OVERLAYS = 30

#: A field of the data list with at most so many different values (tumour type, scanner) becomes a tag of the run.
MAX_KINDS = 8

__all__ = ["MLflowRecorder"]


class MLflowRecorder(pl.Callback):
    """Records one training or evaluation as one MLflow run.

    Recorded are every scalar of the resolved config as parameters, the run's configs, losses, metrics, learning rate,
    seconds, images per second and peak memory per epoch, the data list's fingerprint, git commit and package
    versions, the best weights, the overlays and the table per image. All of it is sent by a thread of its own.

    Args:
        tracking_uri: MLflow store; see :func:`medseg.tracking.store.tracking_uri`.
        experiment_name: experiment, made if it is missing.
        run_name: name of the run.
        output_dir: the run's folder. ``mlflow_run.json`` there ties it to its run, also when it is resumed.
        datalist: from :func:`medseg.io.datalist.load_datalist`; its files are hashed in the background.
        tags: further tags, e.g. task, network and fold.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        output_dir: str,
        run_name: str | None = None,
        datalist: Mapping[str, list[dict[str, Any]]] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.uri, self.experiment, self.run_name = tracking_uri, experiment_name, run_name
        self.folder, self.datalist = Path(output_dir), datalist
        self.tags = {k: str(v) for k, v in (tags or {}).items()}
        self._parser = running_parser()
        self._store: StoreWriter | None = None
        self._epoch_started = self._train_ended = self._train_seconds = 0.0
        self._images = 0
        self._tables: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Seconds trained so far, so that a resumed run reports all of them."""
        return {"train_seconds": self._train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` kept."""
        self._train_seconds = float(state_dict["train_seconds"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the run of a training."""
        self._open(trainer, "train", pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the run of an evaluation."""
        weights = getattr(trainer, "ckpt_path_for_record", None)
        if weights:
            self.tags["ckpt_path"] = str(weights)
            trained = Path(weights).parent.parent / RUN_FILE
            if trained.is_file():
                self.tags["training_run_id"] = json.loads(trained.read_text())["run_id"]
        self._open(trainer, "evaluate", pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the epoch's clock."""
        self._epoch_started = self._train_ended = time.perf_counter()
        self._images = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images."""
        self._images += len(batch["image"]) * trainer.world_size
        self._train_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Send the epoch's metrics, all in one batch."""
        seconds = time.perf_counter() - self._epoch_started
        self._train_seconds += seconds
        if self._store is None:
            return
        values = {k: float(v) for k, v in epoch_metrics(trainer).items()}
        values["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        values |= {"epoch_seconds": seconds, "train_seconds": self._train_seconds}
        values["images_per_second"] = self._images / max(self._train_ended - self._epoch_started, 1e-9)
        values["peak_memory_gb"] = _peak_memory_gb()
        self._metrics(values, trainer.current_epoch)

    def on_results(
        self, folder: Path, part: str, cases: list[Case], summary: Mapping[str, Any], overlays: list[Path]
    ) -> None:
        """Record final scores, the table per image, overlays and weights.

        Args:
            folder: where ``per_image.csv`` and ``overlays/`` were written.
            part: ``best_val`` after a training, else the part of the data list; the artifacts' folder.
            cases: the scored cases.
            summary: what ``metrics.json`` holds, from :func:`medseg.training.results.write_results`.
            overlays: the pictures that were drawn, worst case first; the first ``MAX_OVERLAYS`` are recorded.
        """
        if self._store is None:
            return
        values = {f"{part}_{k}": float(summary[k]) for k in ("cases", "empty_predictions", "empty_truths")}
        for name, value in summary["metrics"].items():
            values |= {f"{part}_{name}": value["mean"], f"{part}_{name}_sd": value["sd"]}
        if "calibration" in summary:
            values[f"{part}_ece"] = summary["calibration"]["ece"]
        self._metrics(values, 0)
        rows = [c.row() for c in cases]
        self._tables = list(dict.fromkeys([*self._tables, f"{part}/per_image.json"]))
        self._store.submit("per-image table", functools.partial(_log_table, rows=rows, tables=list(self._tables)))
        files = {
            part: ["per_image.csv", "metrics.json", "reliability.png", "detections.csv", "truths.csv"],
            "": ["train.log"],
            "models": ["models/model.pt"],
        }
        for target, names in files.items():
            for name in names:
                if (folder / name).is_file():
                    self._file(folder / name, target)
        for picture in overlays[:MAX_OVERLAYS]:
            self._file(picture, f"{part}/overlays")

    def on_run_end(self, status: str) -> None:
        """Close the run.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if self._store is None:
            return
        self._store.submit("the run's end", lambda c, run: c.set_terminated(run, status))
        # Someone who pressed Ctrl-C does not wait long for a dead server.
        self._store.close(timeout=60.0 if status == "FINISHED" else 15.0)
        self._store = None

    def _open(self, trainer: pl.Trainer, kind: str, module: Any) -> None:
        if not trainer.is_global_zero or self._store is not None:
            return
        file = self.folder / RUN_FILE
        resumed = json.loads(file.read_text()) if getattr(trainer, "resumed", False) and file.is_file() else {}
        uri = without_credentials(self.uri)
        run_id = resumed.get("run_id") if resumed.get("tracking_uri") == uri else None

        def remember(run_id: str) -> None:
            content = {"run_id": run_id, "tracking_uri": uri, "experiment": self.experiment}
            write_atomically(file, (json.dumps(content) + "\n").encode())

        tags = {"kind": kind, **self.tags, "mlflow.note.content": self._note(kind), **provenance_tags()}
        self._store = StoreWriter(self.uri, self.experiment, run_id, self.run_name, tags, remember)
        if run_id is None:
            self._settings(module)
        for config in sorted((self.folder / "configs").glob("*")):
            self._file(config, "configs")
        if self.datalist:
            self._store.submit("the data's fingerprint", self._data)

    def _note(self, kind: str) -> str:
        """What MLflow's page shows above the run: what it is, where it lies, what to do with it."""
        folder = self.folder.resolve()
        what = ", ".join(f"{k} `{v}`" for k, v in self.tags.items() if k in ("network", "mode", "fold", "ckpt_path"))
        lines = [f"**{kind}** of `{self.tags.get('task', self.experiment)}`: {what}", "", f"Folder: `{folder}`", ""]
        if kind == "train":
            run = f"python -m monai.bundle run --config_file {folder}/configs"
            lines += [
                f"Continue: `{run}/train.yaml --resume True`  ",
                f"Evaluate: `{run}/evaluate.yaml`  ",
                f"Segment: `{run}/inference.yaml --dataset_dir FOLDER`",
            ]
        return "\n".join(lines)

    def _settings(self, module: Any) -> None:
        from mlflow.entities import Param

        if self._parser is None or self._store is None:
            return
        settings = scalar_settings(self._parser)
        settings["parameters"] = str(sum(p.numel() for p in module.network.parameters()))
        settings["trainable_parameters"] = str(sum(p.numel() for p in module.network.parameters() if p.requires_grad))
        params = [Param(k[:250], without_credentials(v)[:MAX_VALUE]) for k, v in settings.items()]
        for i in range(0, len(params), MAX_PARAMS):
            chunk = params[i : i + MAX_PARAMS]
            self._store.submit("parameters", functools.partial(_log_params, params=chunk))

    def _data(self, client: Any, run_id: str) -> None:
        """Hash of the files and the sizes of the parts, as tags and as MLflow's dataset input."""
        from mlflow.entities import Dataset, DatasetInput, RunTag

        datalist = self.datalist or {}
        items = [item for part in datalist.values() for item in part]
        data = fingerprint(items)
        sizes = {f"{part}_items": len(of) for part, of in datalist.items()}
        tags = {"datalist.sha256": data["sha256"], "datalist.bytes": data["bytes"], **_kinds(items), **sizes}
        client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
        source = json.dumps({"first_image": items[0]["image"]})
        entity = Dataset("datalist", data["sha256"][:32], "local", source, profile=json.dumps({**data, **sizes}))
        client.log_inputs(run_id, [DatasetInput(entity)])

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(k, v, now, step) for k, v in values.items()]
        if self._store:
            self._store.submit("metrics", lambda c, run: c.log_batch(run, metrics=batch))

    def _file(self, path: Path, target: str) -> None:
        if self._store:
            self._store.submit(path.name, lambda c, run: c.log_artifact(run, str(path), target or None))


def _log_params(client: Any, run_id: str, params: list[Any]) -> None:
    client.log_batch(run_id, params=params)


def _kinds(items: list[dict[str, Any]]) -> dict[str, str]:
    """The kinds of cases there are, e.g. ``data.style: abfm, dthp``, to group runs by on MLflow's page."""
    ignored = {"image", "label", "fold", "part", *GROUP_FIELDS}
    fields = dict.fromkeys(k for item in items for k in item if k not in ignored)
    values = {field: sorted({str(item.get(field, "")) for item in items} - {""}) for field in fields}
    # MLflow refuses a whole batch for one key that it does not like, e.g. "age (years)".
    return {
        "data." + re.sub(r"[^\w./ -]", "_", field): ", ".join(kinds)[:MAX_VALUE]
        for field, kinds in values.items()
        if 1 <= len(kinds) <= MAX_KINDS
    }


def _log_table(client: Any, run_id: str, rows: list[dict[str, Any]], tables: list[str]) -> None:
    """A table that MLflow's page shows. Its own ``log_table`` would append to that of an earlier end of the run."""
    data = [[None if v != v else v for v in row.values()] for row in rows]  # nan is no JSON
    client.log_dict(run_id, {"columns": list(rows[0]), "data": data}, tables[-1])
    shown = [{"path": path, "type": "table"} for path in tables]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(shown))


def _peak_memory_gb() -> float:
    """Peak of the GPU's memory since the epoch began, or of the process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
