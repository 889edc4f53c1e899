"""Build the tables of a section: accuracy by task with means, paired differences, and cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from san_bench.report.origin import origin, verified
from san_bench.report.tables.estimate import (
    LEAST_PAIRS,
    RESAMPLES,
    Estimate,
    bootstrap_interval,
    estimate,
    mean_difference,
    wilson,
)
from san_bench.report.tables.published import Published, claims, decimals_of
from san_bench.report.tables.sections import Line, Section, selection_words
from san_bench.run.results import Cell, ResultTable, Row, trainings
from san_bench.vision_language.vqa.benchmarks import BENCHMARKS

Seeds = Mapping[int, Row]
Tasks = Mapping[str, Seeds]

READING = (
    "Top-1 accuracy in %: mean ± sample standard deviation over n seeds; a number without ± is from one seed. "
    "A cell states its n if it differs from the row's. Parameters are the trained ones without the head."
)
MEANS = (
    "Means are computed within each seed that has all tasks, then over these seeds, so ± is the spread of the mean "
    "itself. Papers report either the mean over all tasks or the mean of the group means; compare like with like."
)
LEGACY = "best-test (legacy): the epoch was selected on the reported split, so the number is too high."
PAPERS = (
    "Published rows were copied from the sources in brackets, without spread, for the same suite and backbone; "
    "weights, preprocessing and selection may differ. Unconfirmed: not read in the source, may be wrong. "
    "Derived: computed from other published numbers."
)
MARK = "†"
"""Marks scores on another split than the papers'."""

COSTS = (
    ("Training, s", "train_seconds"),
    ("Saved activations, MiB", "saved_activation_mib"),
    ("Peak memory, MiB", "peak_rss_mib"),
    ("Energy, J", "energy_joules"),
)
"""Columns of the cost table, with their keys in rows."""

MODES = {
    "both": "as trained",
    "neuron": "own scales alone",
    "synapse": "propagated scales alone",
    "off": "none",
}
"""Active scales of a SAN adapter in each evaluation mode."""


@dataclass(frozen=True)
class _Value:
    """Content of a cell: an estimate with a hint, or words instead of it."""

    estimate: Estimate | None
    words: str

    def cell(self, most: int, decimals: int, factor: float = 1.0) -> Cell:
        """Returns the cell; n is stated if it differs from the row's."""
        if self.estimate is None:
            return Cell(self.words)
        mean, sd, n = factor * self.estimate.mean, self.estimate.sd, self.estimate.n
        spread = "" if sd is None else f" ± {factor * sd:,.{decimals}f}"
        return Cell(f"{mean:,.{decimals}f}{spread}{'' if n == most else f' (n = {n})'}", mean, self.words)


@dataclass(frozen=True)
class _Field:
    """A column of accuracies: its name, its tasks, and functions that compute it from rows and from a paper."""

    name: str
    tasks: tuple[str, ...]
    measured: Callable[[Tasks], _Value]
    printed: Callable[[Published], float | None]


def means_table(section: Section, papers: Sequence[Published]) -> ResultTable:
    """Builds the table of means over all tasks and, with several groups, over each group and over the groups."""
    groups = _several(section)
    fields = [
        *(
            _mean_field(group, [tasks], lambda paper, name=group: paper.groups.get(name))
            for group, tasks in groups.items()
        ),
        _mean_field(f"Mean of {len(section.tasks)} tasks", [[*section.tasks]], lambda paper: paper.mean_of_tasks),
    ]
    if groups:
        fields.append(
            _mean_field(f"Mean of {len(groups)} groups", [*groups.values()], lambda paper: paper.mean_of_groups)
        )
    return _accuracy(section, "means", fields, papers, (READING, MEANS))


def _several(section: Section) -> Mapping[str, Sequence[str]]:
    """Returns the groups if there are several; the mean of a single group is that of all tasks."""
    return section.groups if len(section.groups) > 1 else {}


def task_tables(section: Section, papers: Sequence[Published]) -> list[ResultTable]:
    """Builds the tables of accuracy by task: one per group, or a single one with the mean if tasks have no groups.

    Tasks and groups without results are left out.
    """
    there = {row["task"] for row in section.rows}
    if section.groups:
        parts = {group: [_task_field(t) for t in tasks if t in there] for group, tasks in section.groups.items()}
        return [_accuracy(section, group, fields, papers, (READING,)) for group, fields in parts.items() if fields]
    fields = [_task_field(task) for task in section.tasks if task in there]
    if len(section.tasks) == 1:
        return [_accuracy(section, "accuracy", fields, papers, (READING,))]
    mean = _mean_field(f"Mean of {len(section.tasks)} tasks", [[*section.tasks]], lambda paper: paper.mean_of_tasks)
    return [_accuracy(section, "accuracy", [*fields, mean], papers, (READING, MEANS))]


