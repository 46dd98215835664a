"""An MLflow store as medseg's recorder leaves it, written without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities import Metric, Param, RunTag
from PIL import Image

from medseg.calibration import reliability_bins, reliability_table
from medseg.tracking.store import connect, make_experiment

MODES = {"dice": "max", "hausdorff_distance": "min"}


class FakeStore:
    """Writes runs into one experiment.

    Args:
        folder: of the SQLite file and the artifacts.
        experiment: its name.
    """

    def __init__(self, folder: Path, experiment: str = "trial") -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.experiment = experiment
        self.client = connect(self.uri)
        self.experiment_id = make_experiment(self.client, self.uri, experiment)

    def run(
        self,
        configuration: str,
        scores: Mapping[str, Sequence[float]],
        cases: Sequence[str],
        fold: int = 0,
        repeat: int = 0,
        fields: Mapping[str, Sequence[Any]] | None = None,
        params: Mapping[str, Any] | None = None,
        status: str = "FINISHED",
        part: str = "test",
        data: str = "d" * 64,
        pictures: bool = False,
        history: int = 3,
    ) -> str:
        """Write one run with a score per metric and case.

        Returns:
            Its id.
        """
        network, _, mode = configuration.partition("-")
        tags = {
            "kind": "train", "network": network, "mode": mode, "fold": fold, "repeat": repeat, "task": "t",
            "configuration": configuration, "datalist.sha256": data, "version.torch": "2.15.0", "machine": "Linux",
        }  # fmt: skip
        own = {
            "dataset_dir": "/data", "parameters": 1000 + len(network), "trainable_parameters": 10,
            "network_name": network, "output_dir": f"/runs/{configuration}-{repeat}-{fold}",
            **{f"validate.metric_modes.{m}": MODES.get(m, "max") for m in scores}, **(params or {}),
        }  # fmt: skip
        run = self.client.create_run(
            self.experiment_id, run_name=f"{configuration}-{repeat}-{fold}", tags={k: str(v) for k, v in tags.items()}
        )
        metrics = {f"{part}_cases": len(cases), "train_seconds": 60.0, f"{part}_ece": 0.1}
        for name, values in scores.items():
            metrics |= {f"{part}_{name}": np.nanmean(values), f"{part}_{name}_sd": np.nanstd(values)}
        logged = [Metric(k, float(v), 0, 0) for k, v in metrics.items()]
        logged += [Metric("train_loss", 1 / (e + 1), 0, e) for e in range(history)]
        logged += [Metric(f"val_{next(iter(scores))}", e / history, 0, e) for e in range(history)]
        self.client.log_batch(
            run.info.run_id, metrics=logged, params=[Param(k, str(v)) for k, v in own.items()], tags=[RunTag("x", "y")]
        )
        table = pd.DataFrame({"image": [f"/data/{c}" for c in cases], **(fields or {}), **scores})
        table = table.assign(empty_prediction=False, empty_truth=False, overlay=[f"{Path(c).stem}.png" for c in cases])
        folder = Path(run.info.artifact_uri.removeprefix("file://")) / part
        (folder / "overlays").mkdir(parents=True)
        table.to_csv(folder / "per_image.csv", index=False, na_rep="nan")
        rng = np.random.default_rng(fold)
        bins = reliability_bins(rng.random(500), rng.random(500) < 0.5)
        (folder / "metrics.json").write_text(json.dumps({"calibration": reliability_table(bins)}))
        for case in cases if pictures else ():
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
                folder / "overlays" / f"{Path(case).stem}.png"
            )
        self.client.set_terminated(run.info.run_id, status)
        return run.info.run_id
