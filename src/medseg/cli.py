"""The ``medseg`` command. Heavy packages load inside the commands, so that help and lists are instant.

Exit codes: 0 it worked, 1 it failed (the message says why), 2 the command line was wrong.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
import sys
from collections.abc import Callable
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
Jobs = Annotated[int | None, typer.Option(help="Trainings at a time; 1 by default.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[WHICH:]KEY=VALUE",
        help="Argument of the bundle, e.g. dataset_dir=my_data or "
        "max_epochs=50; for one network or mode only: transfer:encoder_weights=weights/{network}.pt",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Further option of the task, e.g. method=analytic."),
]
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
def check(
    bundle: Annotated[str, typer.Argument(metavar="TASK|DIR|FILE", help="Task, bundle folder, packed zip or config.")],
    as_json: Json = False,
) -> None:
    """Find what is wrong with a bundle before it runs, from its text alone: all problems at once."""
    import gc

    gc.disable()  # a fifth of the time, for nothing that lives longer than the command
    from medseg.bundles.check import check_path, report

    problems = check_path(bundle)
    print(report(problems, as_json) if problems or as_json else f"{bundle}: no problems")
    if problems:
        raise typer.Exit(1)


@app.command()
def simulate(
    task: Task,
    out: Annotated[Path, typer.Option(help="Folder to write images, masks and datalist.json to.")],
    count: Annotated[int, typer.Option(help="How many images or volumes (per style).")],
    seed: Annotated[int, typer.Option(help="Seed; the same arguments give the same files.")] = 0,
    style: Annotated[
        list[str] | None, typer.Option(help="Look of the images, e.g. an SNR; may be given several times.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels or voxels.")] = None,
    settings: Options = None,
) -> None:
    """Write simulated images with exact truth, and the data list that bundles train from."""
    run = _task_module(task, "simulate").simulate
    chosen = {k: v for k, v in {"style": style, "size": size}.items() if v is not None}
    print(run(out, count, seed, **chosen, **_options(run, settings or [])))


@app.command("import")
def import_(
    layout: Annotated[str, typer.Argument(help="Layout of the data, e.g. cos-net; an unknown one lists all.")],
    source: Annotated[Path, typer.Argument(help="Folder that holds the data.")],
    out: Annotated[Path, typer.Option(help="Folder to write images, masks and datalist.json to.")],
    settings: Options = None,
) -> None:
    """Turn a public data set in its own layout into files and a data list that bundles train from."""
    from medseg.bundles.catalog import find_importer

    module = find_importer(layout)
    run = getattr(importlib.import_module(module), module.rpartition(".")[2])
    print(run(source, out, **_options(run, settings or [])))


@app.command("fit-crf")
def fit_crf(
    task: Task,
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    steps: Annotated[int, typer.Option(help="Steps of gradient descent.")] = 60,
    cases: Annotated[int, typer.Option(help="Validation cases, evenly chosen: half fit, half judge.")] = 48,
    learning_rate: Annotated[float, typer.Option(help="Relative change of a parameter per step.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the order of the cases.")] = 0,
) -> None:
    """Fit the five parameters of a run's CRF on its validation cases and store them in its configs."""
    print(_task_module(task, "fit_crf").fit(run, steps, cases, learning_rate, seed))


@app.command()
def demo(
    task: Task,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; demo/TASK by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data and the training.")] = 0,
) -> None:
    """Simulate, train small, evaluate, segment and show it: the whole task in a few minutes."""
    module = _task_module(task, "demo")
    module.demo(out or Path("demo") / task, seed)


