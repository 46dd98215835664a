"""The ``medseg`` command. Heavy packages load inside the commands, so that help and lists are instant.

Exit codes: 0 it worked, 1 it failed (the message says why), 2 the command line was wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg import __version__

app = typer.Typer(
    name="medseg",
    help="Published medical-image-analysis methods as MONAI bundles. Training and inference run with "
    "`python -m monai.bundle run`; this command is for everything around them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Task = Annotated[str, typer.Argument(help="Task name, as `medseg list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Run the command; an expected error ends with its message and exit code 1 instead of a traceback."""
    from medseg.demo import DemoError

    try:
        app()
    except (ValueError, OSError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show the tasks: modality, networks and paper."""
    from medseg.bundles.catalog import list_bundles

    summaries = [bundle.summary() for bundle in list_bundles()]
    if as_json:
        print(json.dumps(summaries, indent=1))
        return
    for summary in summaries:
        print(f"{summary['name']}  {summary['version']}")
        print(f"  task      {summary['task']}")
        print(f"  modality  {summary['modality']}")
        print(f"  networks  {', '.join(summary['networks'])}")
        print(f"  paper     {summary['paper']}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, device, where MLflow writes, and what is missing for which task."""
    from medseg.doctor import examine, report

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else report(findings))
    if findings["problems"]:
        raise typer.Exit(1)


@app.command()
def simulate(
    task: Task,
    out: Annotated[Path, typer.Option(help="Folder to write images, masks and datalist.json to.")],
    count: Annotated[int, typer.Option(help="How many images (per style).")],
    seed: Annotated[int, typer.Option(help="Seed; the same arguments give the same files.")] = 0,
    style: Annotated[list[str] | None, typer.Option(help="Look of the images; may be given several times.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
) -> None:
    """Write simulated images with exact truth, and the data list that bundles train from."""
    chosen = {k: v for k, v in {"style": style, "size": size}.items() if v is not None}
    datalist = _task_module(task, "simulate").simulate(out, count, seed, **chosen)
    print(f"{datalist}")


@app.command()
def demo(
    task: Task,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; demo/TASK by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data and the training.")] = 0,
) -> None:
    """Simulate, train small, evaluate, segment and show it: the whole task in a few minutes."""
    module = _task_module(task, "demo")
    module.demo(out or Path("demo") / task, seed)


def _task_module(task: str, name: str) -> Any:
    """A task's module by convention: ``medseg/tasks/<task>/<name>.py`` with a function of the same name."""
    from medseg.bundles.catalog import find_bundle

    find_bundle(task)
    path = f"medseg.tasks.{task}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and path.startswith(error.name):
            raise ValueError(f"{task} has no `medseg {name}`") from error
        raise
