"""Running a cross-validation: one MLflow parent, one nested child per configuration, repeat and fold.

- ``OUT/crossval.json``: the plan's identity and the MLflow parent
- ``OUT/folds/repeat0-fold0.json``: data list of each fold
- ``OUT/CONFIGURATION/repeat0-fold0/``: run folder of each child; ``output.log`` has what it printed
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medseg.experiments.engines import ATTEMPT, ENGINES, Ended, Job, run_local, run_ray
from medseg.experiments.plan import Child, Plan, datalist_text
from medseg.interruption import ended_by_signals
from medseg.io.files import write_atomically
from medseg.tracking.store import (
    absolute_uri,
    connect,
    continue_run,
    find_runs,
    make_experiment,
    tracking_uri,
    without_credentials,
)
from medseg.training.run_folder import living_holder, read_status, run_lock

RECORD, LOG = "crossval.json", "output.log"

log = logging.getLogger(__name__)

__all__ = ["Outcome", "Report", "cross_validate", "finished", "print_outcome", "print_summary"]


@dataclass(frozen=True)
class Outcome:
    """What became of one child.

    Attributes:
        child: which one.
        error: why it failed, or ``None``.
        seconds: how long it ran.
        score: its first metric on the tested fold, with its name.
        skipped: it had finished before.
    """

    child: Child
    error: str | None = None
    seconds: float = 0.0
    score: tuple[str, float] | None = None
    skipped: bool = False


#: Called with each outcome, its number and the number of all children.
Report = Callable[[Outcome, int, int], None]


def finished(child: Child) -> bool:
    """Whether the child ran to its end and left its scores."""
    return read_status(child.folder) == "FINISHED"


def cross_validate(
    plan: Plan, engine: str = "local", jobs: int | None = None, address: str | None = None, report: Report | None = None
) -> list[Outcome]:
    """Run what is missing of a cross-validation, or failed before. A child that fails does not stop the others.

    Args:
        plan: from :func:`medseg.experiments.plan.make_plan`.
        engine: ``local`` or ``ray``.
        jobs: children at a time; 1 on this machine by default.
        address: of the Ray cluster.
        report: told of every child that ends.

    Returns:
        An outcome per child, in the plan's order.

    Raises:
        ValueError: if ``plan.out`` holds a cross-validation with other settings or other data.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    with run_lock(plan.out), ended_by_signals():
        client, parent, recorded = _open_parent(plan, _claim(plan))
        try:
            outcomes = _run_all(plan, parent, recorded, engine, jobs, address, report)
        except BaseException:
            log.warning("stopped; the same command again goes on from here")
            _close_parent(client, parent, plan, None)
            raise
        _close_parent(client, parent, plan, outcomes)
    return outcomes


def _run_all(
    plan: Plan,
    parent: str,
    recorded: set[str],
    engine: str,
    jobs: int | None,
    address: str | None,
    report: Report | None,
) -> list[Outcome]:
    before = {c for c in plan.children if finished(c) and _run_id(c) in recorded}
    outcomes = {c: Outcome(c, score=_score(c), skipped=True) for c in plan.children if c in before}
    missing = [c for c in plan.children if c not in before]
    tell: Report = report or (lambda *_: None)
    for outcome in list(outcomes.values()):
        tell(outcome, len(outcomes), len(plan.children))
    # What finished without the store knowing it is resumed: that scores and records it again, and trains nothing.
    unrecorded = {c for c in missing if finished(c)}
    queue = [
        Job(c.name, _command(c, parent, c in unrecorded), c.folder / LOG, plan.root, _no_orphan(c)) for c in missing
    ]
    ending = run_local(queue, jobs or 1) if engine == "local" else run_ray(queue, jobs, address)
    with contextlib.closing(ending) as endings:
        for ended in endings:
            outcome = _outcome(missing[ended.index], ended)
            outcomes[outcome.child] = outcome
            tell(outcome, len(outcomes), len(plan.children))
    return [outcomes[c] for c in plan.children]


def _command(child: Child, parent: str, again: bool) -> Callable[[], list[str]]:
    """Decided when the child's turn comes: begin, or go on from its last checkpoint."""

    def command() -> list[str]:
        if finished(child) and not again:  # by an orphan of an earlier call
            return [sys.executable, "-c", "pass"]
        return child.command(parent, resume=(child.folder / "checkpoints" / "last.ckpt").is_file())

    return command


def _no_orphan(child: Child) -> Callable[[], bool]:
    """A killed cross-validation leaves its child running: let it end instead of starting a second one."""
    told = False

    def ready() -> bool:
        nonlocal told
        holder = living_holder(child.folder)
        if holder and not told:
            log.warning("%s still runs (%s), started by an earlier call: waiting for it", child.name, holder)
            told = True
        return holder is None or " on " in holder  # of another machine nothing is known: the child itself will refuse

    return ready


def _outcome(child: Child, ended: Ended) -> Outcome:
    if ended.returncode == 0 and finished(child):
        return Outcome(child, seconds=ended.seconds, score=_score(child))
    return Outcome(child, _reason(child, ended.returncode), ended.seconds)


def _run_id(child: Child) -> str | None:
    file = child.folder / "mlflow_run.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["run_id"]) if file.is_file() else None


def _score(child: Child) -> tuple[str, float] | None:
    file = child.folder / "evaluation" / "test" / "metrics.json"
    if not file.is_file():  # a baseline is an evaluation itself
        file = child.folder / "test" / "metrics.json"
    if not file.is_file():
        return None
    name, value = next(iter(json.loads(file.read_text(encoding="utf-8"))["metrics"].items()))
    return name, float("nan") if value["mean"] is None else float(value["mean"])