def difference_table(section: Section, reference: str | None) -> ResultTable | None:
    """Builds the table of paired differences to a reference method on the same task, backbone and seed.

    Args:
        section: The results.
        reference: A method; by default `san`, else the first method of kind san, else the first method.

    Returns:
        The table, or `None` if the section lacks the reference or other methods.
    """
    chosen = reference or _default_reference(section)
    others = {line: tasks for line, tasks in section.lines.items() if line.method != chosen}
    if not others or len(others) == len(section.lines):
        return None
    groups = _several(section)
    rows, alone = [], 0
    for line, tasks in others.items():
        base = section.lines.get(replace(line, method=chosen), {})
        pairs = {task: _paired(tasks.get(task, {}), base.get(task, {})) for task in section.tasks}
        pairs = {task: values for task, values in pairs.items() if values}
        alone += sum(map(len, tasks.values())) - sum(map(len, pairs.values()))
        cells = [Cell(line.method), Cell(line.chosen or "–"), Cell(f"{len(pairs)} of {len(section.tasks)}", len(pairs))]
        for part in [[*section.tasks], *groups.values()]:
            cells.append(_difference([pairs[task] for task in part if task in pairs]))
        rows.append((*cells, *_wins(pairs)))
    notes = [
        f"Accuracy in percentage points, method minus {chosen}, over runs with the same task, backbone, seed, protocol "
        "and selection; the number of pairs is in parentheses. In brackets: 95% interval of a bootstrap that resamples "
        f"tasks, then seeds within them, {RESAMPLES:,} times, with equal weight for all tasks. With fewer than "
        f"{LEAST_PAIRS} pairs, or two tasks: ± sample standard deviation of the pairs. Better, equal and worse count "
        "tasks by their mean.",
        *([f"{alone} runs have no matching run of {chosen} and are left out."] if alone else []),
        *([LEGACY] if any(line.selection == "best-test" for line in section.lines) else []),
    ]
    return ResultTable(
        f"{section.title}: difference to {chosen}",
        ("Method", "Selection", "Tasks", "All tasks", *groups, "Better / equal / worse", "Most gained", "Most lost"),
        tuple(rows),
        (*notes, *_origin(section)),
    )


def modes_table(section: Section) -> ResultTable | None:
    """Builds the table of accuracy by active scales of SAN adapters; `None` if no run was evaluated in other modes."""
    scored = {
        line: {t: {s: r for s, r in seeds.items() if r.get("modes")} for t, seeds in tasks.items()}
        for line, tasks in section.lines.items()
    }
    scored = {line: tasks for line, tasks in scored.items() if all(tasks.get(task) for task in section.tasks)}
    if not scored:
        return None
    rows = []
    every = [row for tasks in scored.values() for seeds in tasks.values() for row in seeds.values()]
    shown = [mode for mode in MODES if mode == "both" or all(mode in row["modes"] for row in every)]
    for line, tasks in scored.items():
        values = [
            _mean(
                {t: {s: {**r, **_in_mode(r, mode)} for s, r in seeds.items()} for t, seeds in tasks.items()}, [[*tasks]]
            )
            for mode in shown
        ]
        most = max((value.estimate.n for value in values if value.estimate), default=0)
        rows.append((Cell(line.method), Cell(str(most), most), *(value.cell(most, 1, 100) for value in values)))
    return ResultTable(
        f"{section.title}: modes",
        ("Method", "n", *(f"{mode}: {MODES[mode]}" for mode in shown)),
        tuple(rows),
        (
            READING,
            "Each trained adapter is evaluated in every mode: scales are disabled after training.",
            *_origin(section),
        ),
    )


def _in_mode(row: Row, mode: str) -> Row:
    return {} if mode == "both" else {"accuracy": row["modes"][mode]}


