"""Write the report of a suite as a self-contained HTML page: tables, figures, recipes, runs and provenance."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_bench.config.strict import counted, read_yaml, san_error
from san_bench.report.tables.render import numeric
from san_bench.report.tables.settings import Setting, side_by_side
from san_bench.report.tables.table import tables
from san_bench.run.provenance import write_atomically
from san_bench.run.results import Cell, ResultTable, Row, read_rows, trainings

if TYPE_CHECKING:
    from san_bench.report.figures.analysis import Picture

ORIGIN = ("commit", "python", "versions", "cpu", "threads", "device")
"""Keys of a row that describe its environment."""

RUN = ("method", "task", "backbone", "seed")
"""Keys that identify a run or a failure."""


@dataclass(frozen=True)
class Compared:
    """Settings of several columns side by side."""

    columns: tuple[str, ...]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Failure:
    """An error of one or several runs.

    Attributes:
        error: Error message.
        runs: The runs, and whether each has finished since.
    """

    error: str
    runs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Page:
    """Contents of a report.

    Attributes:
        title: Name of the suite.
        when: Dates of the results.
        command: Commands that produced the results and this page.
        facts: Counts with their names.
        tables: Result tables; the part of a title before its last colon is the title of the section.
        pictures: Figures with their captions.
        recipes: Settings of each method.
        runs: A row for each run.
        failures: Errors with their runs.
        data: A row for each version of a task's data or of a backbone's checkpoint.
        origins: Environments of the runs.
        plan: Contents of the suite file.
    """

    title: str
    when: str
    command: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    tables: tuple[ResultTable, ...]
    pictures: tuple[Picture, ...]
    recipes: Compared
    runs: ResultTable
    failures: tuple[Failure, ...]
    data: ResultTable
    origins: Compared
    plan: str = ""

    @property
    def sections(self) -> dict[str, list[tuple[str, ResultTable]]]:
        """The tables with their short titles, by the title of their section."""
        found: dict[str, list[tuple[str, ResultTable]]] = {}
        for table in self.tables:
            section, _, name = table.title.rpartition(": ")
            found.setdefault(section, []).append((name[:1].upper() + name[1:], table))
        return found

    def short(self, section: str) -> str:
        """Returns a section's title without the part in parentheses, unless it would be ambiguous."""
        bare = [re.sub(r" \(.*\)", "", title) for title in self.sections]
        mine = re.sub(r" \(.*\)", "", section) or "Results"
        return mine if bare.count(mine) <= 1 else section


def write_report(folder: Path, out: Path) -> None:
    """Writes the report of a suite, or of a single run, as a self-contained HTML file.

    Args:
        folder: Folder of the suite or of the run.
        out: HTML file to write, atomically.

    Raises:
        SanError: If there are no results, they are invalid, or the file cannot be written.
    """
    text = report_to_html(read_page(folder, out))
    try:
        write_atomically(out, text)
    except OSError as error:
        raise san_error(f"{out} cannot be written: {error.strerror}. Choose another file with --out.") from error


def read_page(folder: Path, out: Path) -> Page:
    """Reads the contents of a report from a folder.

    Args:
        folder: Folder of the suite or of the run.
        out: File that the page will be written to, for the displayed command.

    Raises:
        SanError: If there are no results, or they are invalid.
    """
    failures = _read_failures(folder / "failures.jsonl")
    finished = folder / "rows.jsonl"
    only_failures = failures and not (finished.is_file() and finished.read_bytes().strip())
    rows = [] if only_failures else read_rows([folder])
    pictures: list[Picture] = []
    if rows:
        from san_bench.report.figures.analysis import figures

        pictures = figures(folder)
    suites = dict.fromkeys(str(row["suite"]) for row in rows if row.get("suite"))
    plan = folder / "suite.yaml"
    to = "" if out == folder / "report.html" else f" --out {out}"
    return Page(
        title=", ".join(suites) or folder.resolve().name,
        when=_when(rows),
        command=(*_commands(folder, rows), f"san report {folder}{to}"),
        facts=_facts(rows, failures),
        tables=tuple(tables(rows)) if rows else (),
        pictures=tuple(pictures),
        recipes=_recipes(folder, rows),
        runs=_runs(rows),
        failures=_failures(failures, rows),
        data=_data(rows),
        origins=_origins(rows),
        plan=plan.read_text(encoding="utf-8") if plan.is_file() else "",
    )


