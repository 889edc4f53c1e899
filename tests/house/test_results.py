"""Results that the repository keeps: whose code, which rates, and whether the pages still say what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from san_bench.cli import parse
from san_bench.config.recipe import load_recipe
from san_bench.config.suite import Choice, best_rates, load_suite, plan_search
from san_bench.report.tables.table import table_command
from san_bench.run.results import read_rows

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.parent for path in (ROOT / "results").glob("*/rows.jsonl"))
SEARCHED = sorted(path.parents[1] for path in (ROOT / "results").glob("*/search/rows.jsonl"))
PAGE = ROOT / "docs" / "guides" / "evidence.md"
PAGES = (PAGE, *(ROOT / "docs" / "guides" / f"evidence-{name}.md" for name in ("language", "vision-language")))


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_rows_have_their_origin_and_belong_to_the_suite(folder):
    suite = load_suite(folder.name)
    for row in read_rows([folder]):
        assert re.fullmatch("[0-9a-f]{40}", row["commit"]), row["run"]
        assert row["suite"] == folder.name
        assert suite.tasks[row["task"]] == row["group"]
        assert row["split"] == "test"
        assert row["method"] in suite.methods
        rate = suite.rates[row["backbone"]][row["method"]]
        assert row["lr"] == rate, f"{row['run']} has another learning rate than the suite now ships, {rate}"
        assert "/work" not in json.dumps(row)


@pytest.mark.parametrize("folder", SEARCHED, ids=lambda folder: folder.name)
def test_the_rates_that_ship_are_those_that_the_trials_chose(folder):
    trials = read_rows([folder / "search"])
    suite = load_suite(folder.name)
    assert {row["split"] for row in trials} == {run.recipe.eval_split for run in plan_search(suite, Choice())}
    assert {row["task"] for row in trials} == set(suite.search.tasks or suite.tasks)
    assert {row["seed"] for row in trials} == set(suite.search.seeds)
    assert best_rates(suite, trials) == suite.rates
    for backbone, rates in suite.rates.items():
        for method in rates:
            grid = suite.search.grid.get(method, suite.search.grid["default"])
            tried = {row["lr"] for row in trials if (row["backbone"], row["method"]) == (backbone, method)}
            assert tried >= set(grid), f"{method} on {backbone} was not tried with {set(grid) - tried}"


def test_the_rates_of_the_demo_are_those_that_its_trials_chose():
    """Its trials are those of the recipes demo/..., which differ from the suite's in the name of the protocol alone."""
    rows = [json.loads(line) for line in (ROOT / "results/demo/trials.jsonl").read_text(encoding="utf-8").splitlines()]
    suite = load_suite("demo")
    grid, seeds = suite.search.grid["default"], suite.search.seeds
    tried = {(row["recipe"], row["lr"], row["seed"]) for row in rows}
    assert tried == {(method, lr, seed) for method in suite.methods for lr in grid for seed in seeds}
    for row in rows:
        changes = {"optimizer.lr": row["lr"], "seed": row["seed"], "train_split": "train800", "eval_split": "val200"}
        assert load_recipe(f"demo/{row['recipe']}", changes).fingerprint == row["recipe_fingerprint"]
    trials = [{**row, "backbone": "vit", "method": row["recipe"], "task": "digits"} for row in rows]
    assert best_rates(suite, trials) == suite.rates
    assert all(min(grid) < rate < max(grid) for rate in suite.rates["vit"].values()), "a rate lies on the grid's edge"


def test_the_pages_show_the_rows(tmp_path):
    """Every table between marks is what its command, which the page names, makes of the rows now."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    marks = re.findall(r"<!-- (\S+):start -->\n(.*?)<!-- \1:end -->", text, re.S)
    assert sorted(name for name, _ in marks) == [folder.name for folder in KEPT]
    commands = re.sub(r" \\\n\s*", " ", text)
    for name, block in marks:
        (words,) = re.findall(rf"san table results/{name} (.*) --format markdown --out", commands)
        verb: Any = parse(["table", f"results/{name}", *words.split()])
        table_command(
            [ROOT / verb.folders[0]], "markdown", reference=verb.reference, only=verb.only, out=tmp_path / name
        )
        assert block.strip() == (tmp_path / name).read_text(encoding="utf-8").strip(), f"{name}: write it anew"


def compared(backbone):
    command = [sys.executable, ROOT / "scripts" / "compare_variance.py", "san", "ssf", backbone]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(
        r"n = (\S+) runs: (\S+) in .* of (\S+) layers \((\S+) to (\S+)\), below one in (\S+); acting (\S+)", done.stdout
    )
    assert found is not None
    return found.groups()


def test_the_page_says_how_variances_compare():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for words, backbone in (("On the Swin the median is", "swin"), ("on the ConvNeXt", "convnext")):
        _, ratio, layers, low, high, _, acting = compared(backbone)
        assert f"{words} {ratio} ({low} to {high}, {layers} layers; the squares {acting})" in text
    n, ratio, layers, low, high, below, acting = compared("vit")
    assert f"n = {n} runs of each method" in text
    assert (
        f"{ratio} times as much in the median of {layers} layers, from {low} to {high}, and less in {below} of them"
        in text
    )
    assert f"the squares vary {acting} times as much as SSF's scales" in text


def test_the_page_says_how_alike_scales_are():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "results" / "mini-vision" / "similarity.json").read_text(encoding="utf-8"))
    cosines = {(r["backbone"], r["method"]): r for r in found if r["measure"] == "cosine"}
    for title, backbone in (("ViT", "vit"), ("Swin", "swin"), ("ConvNeXt", "convnext")):
        san, ssf = (cosines[backbone, method] for method in ("san", "ssf"))
        row = f"| {title} | {san['n_runs'] // san['n_tasks']} |" + "".join(
            f" {r['intra']:.2f} | {r['inter']:.2f} |" for r in (san, ssf)
        )
        assert row in text
        assert san["p"] == ssf["p"] == 0.0001


def test_the_page_of_texts_says_how_alike_scales_are():
    text = PAGES[1].read_text(encoding="utf-8")
    found = json.loads((ROOT / "results" / "engrams" / "similarity.json").read_text(encoding="utf-8"))
    san, ssf = ({r["method"]: r for r in found if r["measure"] == "cosine"}[name] for name in ("san", "ssf"))
    cells = "".join(f" {r['intra']:.2f} | {r['inter']:.2f} |" for r in (san, ssf))
    assert f"| {san['n_runs'] // san['n_tasks']} |{cells}" in text
    assert san["p"] == ssf["p"] == 0.0001
