"""The report of a suite as one page that holds everything itself: tables, pictures, recipes, runs, and their origin."""

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

from san_bench.config.strict import san_error
from san_bench.report.tables.render import numeric
from san_bench.report.tables.settings import Setting, side_by_side
from san_bench.report.tables.table import tables
from san_bench.run.provenance import write_atomically
from san_bench.run.results import Cell, ResultTable, Row, read_rows, trainings

if TYPE_CHECKING:
    from san_bench.report.figures.analysis import Picture

ORIGIN = ("commit", "python", "versions", "cpu", "threads", "device")
"""Keys of a row that say where it was measured."""

RUN = ("method", "task", "backbone", "seed")
"""Keys that name a run, and a failure of one."""


@dataclass(frozen=True)
class Compared:
    """Settings of several columns side by side."""

    columns: tuple[str, ...]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Failure:
    """What went wrong in one run or in several.

    Attributes:
        error: What was said.
        runs: The runs, and whether each has finished since.
    """

    error: str
    runs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes:
        title: Name of the suite.
        when: From when the results are.
        command: What made the results, and then this page.
        facts: Counts with their names.
        tables: Of the results; what stands before the last colon of a title is the title of a section.
        pictures: Drawings with their captions.
        recipes: Settings of each method.
        runs: A line for each run.
        failures: What went wrong.
        data: A line for each version of a task's data or of a backbone's checkpoint.
        origins: Where runs were measured.
        plan: Text of the suite's own file.
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
        """The tables with what is left of their titles, by the title of their section."""
        found: dict[str, list[tuple[str, ResultTable]]] = {}
        for table in self.tables:
            section, _, name = table.title.rpartition(": ")
            found.setdefault(section, []).append((name[:1].upper() + name[1:], table))
        return found

    def short(self, section: str) -> str:
        """Returns a section's title without what stands in brackets, unless two sections would share it."""
        bare = [re.sub(r" \(.*\)", "", title) for title in self.sections]
        mine = re.sub(r" \(.*\)", "", section) or "Results"
        return mine if bare.count(mine) <= 1 else section


def write_report(folder: Path, out: Path) -> None:
    """Writes the report of a suite, or of a single run, as one file that needs no network.

    Args:
        folder: Folder of the suite or of the run.
        out: HTML file to write, atomically.

    Raises:
        SanError: If there are no results, what is there cannot be read, or the file cannot be written.
    """
    text = report_to_html(read_page(folder, out))
    try:
        write_atomically(out, text)
    except OSError as error:
        raise san_error(f"{out} cannot be written: {error.strerror}. Choose another file with --out.") from error


def read_page(folder: Path, out: Path) -> Page:
    """Reads what the report of a folder shows.

    Args:
        folder: Folder of the suite or of the run.
        out: File that the page will be written to, which the page's command names.

    Raises:
        SanError: If there are no results, or what is there cannot be read.
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
    """Returns the page as the text of one HTML file, which by its own policy can load nothing from elsewhere."""
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
    """Draws a picture as the element `svg`, whose paper, ink and greys are the page's, light or dark.

    Ids get the picture's name in front, since all pictures share one page.
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
    """Returns the mixture of the page's ink and paper that stands for a grey."""
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
    """Reads the recipes of runs that are there; `output`, which decides nothing, is left out."""
    suite = (folder / "rows.jsonl").is_file()
    found: dict[str, list[Any]] = {}
    problems = []
    for row in rows:
        file = (folder / str(row.get("run")) if suite else folder) / "recipe.yaml"
        if file.is_file():
            try:
                recipe = _read_yaml(file)
            except ValueError as error:
                problems.append(f"{file}: {error}")
            else:
                found.setdefault(row["method"], []).append({k: v for k, v in recipe.items() if k != "output"})
    if problems:
        raise san_error("\n".join([f"{len(problems)} recipes cannot be read; repair or remove them:", *problems]))
    return Compared(tuple(found), tuple(side_by_side(list(found.values()))))


def _origins(rows: Sequence[Row]) -> Compared:
    """Sorts runs by where they were measured."""
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
    """Lists what was trained on, and what was trained: two lines of one name were not the same."""
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
        ("Recipe: the first twelve digits of its fingerprint. Folder: within the suite's.",),
    )


def _number(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:{form}}", value)


def _failures(failures: Sequence[Row], rows: Sequence[Row]) -> tuple[Failure, ...]:
    """Sorts failures by what was wrong; a run that failed the same way twice is named once."""
    finished = {tuple(row[key] for key in RUN) for row in rows}
    found: dict[str, dict[str, bool]] = {}
    for failure in failures:
        names = [str(failure.get(key, "unknown")) for key in RUN]
        run = f"{', '.join(names[:-1])}, seed {names[-1]}"
        error = str(failure.get("error") or "No reason was written down.").strip()
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
            except json.JSONDecodeError as error:
                problems.append(f"{file}:{number}: no JSON: {error.msg}, {len(line)} characters.")
                continue
            if isinstance(failure, dict):
                failures.append(failure)
            else:
                problems.append(f"{file}:{number}: holds no keys and values.")
    if problems:
        raise san_error("\n".join(["Some failures cannot be read; repair or remove these lines:", *problems]))
    return failures


def _commands(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Returns what was called: as the suite wrote it down, else the short form that follows from the rows."""
    file = folder / "commands.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    suites = dict.fromkeys(row.get("suite") for row in rows)
    return [f"san bench {suite}" if suite else "san train recipe.yaml" for suite in suites]


def _read_yaml(file: Path) -> dict[str, Any]:
    """Reads a mapping; `ValueError` says what is wrong otherwise."""
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(data, dict):
        raise ValueError("must be a mapping of keys to values.")
    return data
