"""Subcommands that write, check, list and launch recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from tests.bench.test_cli import run

from san_bench import cli
from san_bench.config.draft import DATA_KINDS, METHODS, draft_recipe
from san_bench.config.recipe import load_recipe, shipped
from san_bench.run.launch import SETTINGS, launch_command
from san_bench.run.listing import list_runs

# ---------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("data", ["", "somewhere"])
@pytest.mark.parametrize("kind", DATA_KINDS)
def test_a_draft_of_every_kind_and_method_is_a_short_valid_recipe(kind, data, tmp_path):
    for method in METHODS:
        path = tmp_path / "mine.yaml"
        path.write_text(draft_recipe(kind, data, "", method))
        recipe = load_recipe(path)
        assert (recipe.method.kind, recipe.data) == (method, data or None)
        assert recipe.model == DATA_KINDS[kind].model
        assert len(path.read_text().splitlines()) <= 15
        assert recipe.train_split not in {"trainval", "train800val200"} or not data


def test_init_asks_four_questions(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked, answers = [], iter(["language", "records", "my/model", ""])
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    code, out, _ = run(capsys, "init")
    assert code == 0
    assert len(asked) == 4
    assert "san check recipe.yaml" in out
    data = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (data["extends"], data["data"], data["model"]) == ("language/san", "records", "my/model")
    assert run(capsys, "check", "recipe.yaml")[0] == 0


def test_init_takes_options_and_overwrites_nothing(capsys, tmp_path):
    words = ["init", "--yes", "--out", str(tmp_path / "mine.yaml"), "--method", "lora"]
    assert run(capsys, *words)[0] == 0
    before = (tmp_path / "mine.yaml").read_text()
    code, _, err = run(capsys, *words, "--data", "there")
    assert (code, (tmp_path / "mine.yaml").read_text()) == (2, before)
    assert "mine.yaml already exists" in err


@pytest.mark.parametrize(
    ("words", "said"), [(["--yes", "--method", "sna"], "'san'"), (["--kind", "image", "--data", "x"], "")]
)
def test_init_refuses_what_is_wrong_and_writes_nothing(words, said, capsys, tmp_path, monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "init", *words)
    assert code == 2
    assert said in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("name", [name for name in shipped(None) if name.startswith(("suites/", "protocols/"))])
def test_every_shipped_suite_and_protocol_is_checked_as_what_it_is(name, capsys):
    code, out, err = run(capsys, "check", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"The {name.partition('s/')[0]} {name} is valid")


def test_a_bad_suite_and_a_bad_protocol_are_told_with_line_and_key(capsys, tmp_path):
    for name, wrong, key in (
        ("suites/mini-vision", "methods:", "methodz"),
        ("protocols/mini", "optimizer:", "optimiser"),
    ):
        path = tmp_path / f"{key}.yaml"
        path.write_text(shipped(None)[name].read_text().replace(f"\n{wrong}", f"\n{key}:"))
        code, _, err = run(capsys, "check", str(path))
        line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(key))
        assert code == 2
        assert f"{path}:{line}: {key}: unknown key." in err
        assert " task: is missing" not in err


def test_values_need_no_option(capsys):
    wanted = load_recipe("demo/san", {"seed": 3, "optimizer.lr": 0.5}).fingerprint
    for words in ("seed=3 optimizer.lr=0.5", "--set seed=3 optimizer.lr=0.5", "seed=3 --set optimizer.lr=0.5"):
        assert wanted in run(capsys, "check", "demo/san", *words.split())[1]


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def folder(tmp_path):
    """A finished run, an interrupted one, one without checkpoints, one with a damaged result, and a failed one."""
    for name in ("done", "stopped", "young", "damaged", "suite/runs/failed"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(load_recipe("demo/san").to_yaml())
    result = {"accuracy": 0.9, "n_test": 797, "split": "test"}
    (tmp_path / "done" / "result.json").write_text(json.dumps(result))
    (tmp_path / "damaged" / "result.json").write_text("{")
    for step in (9, 10):
        (tmp_path / "stopped" / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoints" / "checkpoint-9" / "complete").touch()
    failure = {"run": "runs/failed", "error": "No luck\nand its trace"}
    (tmp_path / "suite" / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    return tmp_path


def test_runs_are_listed_with_their_states(folder):
    found = {run.folder.name: run for run in list_runs(folder)}
    states = {name: run.state for name, run in found.items()}
    assert states == {
        "done": "finished",
        "stopped": "interrupted at step 9",
        "young": "no checkpoint",
        "damaged": "failed",
        "failed": "failed",
    }
    assert found["done"].score == "90.00% of 797 on test"
    assert found["failed"].score == "No luck"
    assert {run.method for run in found.values()} == {"san"}


def test_the_list_of_runs_is_printed_in_whole_words(folder, capsys, tmp_path):
    code, out, _ = run(capsys, "runs", str(folder))
    assert code == 0
    assert len(out.splitlines()) == 6
    assert "interrupted at step 9" in out
    assert str(folder / "suite/runs/failed") in out
    (tmp_path / "empty").mkdir()
    assert run(capsys, "runs", str(tmp_path / "empty"))[1].startswith("There are no runs")
    assert run(capsys, "runs", str(tmp_path / "nowhere"))[0] == 2


# ---------------------------------------------------------------------------------------------- launch


def test_the_command_of_several_gpus():
    words = launch_command(["train", "mine.yaml", "seed=1"], 4, None, "bf16")
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert words[-5:] == ["--module", "san_bench", "train", "mine.yaml", "seed=1"]
    options = " ".join(words)
    assert "--multi_gpu" in words
    assert "--num_processes 4" in options
    assert "--mixed_precision bf16" in options
    assert "--multi_gpu" not in launch_command(["train", "mine.yaml"], 1)


@pytest.mark.parametrize("shard", ["fsdp2", "zero2", "zero3"])
def test_sharding_takes_the_settings_in_the_package(shard):
    words = launch_command(["train", "mine.yaml"], 8, shard)
    assert words[words.index("--config_file") + 1] == str(SETTINGS / f"{shard}.yaml")
    assert (SETTINGS / f"{shard}.yaml").is_file()
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(words[3:])
    assert (parsed.num_processes, parsed.training_script, parsed.module) == (8, "san_bench", True)


@pytest.mark.parametrize(("words", "said"), [(["--gpus", "100000"], "100000"), (["--shard", "fsdp2"], "--gpus")])
def test_what_cannot_be_launched_is_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it was launched"))
    code, _, err = run(capsys, "train", "demo/san", *words)
    assert code == 2
    assert said in err


@pytest.mark.slow
def test_two_processes_are_launched_on_the_cpu(tmp_path):
    words = ["train", "demo/linear", f"output={tmp_path / 'run'}", "optimizer.max_steps=2", "--gpus", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "san_bench", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 2)
    assert done.stdout.count("Next: ") == 1


# ---------------------------------------------------------------------------------------------- version, noise


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, f"san-peft {version('san-peft')}\n", "")


@pytest.mark.slow
def test_the_command_shows_no_warnings_of_other_libraries():
    done = subprocess.run([sys.executable, "-m", "san_bench", "env"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_value_of_train_is_parsed():
    words = "train mine.yaml seed=1 optimizer.lr=1e-3 --dry-run --gpus 2 --shard zero3 --track wandb".split()
    values = ("seed=1", "optimizer.lr=1e-3")
    assert cli.parse(words) == cli.Train("mine.yaml", values, track=("wandb",), dry_run=True, gpus=2, shard="zero3")
