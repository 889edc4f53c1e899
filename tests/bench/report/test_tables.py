"""Tables of suites, by hand-computed numbers; the renderers; the command."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console
from tests.bench.rows import made_up

from san_bench.report.tables.render import show, to_csv, to_latex, to_markdown
from san_bench.report.tables.table import table_command, tables
from san_bench.run.provenance import write_rows
from san_bench.run.results import Cell, ResultTable
from san_peft.errors import SanError

GROUP = {"a": "natural", "b": "natural", "c": "structured"}
SAN = {"a": [0.90, 0.92], "b": [0.80, 0.88], "c": [0.50, 0.53]}
LORA = {"a": [0.88, 0.92], "b": [0.81, 0.83], "c": [0.40, 0.45]}


def suite(method, accuracies, **changes):
    """Rows of one method: accuracies by task, from seed 0 on; `None` for a run that is missing."""
    return [
        made_up(f"mini-vision/{task}", method, seed, value, **{"group": GROUP[task], **changes})
        for task, values in accuracies.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


def texts(table, method):
    """Texts of a line by column."""
    (row,) = (row for row in table.rows if row[0].text == method)
    return {column: cell.text for column, cell in zip(table.columns, row, strict=True)}


@pytest.fixture
def both():
    return suite("san", SAN) + suite("lora-r8", LORA)


def test_a_suite_has_means_tasks_differences_and_cost(both):
    assert [table.title for table in tables(both)] == [
        f"mini-vision, vit (embedded), test: {what}"
        for what in ("means", "natural", "structured", "difference to san", "cost")
    ]
    assert all(len(row) == len(table.columns) for table in tables(both) for row in table.rows)


def test_modes_stand_beside_what_was_trained(both):
    for row in both:
        if row["method"] == "san":
            row["modes"] = {"neuron": row["accuracy"] - 0.1, "synapse": 0.25, "off": 0.2}
    (modes,) = [table for table in tables(both) if table.title.endswith("modes")]
    assert texts(modes, "san") == {
        "Method": "san",
        "n": "2",
        "both: as trained": "75.5 ± 3.1",
        "neuron: own scales alone": "65.5 ± 3.1",
        "synapse: propagated scales alone": "25.0 ± 0.0",
        "off: none": "20.0 ± 0.0",
    }
    assert [row[0].text for row in modes.rows] == ["san"]


def test_means_over_groups_tasks_and_groups_of_groups(both):
    means = tables(both)[0]
    assert [row[0].text for row in means.rows] == ["lora-r8", "san"]
    assert texts(means, "san") == {
        "Method": "san",
        "Selection": "last",
        "n": "2",
        "Parameters, M": "0.01",
        "natural": "87.5 ± 3.5",
        "structured": "51.5 ± 2.1",
        "Mean of 3 tasks": "75.5 ± 3.1",
        "Mean of 2 groups": "69.5 ± 2.8",
    }
    assert means.rows[1][6].value == pytest.approx(75.5)


def test_one_group_is_not_told_twice():
    alone = {task: SAN[task] for task in "ab"}
    means, _, difference, *_ = tables(suite("san", alone) + suite("ssf", alone))
    assert means.columns == ("Method", "Selection", "n", "Parameters, M", "Mean of 2 tasks")
    assert difference.columns[3:5] == ("All tasks", "Better / equal / worse")
    assert len(difference.rows[0]) == len(difference.columns)


def test_one_task_has_no_table_of_means():
    first, *_ = tables(suite("san", {"a": SAN["a"]}) + suite("ssf", {"a": SAN["a"]}))
    assert first.columns == ("Method", "Selection", "n", "Parameters, M", "a")


def test_accuracy_by_task(both):
    _, natural, structured, *_ = tables(both)
    assert natural.columns == ("Method", "Selection", "n", "Parameters, M", "a", "b")
    assert texts(natural, "san")["a"] == "91.0 ± 1.4"
    assert texts(natural, "san")["b"] == "84.0 ± 5.7"
    assert texts(structured, "lora-r8")["c"] == "42.5 ± 3.5"
    assert natural.rows[1][4].hint == "seeds 0, 1; 1,000 images"


def test_an_incomplete_suite_says_how_much_is_there():
    rows = suite("san", SAN) + suite("ssf", {"a": [0.9, 0.9], "c": [0.5, None]})
    means, natural, *_ = tables(rows)
    line = texts(means, "ssf")
    assert line["natural"] == "1 of 2 tasks"
    assert line["structured"] == "50.0"
    assert (line["Mean of 3 tasks"], line["Mean of 2 groups"]) == ("2 of 3 tasks", "2 of 3 tasks")
    assert line["n"] == "1"
    assert (texts(natural, "ssf")["a"], texts(natural, "ssf")["b"]) == ("90.0 ± 0.0", "–")


def test_seeds_without_all_tasks_do_not_enter_a_mean():
    rows = suite("san", {"a": [0.90, 0.92, 0.10], "b": [0.80, 0.88], "c": [0.50, 0.53]})
    means, natural, *_ = tables(rows)
    assert (texts(means, "san")["Mean of 3 tasks"], texts(means, "san")["n"]) == ("75.5 ± 3.1", "2")
    assert texts(means, "san")["natural"] == "87.5 ± 3.5"
    assert texts(natural, "san")["n"] == "3"
    assert texts(natural, "san")["b"] == "84.0 ± 5.7 (n = 2)"


def test_tasks_that_share_no_seed_have_no_mean():
    rows = suite("san", {"a": [0.9, None], "b": [None, 0.8], "c": [0.5, 0.6]})
    assert texts(tables(rows)[0], "san")["Mean of 3 tasks"] == "no seed has all tasks"


def test_one_seed_has_no_spread_but_the_interval_of_its_images():
    row = made_up("digits", "san", 3, 0.9, suite=None)
    (accuracy, cost) = tables([row])
    assert accuracy.title == "digits, vit (embedded), test: accuracy"
    assert texts(accuracy, "san")["digits"] == "90.0"
    assert accuracy.rows[0][-1].hint == "seed 3; 95% interval over 1,000 images: 88.0% to 91.7%"
    assert "Measured 2026-01-02 by `san train`" in accuracy.notes[-1]
    assert cost.rows


def test_tasks_that_were_not_run_count_in_a_known_suite():
    rows = [made_up(f"vtab/{task}", "san", 0, 0.5, group="natural") for task in ("cifar", "dtd")]
    means, natural, _ = tables(rows)
    assert texts(means, "san")["Mean of 19 tasks"] == "2 of 19 tasks"
    assert texts(means, "san")["natural"] == "2 of 7 tasks"
    assert natural.columns[4:] == ("cifar", "dtd")
    assert "published" not in to_markdown(means), "the embedded model is no ViT-B/16"


# ---------------------------------------------------------------------------------------------- differences


def test_differences_are_paired_by_task_and_seed(both):
    line = texts(tables(both)[3], "lora-r8")
    assert line["Tasks"] == "3 of 3"
    assert line["All tasks"] == "−4.0 [−10.0, +1.0] (6)"
    assert line["natural"] == "−1.5 ± 2.6 (4)"
    assert line["structured"] == "−9.0 ± 1.4 (2)"
    assert line["Better / equal / worse"] == "0 / 0 / 3"
    assert line["Most gained"] == "–"
    assert line["Most lost"] == "c −9.0 ± 1.4 (2)"


def test_the_reference_can_be_chosen(both):
    table = tables(both, reference="lora-r8")[3]
    assert table.title.endswith("difference to lora-r8")
    line = texts(table, "san")
    assert line["All tasks"] == "+4.0 [−1.0, +10.0] (6)"
    assert line["Most gained"] == "c +9.0 ± 1.4 (2)"
    assert line["Better / equal / worse"] == "3 / 0 / 0"


def test_an_unknown_reference_is_answered_with_known_ones(both):
    with pytest.raises(SanError, match=r"'lora-r9'.* 'lora-r8'.*: lora-r8, san\."):
        tables(both, reference="lora-r9")


def test_runs_without_a_partner_do_not_count():
    rows = suite("san", {"a": [0.9], "b": [0.8]}) + suite("ssf", {"a": [0.8, 0.1], "c": [0.5]})
    table = next(table for table in tables(rows) if "difference" in table.title)
    line = texts(table, "ssf")
    assert line["All tasks"] == "−10.0 (1)"
    assert line["Tasks"] == "1 of 3"
    assert line["structured"] == "–"
    assert any(note.startswith("2 runs ") for note in table.notes)


def test_other_protocols_are_no_pairs():
    rows = suite("san", SAN) + suite("ssf", SAN, protocol="ssf", selection="best-test")
    table = next(table for table in tables(rows) if "difference" in table.title)
    assert texts(table, "ssf")["All tasks"] == "–"
    assert texts(table, "ssf")["Better / equal / worse"] == "–"
    assert table.notes[1].startswith("6 runs ")


def test_without_san_the_first_of_its_kind_is_the_reference_or_the_first_method():
    rows = suite("lora-r8", LORA) + suite("full", LORA)
    assert any(table.title.endswith("difference to full") for table in tables(rows))
    own = suite("k=2", SAN, kind="san")
    assert any(table.title.endswith("difference to k=2") for table in tables([*rows, *own]))
    assert not any("difference" in table.title for table in tables(own))


def test_a_choice_by_the_test_split_is_labelled():
    rows = suite("ssf", SAN, protocol="ssf", selection="best-test")
    means = tables(rows)[0]
    assert texts(means, "ssf")["Selection"] == "ssf, best-test (legacy)"
    assert any(note.startswith("best-test (legacy)") for note in means.notes)
    assert not any("legacy" in note for table in tables(suite("san", SAN)) for note in table.notes)


# ----------------------------------------------------------------------------------------------------- cost


def test_cost_is_told_per_machine():
    rows = suite("san", SAN, trainable_head=1000) + suite("ssf", {"a": [0.5, 0.5]})
    rows[0].update(device="Some GPU", train_seconds=2.0, trainable_head=2000, peak_rss_mib=None)
    cost = tables(rows)[-1]
    gpu, cpu = (row for row in cost.rows if row[0].text == "san")
    assert [cell.text for cell in gpu] == ["san", "last", "Some GPU", "1", "10,000", "12,000", "2.0", "5.0", "–"]
    assert [cell.text for cell in cpu][2:5] == ["Some CPU, 2 threads", "5", "11,000"]
    assert cpu[6].text == "10.6 ± 0.5"
    assert cost.columns[-1] == "Peak memory, MiB", "no row knows its energy"


def test_every_table_says_where_it_comes_from(both):
    other = suite("ssf", {"b": [None, 0.5]}, commit="b" * 40, finished="2026-03-01T00:00:00+00:00", resumed_from_step=7)
    for table in tables(both + other):
        second, first, resumed = table.notes[-3:]
        assert first.startswith(
            f"12 runs of lora-r8, san: measured 2026-01-02 by `san bench mini-vision`; commit {'a' * 40}; "
        )
        assert first.endswith("torch 2.9.0, Python 3.12.1; Some CPU, 2 threads, device cpu.")
        assert second.startswith("1 run of ssf: measured 2026-03-01 by")
        assert resumed == "The run of ssf on mini-vision/b, seed 1, was interrupted and resumed at step 7."


# ------------------------------------------------------------------------------------------------ published


def real(suite_name, tasks, model="timm/vit_base_patch16_224.orig_in21k", **changes):
    return [made_up(f"{suite_name}/{task}", "san", 0, 0.7, model=model, **changes) for task in tasks]


def test_published_lines_stand_below_ours_with_their_source():
    means, natural, *_ = tables(real("vtab", ["cifar", "dtd"], group="natural"))
    full = texts(natural, "Full (VPT paper)")
    assert full == {
        "Method": "Full (VPT paper)",
        "Source": "published [1], orig_in21k",
        "Selection": "val200",
        "n": "–",
        "Parameters, M": "85.8",
        "cifar": "68.9",
        "dtd": "64.3",
    }
    assert texts(natural, "san")["Source"] == "measured"
    assert texts(means, "SSF")["Selection"] == "best-test (legacy)"
    assert (texts(means, "SSF")["Mean of 19 tasks"], texts(means, "SSF")["Mean of 3 groups"]) == ("73.1", "75.7")
    own = texts(means, "SAN (paper)")
    assert own["Source"].endswith(", derived")
    assert own["Mean of 3 groups"] == "77.7"
    assert texts(natural, "FacT-TT r≤16")["Source"].endswith(", unconfirmed, orig_in21k")
    assert "SAN (paper)" not in [row[0].text for row in natural.rows]
    assert any(note.startswith("[1] The papers' own numbers, as printed in") for note in natural.notes)
    assert any("up to 8.7 points above full fine-tuning" in note for note in means.notes)
    assert [all(cell.published for cell in row) for row in natural.rows[:2]] == [False, True]


def test_published_lines_can_be_left_out_and_never_stand_where_they_do_not_fit():
    rows = real("vtab", ["cifar"], group="natural")
    for made in (
        tables(rows, published=False),
        tables(real("vtab", ["cifar"], model="timm/vit_small_patch16_224.augreg_in21k", group="natural")),
        tables(real("vtab", ["cifar"], group="natural", split="val200")),
    ):
        assert not any(cell.published for table in made for row in table.rows for cell in row)
        assert not any("Source" in table.columns for table in made)


def test_another_backbone_has_the_means_of_groups_alone():
    means, natural, _ = tables(real("vtab", ["cifar"], "timm/swin_base_patch4_window7_224.ms_in22k", group="natural"))
    line = texts(means, "Convpass")
    assert (line["natural"], line["Mean of 19 tasks"], line["Mean of 3 groups"]) == ("83.1", "–", "78.1")
    assert not any(cell.published for row in natural.rows for cell in row)


def test_published_answers_were_generated():
    """So they stand beside those of ours that were, and not beside choices by likelihood."""
    tasks, changes = ["boolq", "piqa"], {"model": "meta-llama/Meta-Llama-3-8B", "group": "commonsense"}
    made = tables(
        real("commonsense", tasks, way="generation", **changes)
        + real("commonsense", tasks, way="likelihood", **changes)
    )
    assert [" by generation" in table.title for table in made if "Source" in table.columns] == [True]
    line = texts(made[0], "DoRA r32")
    assert (line["boolq"], line["piqa"], line["Mean of 8 tasks"]) == ("74.6", "89.3", "85.2")
    assert any("up to 8.5 points above ChatGPT" in note for note in made[0].notes)


def test_image_classification_has_two_decimals():
    accuracy, _ = tables(real("gic", ["cifar100", "imagenet-1k"]))
    assert texts(accuracy, "san")["Mean of 2 tasks"] == "70.00"
    assert texts(accuracy, "SSF (log)")["cifar100"] == "93.99"
    assert texts(accuracy, "SSF (log)")["imagenet-1k"] == "–"
    assert texts(accuracy, "Full")["Source"].endswith("unconfirmed")


# ------------------------------------------------------------------------------------------------ rendering

PLAIN = ResultTable(
    "50% & more_#1",
    ("Method", "x^2"),
    ((Cell("a\\b {c} ~ $d$ [1]|"), Cell("1.0 ± 0.2 – −3", 1.0)), (Cell("old", published=True), Cell("<2≤3>", 2.0))),
    ("`san` | note & [2].",),
)


def test_latex_escapes_everything():
    assert to_latex(PLAIN).splitlines() == [
        r"\begin{table}",
        r"\caption{50\% \& more\_\#1}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"Method & x\textasciicircum{}2 \\",
        r"\midrule",
        r"a\textbackslash{}b \{c\} \textasciitilde{} \$d\$ {[}1]| & 1.0 $\pm$ 0.2 -- $-$3 \\",
        r"\midrule",
        r"old & $<$2$\le$3$>$ \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\begin{minipage}{\linewidth}\footnotesize \textasciigrave{}san\textasciigrave{} | note \& {[}2]."
        r"\end{minipage}",
        r"\end{table}",
    ]


def test_markdown_keeps_bars_within_cells():
    assert to_markdown(PLAIN).splitlines() == [
        "**50% & more_#1**",
        "",
        "| Method | x^2 |",
        "| :-- | --: |",
        r"| a\b {c} ~ $d$ [1]\| | 1.0 ± 0.2 – −3 |",
        "| old | <2≤3> |",
        "",
        "`san` | note & [2].",
    ]


def test_csv_holds_every_cell_and_note(both):
    made = tables(both)
    lines = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert len(lines) == sum(len(table.rows) * len(table.columns) + len(table.notes) for table in made)
    (line,) = (x for x in lines if x["table"].endswith("means") and x["name"] == "san" and x["column"] == "natural")
    assert (line["text"], float(line["value"]), line["published"]) == ("87.5 ± 3.5", pytest.approx(87.5), "False")
    assert any(x["column"] == "note" and x["text"].startswith("Measured") for x in lines)


def test_the_terminal_shows_brackets_as_they_are(both):
    text = io.StringIO()
    show([*tables(both), PLAIN], Console(file=text, width=160))
    assert "50% & more_#1" in text.getvalue()
    assert "$d$ [1]|" in text.getvalue()
    assert "−1.5 ± 2.6 (4)" in text.getvalue()
    assert "[−" in text.getvalue()


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("form", "has"),
    [
        ("rich", "┃ Mean of 3 tasks ┃"),
        ("markdown", "| Mean of 3 tasks |"),
        ("latex", "& Mean of 3 tasks &"),
        ("csv", ",san,Mean of 3 tasks,75.5 ± 3.1,75.5"),
    ],
)
def test_the_command_prints_and_writes_the_same(tmp_path, capsys, both, form, has):
    write_rows(tmp_path / "rows.jsonl", both)
    table_command([tmp_path], form)
    printed = capsys.readouterr().out
    assert has in printed
    table_command([tmp_path], form, out=tmp_path / "new" / "table.txt")
    assert (tmp_path / "new" / "table.txt").read_text(encoding="utf-8") == printed
    assert capsys.readouterr().out == f"5 tables written to {tmp_path / 'new' / 'table.txt'}\n"


def test_the_command_shows_the_tables_that_are_named(tmp_path, capsys, both):
    write_rows(tmp_path / "rows.jsonl", both)
    table_command([tmp_path], "markdown", only=("means", "difference"))
    out = capsys.readouterr().out
    titles = [line.rpartition(": ")[2] for line in out.splitlines() if "mini-vision, vit (embedded), test: " in line]
    assert [title.strip("*#") for title in titles] == ["means", "difference to san"]
    with pytest.raises(SanError, match=r"maens.*: means, natural, structured, difference"):
        table_command([tmp_path], only=("maens",))


def test_the_command_leaves_published_lines_out_and_takes_a_reference(tmp_path, capsys):
    rows = real("vtab", ["cifar"], group="natural")
    write_rows(tmp_path / "rows.jsonl", [*rows, {**rows[0], "method": "ssf", "kind": "ssf"}])
    table_command([tmp_path], "markdown", reference="ssf")
    assert "published [1]" in (first := capsys.readouterr().out)
    assert "difference to ssf" in first
    table_command([tmp_path], "markdown", published=False)
    assert "published" not in capsys.readouterr().out


def test_a_report_of_good_rows_needs_no_torch(tmp_path, both):
    import subprocess
    import sys

    write_rows(tmp_path / "rows.jsonl", both)
    program = (
        "import sys; from pathlib import Path; from san_bench.report.tables.table import table_command; "
        "table_command([Path(sys.argv[1])], 'csv'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)


def test_scores_of_another_split_than_the_papers_are_marked():
    names = ("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mmbench")
    model = {"backbone": "llava-1.5-7b", "model": "llava-hf/llava-1.5-7b-hf", "way": "generation", "correct": None}
    rows = [
        made_up(f"llava/{name}", method, 0, 0.7, group="vision-language", recipe_fingerprint=method, **model)
        for method in ("san-lora-r128", "lora-r128")
        for name in names
    ]
    accuracy = tables(rows)[0]
    said = texts(accuracy, "san-lora-r128")
    assert [said[name] for name in names] == ["70.0 †", "70.0", "70.0 †", "70.0", "70.0", "70.0", "70.0"]
    assert said["Mean of 7 tasks"] == "70.0 †"
    assert [texts(accuracy, "DoRA r128")[name] for name in ("vqav2", "sqa")] == ["78.6", "69.9"]
    (note,) = [note for note in accuracy.notes if note.startswith("†")]
    assert note == (
        "† Another split than the papers', not comparable with published numbers: vqav2 uses val2014, papers use "
        "test-dev2015; vizwiz uses val, papers use test (8,000 questions)."
    )
    assert r"70.0 $\dagger$" in to_latex(accuracy)
    some = tables([row for row in rows if row["task"] != "llava/vqav2"])[0]
    assert texts(some, "lora-r128")["Mean of 7 tasks"] == "6 of 7 tasks"


def test_other_tables_have_no_mark(both):
    assert not any("†" in to_markdown(table) for table in tables(both))