@app.command()
def crossval(
    task: Task,
    folds: Annotated[
        int | None, typer.Option(help="Deal the training items anew to so many folds; by default the list's own, or 5.")
    ] = None,
    networks: Annotated[str, typer.Option(help="Networks and baselines, with commas; all networks by default.")] = "",
    modes: Annotated[str, typer.Option(help="Training modes, with commas; the first one by default.")] = "",
    repeats: Annotated[int, typer.Option(help="Deal and cross-validate so many times.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the dealing and of the training; plus 1 for each repeat.")] = 0,
    settings: Settings = None,
    config: Annotated[list[str] | None, typer.Option(help="Config laid over the bundle's train.yaml.")] = None,
    stratify: Annotated[str | None, typer.Option(help="Field of the data list to keep even over the folds.")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Score the list's own test part as well.")] = False,
    jobs: Jobs = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Address of the Ray cluster, e.g. auto.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; runs/TASK/crossval by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the commands, run nothing.")] = False,
) -> None:
    """Cross-validate networks and modes of a task. Called again, it runs only what is missing or failed."""
    from medseg.bundles.catalog import find_bundle, repository_root
    from medseg.experiments import crossval as run
    from medseg.experiments.plan import describe, make_plan, parse_setting

    root = repository_root()
    plan = make_plan(
        find_bundle(task), root, (out or root / "runs" / task / "crossval").resolve(), folds=folds,
        networks=_words(networks), modes=_words(modes), repeats=repeats, seed=seed,
        settings=[parse_setting(s) for s in settings or []], overlays=config or [], stratify=stratify,
        held_out=held_out,
    )  # fmt: skip
    print(describe(plan), flush=True)
    if dry_run:
        print("\n".join(shlex.join(["python", *child.command("PARENT_RUN_ID")[1:]]) for child in plan.children))
        return
    if run.print_summary(run.cross_validate(plan, engine, jobs, address, run.print_outcome), plan):
        raise typer.Exit(1)


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="MLflow experiment, by name or id.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric; may be given several times. All by default.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Configuration to test against; the first one run.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown, latex, csv or html.")] = "table",
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.csv, report.html and the tables.")] = None,
    part: Annotated[str, typer.Option(help="Part of the data list that was scored: test, held_out, ...")] = "test",
    unit: Annotated[
        str, typer.Option(help="case, or a field whose cases are averaged first: patient, video.")
    ] = "case",
    common: Annotated[
        bool, typer.Option("--common", help="Compare on the cases that all configurations have.")
    ] = False,
    filter_: Annotated[str, typer.Option("--filter", help="In MLflow's language: tags.network = 'unet'.")] = "",
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; MLFLOW_TRACKING_URI by default.")] = None,
) -> None:
    """Compare the configurations of an experiment: intervals, paired tests, ranks, subgroups, report."""
    from medseg.experiments.compare import compare as run
    from medseg.experiments.runs import read_runs
    from medseg.experiments.tables import FORMATS, render

    if form not in (*FORMATS, "html"):
        raise ValueError(f"unknown --format {form}; choose from {', '.join([*FORMATS, 'html'])}")
    comparison = run(read_runs(experiment, tracking_uri, part, filter_), metric or (), baseline, unit, common)
    if out is None and form == "html":
        from medseg.experiments.report import html_report

        print(html_report(comparison))
        return
    if form != "html":
        print(render(comparison, form), end="")
    if out is not None:
        from medseg.experiments.report import write_comparison

        for file in write_comparison(comparison, out, form):
            print(f"wrote {file}", file=sys.stderr)


