"""The background writer against stores that come late, lose calls, or never answer."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from medseg.tracking import store as module
from medseg.tracking.store import StoreWriter, local_path, tracking_uri, without_credentials


class Client:
    """Stands in for MlflowClient; fails as often as told."""

    failures = 0
    calls: list[str]

    def __init__(self, uri: str) -> None:
        if type(self).failures > 0:
            type(self).failures -= 1
            raise ConnectionError("store is down")
        self.calls = []

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str, **_: object) -> str:
        return "1"

    def create_run(self, experiment_id: str, run_name: str | None, tags: dict) -> object:
        class Run:
            class info:
                run_id = "abc"

        return Run


@pytest.fixture
def client(monkeypatch):
    import mlflow

    Client.failures = 0
    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    return Client


def writer(seen: list[str]) -> StoreWriter:
    return StoreWriter("http://127.0.0.1:9", "e", None, None, {}, seen.append)


def test_a_store_that_is_down_for_a_moment_loses_nothing(client):
    client.failures = 2
    runs: list[str] = []
    done: list[int] = []
    store = writer(runs)
    failing = [True]

    def flaky(_: object, run: str) -> None:
        if failing:
            failing.clear()
            raise ConnectionError("again")
        done.append(1)

    store.submit("first", flaky)
    store.submit("second", lambda *_: done.append(2))
    store.close(timeout=20)
    assert runs == ["abc"]
    assert done == [1, 2]  # in order


def test_a_dead_store_never_blocks_or_raises(client, caplog):
    client.failures = 10**6
    store = writer([])
    started = time.monotonic()
    for i in range(1000):
        store.submit(f"m{i % 2}", lambda *_: None)
    assert time.monotonic() - started < 0.5
    with caplog.at_level(logging.WARNING):
        store.close(timeout=2)
    assert time.monotonic() - started < 15
    assert "not recorded: the run, m0, m1" in caplog.text


def test_an_invalid_value_is_dropped_and_the_rest_goes_on(client, caplog):
    done: list[str] = []
    store = writer([])

    def invalid(*_: object) -> None:
        error = ValueError("too long")
        error.error_code = "INVALID_PARAMETER_VALUE"
        raise error

    store.submit("a bad parameter", invalid)
    store.submit("metrics", lambda *_: done.append("metrics"))
    store.close(timeout=5)
    assert done == ["metrics"]
    assert "a bad parameter" in caplog.text


def test_credentials_stay_out_of_the_record():
    assert without_credentials("http://user:secret@host:5000/x") == "http://host:5000/x"
    assert without_credentials("sqlite:////data/a@b.db") == "sqlite:////data/a@b.db"


def test_where_runs_are_recorded(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking_uri() == "http://tracking.example:5000"
    assert local_path(tracking_uri()) is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == module.DEFAULT_URI
    assert local_path(tracking_uri()) == Path("mlflow.db").resolve()