def cost_table(section: Section) -> ResultTable:
    """Builds the table of parameters, time, memory and energy, with a row for each method and machine."""
    lines: dict[tuple[Line, str], list[Row]] = {}
    for line, tasks in section.lines.items():
        for seeds in tasks.values():
            for row in seeds.values():
                lines.setdefault((line, _machine(row)), []).append(row)
    known = [(name, key) for name, key in COSTS if any(row.get(key) is not None for row in section.rows)]
    made = []
    for (line, machine), every in lines.items():
        rows = trainings(every)
        values = [_known([row[key] for row in rows if row.get(key) is not None]) for _, key in known]
        head = [Cell(line.method), Cell(line.chosen or "–"), Cell(machine), Cell(str(len(rows)), len(rows))]
        head.append(_range([row["trainable_parameters"] - row["trainable_head"] for row in rows]))
        head.append(_range([row["trainable_parameters"] for row in rows]))
        made.append((*head, *(value.cell(len(rows), 1) for value in values)))
    reading = (
        "Mean ± sample standard deviation over all runs (tasks and seeds) on one machine; compare only methods that "
        "ran the same tasks on the same machine."
    )
    return ResultTable(
        f"{section.title}: cost",
        ("Method", "Selection", "Machine", "Runs", "Trained without head", "with head", *(name for name, _ in known)),
        tuple(made),
        (reading, *verified(section.rows), *_origin(section)),
    )


def _accuracy(
    section: Section, what: str, fields: Sequence[_Field], papers: Sequence[Published], reading: Sequence[str]
) -> ResultTable:
    """Builds a table of measured rows followed by published ones."""
    decimals = decimals_of(section.family)
    papers = [paper for paper in papers if any(field.printed(paper) is not None for field in fields)]
    sources = [*dict.fromkeys(paper.source for paper in papers)]
    rows = []
    for line, tasks in section.lines.items():
        values = [field.measured(tasks) for field in fields]
        most = max((value.estimate.n for value in values if value.estimate), default=0)
        trained = [row["trainable_parameters"] - row["trainable_head"] for s in tasks.values() for row in s.values()]
        head = [Cell(line.method), *([Cell("measured")] if papers else []), Cell(line.chosen or "–")]
        head += [Cell(str(most or "–"), most or None), _millions(min(trained) / 1e6, max(trained) / 1e6)]
        shown = [value.cell(most, decimals, 100) for value in values]
        rows.append((*head, *map(_marked, shown, fields)))
    for paper in papers:
        rows.append(_printed(paper, sources.index(paper.source) + 1, [f.printed(paper) for f in fields], decimals))
    legacy = any("legacy" in cell.text for row in rows for cell in row)
    notes = [*reading, *([LEGACY] if legacy else []), *_other_splits(fields)]
    if papers:
        notes += [PAPERS, *(f"[{place}] {source}." for place, source in enumerate(sources, 1)), *claims(section.family)]
    where = ("Source",) if papers else ()
    names = ("Method", *where, "Selection", "n", "Parameters, M", *(field.name for field in fields))
    return ResultTable(f"{section.title}: {what}", names, tuple(rows), (*notes, *_origin(section)))


def _printed(paper: Published, source: int, values: Sequence[float | None], decimals: int) -> tuple[Cell, ...]:
    standing = "" if paper.confirmed else ", derived" if paper.derived else ", unconfirmed"
    weights = f", {paper.weights}" if paper.weights else ""
    cells = [
        Cell(paper.method, hint=paper.note),
        Cell(f"published [{source}]{standing}{weights}", hint=paper.source),
        Cell(selection_words(paper.selection) or "not stated"),
        Cell("–"),
        Cell("–") if paper.parameters is None else _millions(paper.parameters, paper.parameters),
        *(Cell("–") if value is None else Cell(f"{value:.{decimals}f}", value) for value in values),
    ]
    return tuple(replace(cell, published=True) for cell in cells)


def _task_field(task: str) -> _Field:
    def printed(paper: Published) -> float | None:
        return paper.accuracy.get(_short(task))

    return _Field(_short(task), (task,), lambda tasks: _over_seeds(tasks.get(task, {})), printed)


def _mean_field(name: str, parts: Sequence[Sequence[str]], printed: Callable[[Published], float | None]) -> _Field:
    return _Field(name, tuple(task for part in parts for task in part), lambda tasks: _mean(tasks, parts), printed)


def _marked(cell: Cell, field: _Field) -> Cell:
    """Marks a score that includes one on another split than the papers'."""
    other = cell.value is not None and any(map(_other_split, field.tasks))
    return replace(cell, text=f"{cell.text} {MARK}") if other else cell


def _other_split(task: str) -> str:
    """Describes the split of a task if papers report another one; else returns an empty string."""
    family, _, name = task.rpartition("/")
    one = BENCHMARKS.get(name) if family == "llava" else None
    return "" if one is None or one.same else f"{name} uses {one.local_split}, papers use {one.paper_split}"


