"""Recipes: strict, frozen, resolved to all values; every error at once, each with its place."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError
from tests.bench.config.refusals import message

from san_bench.config.recipe import find, load_recipe, shipped
from san_bench.config.suite import Choice, load_suite, plan
from san_peft.errors import SanError

NAMES = sorted(shipped())
TEXT = shipped()["demo/san"].read_text(encoding="utf-8")


@pytest.fixture
def file(write):
    return lambda text: write("mine.yaml", text)


def line_of(text, start):
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(start))


def test_the_demo_ships_its_six_methods():
    assert {n for n in NAMES if n.startswith("demo/")} == {
        f"demo/{n}" for n in ("full", "linear", "lora-equal", "lora-r8", "san", "ssf")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert shipped()[name].read_text(encoding="utf-8").startswith("# "), "its first line says what it is"
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump(mode="json")


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("demo/")])
def test_recipes_of_the_demo_differ_in_method_and_learning_rate_alone(name):
    def common(recipe):
        return {
            **recipe.model_dump(exclude={"method", "output"}),
            "optimizer": recipe.optimizer.model_dump(exclude={"lr"}),
        }

    assert common(load_recipe(name)) == common(load_recipe("demo/san"))
    assert load_recipe(name).output == f"runs/{name}"
    assert load_recipe(name).eval_split == "test"
    assert load_recipe(name).train_split == "train800val200"


def test_what_it_writes_it_reads(file):
    recipe = load_recipe("demo/lora-r8", {"seed": 7})
    assert load_recipe(file(recipe.to_yaml())) == recipe


def test_a_typo_is_an_error_with_line_place_and_suggestion(file):
    text = TEXT.replace("  exponent:", "  expnent:")
    path = file(text)
    line = line_of(text, "expnent")
    said = message(path)
    assert f"{path}:{line}: method.expnent: unknown key. Did you mean 'exponent'?" in said
    assert len(said.splitlines()) == 1


def test_several_errors_come_at_once(file):
    text = (
        TEXT.replace("task: digits", "task: digitz").replace("  epochs: 5", "  epochs: 0").replace("seed: 0", "seed: x")
    )
    path = file(text)
    said = message(path).splitlines()
    assert len(said) == 3
    assert f"{path}:{line_of(text, 'task')}: task: unknown task 'digitz'. Did you mean 'digits'?" in said[0]
    assert f":{line_of(text, 'epochs')}: optimizer.epochs: input should be greater than or equal to 1" in said[1]
    assert f":{line_of(text, 'seed')}: seed: input should be a valid integer, but it is 'x'." in said[2]


@pytest.mark.parametrize(
    "key", ["task", "model", "optimizer", "optimizer.lr", "optimizer.epochs", "method", "method.kind"]
)
def test_a_missing_key_is_an_error(file, key):
    data = yaml.safe_load(TEXT)
    *parents, last = key.split(".")
    del (data[parents[0]] if parents else data)[last]
    assert f"{key}: is missing" in message(file(yaml.safe_dump(data)))


def test_a_key_that_is_there_twice_is_an_error(file):
    text = TEXT + "seed: 1\n"
    path = file(text)
    first, second = line_of(text, "seed"), len(text.splitlines())
    assert message(path).startswith(f"{path}:{second}: seed:")
    assert message(path).endswith(f"line {first}")
    assert "optimizer.lr: " in message(file(TEXT.replace("  epochs:", "  lr: 1.0\n  epochs:")))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.epochs=5.0", "optimizer.epochs: input should be a valid integer, but it is 5.0."),
        ("seed=true", "seed: input should be a valid integer, but it is True."),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number, but it is 'fast'."),
        ("optimizer.lr=0", "optimizer.lr: input should be greater than 0, but it is 0."),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, but it is inf."),
        ("optimizer.lr=.nan", "optimizer.lr: input should be a finite number, but it is nan."),
        ("method.shift=1", "method.shift: input should be a valid boolean, but it is 1."),
        ("model=", "model: input should be a valid string, but it is None."),
        ("method=san", "method: input should be a mapping"),
        ("method.kind=sna", "method.kind: unknown method 'sna'. Did you mean 'san'?"),
        ("method.propagation=al", "method.propagation: 'al' is not valid. Did you mean 'all'?"),
        ("nonsense.key=1", "nonsense: unknown key."),
    ],
)
def test_wrong_values_are_errors(override, said):
    assert f"command line: {said}" in message("demo/san", [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "command line: seed: write key=value, such as optimizer.lr=1e-3."),
        ("=1", "command line: =1: write key=value"),
        ("seed=[1", "command line: seed=[1: '[1' is not YAML."),
        ("seed=2020-13-45", "is not YAML."),
        ("optimizer.lr.x=1", "command line: optimizer.lr.x: 'lr' "),
    ],
)
def test_bad_overrides_say_so(override, said):
    assert said in message("demo/san", [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping"),
        ("- task", "expected a mapping"),
        ("task: [", ":1: not YAML:"),
        ("task: digits\n---\ntask: digits", "not YAML:"),
        ("? [a]: b", ":1: not YAML: found unhashable key"),
        ("a: &x {b: *x}", "not YAML:"),
        ("a: !!python/object/apply:os.getcwd []", ":1: not YAML: could not determine a constructor"),
    ],
)
def test_files_that_hold_no_recipe_say_so(file, text, said):
    path = file(text)
    assert message(path).startswith(f"{path}")
    assert said in message(path)


def test_bytes_that_are_no_text_say_so(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not YAML" in message(path)


def test_validation_images_are_not_trained_with_and_scored():
    assert "eval_split: val200 is part of train800val200" in message("demo/san", ["eval_split=val200"])
    load_recipe("demo/san", ["eval_split=val200", "train_split=train800"])


def test_overrides_are_read_as_yaml():
    recipe = load_recipe("demo/lora-r8", ["optimizer.lr=1e-3", "method.targets=[fc1]", "precision=bf16"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.method.targets == ("fc1",)
    assert recipe.precision == "bf16"


def leaves(data, place=()):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*place, key))
        else:
            yield ".".join((*place, key)), value


OTHER = {
    "train_split": "train800",
    "eval_split": "val200",
    "model": "another",
    "seed": 1,
    "precision": "bf16",
    "checkpoint_steps": 9,
    "method.propagation": "exact",
    "method.exponent": 0.5,
    "method.from": "there",
    "method.graph": "graph.json",
    "optimizer.max_steps": 7,
    "eval_steps": 7,
    "patience": 3,
    "optimizer.lr": 0.004,
    "optimizer.weight_decay": 0.5,
    "optimizer.kind": "sgd",
    "optimizer.accumulation": 2,
    "optimizer.warmup_lr": 0.1,
    "optimizer.min_lr": 0.1,
    "input.size": 64,
    "input.resize": "crop",
    "input.crop_pct": 0.5,
    "input.interpolation": "bicubic",
    "input.normalization": "none",
    "augmentation.crop": "random",
    "augmentation.smallest_crop": 0.5,
    "augmentation.randaugment": "rand-m9-mstd0.5-inc1",
    "augmentation.erasing": 0.25,
    "augmentation.mixup": 0.8,
    "augmentation.cutmix": 1.0,
    "augmentation.smoothing": 0.1,
    "drop_path": 0.1,
    "ema": 0.99,
    "selection": "best-val",
    "protocol": "ssf",
    "data_workers": 2,
    "optimizer.epochs": 6,
    "optimizer.batch_size": 31,
    "optimizer.warmup": 0.2,
    "optimizer.schedule": "linear",
    "optimizer.max_grad_norm": 2.0,
}


def test_the_fingerprint_changes_with_everything_but_the_output():
    base = load_recipe("demo/san", {"train_split": "train800"})
    assert (
        load_recipe("demo/san", {"train_split": "train800", "output": "elsewhere", "data": "there"}).fingerprint
        == base.fingerprint
    )
    seen = {base.fingerprint}
    for key, value in leaves(base.model_dump()):
        if key in {"task", "method.kind", "output", "data"}:  # one choice, another model, and the exceptions
            continue
        other = OTHER.get(key, not value if isinstance(value, bool) else None)
        assert other is not None, f"OTHER needs a value for {key}"
        change = {"train_split": "train800", key: other} if key != "train_split" else {}
        if key == "patience":
            change["selection"] = "best-val"
        fingerprint = load_recipe("demo/san", change).fingerprint
        assert fingerprint not in seen, f"{key} does not change the fingerprint"
        seen.add(fingerprint)
    assert not {load_recipe(name).fingerprint for name in NAMES if name != "demo/san"} & seen


def test_the_fingerprint_is_of_meaning_not_of_text(file):
    data = yaml.safe_load(TEXT)
    turned = yaml.safe_dump(dict(reversed(data.items())), sort_keys=False)
    assert load_recipe(file(turned)).fingerprint == load_recipe("demo/san").fingerprint
    assert load_recipe("demo/san", ["optimizer.max_grad_norm=1"]).fingerprint == load_recipe("demo/san").fingerprint


def test_it_is_frozen():
    recipe = load_recipe("demo/san")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optimizer.lr = 1.0


def test_unknown_names_are_answered_with_known_ones():
    with pytest.raises(
        SanError, match=r"no recipe 'demo/sam'. Did you mean 'demo/san'\? Give a file, or one of demo/full"
    ):
        find("demo/sam")


# The first 12 digits of each, before there were default values, `extends` and fields that were added later.
FINGERPRINTS = {
    "demo/full": "0b193b0cced4",
    "demo/linear": "20edf9e72e57",
    "demo/lora-equal": "317c4f65eeb6",
    "demo/lora-r8": "1357b43dae83",
    "demo/san": "b92926f87263",
    "demo/ssf": "d7e285d3e6b0",
    "hosts/dora": "26d32fdeae26",
    "hosts/lora": "1357b43dae83",
    "hosts/san-dora": "fa4026f051b4",
    "hosts/san-lora": "12ad328b6b16",
    "language/llama-3-8b-san-lora": "13014baa8353",
    "language/llama-7b-lora": "a3ca13a91495",
    "language/san": "53c135522aad",
    "vision-language/llava-1.5-7b-lora": "db35eb8d1563",
    "vision-language/llava-1.5-7b-san-lora": "7c07849c2bf2",
    "vision-language/san": "ac91c7c1843f",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_shipped_recipes_keep_their_fingerprints(name, file):
    recipe = load_recipe(name)
    assert recipe.fingerprint[:12] == FINGERPRINTS[name]
    assert load_recipe(file(recipe.to_yaml())).fingerprint == recipe.fingerprint, "fields at their default count"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.batch_size=100000000000000000000", "optimizer.batch_size: 100000000000000000000 .* 1e\\+15"),
        ("method.exponent=1e30", "method.exponent: 1e\\+30"),
        ("method.exponent=5000", "method.exponent: .*1000"),
        ("input.size=100000", "input.size: .*4096"),
        ("data_workers=100000", "data_workers: .*256"),
        ("optimizer.epochs=100000000000", "optimizer.epochs: "),
        ('output="a\\0b"', "output: .* null character"),
    ],
)
def test_numbers_that_no_training_can_have_are_refused(override, said):
    with pytest.raises(SanError, match=said):
        load_recipe("demo/san", [override])


def test_anchors_expand_to_a_bounded_size(tmp_path):
    """Eight lines once made a message of 226 MB."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join(['*' + m] * 9)}]" for m, n in zip("abcdefg", "bcdefgh", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(SanError, match=r"bomb\.yaml: not YAML: its anchors expand to [\d,]{9,} characters"):
        load_recipe(tmp_path / "bomb.yaml")
    (tmp_path / "many.yaml").write_text("".join(f"key{number}: 1\n" for number in range(200)))
    with pytest.raises(SanError, match=r"and \d{3} more problems"):
        load_recipe(tmp_path / "many.yaml")


def test_a_recipe_is_no_protocol(file):
    """Its task, model and method would be replaced by those of the suite without a word."""
    with pytest.raises(SanError) as caught:
        plan(load_suite("demo"), Choice(protocol=str(file(TEXT))))
    said = str(caught.value)
    assert [key for key in ("task", "model", "method", "output") if f": {key}: a suite sets this" not in said] == []
