"""Runs of every method: trained, stored, scored again, exported; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.bench.small import SIZES, short_recipe, small_scale, small_task
from transformers import AutoModelForImageClassification

from san_bench import cli
from san_bench.image import domain as images
from san_bench.image.domain import base_model, load_predictions
from san_bench.image.preprocess import for_checkpoint
from san_bench.models import adapt as build
from san_bench.models.embedded import embedded_path
from san_bench.run import train as training
from san_bench.run.evaluate import evaluate, export, export_lora, load_model
from san_bench.run.train import train
from san_peft.errors import SanError

KINDS = {
    "san": ("san", {}),
    "ssf": ("ssf", {}),
    "lora": ("lora-equal", {}),
    "dora": ("lora-r8", {"method__kind": "dora", "method__rank": 2}),
    "san-lora": ("hosts/san-lora", {"method__rank": 2}),
    "san-dora": ("hosts/san-dora", {"method__rank": 2, "method__decomposition": "norm"}),
    "linear": ("linear", {}),
    "norm": ("linear", {"method__kind": "norm"}),
    "bitfit": ("linear", {"method__kind": "bitfit"}),
    "full": ("full", {}),
}
HEAD = 160 * 10 + 10


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_scale():
        yield


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A finished run of every method: recipe and result."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {kind: short_recipe(name, folder / kind, **more) for kind, (name, more) in KINDS.items()}
    return {kind: (recipe, train(recipe)) for kind, recipe in recipes.items()}


@pytest.fixture(params=KINDS)
def one(request, runs):
    return runs[request.param]


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_the_result_has_its_origin(one):
    recipe, result = one
    folder = Path(recipe.output)
    files = ["adapter", "log.jsonl", "predictions.safetensors", "recipe.yaml", "result.json"]
    scaled = ["scales.safetensors"] if recipe.method.kind not in build.PLAIN else []
    assert sorted(p.name for p in folder.iterdir()) == files + scaled
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["method"] == recipe.method.kind
    assert result["recipe_fingerprint"] == recipe.fingerprint
    assert result["task_fingerprint"] == small_task().fingerprint
    assert (result["split"], result["n_test"]) == ("test", SIZES["test"])
    assert (result["train_split"], result["n_train"]) == ("train800val200", SIZES["train800val200"])
    assert result["accuracy"] == result["correct"] / result["n_test"]
    assert (result["seed"], result["lr"], result["steps"]) == (0, recipe.optimizer.lr, 8)
    assert {"versions", "commit", "cpu", "threads", "python", "device", "finished"} <= set(result)
    assert result["resumed_from_step"] == 0
    assert result["checkpoint_sha256"] == build.checkpoint_sha256(base_model(recipe, small_task()))
    assert (result["model"], result["selection"], result["protocol"]) == ("embedded", "last", None)
    assert result["saved_activation_mib"] > 0
    assert 0 < result["step_seconds"] < result["train_seconds"]
    assert result["peak_rss_mib"] > result["peak_rss_growth_mib"]
    assert (result["peak_gpu_reserved_mib"] > 0) == torch.cuda.is_available()
    assert result["saved_bytes"] == sum(f.stat().st_size for f in (folder / "adapter").glob("*.safetensors"))
    assert result["total_seconds"] >= result["train_seconds"]


def test_the_log_has_every_step(one):
    recipe, result = one
    rows = [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert result["final_loss"] == steps[-1]["loss"]
    rates = [row["learning_rate"] for row in steps]
    assert max(rates) == pytest.approx(recipe.optimizer.lr)
    assert rates[-1] < rates[4]


def test_what_is_trained_is_the_methods(one, runs):
    """From the files alone: what the adapter holds, or what differs from the pretrained model."""
    recipe, result = one
    kind = recipe.method.kind
    base = base_model(recipe, small_task()).state_dict()
    if kind in build.PLAIN:
        saved = AutoModelForImageClassification.from_pretrained(Path(recipe.output) / "adapter").state_dict()
        assert saved.keys() == base.keys()
        trained = {name for name in saved if not torch.equal(saved[name], base[name])}
        still = set(saved) - trained
        if kind == "full":  # a key's bias cancels in the softmax, so it has no gradient
            assert all(name.endswith("k_proj.bias") for name in still), still
            assert result["trainable_parameters"] == sum(v.numel() for v in saved.values())
        else:
            beside = {
                "linear": set(),
                "norm": {name for name in saved if "norm" in name},
                "bitfit": {name for name in saved if name.endswith(".bias") and not name.startswith("classifier")},
            }[kind]
            assert trained <= beside | {"classifier.weight", "classifier.bias"}
            assert all(name.endswith("k_proj.bias") for name in beside - trained)
            assert result["trainable_parameters"] == HEAD + sum(saved[name].numel() for name in beside)
    else:
        saved = load_file(Path(recipe.output) / "adapter" / "adapter_model.safetensors")
        assert sum(value.numel() for value in saved.values()) == result["trainable_parameters"]
        words = {"san": ("san_scale", "norm"), "ssf": ("san_scale", "san_shift")}.get(kind, ("lora_",))
        rest = {name for name in saved if "classifier" not in name}
        assert all(any(word in name for word in words) for name in rest)
        assert all(any(word in name for name in rest) for word in words)
        zero = {name for name in rest if "san_" in name and not saved[name].any()}
        assert all("k_proj.san_shift" in name for name in zero), zero  # for the same reason
    assert result["trainable_head"] == HEAD


def test_lora_at_equal_parameters_is(runs):
    sizes = {kind: result["trainable_parameters"] - HEAD for kind, (_, result) in runs.items()}
    assert (sizes["san"], sizes["lora"], sizes["linear"]) == (8800, 8960, 0)


def test_scoring_again_gives_the_result(one):
    recipe, result = one
    again = evaluate(recipe.output)
    assert again["mode"] == "both"
    known = again.keys() - {"run", "mode"}
    assert {key: again[key] for key in known} == {key: result[key] for key in known}
    assert json.loads((Path(recipe.output) / "eval-test.json").read_text()) == again
    (Path(recipe.output) / "eval-test.json").unlink()


def test_another_split_can_be_scored(runs, capsys):
    recipe, _ = runs["linear"]
    cli.main(["eval", recipe.output, "--split", "val200"])
    assert f"n_test              {SIZES['val200']}" in capsys.readouterr().out
    (Path(recipe.output) / "eval-val200.json").unlink()
    with pytest.raises(SanError, match=r"has no split 'val'\. Did you mean 'val200'"):
        evaluate(recipe.output, "val")


def test_the_same_recipe_gives_the_same_run(runs, tmp_path):
    """Random state that earlier code left behind does not matter."""
    _, result = runs["dora"]
    torch.manual_seed(123)
    name, more = KINDS["dora"]
    again = train(short_recipe(name, tmp_path / "dora", **more))
    assert (again["final_loss"], again["predictions_sha256"]) == (result["final_loss"], result["predictions_sha256"])


# ---------------------------------------------------------------------------------------------- export


PROGRAM = """
import sys
from datetime import datetime
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
images = load_file(sys.argv[1])["pixel_values"]
for folder in map(Path, sys.argv[2:]):
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        save_file({"logits": model(pixel_values=images).logits}, folder / "again.safetensors")
strange = {"san_peft", "san_bench", "peft"} & set(sys.modules)
assert not strange, strange
"""


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Every run exported by the command, and loaded in one fresh process that imports no code of ours."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("exported")
    for kind, (recipe, _) in runs.items():
        cli.main(["export", recipe.output, "--out", str(folder / kind), "--merged"])
    save_file(
        {"pixel_values": for_checkpoint(small_task()["test"], embedded_path()).batch(40)}, folder / "images.safetensors"
    )
    words = [sys.executable, "-c", PROGRAM, str(folder / "images.safetensors"), *(str(folder / kind) for kind in runs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_exported_models_need_nothing_of_ours(kind, runs, exported):
    recipe, _ = runs[kind]
    names = {p.name for p in (exported / kind).iterdir()}
    assert names == {"config.json", "export.json", "model.safetensors", "preprocessor_config.json", "again.safetensors"}
    logits, expected = load_file(exported / kind / "again.safetensors")["logits"], load_predictions(Path(recipe.output))
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    plain = Path(runs["full"][0].output) / "adapter" / "model.safetensors"
    assert load_file(exported / kind / "model.safetensors").keys() == load_file(plain).keys()


@pytest.mark.parametrize("kind", ["san", "san-lora"])
def test_the_closest_lora_by_the_command(kind, runs, tmp_path, capsys):
    from peft import PeftModel

    recipe, _ = runs[kind]
    lost = []
    for rank in (1, 160):
        cli.main(["export", recipe.output, "--out", str(tmp_path / str(rank)), "--as-lora", str(rank)])
        lines = capsys.readouterr().out.splitlines()
        shown = {first: rest.strip() for first, _, rest in (line.strip().partition(" ") for line in lines)}
        lost.append(float(shown["lost_share_of_the_change"]))
        assert shown["rank"] == str(rank)
    assert lost[0] > lost[1]
    assert lost[1] < 1e-4
    lora = PeftModel.from_pretrained(base_model(recipe, small_task()), tmp_path / "160").eval()
    with torch.no_grad():
        logits = lora(pixel_values=for_checkpoint(small_task()["test"], embedded_path()).batch(40)).logits
    torch.testing.assert_close(logits, load_predictions(Path(recipe.output)), atol=1e-3, rtol=1e-3)


def test_a_run_without_san_has_no_closest_lora(runs, tmp_path):
    with pytest.raises(SanError, match="'linear'"):
        export_lora(runs["linear"][0].output, tmp_path / "out", 2)
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing(runs, exported, tmp_path):
    recipe, _ = runs["san"]
    with pytest.raises(SanError, match=r"is not empty. Choose another with --out"):
        export(recipe.output, exported / "san")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SanError, match=r"file is a file. Choose another with --out"):
        export(recipe.output, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["san", "lora"])
def test_an_export_that_changes_outputs_writes_nothing(kind, runs, tmp_path, monkeypatch):
    recipe, _ = runs[kind]
    model, _ = load_model(recipe.output)
    layer = next(m for name, m in model.named_modules() if name.endswith("fc1"))
    merge = type(layer).merge

    def wrong(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().weight.data *= 1.05

    monkeypatch.setattr(type(layer), "merge", wrong)
    with pytest.raises(SanError, match="the tolerance of"):
        export(recipe.output, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- once, and only this one


def test_a_run_without_a_suite_has_a_table(runs, capsys):
    cli.main(["table", *(runs[kind][0].output for kind in ("san", "linear"))])
    printed = capsys.readouterr().out
    assert "embedded" in printed
    assert "linear" in printed


def test_a_finished_run_is_not_repeated(runs, monkeypatch, capsys):
    recipe, result = runs["san"]
    monkeypatch.setattr(training, "with_method", lambda *_: pytest.fail("it was built again"))
    assert train(recipe) == result
    cli.main(["train", str(Path(recipe.output) / "recipe.yaml")])
    assert f"n_test                {SIZES['test']}" in capsys.readouterr().out


def test_another_recipe_in_the_folder_is_refused(runs):
    recipe, _ = runs["linear"]
    other = short_recipe("linear", Path(recipe.output), seed=1)
    before = {p: p.stat().st_mtime_ns for p in Path(recipe.output).rglob("*")}
    with pytest.raises(SanError) as caught:
        train(other)
    assert recipe.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)
    assert "Choose another output, or remove the folder." in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in Path(recipe.output).rglob("*")} == before


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    recipe = short_recipe("linear", tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml().replace("precision:", "dtype:"))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SanError, match=r"holds a run of another recipe \(unknown, .*yaml:\d+: dtype: unknown key"):
        train(recipe)


def test_a_run_that_has_not_finished_is_not_scored(tmp_path):
    (tmp_path / "recipe.yaml").write_text(short_recipe("linear", tmp_path).to_yaml())
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SanError, match=r"has not finished\. `san train .*recipe.yaml` resumes it"):
        evaluate(tmp_path)


@pytest.mark.parametrize("name", ["san", "full"])
def test_a_loss_that_is_not_finite_stops_at_once(name, tmp_path):
    recipe = short_recipe(name, tmp_path / name, optimizer__lr=1e6)
    with pytest.raises(SanError, match=r"step [2-7]\b.*optimizer\.lr below 1e\+06"):
        train(recipe)
    assert not (tmp_path / name / "result.json").exists()


def test_predictions_that_are_not_finite_are_no_result(tmp_path, monkeypatch):
    nan = torch.full((SIZES["test"], 10), torch.nan)
    monkeypatch.setattr(images, "predict", lambda *_: nan)
    with pytest.raises(SanError, match="predicts values that are not finite"):
        train(short_recipe("linear", tmp_path / "run", optimizer__epochs=1))
    assert not (tmp_path / "run" / "result.json").exists()
