"""Writing to an MLflow store in the background: a slow or unreachable store never stops a training."""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Errors that another try cannot mend.
FINAL_ERRORS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
}

Write = Callable[[Any, str], Any]

log = logging.getLogger(__name__)

__all__ = [
    "DEFAULT_URI",
    "StoreWriter",
    "absolute_uri",
    "connect",
    "continue_run",
    "find_runs",
    "make_experiment",
    "tracking_uri",
    "without_credentials",
]

#: One SQLite file in the folder that bundles are run from (MLflow 3 refuses the plain ./mlruns store).
DEFAULT_URI = "sqlite:///mlflow.db"


def tracking_uri() -> str:
    """Where runs are recorded: ``MLFLOW_TRACKING_URI``, or one SQLite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def absolute_uri(uri: str, root: Path) -> str:
    """A tracking URI whose SQLite file is the same one from every working directory.

    Args:
        uri: tracking URI.
        root: folder that a relative file starts from.
    """
    prefix = "sqlite:///"
    return f"{prefix}{(root / uri.removeprefix(prefix)).resolve()}" if uri.startswith(prefix) else uri


def connect(uri: str) -> Any:
    """A client of a store that answers.

    Args:
        uri: tracking URI.

    Returns:
        An ``MlflowClient``.

    Raises:
        ConnectionError: if the store does not answer; the message names it.
    """
    from mlflow import MlflowClient

    # MLflow's own patience is minutes per request.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    before = {k: os.environ.get(k) for k in patience}
    os.environ.update({k: v for k, v in patience.items() if before[k] is None})
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # store, database, network: no common type
        raise ConnectionError(
            f"the MLflow store {without_credentials(uri)} does not answer: {str(error).strip().splitlines()[0][:300]}; "
            "check MLFLOW_TRACKING_URI"
        ) from error
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
    return client


def find_runs(client: Any, experiment_id: str, filter_string: str = "") -> list[Any]:
    """All runs of an experiment, the oldest first.

    Args:
        client: an ``MlflowClient``.
        experiment_id: the experiment.
        filter_string: in MLflow's language.
    """
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def make_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, which is made if it is missing.

    Args:
        client: an ``MlflowClient``.
        uri: its tracking URI.
        name: experiment name.

    Raises:
        ValueError: if the experiment was deleted.
    """
    known = client.get_experiment_by_name(name)
    if known and known.lifecycle_stage != "active":
        raise ValueError(
            f"the MLflow experiment {name} was deleted; restore it (mlflow experiments restore --experiment-id "
            f"{known.experiment_id}) or choose another experiment_name"
        )
    if known:
        return str(known.experiment_id)
    # MLflow's default would put the artifacts of a local store into the folder of whoever came first.
    database = local_path(uri)
    location = (database.parent / "mlruns" / name).as_uri() if database else None
    # Without its kind MLflow's page shows an experiment in the layout for language models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=location, tags=tags))


class StoreWriter:
    """Carries out writes to one MLflow run, in order, in a thread of its own.

    A write that fails is tried again, with growing pauses, until the store answers or :meth:`close` gives up; one
    that can never succeed (an invalid value) is dropped with a warning. Nothing here raises into the training.

    Args:
        uri: tracking URI.
        experiment: experiment name, made if it is missing.
        run_id: run to continue; a new one is made if ``None``.
        run_name: name of a new run.
        tags: tags of the run.
        on_run: called with the run id as soon as there is one.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_id: str | None,
        run_name: str | None,
        tags: dict[str, str],
        on_run: Callable[[str], None],
    ) -> None:
        self.uri, self.experiment, self.run_id, self.run_name = uri, experiment, run_id, run_name
        self.tags, self._on_run = tags, on_run
        self._writes: queue.Queue[tuple[str, Write] | None] = queue.Queue()
        self._deadline = float("inf")
        self._client: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def submit(self, what: str, write: Write) -> None:
        """Queue a write.

        Args:
            what: what is written, for messages.
            write: called with the ``MlflowClient`` and the run id.
        """
        self._writes.put((what, write))

    def close(self, timeout: float = 60.0) -> None:
        """Write what is left and stop.

        Args:
            timeout: seconds after which an unreachable store is given up.
        """
        self._deadline = time.monotonic() + timeout
        self._writes.put(None)
        self._thread.join(timeout + 30)
        if self._thread.is_alive():
            left = self._writes.qsize()
            log.warning(
                "MLflow store %s is slow: about %d writes are left; the run's folder has it all", self.uri, left
            )

    def _work(self) -> None:
        # MLflow's own patience (minutes per request) would outlast any timeout here; the retries below replace it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        lost = [] if self._try("the run", self._start) else ["the run"]
        while (job := self._writes.get()) is not None:
            what, write = job
            started = self._client is not None
            if not started or not self._try(what, functools.partial(self._write, write)):
                lost.append(what)
        if lost:
            names = ", ".join(dict.fromkeys(lost))
            log.warning("MLflow store %s: not recorded: %s; the run's folder has it all", self.uri, names)

    def _write(self, write: Write) -> None:
        write(self._client, str(self.run_id))

    def _start(self) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        if self.run_id is not None and not continue_run(client, self.run_id):
            self.run_id = None
        if self.run_id is None:
            experiment_id = make_experiment(client, self.uri, self.experiment)
            run = client.create_run(experiment_id, run_name=self.run_name, tags=self.tags)
            self.run_id = run.info.run_id
        self._client = client
        self._on_run(self.run_id)

    def _try(self, what: str, write: Callable[[], Any]) -> bool:
        pause, warned = 1.0, False
        while True:
            try:
                write()
                return True
            except Exception as error:  # store, database, network: no common type, and none may reach the training
                final = getattr(error, "error_code", "") in FINAL_ERRORS
                if not warned:
                    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
                    log.warning("MLflow store %s: %s: %s%s", self.uri, what, text, "" if final else "; trying again")
                    warned = True
                if final or time.monotonic() + pause > self._deadline:
                    return False
            # A short nap at a time, so that close() is heard.
            nap_until = time.monotonic() + pause
            while time.monotonic() < min(nap_until, self._deadline):
                time.sleep(0.2)
            pause = min(pause * 2, 30.0)


def continue_run(client: Any, run_id: str) -> bool:
    """Take up an earlier run.

    Args:
        client: an ``MlflowClient``.
        run_id: the run.

    Returns:
        ``False`` if the store knows it no more, so that a new one has to be made.
    """
    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def without_credentials(text: str) -> str:
    """A text without the ``user:password@`` of the addresses in it."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def local_path(uri: str) -> Path | None:
    """The SQLite file of a tracking URI, or ``None`` for a server."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None
