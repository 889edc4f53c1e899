"""Run a suite and its learning rate search; finished runs are skipped, and failures do not stop the rest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from san_bench.config.errors import loading
from san_bench.config.suite import Choice, PlannedRun, Rates, Suite, best_rates, plan, plan_search
from san_bench.kinds import recipe_class
from san_bench.run.folder import RESULT, check_unlocked, held
from san_bench.run.provenance import write_atomically, write_rows
from san_bench.run.results import by_task
from san_bench.suites.engines import Engine
from san_bench.suites.verify import read_checks, verify
from san_peft.errors import SanError

Row = dict[str, Any]


class Benched(NamedTuple):
    """What became of the runs of a choice.

    Attributes:
        rows: Rows of all finished runs.
        failures: A row for each failed run, with its `error`.
    """

    rows: list[Row]
    failures: list[Row]


def bench(
    suite: Suite,
    name: str,
    choice: Choice,
    out: Path,
    engine: Engine,
    search: bool = False,
    keep_models: bool = False,
    command: str | None = None,
) -> Benched:
    """Runs a suite, or a part of it.

    The folder gets `suite.yaml`, `runs/<task>/<backbone>/<method>/<address>/` with the run folders, `rows.jsonl` with a
    row for each finished run, and `failures.jsonl`. An address is a hash of the recipe and of the data, so an existing
    run is not repeated, and an interrupted one is resumed or repeated. With `search`, the trials run first, in
    `search/`, and the selected learning rates go to `rates.json`, which later calls use.

    Args:
        suite: The suite.
        name: Name of its results.
        choice: The methods, models, tasks and seeds to run.
        out: Folder to write to.
        engine: Engine that executes the runs.
        search: Whether to search the learning rates first.
        keep_models: Whether to keep the full models that methods without an adapter save.
        command: Command line, which is added to `commands.txt` for reports.

    Returns:
        The rows of all finished runs of the choice, and its failures.

    Raises:
        SanError: If the choice is invalid, or every trial of a search fails.
    """
    # Other processes and machines may have another working directory.
    out, choice = out.absolute(), replace(choice, data=choice.data and choice.data.absolute())
    text = json.dumps(suite.model_dump(mode="json"), indent=2) + "\n"  # JSON is YAML
    _check_same(suite, name, out)
    check_unlocked(out)
    console, rates_file = Console(stderr=True), out / "rates.json"
    trials = plan_search(suite, choice) if search else []
    runs = [] if search else plan(suite, choice, _rates(rates_file))
    prints = _fingerprints([*trials, *runs])  # loads the data: its errors should come before the folder is made
    begun: list[str] = []
    with held(out, lambda: bool(begun)):
        _check_same(suite, name, out)
        write_atomically(out / "suite.yaml", text)
        if command is not None:
            known = file.read_text(encoding="utf-8").splitlines() if (file := out / "commands.txt").exists() else []
            write_atomically(file, "".join(f"{line}\n" for line in dict.fromkeys([*known, command])))
        begun.append(name)
        if search:
            tried = _carry_out(trials, prints, name, out / "search", engine, console)
            if not tried.rows:
                raise SanError(
                    f"All {len(tried.failures)} trials failed, see {out / 'search' / 'failures.jsonl'}. The first "
                    f"error: {tried.failures[0]['error']}"
                )
            rates = _rates(rates_file)
            for backbone, by_method in best_rates(suite, tried.rows).items():
                for method, rate in by_method.items():
                    known_rate = rates.setdefault(backbone, {}).get(method)
                    both = isinstance(rate, dict) and isinstance(known_rate, dict)
                    rates[backbone][method] = {**known_rate, **rate} if both else rate  # type: ignore[dict-item]
            write_atomically(rates_file, json.dumps(rates, indent=2) + "\n")
            runs = plan(suite, choice, rates)
            prints |= _fingerprints([run for run in runs if run.task not in prints])
        return _carry_out(runs, prints, name, out, engine, console, keep_models, suite)


def _rates(file: Path) -> Rates:
    """Reads the learning rates that a search has selected, if there was one."""
    if not file.exists():
        return {}
    with loading(f"{file}", "Remove it, and search the learning rates again with --search."):
        rates = json.loads(file.read_text(encoding="utf-8"))
        return {backbone: dict(by_method) for backbone, by_method in rates.items()}


def _check_same(suite: Suite, name: str, out: Path) -> None:
    """Checks that a folder holds no results, or results of this suite, which may have got new entries since.

    Raises:
        SanError: If it holds another suite, or this suite with other settings.
    """
    file = out / "suite.yaml"
    others = {str(row["suite"]) for row in _read(out / "rows.jsonl") if row.get("suite")} - {name}
    if others:
        raise SanError(f"{out} holds results of the suite {', '.join(sorted(others))}, not of {name}. {OTHER_OUT}")
    if not file.exists():
        return
    with loading(f"{file}", OTHER_OUT):
        old, new = dict(json.loads(file.read_text(encoding="utf-8"))), suite.model_dump(mode="json")
        old["groups"] = {task: group for group, tasks in old["groups"].items() for task in tasks}
        new["groups"] = suite.tasks
        changed = [key for key in ("protocol", "mix") if old[key] != new[key]]
        for key in ("groups", "models", "methods", "settings"):
            changed += [f"{key}.{one}" for one in old[key] if one in new[key] and old[key][one] != new[key][one]]
    if changed:
        raise SanError(f"{out} holds another suite than {name}: {', '.join(changed)} differ. {OTHER_OUT}")


OTHER_OUT = "Choose another folder with --out; a suite may get new methods, models and tasks in the same folder."


def _carry_out(
    runs: Sequence[PlannedRun],
    prints: Mapping[str, str],
    name: str,
    out: Path,
    engine: Engine,
    console: Console,
    keep_models: bool = False,
    suite: Suite | None = None,
) -> Benched:
    """Executes runs; those of a suite, other than trials, are also scored in its modes and verified."""
    from san_bench.models.adapt import PLAIN, SAN

    jobs = {}
    for run in runs:
        address = hashlib.sha256(f"{run.recipe.fingerprint} {prints[run.task]}".encode()).hexdigest()[:12]
        folder = f"runs/{run.task.replace('/', '-')}/{run.backbone}/{run.method}/{address}"
        labels = {"suite": name, "backbone": run.backbone, "method": run.method, "run": folder}
        recipe = run.recipe.model_copy(update={"output": str(out / folder)})
        jobs[folder] = {
            "recipe": recipe.model_dump(mode="json"),
            "labels": labels,
            "groups": run.groups,
            "keep": keep_models,
            "modes": list(suite.modes) if suite and recipe.method.kind in SAN else [],
            "verify": bool(suite and suite.verify and recipe.method.kind not in PLAIN),
        }
    rows = {key: found for key, job in jobs.items() if (found := _rows(job)) is not None}
    todo = {key: job for key, job in jobs.items() if key not in rows}
    others = [row for row in _read(out / "rows.jsonl") if row["run"] not in jobs]
    failures: dict[str, Row] = {row["run"]: row for row in _read(out / "failures.jsonl") if row["run"] not in jobs}
    console.print(f"{len(jobs)} runs, {len(rows)} already finished. Output: {out}", highlight=False)

    def store() -> None:
        write_rows(out / "rows.jsonl", [*others, *(row for key in jobs for row in rows.get(key, []))])
        write_rows(out / "failures.jsonl", list(failures.values()))

    store()
    for outcome in _watched(engine, todo, console):
        if outcome.error is None:
            rows[outcome.job] = outcome.value
            console.print(f"{outcome.job} finished", highlight=False)
        else:
            job = jobs[outcome.job]
            task = job["recipe"]["task"]
            facts = {"task": task, "seed": job["recipe"]["seed"], "group": job["groups"].get(task), **job["labels"]}
            failures[outcome.job] = {**facts, "error": outcome.error}
            console.print(f"{outcome.job} failed: {outcome.error.splitlines()[0]}", style="red", highlight=False)
        store()
    return Benched(
        [row for key in jobs for row in rows.get(key, [])], [failures[key] for key in jobs if key in failures]
    )


def _watched(engine: Engine, jobs: dict[str, Any], console: Console) -> Iterator[Any]:
    """Yields the outcomes, with a progress bar over all runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        for outcome in engine.run(run_job, jobs):
            progress.update(bar, advance=1, description=outcome.job.removeprefix("runs/").rpartition("/")[0])
            yield outcome