@app.command()
def froc(
    runs: Annotated[list[str], typer.Argument(metavar="[NAME=]RUN", help="Folders of runs that scored a part.")],
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")],
    rule: Annotated[str, typer.Option(help="Hit rule: iou>0.5, iou>0.3, centre or bcs-dbt.")] = "iou>0.5",
    limit: Annotated[float, typer.Option(help="False positives up to which the area is taken.")] = 4.0,
    part: Annotated[str, typer.Option(help="Part of the data list that was scored.")] = "test",
    baseline: Annotated[str | None, typer.Option(help="Run to test the others against; the first one.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="Field for subgroups; may be given several times. All known by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
) -> None:
    """FROC analysis of one or several runs of a detection task: curves, tables, subgroups, paired tests."""
    from medseg.detection.froc_report import find_runs, write_froc_report

    for file in write_froc_report(find_runs(runs, part), out, rule, limit, baseline, seed=seed, fields=field):
        print(f"wrote {file}", file=sys.stderr)
    print((out / "froc_tables.md").read_text(encoding="utf-8"), end="")


@app.command()
def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, e.g. crossval/unet-end_to_end/repeat0-fold*.")],
    out: Annotated[Path, typer.Option(help="Folder to write the ensemble to.")],
    activation: Annotated[str, typer.Option(help="How logits become probabilities: sigmoid or softmax.")] = "sigmoid",
) -> None:
    """Make one predictor of several runs: the mean of their probabilities. Its configs are used like a run's."""
    from medseg.experiments.ensemble import write_ensemble

    folder = write_ensemble(runs, out, activation)
    run = "python -m monai.bundle run --config_file"
    print(f"segment:  {run} {folder}/configs/inference.yaml --dataset_dir FOLDER")
    print(f"evaluate: {run} {folder}/configs/evaluate.yaml")


@app.command()
def promote(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    bundle: Annotated[str | None, typer.Option(help="Task; found by the run's metadata by default.")] = None,
    version: Annotated[str | None, typer.Option(help="New version; by default the last number is raised.")] = None,
    note: Annotated[str, typer.Option(help="Words for the changelog.")] = "",
) -> None:
    """Put a run's best weights into its bundle: models/, version, changelog, scores and provenance."""
    from medseg.bundles.promote import promote as run_it

    done = run_it(run, bundle, version, note)
    print(f"{done.bundle.name} {done.version}: {done.change}")
    print(f"segment:  python -m monai.bundle run --config_file bundles/{done.bundle.name}/models/inference.yaml")
    print(f"share:    medseg pack {done.bundle.name}")


@app.command()
def pack(
    task: Task,
    weights: Annotated[
        Path | None, typer.Option(help="models/model.pt of a run's folder; what was promoted by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the zip.")] = Path("dist"),
    version: Annotated[str | None, typer.Option(help="Version, for weights that were not promoted.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Bring models/model.onnx as well.")] = False,
    no_overlays: Annotated[bool, typer.Option("--no-overlays", help="Leave pictures of your data out.")] = False,
    sign: Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM or OpenSSH) to sign with.")] = None,
) -> None:
    """Make one zip that runs with stock MONAI (or names medseg as needed): configs, weights, card, self-test."""
    from medseg.bundles.pack import pack as run_it

    if sign is not None:  # a wrong key is said before the work
        key = _signer(sign)
    done = run_it(task, weights, out, version=version, onnx=onnx, overlays=not no_overlays)
    print(f"{done.path}  {done.path.stat().st_size / 1e6:.1f} MB")
    print(f"sha256  {done.sha256}")
    if sign is not None:
        from medseg.io.files import write_atomically

        signature = done.path.with_name(f"{done.path.name}.sig")
        write_atomically(signature, key(done.sha256))
        print(f"signed  {signature}")
    for remark in done.remarks:
        print(f"note: {remark}", file=sys.stderr)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="Packed or unpacked bundle.")],
    run: Annotated[bool, typer.Option("--run", help="If it is trusted, run its self-test and compare.")] = False,
    accept: Annotated[
        bool, typer.Option("--accept-untrusted", help="With --run: run it although it is not trusted.")
    ] = False,
    trusted: Annotated[Path | None, typer.Option(help="Public Ed25519 key that must have signed it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List what is harmless as well.")] = False,
    as_json: Json = False,
) -> None:
    """Look into a bundle from a stranger without running anything of it. Exit code 0 only if it is trusted."""
    from medseg.bundles.verify import verify as run_it

    report = run_it(bundle, trusted)
    if run and (report.verdict == "trusted" or (accept and report.verdict == "untrusted")):
        from medseg.bundles.self_test import check_self_test

        try:
            report.checked["self-test"] = "; ".join(check_self_test(bundle))
        except ValueError as error:
            report.add("refused", "self-test", str(error))
    elif run:
        report.checked["self-test"] = f"not run, as the bundle is {report.verdict}"
    print(report.to_json() if as_json else report.table(everything))
    if report.verdict != "trusted":
        raise typer.Exit(1)


