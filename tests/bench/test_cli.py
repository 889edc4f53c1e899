"""The command `san`: words to verbs, and mistakes to one message and exit code 2."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from san_bench import cli
from san_bench.config.recipe import load_recipe, shipped
from san_bench.config.suite import load_suite


def run(capsys, *words):
    """Exit code, standard output and standard error of a command."""
    try:
        cli.main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ("demo", cli.Demo()),
        ("demo --out there --methods san linear", cli.Demo(Path("there"), ("san", "linear"))),
        ("train demo/san", cli.Train("demo/san")),
        ("train mine.yaml --set seed=1 optimizer.lr=1e-3", cli.Train("mine.yaml", ("seed=1", "optimizer.lr=1e-3"))),
        ("eval runs/demo/san", cli.Eval(Path("runs/demo/san"))),
        ("eval runs/demo/san --split val200", cli.Eval(Path("runs/demo/san"), "val200")),
        ("eval runs/demo/san --mode neuron", cli.Eval(Path("runs/demo/san"), mode="neuron")),
        ("check demo/san --set seed=1", cli.Check("demo/san", ("seed=1",))),
        ("recipes", cli.Recipes()),
        ("recipes --copy demo/san --out mine.yaml", cli.Recipes("demo/san", Path("mine.yaml"))),
        ("env --json", cli.Env(json=True)),
        ("trace here --scheme exact --json", cli.Trace("here", "exact", json=True)),
        ("export runs/demo/san --out there --merged", cli.Export(Path("runs/demo/san"), Path("there"), True)),
        (
            "submission runs/llava vqav2 test.json --out up.json --images there",
            cli.Submission(Path("runs/llava"), "vqav2", Path("test.json"), Path("up.json"), Path("there")),
        ),
        (
            "lmms-eval plain --benchmarks gqa sqa --processes 8",
            cli.LmmsEval(Path("plain"), benchmarks=("gqa", "sqa"), processes=8),
        ),
        ("train demo/san --track wandb", cli.Train("demo/san", track=("wandb",))),
        (
            "bench vtab --methods san ssf --seeds 5 --data there --engine ray --gpus-per-run 0.5",
            cli.Bench("vtab", None, Path("there"), ("san", "ssf"), seeds=5, engine="ray", gpus_per_run=0.5),
        ),
        (
            "table runs/a runs/b --format latex --no-published --reference ssf",
            cli.Table((Path("runs/a"), Path("runs/b")), "latex", False, "ssf"),
        ),
        ("report runs/a --out page.html", cli.Report(Path("runs/a"), Path("page.html"))),
        ("plot runs/a --format svg", cli.Plot(Path("runs/a"), format="svg")),
        ("data check vtab/cifar there --no-images", cli.Data("check", "vtab/cifar", Path("there"), images=False)),
        ("data fetch gic there", cli.Data("fetch", "gic", Path("there"))),
    ],
)
def test_words_become_verbs(words, verb):
    assert cli.parse(words.split()) == verb


def test_a_suites_command_is_written_as_it_can_be_typed():
    words = "bench vtab --out 'my runs' --methods san ssf --seeds 5 --search --set optimizer.lr=0.1 --gpus-per-run 0.5"
    verb = cli.parse(shlex.split(words))
    assert cli.parse(shlex.split(verb.command)[1:]) == verb
    assert verb.command == f"san {words}"


def test_every_verb_has_words_above():
    said = {words.split()[0] for words, _ in test_words_become_verbs.pytestmark[0].args[1]}
    assert said == {cli.name_of(verb) for verb in cli.VERBS}


@pytest.mark.parametrize("words", [["dmeo"], ["train"], ["export", "run"], ["env", "--jsno"]])
def test_words_that_mean_nothing_are_refused(capsys, words):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err


def test_check_prints_the_fingerprint(capsys):
    code, out, err = run(capsys, "check", "demo/san", "--set", "seed=3")
    assert (code, err) == (0, "")
    assert load_recipe("demo/san", {"seed": 3}).fingerprint in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "demo/sam"], "'demo/san'"),
        (["train", "demo/sam"], "'demo/san'"),
        (["check", "demo/san", "--set", "optimizer.lrr=1"], "optimizer.lrr"),
        (["demo", "--methods", "sann"], "'sann'"),
        (["eval", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "there", "--merged"], "nowhere"),
        (["lmms-eval", "nowhere"], "nowhere"),
        (["submission", "run", "gqa", "q.jsonl", "--out", "up.json"], "gqa"),
        (
            ["submission", "run", "vqav2", "q.jsonl", "--out", "up"],
            ".json",
        ),
        (["submission", "run", "vqav2", "q.jsonl", "--out", "up.json"], "q.jsonl"),
        (["export", "run", "--out", "there"], "--as-lora RANK"),
        (["export", "run", "--out", "there", "--merged", "--as-lora", "2"], "--as-lora RANK"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "san: " in err
    assert said in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_bad_file_is_answered_line_by_line(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    text = shipped()["demo/san"].read_text(encoding="utf-8")
    path.write_text(text.replace("seed:", "sede:"), encoding="utf-8")
    code, out, err = run(capsys, "check", str(path))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    assert "'seed'" in next(line for line in err.splitlines() if "sede" in line)


def test_recipes_are_listed_with_what_they_are(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(listed) == list(shipped(None))
    assert {"suites/mini-vision", "protocols/ssf", "demo/san"} <= set(listed)
    assert listed["demo/linear"] == "Linear probe: the frozen model with a trained head."


def test_a_recipe_is_copied_and_nothing_overwritten(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "recipes", "--copy", "demo/san") == (0, "san.yaml\n", "")
    assert load_recipe("san.yaml") == load_recipe("demo/san")
    Path("san.yaml").write_text("mine", encoding="utf-8")
    code, _, err = run(capsys, "recipes", "--copy", "demo/san")
    assert code == 2
    assert err.startswith("san: san.yaml")
    assert "--out" in err
    assert Path("san.yaml").read_text(encoding="utf-8") == "mine"
    assert run(capsys, "recipes", "--copy", "suites/mini-vision", "--out", "my-suite.yaml")[0] == 0
    assert load_suite("my-suite.yaml") == load_suite("mini-vision")
    assert run(capsys, "recipes", "--copy", "demo/ssf", "--out", "new/other.yaml")[0] == 0
    assert load_recipe("new/other.yaml") == load_recipe("demo/ssf")


def test_env_is_json_with_versions(capsys):
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    facts = json.loads(out)
    assert {"san-peft", "torch", "transformers", "peft", "accelerate", "numpy"} <= set(facts["versions"])
    assert {"python", "commit", "cpu", "threads", "device"} <= set(facts)
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert f"torch         {facts['versions']['torch']}" in out


def test_ctrl_c_is_one_message(capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Env, "run", stop)
    code, out, err = run(capsys, "env")
    assert (code, out, err.count("\n")) == (130, "", 1)


def test_a_missing_extra_says_how_to_install_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, out, err = run(capsys, "train", "demo/san", "--set", f"output={tmp_path}/run")
    assert (code, out) == (2, "")
    assert err == 'san: sklearn.datasets is missing: pip install "san-peft[demo]"\n'


def test_an_error_that_is_no_mistake_keeps_its_traceback(monkeypatch):
    def fail(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.Env, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["env"])