def report_to_html(page: Page) -> str:
    """Renders the page as HTML, with a content security policy that forbids external resources."""
    import jinja2

    loader = jinja2.PackageLoader("san_bench.report.page")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (resources.files("san_bench.report.page") / "templates/report.js").read_text(encoding="utf-8").strip()
    return environment.get_template("report.html.jinja").render(
        page=page,
        numeric=numeric,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawings=[(picture, _to_svg(picture, f"picture-{place}")) for place, picture in enumerate(page.pictures, 1)],
    )


def _to_svg(picture: Picture, name: str) -> str:
    """Renders a figure as an `svg` element with the light or dark colours of the page.

    Ids are prefixed with the name of the figure, so that they are unique on the page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    bare = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": "san", "svg.fonttype": "path"}):
        picture.figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=bare)
    text = buffer.getvalue()
    text = re.sub("<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL).strip()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#([0-9a-f]{2})\1\1\b", _grey, text)
    opening, rest = text.split(">", 1)
    size = dict(re.findall(r'\b(width|height|viewBox)="([^"]*)"', opening))
    return (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size["viewBox"]}" style="--width: {size["width"]}" '
        f'role="img" aria-labelledby="{name}-caption">{rest}'
    )


def _grey(match: re.Match[str]) -> str:
    """Returns the CSS mix of the page's text and background colours for a grey."""
    ink = round(100 * (1 - int(match[1], 16) / 255))
    return {0: "var(--paper)", 100: "var(--ink)"}.get(ink, f"color-mix(in srgb, var(--ink) {ink}%, var(--paper))")


