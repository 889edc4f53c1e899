"""Suites: what they plan, what they skip, what they survive, and how they choose learning rates."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.bench.small import built

from san_bench import cli
from san_bench.config.recipe import load_recipe, shipped
from san_bench.config.suite import Choice, Suite, best_rates, load_suite, plan, plan_search
from san_bench.image.tasks import load_task
from san_bench.run.evaluate import evaluate
from san_bench.suites.engines import LocalEngine, Outcome
from san_bench.suites.suite import bench, run_job
from san_peft.errors import SanError

SMALL = {"optimizer.epochs": 1, "optimizer.lr": 0.01}
COUNT = ("mini-vision/count",)


class Here:
    """An engine without processes, which fails the methods that it is told to."""

    def __init__(self, fail=()):
        self.fail, self.ran = fail, []

    def run(self, function, jobs):
        for name, job in jobs.items():
            self.ran.append(job["labels"]["method"])
            if job["labels"]["method"] in self.fail:
                yield Outcome(name, None, "no luck\nand its trace")
            else:
                yield Outcome(name, function(job), None)


@pytest.fixture(scope="module")
def suite():
    return load_suite("mini-vision").model_copy(update={"models": {"vit": "embedded"}})


@pytest.mark.parametrize("name", shipped("suites"))
def test_shipped_suites_plan_complete_recipes(name):
    suite = load_suite(name)
    runs = plan(suite, Choice(data=Path("there"), overrides=["optimizer.lr=0.01"]))
    assert len(runs) == (1 if suite.mix else len(suite.tasks)) * len(suite.models) * len(suite.methods)
    assert len({run.recipe.fingerprint for run in runs}) == len(runs)
    assert {run.recipe.eval_split for run in runs} == {"test"}
    if name == "llava":
        with pytest.raises(SanError, match=r"llava .* no val"):
            plan_search(suite, Choice(data=Path("there")))
        return
    assert {run.recipe.eval_split for run in plan_search(suite, Choice(data=Path("there")))} <= {"val", "val200"}


def test_all_wrong_names_come_at_once(suite):
    with pytest.raises(SanError) as caught:
        plan(suite, Choice(("sam",), ("vot",), ("mini-vision/coutn",), seeds=0))
    for words in (
        "method 'sam'. Did you mean 'san'?",
        "model 'vot'",
        "Did you mean 'mini-vision/count'?",
        "but it is 0",
    ):
        assert words in str(caught.value)
    with pytest.raises(SanError, match=r"No learning rate is known for san on vit. Search for them first"):
        plan(suite.model_copy(update={"rates": {}}), Choice(("san",)))
    with pytest.raises(SanError, match=r"mini, san on mini-vision/count: optimizer.epochs: input should be greater"):
        plan(suite, Choice(("san",), tasks=COUNT, overrides={"optimizer.epochs": 0, "optimizer.lr": 1.0}))


def test_rates_of_a_task_go_before_those_of_all(suite):
    rates = {"vit": {"san": {"mini-vision/count": 0.5}, "ssf": 0.25}}
    runs = plan(suite, Choice(("san", "ssf"), tasks=COUNT), rates)
    assert [run.recipe.optimizer.lr for run in runs] == [0.5, 0.25]


def test_the_best_rate_has_the_best_mean_and_ties_go_to_the_smaller(suite):
    trials = [("a", 0.1, 0.5), ("b", 0.1, 0.7), ("a", 0.01, 0.9), ("b", 0.01, 0.3), ("a", 1.0, 0.2), ("b", 1.0, 0.8)]
    rows = [{"backbone": "vit", "method": "san", "task": t, "lr": lr, "accuracy": a} for t, lr, a in trials]
    assert best_rates(suite, rows) == {"vit": {"san": 0.01}}
    each = suite.model_copy(update={"search": suite.search.model_copy(update={"per": "task"})})
    assert best_rates(each, rows) == {"vit": {"san": {"a": 0.01, "b": 1.0}}}


def test_a_search_looks_at_no_test_images(suite):
    trials = plan_search(suite, Choice(("san", "full"), tasks=COUNT))
    assert {(r.recipe.train_split, r.recipe.eval_split) for r in trials} == {("train800", "val200")}
    for words in (["eval_split=test"], ["train_split=train800val200", "optimizer.epochs=1"]):
        asked = plan_search(suite, Choice(("san",), tasks=COUNT, overrides=words))
        assert {(r.recipe.train_split, r.recipe.eval_split) for r in asked} == {("train800", "val200")}
    by_method = {m: sorted(r.recipe.optimizer.lr for r in trials if r.method == m) for m in ("san", "full")}
    assert len(by_method["san"]) == len(by_method["full"]) == 4


def test_a_search_may_keep_to_some_tasks(suite):
    few = suite.search.tasks
    assert {run.task for run in plan_search(suite, Choice(("san",), models=("vit",)))} == set(few) < set(suite.tasks)
    assert {run.task for run in plan_search(suite, Choice(("san",), tasks=(*few[:1], *COUNT)))} == {few[0]}
    assert {run.task for run in plan_search(suite, Choice(("san",), tasks=COUNT))} == set(COUNT)
    data = suite.model_dump()
    for search, problem in (
        ({"per": "task"}, "must be empty"),
        ({"tasks": ["mini-vision/cuont"]}, "mini-vision/cuont"),
    ):
        with pytest.raises(ValidationError, match=problem):
            Suite.model_validate({**data, "search": {**data["search"], **search}})


@pytest.mark.slow
def test_what_is_done_is_skipped_and_what_fails_stops_nothing(suite, tmp_path):
    choice = Choice(("linear", "norm", "san"), tasks=COUNT, overrides=SMALL)
    first = Here(fail=("norm",))
    rows, (failed,) = bench(suite, "mini-vision", choice, tmp_path, first)
    assert first.ran == ["linear", "norm", "san"]
    assert [row["method"] for row in rows] == ["linear", "san"]
    failure = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failed == failure
    assert (failure["method"], failure["seed"], failure["error"]) == ("norm", 0, "no luck\nand its trace")
    assert rows[0]["run"].startswith("runs/mini-vision-count/vit/linear/")
    assert not (tmp_path / rows[0]["run"] / "adapter").exists()
    assert (tmp_path / rows[1]["run"] / "adapter" / "adapter_model.safetensors").exists()
    alone = load_recipe(tmp_path / rows[1]["run"] / "recipe.yaml")
    assert alone.fingerprint == rows[1]["recipe_fingerprint"]

    second = Here()
    rows, failures = bench(suite, "mini-vision", choice, tmp_path, second)
    assert failures == []
    assert second.ran == ["norm"]
    assert [row["method"] for row in rows] == ["linear", "norm", "san"]
    assert (tmp_path / "failures.jsonl").read_text() == ""
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert stored == rows
    assert {"group", "backbone", "suite", "checkpoint_sha256", "energy_joules"} <= set(stored[0])

    third = Here()
    bench(suite, "mini-vision", Choice(("linear",), tasks=COUNT, seeds=2, overrides=SMALL), tmp_path, third)
    assert third.ran == ["linear"], "one more seed"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4, "rows of other choices stay"


def test_all_runs_may_fail_but_not_all_trials(suite, tmp_path):
    choice = Choice(("san",), tasks=COUNT, overrides=SMALL)
    rows, (failure,) = bench(suite, "mini-vision", choice, tmp_path, Here(("san",)))
    assert (rows, failure["error"]) == ([], "no luck\nand its trace")
    with pytest.raises(SanError, match=r"4 trials .*search/failures\.jsonl.*: no luck"):
        bench(suite, "mini-vision", choice, tmp_path, Here(("san",)), search=True)


@pytest.mark.parametrize(("fail", "code"), [(("norm",), 1), (("linear", "norm"), 1), ((), 0)])
def test_the_exit_code_and_the_last_line_tell_of_failures(tmp_path, capsys, monkeypatch, fail, code):
    def run(self, function, jobs):
        for name, job in jobs.items():
            yield (
                Outcome(name, None, "no luck") if job["labels"]["method"] in fail else Outcome(name, [made(job)], None)
            )

    def made(job):
        return {**job["labels"], "task": COUNT[0]}

    monkeypatch.setattr(LocalEngine, "run", run)
    words = ["bench", "mini-vision", "--models", "vit", "--methods", "linear", "norm", "--tasks", *COUNT]
    with pytest.raises(SystemExit) if code else nullcontext() as stop:
        cli.main([*words, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    if code:
        assert stop.value.code == code
        assert err.splitlines()[-1] == f"san: {len(fail)} of 2 runs failed: {tmp_path / 'failures.jsonl'}"
    if len(fail) < 2:
        assert out.splitlines()[-1].startswith(f"{2 - len(fail)} of 2 runs finished: {tmp_path / 'rows.jsonl'}")


def test_missing_data_is_found_before_anything_runs(suite, tmp_path):
    other = suite.model_copy(update={"groups": {"natural": ("vtab/cifar", "vtab/dtd")}})
    engine = Here()
    with pytest.raises(SanError) as caught:
        bench(other, "vtab", Choice(("san",), data=tmp_path / "nowhere", overrides=SMALL), tmp_path / "out", engine)
    assert "vtab/cifar: " in str(caught.value)
    assert "vtab/dtd: " in str(caught.value)
    assert engine.ran == []


@pytest.mark.slow
def test_a_search_writes_the_rates_that_runs_then_use(suite, tmp_path):
    grid = {"default": (1e-6, 0.01)}
    quick = suite.model_copy(update={"search": suite.search.model_copy(update={"grid": grid})})
    choice = Choice(("san",), tasks=("mini-vision/digits",), overrides={"optimizer.epochs": 1})
    rows = bench(quick, "mini-vision", choice, tmp_path, Here(), search=True).rows
    assert json.loads((tmp_path / "rates.json").read_text()) == {"vit": {"san": 0.01}}
    assert [row["lr"] for row in rows] == [0.01]
    trials = [json.loads(line) for line in (tmp_path / "search/rows.jsonl").read_text().splitlines()]
    assert {row["split"] for row in trials} == {"val200"}
    again = Here()
    bench(quick, "mini-vision", choice, tmp_path, again)
    assert again.ran == []


@pytest.mark.slow
def test_trained_adapters_are_scored_in_the_modes_of_a_suite(suite, tmp_path):
    """A run that was killed between training and scoring is not done."""
    several = suite.model_copy(update={"modes": ("neuron", "off")})
    choice = Choice(("linear", "san"), tasks=COUNT, overrides={**SMALL, "optimizer.lr": 0.1})
    linear, san = bench(several, "mini-vision", choice, tmp_path, Here()).rows
    assert "modes" not in linear
    assert set(san["modes"]) == {"neuron", "off"}
    (tmp_path / san["run"] / "eval-test-off.json").unlink()
    again = Here()
    assert bench(several, "mini-vision", choice, tmp_path, again).rows[1] == san
    assert again.ran == ["san"]
    both = evaluate(tmp_path / san["run"])["accuracy"]
    assert (both, san["accuracy"]) == (san["accuracy"], pytest.approx(both))
    assert evaluate(tmp_path / san["run"], mode="neuron")["accuracy"] == san["modes"]["neuron"] != both
    with pytest.raises(SanError, match=r"'off'.*'linear'"):
        evaluate(tmp_path / linear["run"], mode="off")


@pytest.mark.slow
def test_the_command_runs_in_processes(tmp_path, capsys):
    words = ["bench", "mini-vision", "--models", "vit", "--methods", "linear", "--tasks", *COUNT]
    words += ["--out", str(tmp_path / "out")]
    cli.main([*words, "--set", "optimizer.lr=0.01", "optimizer.epochs=1"])
    assert "rows.jsonl" in capsys.readouterr().out
    (command,) = (tmp_path / "out" / "commands.txt").read_text().splitlines()
    assert command.startswith("san bench mini-vision --out ")
    cli.main(["table", str(tmp_path / "out")])
    assert "linear" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "mini-vison"])
    assert stop.value.code == 2
    assert "Did you mean 'mini-vision'?" in capsys.readouterr().err


def test_an_ablation_of_order_trains_other_edges(tmp_path):
    """The broken graph is in the adapter that is saved, and follows from the seed."""
    order, edges = load_suite("order"), {}
    runs = plan(order, Choice(tasks=("mini-vision/digits",), overrides=SMALL))
    task = load_task("digits")
    for run in runs:
        model = built(run.recipe, task)
        edges[run.method] = tuple(map(str, model.base_model.propagation_graph.edges))
    assert edges["san-none"] == ()
    assert len({edges[name] for name in ("san", "san-reversed", "san-skip-one", "san-permuted")}) == 4
    graphs = {run.method: model_graph(run.recipe, task) for run in runs if run.method in ("san", "san-shuffled")}
    assert graphs["san"] != graphs["san-shuffled"]


def model_graph(recipe, task):
    return built(recipe, task).base_model.propagation_graph


def test_a_job_is_what_other_processes_find():
    assert run_job.__module__ == "san_bench.suites.suite"


def test_a_folder_belongs_to_one_suite_which_may_grow(suite, tmp_path):
    """Rows of another suite, other settings of a method, and another protocol are refused; a new method is not."""
    few = suite.model_copy(update={"methods": {name: suite.methods[name] for name in ("linear", "norm")}})
    choice = Choice(("linear",), tasks=COUNT, overrides=SMALL)
    assert len(bench(few, "mine", choice, tmp_path / "out", Here(("linear",))).failures) == 1
    before = (tmp_path / "out" / "suite.yaml").read_bytes()
    changed = few.model_copy(update={"methods": {"linear": suite.methods["norm"]}})
    for other, said in ((changed, "methods.linear"), (few.model_copy(update={"protocol": "vpt"}), "protocol")):
        with pytest.raises(SanError, match=f"holds another suite than mine: {said}"):
            bench(other, "mine", choice, tmp_path / "out", Here())
    assert (tmp_path / "out" / "suite.yaml").read_bytes() == before
    (tmp_path / "out" / "rows.jsonl").write_text('{"run": "a", "suite": "mini-vision"}\n')
    with pytest.raises(SanError, match="results of the suite mini-vision, not of mine"):
        bench(few, "mine", choice, tmp_path / "out", Here())
    (tmp_path / "out" / "rows.jsonl").write_text("")
    bench(suite, "mine", choice, tmp_path / "out", Here(("linear",)))
    assert "san" in load_suite(tmp_path / "out" / "suite.yaml").methods


def test_a_suite_that_fails_before_its_first_run_leaves_no_folder(suite, tmp_path):
    other = suite.model_copy(update={"groups": {"natural": ("vtab/cifar",)}})
    for broken, choice in (
        (other, Choice(("san",), data=tmp_path / "nowhere", overrides=SMALL)),
        (suite, Choice(("sam",))),
    ):
        with pytest.raises(SanError):
            bench(broken, "vtab", choice, tmp_path / "runs" / "out", Here())
    assert not list(tmp_path.iterdir())


def test_damaged_rows_and_rates_are_named(suite, tmp_path):
    choice = Choice(("linear",), tasks=COUNT, overrides=SMALL)
    for name in ("rows.jsonl", "rates.json"):
        (tmp_path / name).write_text('{"run": "a')
        with pytest.raises(SanError, match=name.replace(".", r"\.")):
            bench(suite, "mine", choice, tmp_path, Here())
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