def _reason(child: Child, returncode: int) -> str:
    """What the last attempt printed last: a failed run ends with its cause."""
    file = child.folder / LOG
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    attempt = text.rpartition(ATTEMPT)[2].partition("\n")[2].strip()
    _, found, cause = f"\n{attempt}".rpartition("\nerror: ")
    last = attempt.splitlines()[-1].strip() if attempt else ""
    if returncode < 0:
        return f"ended by signal {-returncode}" + (f" after: {last[:200]}" if last else "")
    return (cause.strip() if found else last or f"exit code {returncode}")[:600]


def _claim(plan: Plan) -> dict[str, Any]:
    """Write the folds of a new cross-validation, or check that an old one is the same."""
    file = plan.out / RECORD
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if record:
        before = record["identity"]
        changed = [f"{k}: {before.get(k)}, now {v}" for k, v in plan.identity.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{plan.out} holds a cross-validation with other settings ({'; '.join(changed)}); choose another --out"
            )
    for path, content in plan.datalists.items():
        text = datalist_text(content)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"the data list has changed since {path} was written; choose another --out")
        write_atomically(path, text.encode())
    record = {"identity": dict(plan.identity), "experiment": plan.experiment, **record}
    _write(plan, record)
    return record


def _write(plan: Plan, record: Mapping[str, Any]) -> None:
    write_atomically(plan.out / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _open_parent(plan: Plan, record: dict[str, Any]) -> tuple[Any, str, set[str]]:
    """The MLflow run that the children hang under, and which children it knows as finished.

    It also makes the store before two children could do so at once.
    """
    uri = absolute_uri(plan.tracking_uri or tracking_uri(), plan.root)
    client = connect(uri)
    experiment_id = make_experiment(client, uri, plan.experiment)
    parent = record.get("parent_run_id") if record.get("tracking_uri") == without_credentials(uri) else None
    if parent and not continue_run(client, parent):
        parent = None
    if parent is None:
        configurations = list(dict.fromkeys(c.configuration for c in plan.children))
        tags = {
            "kind": "crossval",
            "task": plan.task,
            "mlflow.note.content": f"Cross-validation of {', '.join(configurations)}\n\nFolder: `{plan.out}`\n\n"
            f"Compare: `medseg compare {plan.experiment}`",
        }
        parent = client.create_run(experiment_id, run_name=f"crossval-{plan.out.name}", tags=tags).info.run_id
        for key, value in plan.identity.items():
            client.log_param(parent, key, str(value)[:6000])
        record |= {"parent_run_id": parent, "tracking_uri": without_credentials(uri)}
        _write(plan, record)
    return client, parent, _bury_the_dead(client, experiment_id, parent, plan)


def _bury_the_dead(client: Any, experiment_id: str, parent: str, plan: Plan) -> set[str]:
    """Children that a power cut or SIGKILL ended are still marked as running; those that do run are left alone.

    Returns:
        Ids of the children that finished.
    """
    alive = {_run_id(c) for c in plan.children if living_holder(c.folder)}
    children = find_runs(client, experiment_id, f"tags.`mlflow.parentRunId` = '{parent}'")
    for run in children:
        if run.info.status == "RUNNING" and run.info.run_id not in alive:
            client.set_terminated(run.info.run_id, "KILLED")
    return {str(run.info.run_id) for run in children if run.info.status == "FINISHED"}


def _close_parent(client: Any, parent: str, plan: Plan, outcomes: list[Outcome] | None) -> None:
    """Close the parent; it was killed if there are no outcomes. A lost store does not lose the summary."""
    try:
        if outcomes is not None:
            failed = sum(o.error is not None for o in outcomes)
            client.log_metric(parent, "children_finished", len(outcomes) - failed)
            client.log_metric(parent, "children_failed", failed)
            client.log_artifact(parent, str(plan.out / RECORD))
            for file in plan.datalists:
                client.log_artifact(parent, str(file), "folds")
        client.set_terminated(parent, "KILLED" if outcomes is None else "FAILED" if failed else "FINISHED")
    except Exception as error:  # store, database, network: no common type
        log.warning("the MLflow run of the cross-validation could not be closed: %s", str(error).splitlines()[0][:300])


def print_outcome(outcome: Outcome, number: int, total: int) -> None:
    """One line per child as it ends."""
    score = f"  {outcome.score[0]} {outcome.score[1]:.4f}" if outcome.score else ""
    state = "FAILED" if outcome.error else "had finished before" if outcome.skipped else "finished"
    seconds = "" if outcome.skipped else f" in {outcome.seconds:.0f} s"
    print(f"[{number}/{total}] {outcome.child.name}: {state}{seconds}{score}", flush=True)


def print_summary(outcomes: list[Outcome], plan: Plan) -> int:
    """Say what failed and why, and what to do next.

    Args:
        outcomes: from :func:`cross_validate`.
        plan: the plan.

    Returns:
        How many children failed.
    """
    failed = [o for o in outcomes if o.error]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} children finished: {plan.out}")
    for outcome in failed:
        print(f"  {outcome.child.name} failed: {outcome.error}\n    log: {outcome.child.folder / LOG}")
    if failed:
        print("The same command again runs what failed.")
    print(f"compare: medseg compare {plan.experiment} --out {plan.out / 'comparison'}")
    return len(failed)