def run_job(job: dict[str, Any]) -> list[Row]:
    """Executes one run of a suite in its own process; returns its rows, one per task and scoring method."""
    os.environ["TQDM_DISABLE"] = "1"  # the suite has its own progress bar
    from san_bench.models.adapt import PLAIN
    from san_bench.run.evaluate import eval_file, evaluate
    from san_bench.run.train import train

    recipe: Any = recipe_class(job["recipe"]).model_validate(job["recipe"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(recipe)
        for mode in job["modes"]:
            if not eval_file(Path(recipe.output), recipe.eval_split, mode).exists():
                evaluate(recipe.output, mode=mode)
        if job["verify"] and read_checks(Path(recipe.output)) is None:
            verify(recipe.output)
    if recipe.method.kind in PLAIN and not job["keep"]:
        shutil.rmtree(Path(recipe.output) / "adapter", ignore_errors=True)
    rows = _rows(job)
    assert rows is not None
    return rows


def _rows(job: Row) -> list[Row] | None:
    """Reads the rows of a run that has finished, was evaluated in every mode and verified; else returns `None`."""
    from san_bench.run.evaluate import eval_file

    folder, split = Path(job["recipe"]["output"]), job["recipe"]["eval_split"]
    files = {mode: eval_file(folder, split, mode) for mode in job["modes"]}
    if not all(file.exists() for file in (folder / RESULT, *files.values())):
        return None
    checks = read_checks(folder) if job["verify"] else {}
    if checks is None:
        return None
    rows = []
    with loading(f"The result in {folder}", "Remove the folder, and the same command repeats the run."):
        modes = {mode: by_task(json.loads(file.read_text(encoding="utf-8"))) for mode, file in files.items()}
        for place, row in enumerate(by_task(json.loads((folder / RESULT).read_text(encoding="utf-8")))):
            scores = {mode: found[place]["accuracy"] for mode, found in modes.items()}
            group = {"group": job["groups"].get(row["task"])}
            rows.append({**row, **job["labels"], **group, **({"modes": scores} if scores else {}), **checks})
    return rows


def _read(path: Path) -> list[Row]:
    """Reads the rows of a file, if there is one."""
    if not path.exists():
        return []
    with loading(f"{path}", "Remove its invalid lines; rows of finished runs are written again."):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [{**row, "run": str(row["run"])} for row in map(json.loads, lines)]


def _fingerprints(runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Returns the fingerprint of each task's data; loading all of it also validates it before the first run."""
    from san_bench.run.domain import domain_of

    prints, problems = {}, []
    for recipe in {run.task: run.recipe for run in runs}.values():
        try:
            prints[recipe.task] = domain_of(recipe).fingerprint
        except SanError as error:
            problems.append(f"{recipe.task}: {error}")
    if problems:
        raise SanError("\n".join(problems))
    return prints
