"""Short recipes: default values, `extends`, and what is wrong with either."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from tests.bench.config.refusals import message

from san_bench.config.recipe import load_recipe

SHORT = """
task: folder
data: photos
model: embedded
method: {kind: san}
optimizer: {lr: 0.01, epochs: 3, batch_size: 32}
"""


def test_a_recipe_states_only_what_has_no_standard_value(write):
    recipe = load_recipe(write("mine.yaml", SHORT))
    assert recipe.output == "runs/mine"
    assert (recipe.seed, recipe.precision, recipe.selection, recipe.train_split) == (0, "fp32", "last", "train")
    assert (recipe.method.propagation, recipe.method.train_norms) == ("all", True)
    whole = yaml.safe_load(recipe.to_yaml())
    assert whole["augmentation"]["flip"] is False
    assert whole["optimizer"]["max_grad_norm"] == 1.0
    assert load_recipe(write("whole.yaml", recipe.to_yaml())) == recipe


@pytest.mark.parametrize("kind", ["ssf", "lora", "dora", "san-lora", "san-dora", "linear", "norm", "bitfit", "full"])
def test_methods_have_default_values(write, kind):
    assert load_recipe(write("mine.yaml", SHORT.replace("kind: san", f"kind: {kind}"))).method.kind == kind


def test_text_and_conversations_have_default_values(write):
    text = SHORT.replace("task: folder", "task: instructions")
    scoring = "text: {}\nscoring: {ways: [exact]}\n"
    assert load_recipe(write("mine.yaml", text + scoring)).text.template == "clean"
    talk = SHORT.replace("task: folder", "task: conversations") + "conversation: {}\n"
    assert load_recipe(write("mine.yaml", talk)).answering.benchmarks == ()


def test_extends_states_what_differs(write):
    mine = load_recipe(write("mine.yaml", "extends: demo/san\noptimizer: {lr: 0.5}\nseed: 3\n"))
    shipped = load_recipe("demo/san", {"optimizer.lr": 0.5, "seed": 3, "output": "runs/mine"})
    assert mine == shipped
    assert mine.fingerprint == shipped.fingerprint
    assert mine.output == "runs/mine", "two recipes with one base have two folders"


def test_a_file_extends_a_file_beside_it_that_extends_another(write):
    write("base/a.yaml", "extends: demo/san\noptimizer: {lr: 0.5, epochs: 9}\noutput: runs/a\n")
    write("b.yaml", "extends: base/a.yaml\noptimizer: {lr: 0.25}\n")
    mine = load_recipe(write("c.yaml", "extends: b.yaml\nseed: 1\noutput: here\n"), ["optimizer.epochs=2"])
    assert (mine.optimizer.lr, mine.optimizer.epochs, mine.seed, mine.output) == (0.25, 2, 1, "here")


def test_another_method_inherits_none_of_its_settings(write):
    mine = load_recipe(write("mine.yaml", "extends: demo/san\nmethod: {kind: lora, rank: 4}\n"))
    assert (mine.method.kind, mine.method.rank, mine.method.alpha) == ("lora", 4, 16.0)
    same = load_recipe(write("mine.yaml", "extends: demo/lora-r8\nmethod: {kind: lora, rank: 4}\n"))
    assert same.method.targets == load_recipe("demo/lora-r8").method.targets
    assert load_recipe("demo/san", ["method.kind=lora", "method.rank=2"]).method.rank == 2
    assert load_recipe("demo/san", ["method.rank=2", "method.kind=lora"]).method.rank == 2


def test_errors_name_the_file_and_line_they_are_in(write):
    base = write("base.yaml", "extends: demo/san\nseed: x\noptimizer:\n  lrr: 1\n")
    mine = write("mine.yaml", "extends: base.yaml\n\nprecision: fp31\n")
    said = message(mine, ["optimizer.lr=fast"]).splitlines()
    assert len(said) == 4
    assert any(line.startswith(f"{base}:2: seed: ") for line in said)
    assert any(line.startswith(f"{base}:4: optimizer.lrr: unknown key.") for line in said)
    assert any(line.startswith(f"{mine}:3: precision: ") for line in said)
    assert any(line.startswith("command line: optimizer.lr: ") for line in said)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("seed: 1\nextends: demo/sam\n", ":2: extends: ", "Did you mean 'demo/san'?"),
        ("extends: nowhere.yaml\n", ":1: extends: ", "'nowhere.yaml'"),
        ("extends: [demo/san]\n", ":1: extends: ", "['demo/san']"),
        ("extends:\n", ":1: extends: ", "None"),
        ("extends: mine.yaml\n", ":1: extends: ", "mine.yaml -> mine.yaml"),
    ],
)
def test_a_wrong_base_is_an_error_with_its_line(write, text, place, said):
    path = write("mine.yaml", text)
    assert message(path).startswith(f"{path}{place}")
    assert said in message(path)


def test_recipes_that_extend_each_other_are_an_error(write):
    write("b.yaml", "extends: a.yaml\n")
    path = write("a.yaml", "extends: b.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in message(path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.batch_size=100000000000000000000", "optimizer.batch_size"),
        ("optimizer.epochs=100000000000", "optimizer.epochs"),
        ("method.exponent=1e30", "method.exponent"),
        ("input.size=1000000000", "input.size"),
        ("data_workers=1000000", "data_workers"),
    ],
)
def test_absurd_values_are_refused_before_training(override, key):
    assert message("demo/san", [override]).startswith(f"command line: {key}: ")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{kind: san-lora, host: there, rank: 4}", "method.rank: the adapter in there has its own"),
        ("{kind: san-lora, host: there, from: here}", "method.host: give either"),
        ("{kind: san-lora, rank: null}", "method.rank: may only be null with host"),
        ("{kind: san, host: there}", "method.host: unknown key"),
        ("{kind: san, form: there}", "Did you mean 'from'?"),
    ],
)
def test_the_start_of_a_method_is_checked(write, method, said):
    assert said in message(write("mine.yaml", SHORT.replace("{kind: san}", method)))


def test_a_host_brings_its_own_settings(write):
    recipe = load_recipe(write("mine.yaml", SHORT.replace("kind: san", "kind: san-lora, host: there")))
    assert recipe.method.rank is recipe.method.targets is None
    assert load_recipe(write("again.yaml", recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["patience=2"], "patience: early stopping needs evaluations; set selection to best-val"),
        (["eval_steps=5"], "eval_steps: train800val200 contains the validation split; train on train800"),
        (["selection=best-val", "patience=2"], "selection: train800val200 contains"),
    ],
)
def test_training_data_is_not_what_stops_or_selects(changes, said):
    assert said in message("demo/san", changes)


def test_a_list_is_not_called_a_tuple():
    said = message("language/san", ["scoring.ways=exact"])
    assert said == "command line: scoring.ways: input should be a list such as [a, b], but it is 'exact'."


def test_a_wrong_override_is_refused_before_torch_is_imported():
    program = (
        "import sys, time\nfrom san_bench import cli\nbegan = time.perf_counter()\n"
        "try:\n    cli.main(['train', 'demo/san', 'optimizer.lrr=1'])\n"
        "except SystemExit as stop:\n    assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\nassert time.perf_counter() - began < 3\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("san: command line: optimizer.lrr: unknown key. Did you mean 'lr'?")


@pytest.mark.slow
def test_an_error_from_before_the_import_is_the_packages_own():
    program = (
        "from san_bench.config.strict import san_error\nerror = san_error('x')\n"
        "import san_peft\nassert isinstance(error, san_peft.SanError)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
