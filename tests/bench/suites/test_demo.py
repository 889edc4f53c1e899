"""The demo: what it writes, what it checks, and the table in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.bench.small import SHORT, SIZES, small_scale

from san_bench import cli
from san_bench.config.recipe import load_recipe, shipped
from san_bench.config.suite import Choice, load_suite, plan
from san_bench.report.tables.render import to_markdown
from san_bench.report.tables.table import COLUMNS, demo_cells, demo_table, notes, origin, table_command, wilson
from san_bench.run import train as training
from san_bench.suites import demo as demo_module
from san_bench.suites.demo import demo
from san_bench.suites.engines import Outcome, attempt, import_path
from san_peft.errors import SanError

METHODS = ("san", "linear")
ROOT = Path(__file__).parents[3]


class Here:
    """The engine of the demo, without processes."""

    def __init__(self, *_):
        pass

    def run(self, function, jobs):
        for name, job in jobs.items():
            yield Outcome(name, *attempt(import_path(function), job, None))


@pytest.fixture(scope="module")
def cut():
    """The demo in this process, on the small task, with short runs."""
    short = load_suite("demo").model_copy(update={"settings": {"digits": {**SHORT, "optimizer.decay_vectors": True}}})
    with small_scale() as patch:
        patch.setattr(demo_module, "LocalEngine", Here)
        patch.setattr(demo_module, "load_suite", lambda name: {"demo": short}[name])
        yield


@pytest.fixture(scope="module")
def done(cut, tmp_path_factory):
    """A demo that has run: its folder and rows."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, METHODS).rows