@app.command()
def install(
    source: Annotated[str, typer.Argument(metavar="FILE|DIR|URL|hf:OWNER/NAME|zoo:NAME", help="Where the bundle is.")],
    into: Annotated[Path, typer.Option(help="Folder to install into.")] = Path("installed"),
    version: Annotated[str | None, typer.Option(help="Version to fetch from a hub.")] = None,
    trusted: Annotated[Path | None, typer.Option(help="Public Ed25519 key that must have signed it.")] = None,
    allow_untrusted: Annotated[
        bool, typer.Option("--allow-untrusted", help="Unpack it although it is not trusted; nothing is run.")
    ] = False,
) -> None:
    """Check a bundle, then unpack it as a whole or not at all, and record where it came from."""
    from medseg.bundles.install import install as run_it

    done = run_it(source, into, allow_untrusted=allow_untrusted, trusted_key=trusted, version=version)
    what = "is there already" if done.already else "installed"
    print(f"{done.name} {done.version} ({done.verdict}) {what}: {done.path}")
    run = "python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER --output_dir ../masks"
    print(f"segment:  cd {done.path} && {run}")


@app.command()
def card(
    bundle: Annotated[str, typer.Argument(metavar="TASK|DIR|FILE", help="Task, bundle folder or packed zip.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; NAME_card.html by default.")] = None,
) -> None:
    """Show the model card as one HTML page that opens offline."""
    from medseg.bundles.card import write_card

    print(write_card(bundle, out))


@app.command()
def paper(
    task: Task,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; runs/TASK/paper by default.")] = None,
    folds: Annotated[int | None, typer.Option(help="Folds of each cross-validation, where the paper has one.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Trainings of each method, where the paper has one split.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Simulated images or volumes per style.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds that each network trains, where all train equally long.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of images, folds and training.")] = 0,
    settings: Settings = None,
    jobs: Jobs = None,
    full: Annotated[
        bool, typer.Option("--full", help="Full-size images and the bundle's own recipe, for a GPU.")
    ] = False,
) -> None:
    """Make the table of the task's paper on simulated data, with the published numbers beside it."""
    run = _task_module(task, "paper").paper
    chosen = {
        k: v
        for k, v in {"folds": folds, "repeats": repeats, "count": count, "seconds": seconds}.items()
        if v is not None
    }
    for name in chosen:
        if name not in inspect.signature(run).parameters:
            raise ValueError(f"the tables of {task} have no --{name}")
    run(out or Path("runs") / task / "paper", seed=seed, settings=settings or [], jobs=jobs, full=full, **chosen)


def _signer(key: Path) -> Callable[[str], bytes]:
    """Signs a digest with a key; asks for the key's password if it has one."""
    import getpass

    from medseg.bundles.signature import sign

    try:
        sign("0" * 64, key)
    except ValueError as error:
        if "needs its password" not in str(error):
            raise
        password = getpass.getpass(f"password of {key}: ").encode()
        sign("0" * 64, key, password)
        return lambda digest: sign(digest, key, password)
    return lambda digest: sign(digest, key)


def _options(function: Callable[..., Any], settings: list[str]) -> dict[str, Any]:
    """Keyword arguments of a task's function from ``key=value``, each of the type of its default."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    chosen: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"--set {text}: the options are {', '.join(f'{k}={v}' for k, v in known.items()) or 'none'}"
            )
        kind = type(known[key])
        try:
            chosen[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        except ValueError as error:
            raise ValueError(f"--set {text}: {key} is a {kind.__name__}, e.g. {known[key]}") from error
    return chosen


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


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