def _other_splits(fields: Sequence[_Field]) -> list[str]:
    """Explains the mark if a table needs it."""
    said = dict.fromkeys(text for field in fields for task in field.tasks if (text := _other_split(task)))
    if not said:
        return []
    return [f"{MARK} Another split than the papers', not comparable with published numbers: {'; '.join(said)}."]


def _over_seeds(seeds: Seeds) -> _Value:
    if not seeds:
        return _Value(None, "–")
    rows = [seeds[seed] for seed in sorted(seeds)]
    asked = f"{rows[0]['n_test']:,} {'questions' if rows[0].get('way') else 'images'}"
    hint = f"seed{'s' if len(rows) > 1 else ''} {', '.join(map(str, sorted(seeds)))}; {asked}"
    if len(rows) == 1 and rows[0].get("correct") is not None:
        low, high = wilson(rows[0]["correct"], rows[0]["n_test"])
        hint = f"seed {rows[0]['seed']}; 95% interval over {asked}: {low:.1%} to {high:.1%}"
    return _Value(estimate([row["accuracy"] for row in rows]), hint)


def _mean(tasks: Tasks, parts: Sequence[Sequence[str]]) -> _Value:
    """Averages over parts the mean of each part's tasks, for the seeds that have all of them."""
    wanted = [task for part in parts for task in part]

    def of_seed(seed: int) -> float:
        return statistics.fmean(statistics.fmean(tasks[t][seed]["accuracy"] for t in part) for part in parts)

    seeds = sorted(set.intersection(*(set(tasks.get(task, {})) for task in wanted)))
    if seeds:
        hint = f"seeds {', '.join(map(str, seeds))}; all {len(wanted)} tasks"
        return _Value(estimate([of_seed(seed) for seed in seeds]), hint)
    there = sum(task in tasks for task in wanted)
    return _Value(None, f"{there} of {len(wanted)} tasks" if there < len(wanted) else "no seed has all tasks")


def _known(values: Sequence[float]) -> _Value:
    return _Value(estimate(values), f"{len(values)} runs") if values else _Value(None, "–")


def _paired(seeds: Seeds, base: Seeds) -> list[float]:
    return [seeds[seed]["accuracy"] - base[seed]["accuracy"] for seed in sorted(seeds.keys() & base.keys())]


def _difference(pairs: Sequence[Sequence[float]], name: str = "") -> Cell:
    """Formats a mean difference with its interval, or with its spread if there are too few pairs."""
    if not pairs:
        return Cell("–")
    mean, every = 100 * mean_difference(pairs), estimate([value for task in pairs for value in task])
    spread = "" if every.sd is None else f" ± {100 * every.sd:.1f}"
    if interval := bootstrap_interval(pairs):
        spread = f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    text = f"{mean:+.1f}{spread} ({every.n})".replace("-", "−")
    return Cell(f"{name} {text}" if name else text, mean, f"{len(pairs)} tasks, {every.n} pairs")


def _wins(pairs: Mapping[str, Sequence[float]]) -> list[Cell]:
    """Counts better, equal and worse tasks, and finds the largest gain and loss."""
    means = {task: round(statistics.fmean(values), 12) for task, values in pairs.items()}
    if not means:
        return [Cell("–")] * 3
    better, worse = sum(mean > 0 for mean in means.values()), sum(mean < 0 for mean in means.values())
    best, worst = max(means, key=lambda task: means[task]), min(means, key=lambda task: means[task])
    return [
        Cell(f"{better} / {len(means) - better - worse} / {worse}", better - worse),
        _difference([pairs[best]], _short(best)) if means[best] > 0 else Cell("–"),
        _difference([pairs[worst]], _short(worst)) if means[worst] < 0 else Cell("–"),
    ]


def _default_reference(section: Section) -> str:
    methods = [line.method for line in section.lines]
    own = [row["method"] for row in section.rows if row.get("kind") == "san"]
    return "san" if "san" in methods else [*own, *methods][0]


def _millions(low: float, high: float) -> Cell:
    return Cell(f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}", high)


def _range(values: Sequence[int]) -> Cell:
    low, high = min(values), max(values)
    return Cell(f"{low:,}" if low == high else f"{low:,}–{high:,}", high)


def _machine(row: Row) -> str:
    return row["device"] if row["device"] != "cpu" else f"{row['cpu']}, {row['threads']} threads"


def _short(task: str) -> str:
    return task.rpartition("/")[2]


def _origin(section: Section) -> list[str]:
    command = f"san bench {section.suite}" if section.rows[0].get("suite") else "san train"
    return origin(section.rows, command).split("\n\n")