def table_of(text):
    """Cells of the first Markdown table of a text, by method."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert set("".join(rows[1])) <= {":", "-"}
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert tuple(rows[0]) == COLUMNS
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def test_its_runs_are_those_of_the_recipes_of_the_same_names():
    runs = plan(load_suite("demo"), Choice())
    assert {f"demo/{run.method}" for run in runs} == {name for name in shipped() if name.startswith("demo/")}
    for run in runs:
        recipe = load_recipe(f"demo/{run.method}", {"protocol": "mini", "output": run.recipe.output})
        assert run.recipe == recipe


@pytest.mark.slow
def test_it_writes_rows_table_and_plots(done):
    out, rows = done
    written = {"runs", "suite.yaml", "commands.txt", "rows.jsonl", "failures.jsonl"}
    assert {p.name for p in out.iterdir()} == {*written, "table.md", "curves.png", "scales.png"}
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == rows
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert {"recipe_fingerprint", "task_fingerprint", "seed", "versions", "commit", "cpu", "threads"} <= set(row)
    for name in ("curves.png", "scales.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_table_has_the_numbers_of_the_rows(done):
    out, rows = done
    text = (out / "table.md").read_text(encoding="utf-8")
    table = table_of(text)
    assert list(table) == ["SAN", "linear probe"]
    for row, line in zip(rows, table.values(), strict=True):
        assert line["Right / n"] == f"{row['correct']} / {SIZES['test']}"
        assert line["Accuracy"] == f"{100 * row['correct'] / SIZES['test']:.1f}%"
        assert line["with head"] == f"{row['trainable_parameters']:,}"
        assert line["Training, s"] == f"{row['train_seconds']:.1f}"
        assert line["Saved activations, MiB"] == f"{row['saved_activation_mib']:.1f}"
    assert (table["SAN"]["Trained without head"], table["linear probe"]["Trained without head"]) == ("8,800", "0")
    assert f"with seed 0, evaluated once on n = {SIZES['test']} test images" in text
    assert "by `san demo --methods san linear`; commit" in text
    assert rows[0]["versions"]["torch"] in text


@pytest.mark.slow
def test_the_saved_adapter_was_loaded_and_merged(done, capsys):
    out, (san, linear) = done
    assert san["reload_max_abs_difference"] == 0.0
    assert 0.0 < san["merge_max_abs_difference"] < 1e-3
    assert san["merge_changed_predictions"] == 0
    assert "merge_max_abs_difference" not in linear
    said = f"Verified adapters: san. Loaded from disk, .* no prediction, .* {san['merge_max_abs_difference']:.2g}."
    assert re.search(said, (out / "table.md").read_text(encoding="utf-8"))
    table_command([out], "markdown", only=("cost",))
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.slow
def test_again_it_prints_the_table_and_trains_nothing(done, capsys, monkeypatch):
    out, rows = done
    before = (out / "table.md").read_text()
    monkeypatch.setattr(training, "with_method", lambda *_: pytest.fail("it was trained again"))
    cli.main(["demo", "--out", str(out), "--methods", *METHODS])
    printed = capsys.readouterr().out
    assert "linear probe" in printed
    assert f"{rows[0]['correct']} / {SIZES['test']}" in printed
    assert printed.splitlines()[-1].startswith(f"2 of 2 runs finished: {out / 'rows.jsonl'}")
    assert (out / "table.md").read_text() == before


@pytest.mark.slow
def test_fewer_methods_have_a_table_and_curves_of_their_own(done, monkeypatch):
    out, drawn = done[0], []
    monkeypatch.setattr("san_bench.report.figures.plots.write_figure", lambda figure, path: drawn.append(figure))
    try:
        demo(out, ("linear",))
        assert list(table_of((out / "table.md").read_text(encoding="utf-8"))) == ["linear probe"]
        assert [len(figure.axes[0].lines) for figure in drawn] == [1]
    finally:
        demo(out, METHODS)


@pytest.mark.slow
def test_an_adapter_that_was_changed_is_found_out(done, capsys):
    out, (san, _) = done
    file = out / san["run"] / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    scale = next(name for name in tensors if "fc1.san_scale" in name)
    save_file({**tensors, scale: tensors[scale] + 3.0}, file)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo", "--out", str(out), "--methods", *METHODS])
        assert stop.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"san: 1 of 2 runs failed: {out / 'failures.jsonl'}"
        failure = json.loads((out / "failures.jsonl").read_text())
        assert (failure["method"], failure["run"]) == ("san", san["run"])
        assert re.search(r"san/\w+ gives another prediction for \d+ of 40", failure["error"])
    finally:
        file.write_bytes(whole)
    assert demo(out, METHODS).failures == []


@pytest.mark.slow
def test_a_merge_that_changes_outputs_is_found_out(done, monkeypatch):
    from san_peft.tuner import merge

    out, (san, _) = done
    fold = merge.fold

    def wrong(*tensors, **options):
        weight, bias = fold(*tensors, **options)
        return weight * 1.05, bias

    (out / san["run"] / "verified.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(merge, "fold", wrong)
        found = demo(out, ("san",))
    assert found.rows == []
    assert "the tolerance of" in found.failures[0]["error"]
    assert demo(out, METHODS).failures == []


def test_unknown_methods_are_answered_with_known_ones(tmp_path):
    with pytest.raises(SanError, match=r"no method 'lora-eqal'\. Did you mean 'lora-equal'\?"):
        demo(tmp_path / "out", ("san", "lora-eqal"))


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "NEEDED", ("sklearn", "matplotlip"))
    with pytest.raises(SanError, match=r'needs matplotlip: pip install "san-peft\[demo\]"'):
        demo(tmp_path / "out", METHODS)


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (719, 797, 0.8795, 0.9209)],
)
def test_wilsons_interval(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.slow
def test_every_cell_has_its_column(done):
    assert len(demo_cells(done[1][0])) == len(COLUMNS)


@pytest.mark.slow
def test_rows_that_differ_in_origin_say_so(done):
    _, (san, linear) = done
    same = origin([san, linear], "san demo")
    assert same.count("\n") == 0
    assert same.startswith("Measured ")
    other = {**linear, "commit": "abc", "finished": "2020-01-02T00:00:00+00:00"}
    first, second = origin([san, other], "san demo").split("\n\n")
    assert first.startswith("1 run of san: measured ")
    assert second.startswith("1 run of linear: measured 2020-01-02 by `san demo`; commit abc; ")


@pytest.mark.slow
def test_a_resumed_run_says_so(done):
    text = to_markdown(demo_table([{**done[1][0], "resumed_from_step": 6}], "x"))
    assert "The run of san on digits, seed 0, was interrupted and resumed at step 6." in text


@pytest.mark.slow
def test_several_seeds_and_sizes_are_all_named(done):
    san, linear = done[1]
    assert "seed 0, 3, evaluated once on n = 40, 1,000 test" in notes([san, {**linear, "seed": 3, "n_test": 1000}])


def test_the_front_page_has_a_table_with_its_origin():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- results:start -->\n(.*)<!-- results:end -->", text, re.S)
    assert block, "scripts/write_results.py writes between these marks"
    table = table_of(block[1])
    assert list(table) == [
        "SAN",
        "linear probe",
        "SSF",
        "LoRA, rank 1 (as many parameters as SAN)",
        "LoRA, rank 8",
        "full fine-tuning",
    ]
    for line in table.values():
        right, n = map(int, line["Right / n"].split(" / "))
        assert n == 797
        low, high = wilson(right, n)
        assert line["Accuracy"] == f"{right / n:.1%}"
        assert line["95% interval"] == f"{100 * low:.1f}–{100 * high:.1f}%"
        assert int(line["with head"].replace(",", "")) >= int(line["Trained without head"].replace(",", ""))
    assert "n = 797 test images" in block[1]
    assert re.search(r"Measured \d{4}-\d\d-\d\d by `san demo`; commit [0-9a-f]{40}", block[1])
    assert "torch" in block[1]
    assert "threads" in block[1]
