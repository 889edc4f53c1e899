"""Results: reading rows, means with spread and n, intervals, published numbers, and what cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from tests.bench.rows import made_up

from san_bench.report.tables import estimate as estimates
from san_bench.report.tables.estimate import Estimate, bootstrap_interval, estimate, mean_difference, wilson
from san_bench.report.tables.published import backbone_of, claims, published, tasks_of
from san_bench.report.tables.sections import sections
from san_bench.run.provenance import write_rows
from san_bench.run.results import read_rows
from san_peft.errors import SanError

ROW = made_up("mini-vision/count", "san", 0, 0.9)


# ------------------------------------------------------------------------------------------------ reading


def test_suites_runs_and_files_are_read(tmp_path):
    others = [made_up("mini-vision/count", "san", seed, 0.9) for seed in (1, 2, 3)]
    write_rows(tmp_path / "suite" / "rows.jsonl", [ROW, others[0]])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(others[1], indent=2), encoding="utf-8")
    write_rows(tmp_path / "more.jsonl", [others[2]])
    assert read_rows([tmp_path / "suite", tmp_path / "run", tmp_path / "more.jsonl"]) == [ROW, *others]


def test_a_run_that_is_found_twice_counts_once_as_it_finished_last(tmp_path):
    again = {**ROW, "accuracy": 0.91, "finished": "2026-02-01T00:00:00+00:00"}
    write_rows(tmp_path / "a.jsonl", [again, ROW])
    write_rows(tmp_path / "b.jsonl", [ROW])
    assert read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == [again]


def test_one_recipe_under_two_names_or_in_two_suites_counts_twice(tmp_path):
    rows = [ROW, {**ROW, "method": "san-again"}, {**ROW, "suite": "order"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows([tmp_path]) == rows


def test_all_bad_lines_are_named_at_once(tmp_path):
    lacking = {key: value for key, value in ROW.items() if key not in {"seed", "versions"}}
    lines = [json.dumps(ROW), json.dumps(ROW)[:50], "[1]", json.dumps({**ROW, "accuracy": 90.0}), json.dumps(lacking)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(SanError) as caught:
        read_rows([tmp_path, tmp_path / "empty.jsonl", tmp_path / "nowhere", tmp_path / "gone.jsonl"])
    said = str(caught.value).splitlines()
    assert len(said) == 8
    assert f"{tmp_path / 'rows.jsonl'}:2: " in said[1]
    assert "rows.jsonl:3: row: " in said[2]
    assert "rows.jsonl:4: accuracy: " in said[3]
    assert "less than or equal to 1" in said[3]
    assert "rows.jsonl:5: seed: Field required; versions: Field required." in said[4]
    assert "empty.jsonl: empty" in said[5]
    assert "nowhere: has neither rows.jsonl nor result.json" in said[6]
    assert "gone.jsonl: " in said[7]


def test_no_folder_is_an_error():
    with pytest.raises(SanError, match="runs/mini-vision"):
        read_rows([])


def test_a_number_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "train_seconds": float("nan")}), encoding="utf-8")
    with pytest.raises(SanError, match=r"rows\.jsonl:1: train_seconds: .*finite"):
        read_rows([tmp_path])


# --------------------------------------------------------------------------------------------- estimating


@pytest.mark.parametrize(
    ("values", "mean", "sd"),
    [([0.9], 0.9, None), ([1.0, 3.0], 2.0, 2**0.5), ([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0], 5.0, (32 / 7) ** 0.5)],
)
def test_mean_spread_and_n(values, mean, sd):
    assert estimate(values) == Estimate(pytest.approx(mean), sd and pytest.approx(sd), len(values))


def test_the_interval_of_a_share_agrees_with_scipy():
    for correct, n in [(0, 10), (5, 10), (719, 797)]:
        interval = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson(correct, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_all_tasks_weigh_the_same():
    assert mean_difference([[1.0, 1.0, 1.0, 1.0], [3.0]]) == 2.0


def test_with_one_level_it_is_the_usual_bootstrap():
    """One task of many seeds, or many tasks of one seed: the percentile bootstrap of a mean, taken further out."""
    values = np.random.default_rng(1).normal(1.0, 2.0, 25)
    level = 1 - 2 * stats.norm.cdf(-((25 / 24) ** 0.5) * stats.t.ppf(0.975, 24))
    assert 0.95 < level < 0.97
    usual = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=20_000, method="percentile", rng=3)
    usual = usual.confidence_interval
    expected = pytest.approx((usual.low, usual.high), abs=0.05)
    assert bootstrap_interval([values.tolist()]) == expected
    assert bootstrap_interval([[value] for value in values]) == expected


def test_ragged_seeds_are_drawn_from_those_that_are_there():
    low, high = bootstrap_interval([[5.0], [5.0, 5.0, 5.0], [5.0, 5.0]])
    assert (low, high) == (5.0, 5.0)


def test_both_levels_move_the_interval():
    between = bootstrap_interval([[float(task)] * 5 for task in range(6)])
    within = bootstrap_interval([[0.0, 1.0, 2.0, 3.0, 4.0]] * 6)
    both = bootstrap_interval([[task + seed for seed in range(5)] for task in range(6)])
    widths = [high - low for low, high in (between, within, both)]
    assert min(widths) > 0.5
    assert widths[2] > max(widths) - 1e-9
    assert bootstrap_interval([[0.0, 1.0]] * 3, seed=4) == bootstrap_interval([[0.0, 1.0]] * 3, seed=4)


@pytest.mark.parametrize("pairs", [[[1.0]], [[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]])
def test_few_pairs_have_no_interval(pairs):
    assert bootstrap_interval(pairs) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)
    draw, hits, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        pairs = draw.normal(0.5, 1.0, (8, 1)) + draw.normal(0.0, 1.0, (8, 3))
        low, high = bootstrap_interval(pairs.tolist())
        hits += low <= 0.5 <= high
    assert 0.92 < hits / trials < 0.995


# --------------------------------------------------------------------------------------------- comparing


def test_other_data_under_one_name_cannot_be_compared():
    rows = [ROW, made_up("mini-vision/count", "lora-r8", 0, 0.8), made_up("mini-vision/count", "ssf", 0, 0.8)]
    rows[2]["task_fingerprint"] = "another"
    with pytest.raises(SanError) as caught:
        sections(rows)
    assert "- mini-vision/count (vit, test): task_fingerprint is data of mini in 2 (first san, seed 0)" in str(
        caught.value
    )
    assert "but another in 1 (first ssf, seed 0)." in str(caught.value)


def test_everything_that_cannot_be_compared_is_named():
    rows = [
        ROW,
        made_up("mini-vision/count", "ssf", 0, 0.8, n_test=900, train_split="train800"),
        made_up("mini-vision/digits", "ssf", 0, 0.8, checkpoint_sha256="d" * 64),
        made_up("mini-vision/digits", "ssf", 0, 0.7, recipe_fingerprint="other"),
    ]
    with pytest.raises(SanError) as caught:
        sections(rows)
    said = str(caught.value)
    assert "train_split is train800val2" in said
    assert "n_test is 1000 in 1" in said
    assert "embedded (vit, test): checkpoint_sha256 is cccccccccccc in 3" in said
    assert "- ssf on mini-vision/digits (vit) has seed 0 from two recipes: vit mini-vis and other." in said
    assert said.endswith("or remove the runs that do not belong.")


def test_suites_backbones_models_and_splits_have_sections_of_their_own():
    rows = [
        made_up("vtab/cifar", "san", 0, 0.6, suite="paper-vision", backbone="convnext"),
        made_up("vtab/cifar", "san", 0, 0.6, suite="paper-vision", backbone="vit"),
        made_up("fgvc/cub", "san", 0, 0.6, suite="paper-vision"),
        made_up("digits", "san", 0, 0.6, suite=None),
        {**ROW, "split": "val200", "task_fingerprint": "another"},
        ROW,
    ]
    assert [section.title for section in sections(rows)] == [
        "digits, vit (embedded), test",
        "mini-vision, vit (embedded), test",
        "mini-vision, vit (embedded), val200",
        "fgvc of paper-vision, vit (embedded), test",
        "vtab of paper-vision, vit (embedded), test",
        "vtab of paper-vision, convnext (embedded), test",
    ]


def test_the_order_does_not_depend_on_which_run_was_ready_first():
    methods = ["full", "linear", "ssf", "lora-r2", "lora-r16", "san"]
    rows = [made_up("mini-vision/count", method, seed, 0.5) for method in methods for seed in (0, 1)]
    for order in (rows, rows[::-1]):
        (section,) = sections(order)
        assert [line.method for line in section.lines] == methods
        assert [row["seed"] for row in section.rows[:2]] == [0, 1]


# --------------------------------------------------------------------------------------------- published

MEANS = """
Full (VPT paper) 75.89 83.38 47.64 65.57 68.97
Linear (VPT paper) 68.93 77.15 26.85 52.94 57.64
BitFit (VPT paper) 73.30 78.25 44.10 62.05 65.22
Adapter (VPT paper) 70.50 76.97 32.39 55.82 59.95
VPT-Shallow 76.81 79.67 46.98 64.85 67.82
VPT-Deep 78.49 82.42 55.00 69.43 71.97
Adapter h=8 (NOAH paper) 79.01 84.08 58.49 71.44 73.86
AdaptFormer h=8 (Convpass paper) 80.56 84.88 58.83 72.32 74.75
LoRA r=8 on q, v (NOAH paper) 79.49 84.55 59.78 72.25 74.60
NOAH 80.26 84.88 61.30 73.25 75.48
FacT-TT r≤16 80.56 84.95 60.50 73.04 75.34
FacT-TK r≤32 80.64 85.30 60.71 73.23 75.55
SSF 81.57 86.55 58.96 73.10 75.69
RepAdapter 81.63 85.42 61.23 73.84 76.09
Convpass-attn 81.24 84.75 61.55 73.69 75.85
Convpass 81.71 85.30 62.66 74.45 76.56
SCT 82.23 85.90 59.87 73.59 76.00
Hydra 81.83 85.95 61.66 74.21 76.48
DTL 80.83 86.10 63.35 74.58 76.76
HST 82.83 87.12 64.45 75.99 78.13
GPS 83.74 86.78 61.89 75.18 77.47
SNF 83.79 86.12 59.61 74.10 76.51
"""
"""Means by group, over the 19 tasks and over the groups, computed apart from this code."""


def test_published_accuracies_have_the_known_means():
    rows = {row.method: row for row in published("vtab", "ViT-B/16")}
    lines = [line.rsplit(maxsplit=5) for line in MEANS.strip().splitlines()]
    assert [*rows][:-1] == [line[0] for line in lines]
    for method, *means in lines:
        row = rows[method]
        known = [*row.groups.values(), row.mean_of_tasks, row.mean_of_groups]
        assert known == pytest.approx([float(mean) for mean in means], abs=0.0051), method


def test_published_means_of_fgvc_are_the_known_ones():
    text = "88.54 79.32 85.66 88.41 88.02 84.66 89.10 88.48 86.38 90.00 84.78 90.72 90.46 89.50 90.74 91.78"
    known = [float(mean) for mean in text.split()]  # papers took them before they rounded the tasks
    assert [row.mean_of_tasks for row in published("fgvc", "ViT-B/16")] == pytest.approx(known, abs=0.0101)


def test_what_is_not_read_in_the_source_is_marked():
    doubted = {
        (suite, row.method) for suite in ("vtab", "fgvc") for row in published(suite, "ViT-B/16") if not row.confirmed
    }
    assert doubted == {
        ("vtab", "Adapter (VPT paper)"),
        ("vtab", "FacT-TT r≤16"),
        ("vtab", "SAN (paper)"),
        ("fgvc", "Bias (VPT paper)"),
    }
    assert [row.method for row in published("vtab", "ViT-B/16") if row.derived] == ["SAN (paper)"]
    assert [row.method for row in published("vtab", "Swin-B") if row.confirmed] == ["Convpass"]
    confirmed = [row for backbone in ("ViT-B/16", "Swin-B", "ConvNeXt-B") for row in published("gic", backbone)]
    assert [(row.method, *row.accuracy.items()) for row in confirmed if row.confirmed] == [
        ("SSF (log)", ("cifar100", 93.99))
    ]
    assert all(row.source for row in confirmed)


def test_what_is_no_fine_tuned_model_stands_beside_every_one():
    for backbone in ("LLaMA-7B", "LLaMA-13B", "LLaMA-2-7B", "LLaMA-3-8B"):
        first = published("commonsense", backbone)[0]
        assert (first.method, round(first.mean_of_tasks, 1)) == ("ChatGPT, asked", 77.0)
    assert published("commonsense", None) == []


def test_an_unknown_suite_or_backbone_has_nothing():
    assert published("mini-vision", "ViT-B/16") == published("vtab", None) == claims("mini-vision") == []
    assert tasks_of("mini-vision") == {}
    assert len(tasks_of("vtab")) == 19
    assert list(tasks_of("gic").values()) == [None, None]


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("timm/vit_base_patch16_224.orig_in21k", "ViT-B/16"),
        ("vit_base_patch16_224_in21k", "ViT-B/16"),
        ("checkpoints/vit_base_patch16_224.augreg_in21k/", "ViT-B/16"),
        ("timm/swin_base_patch4_window7_224.ms_in22k", "Swin-B"),
        ("facebook/convnext-base-224-22k", "ConvNeXt-B"),
        ("timm/convnext_base.fb_in22k", "ConvNeXt-B"),
        ("timm/convnext_base.fb_in22k_ft_in1k", None),
        ("timm/vit_base_patch16_224.dino", None),
        ("timm/vit_tiny_patch16_224.augreg_in21k", None),
        ("embedded", None),
        (None, None),
    ],
)
def test_a_checkpoint_is_what_papers_call_it(model, backbone):
    assert backbone_of(model) == backbone
