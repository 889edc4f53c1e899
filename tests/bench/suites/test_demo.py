"""The demo: what it writes, what it checks, and the table in the README."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.bench import jobs
from tests.bench.small import SHORT, SIZES, small_scale

from san_bench import cli
from san_bench.config.recipe import load_recipe
from san_bench.image import tasks as vision
from san_bench.report.tables.table import COLUMNS, demo_cells, demo_to_markdown, notes, origin, wilson
from san_bench.run import train as training
from san_bench.suites import demo as demo_module
from san_bench.suites.demo import demo
from san_bench.suites.engines import in_fresh_process
from san_peft.errors import MergeError, SanError

pytestmark = pytest.mark.slow

METHODS = ("san", "linear")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cut():
    """The demo in this process, on the small task, with short recipes."""
    with small_scale() as patch:
        patch.setattr(demo_module, "in_fresh_process", lambda function, value: function(value))
        patch.setattr(demo_module, "load_recipe", lambda name, changes: load_recipe(name, {**SHORT, **changes}))
        yield


@pytest.fixture(scope="module")
def done(cut, tmp_path_factory):
    """A demo that has run: its folder and rows."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, METHODS)


def table_of(text):
    """Cells of the first Markdown table of a text, by method."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert set("".join(rows[1])) <= {":", "-"}
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert tuple(rows[0]) == COLUMNS
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def test_it_writes_rows_table_and_plots(done):
    out, rows = done
    assert {p.name for p in out.iterdir()} == {"san", "linear", "results.jsonl", "table.md", "curves.png", "scales.png"}
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == rows
    assert [row["run"] for row in rows] == list(METHODS)
    for row in rows:
        assert {"recipe_fingerprint", "task_fingerprint", "seed", "versions", "commit", "cpu", "threads"} <= set(row)
        assert row.items() >= json.loads((out / row["run"] / "result.json").read_text()).items()
    for name in ("curves.png", "scales.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 10_000


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


def test_the_saved_adapter_was_loaded_and_merged(done):
    _, (san, linear) = done
    assert san["reload_max_abs_difference"] == 0.0
    assert 0.0 < san["merge_max_abs_difference"] < 1e-3
    assert san["merge_changed_classes"] == 0
    assert "merge_max_abs_difference" not in linear


def test_again_it_prints_the_table_and_trains_nothing(done, capsys, monkeypatch):
    out, rows = done
    before = (out / "table.md").read_text()
    monkeypatch.setattr(training, "with_method", lambda *_: pytest.fail("it was trained again"))
    cli.main(["demo", "--out", str(out), "--methods", *METHODS])
    printed = capsys.readouterr().out
    assert "linear probe" in printed
    assert f"{rows[0]['correct']} / {SIZES['test']}" in printed
    assert "all 40 predicted classes are the same" in printed
    assert (out / "table.md").read_text() == before


def test_an_adapter_that_was_changed_is_found_out(done, tmp_path):
    out, _ = done
    file = out / "san" / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    scale = next(name for name in tensors if "fc1.san_scale" in name)
    save_file({**tensors, scale: tensors[scale] + 3.0}, file)
    try:
        with pytest.raises(SanError, match=r"san\b.* \d+ of 40"):
            demo(out, ("san",))
    finally:
        file.write_bytes(whole)


def test_a_merge_that_changes_outputs_is_found_out(done, monkeypatch):
    from san_peft.tuner import merge

    fold = merge.fold

    def wrong(*tensors, **options):
        weight, bias = fold(*tensors, **options)
        return weight * 1.05, bias

    monkeypatch.setattr(merge, "fold", wrong)
    with pytest.raises(MergeError, match="the tolerance of"):
        demo(done[0], ("san",))


def test_runs_of_other_recipes_are_refused_before_anything_is_trained(done, cut, monkeypatch):
    out, _ = done
    changed = {**SHORT, "seed": 9}
    monkeypatch.setattr(demo_module, "load_recipe", lambda name, changes: load_recipe(name, {**changed, **changes}))
    with pytest.raises(SanError, match=r": san\. .*--out \S*out-2"):
        demo(out, ("ssf", "san"))
    assert not (out / "ssf").exists()


def test_unknown_methods_are_answered_with_known_ones(tmp_path):
    with pytest.raises(SanError, match=r"no method 'lora-eqal'\. Did you mean 'lora-equal'\? Choose from full, linear"):
        demo(tmp_path / "out", ("san", "lora-eqal"))
    assert not (tmp_path / "out").exists()


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "NEEDED", ("sklearn", "matplotlip"))
    with pytest.raises(SanError, match=r'needs matplotlip: pip install "san-peft\[demo\]"'):
        demo(tmp_path / "out", METHODS)


def test_a_fresh_process_returns_and_raises():
    assert in_fresh_process(jobs.facts, None)["pid"] != os.getpid()
    with pytest.raises(SanError, match="no task 'digit'"):
        in_fresh_process(vision.load_task, "digit")
    with pytest.raises(SanError, match=r"double_or_die .*SIGKILL"):
        in_fresh_process(jobs.double_or_die, -1)


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (719, 797, 0.8795, 0.9209)],
)
def test_wilsons_interval(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_every_cell_has_its_column(done):
    assert len(demo_cells(done[1][0])) == len(COLUMNS)


def test_rows_that_differ_in_origin_say_so(done):
    _, (san, linear) = done
    same = origin([san, linear], "san demo")
    assert same.count("\n") == 0
    assert same.startswith("Measured ")
    other = {**linear, "commit": "abc", "finished": "2020-01-02T00:00:00+00:00"}
    first, second = origin([san, other], "san demo").split("\n\n")
    assert first.startswith("SAN: measured ")
    assert second.startswith("Linear probe: measured 2020-01-02 by `san demo`; commit abc; ")


def test_a_resumed_run_says_so(done):
    assert "SAN was interrupted and resumed at step 6." in demo_to_markdown(
        [{**done[1][0], "resumed_from_step": 6}], "x"
    )


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