def _facts(rows: Sequence[Row], failures: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    kinds = {"Tasks": "task", "Backbones": "backbone", "Methods": "method", "Seeds": "seed"}
    counts = {name: len({row[key] for row in rows}) for name, key in kinds.items()}
    return tuple(
        (name, f"{count:,}")
        for name, count in {"Runs": len(trainings(rows)), **counts, "Failed": len(failures)}.items()
    )


def _when(rows: Sequence[Row]) -> str:
    dates = sorted({row["finished"][:10] for row in rows})
    return " to ".join([dates[0], *dates[1:][-1:]]) if dates else ""


def _recipes(folder: Path, rows: Sequence[Row]) -> Compared:
    """Reads the recipes of existing run folders, without `output`."""
    suite = (folder / "rows.jsonl").is_file()
    found: dict[str, list[Any]] = {}
    problems = []
    for row in rows:
        file = (folder / str(row.get("run")) if suite else folder) / "recipe.yaml"
        if file.is_file():
            try:
                recipe, _, _ = read_yaml(file)
            except ValueError as error:
                problems.append(str(error))
            else:
                found.setdefault(row["method"], []).append({k: v for k, v in recipe.items() if k != "output"})
    if problems:
        raise san_error("\n".join([f"{counted(len(problems), 'invalid recipe')}; repair or remove:", *problems]))
    return Compared(tuple(found), tuple(side_by_side(list(found.values()))))


def _origins(rows: Sequence[Row]) -> Compared:
    """Groups runs by environment."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in ORIGIN], sort_keys=True), []).append(row)
    names, facts = [], []
    for group in groups.values():
        count = len(trainings(group))
        names.append(f"{count:,} {'run' if count == 1 else 'runs'}, {_when(group)}")
        facts.append([{key: "unknown" if group[0][key] is None else group[0][key] for key in ORIGIN}])
    return Compared(tuple(names), tuple(side_by_side(facts)))


def _data(rows: Sequence[Row]) -> ResultTable:
    """Lists datasets and checkpoints with their hashes; different versions of the same name get separate rows."""
    data: dict[tuple[str, ...], int] = {}
    checkpoints: dict[tuple[str, ...], int] = {}
    for row in rows:
        splits = f"{row.get('train_split') or 'unknown'} → {row['split']}"
        counted = [(data, (row["task"], f"data, {splits}", row["task_fingerprint"]))]
        if row.get("checkpoint_sha256"):
            words = f"checkpoint, {row.get('model') or 'unnamed'}"
            counted.append((checkpoints, (row["backbone"], words, row["checkpoint_sha256"])))
        for counts, key in counted:
            counts[key] = counts.get(key, 0) + 1
    lines = [
        (Cell(name), Cell(words), Cell(digest[:16], hint=digest[16:]), Cell(f"{count:,}", count))
        for counts in (checkpoints, data)
        for (name, words, digest), count in counts.items()
    ]
    return ResultTable("Data and checkpoints", ("Name", "What", "sha256", "Runs"), tuple(lines), ())


def _runs(rows: Sequence[Row]) -> ResultTable:
    columns = ("Method", "Task", "Group", "Backbone", "Seed", "Learning rate", "Accuracy", "Right", "n", "Seconds")
    return ResultTable(
        "Every run",
        (*columns, "Selection", "Recipe", "Finished", "Folder"),
        tuple(
            (
                Cell(row["method"]),
                Cell(row["task"]),
                Cell(row.get("group") or "–"),
                Cell(row["backbone"]),
                Cell(str(row["seed"]), row["seed"]),
                _number(row.get("lr"), "g"),
                Cell(f"{100 * row['accuracy']:.2f}%", row["accuracy"]),
                _number(row.get("correct"), ","),
                Cell(f"{row['n_test']:,}", row["n_test"]),
                _number(row.get("train_seconds"), ",.1f"),
                Cell(row.get("selection") or "–"),
                Cell(row["recipe_fingerprint"][:12]),
                Cell(row["finished"][:16].replace("T", " ")),
                Cell(row.get("run") or "–"),
            )
            for row in rows
        ),
        ("Recipe: first 12 digits of the fingerprint. Folder: relative to the suite folder.",),
    )


def _number(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:{form}}", value)


def _failures(failures: Sequence[Row], rows: Sequence[Row]) -> tuple[Failure, ...]:
    """Groups failures by error; a run that failed twice with the same error is listed once."""
    finished = {tuple(row[key] for key in RUN) for row in rows}
    found: dict[str, dict[str, bool]] = {}
    for failure in failures:
        names = [str(failure.get(key, "unknown")) for key in RUN]
        run = f"{', '.join(names[:-1])}, seed {names[-1]}"
        error = str(failure.get("error") or "No error message was recorded.").strip()
        found.setdefault(error, {})[run] = tuple(failure.get(key) for key in RUN) in finished
    return tuple(Failure(error, tuple(runs.items())) for error, runs in found.items())


def _read_failures(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    failures, problems = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                failure = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                said = getattr(error, "msg", error)
                problems.append(f"{file}:{number}: invalid JSON: {said} ({len(line)} characters).")
                continue
            if isinstance(failure, dict):
                failures.append(failure)
            else:
                problems.append(f"{file}:{number}: not a mapping.")
    if problems:
        raise san_error("\n".join(["Invalid failures; repair or remove these lines:", *problems]))
    return failures


def _commands(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Returns the recorded commands of the suite, or else a short form derived from the rows."""
    file = folder / "commands.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    suites = dict.fromkeys(row.get("suite") for row in rows)
    return [f"san bench {suite}" if suite else "san train recipe.yaml" for suite in suites]
