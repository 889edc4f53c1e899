"""The parts of a run: what is trained, what is measured, and where a number comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tests.bench.small import built, short_recipe
from torch import nn

from san_bench.models import adapt as build
from san_bench.models.embedded import EMBEDDED
from san_bench.run import provenance
from san_peft.errors import SanError


def test_parameters_that_are_not_the_methods_are_refused(tmp_path):
    recipe = short_recipe("san", tmp_path)
    model = built(recipe)
    frozen = next(p for name, p in model.named_parameters() if name.endswith("fc1.base_layer.weight"))
    frozen.requires_grad_(True)
    with pytest.raises(SanError, match=r"san .* 1 .*fc1\.base_layer\.weight"):
        build.check_trainable(model, recipe)
    frozen.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier.modules_to_save" in name)
    with pytest.raises(SanError, match=r"san .* 2 "):
        build.check_trainable(model, recipe)
    model.requires_grad_(False)
    with pytest.raises(SanError, match="'classifier'"):
        build.check_trainable(model, recipe)


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("method", ["san", "ssf", "lora-equal", "linear", "full"])
def test_every_small_model_trains_what_the_method_says(name, method, tmp_path):
    """Norms count as such by their class: those before a ConvNeXt's downsampling are not called so."""
    more = {"method__targets": "all-linear"} if method == "lora-equal" else {}
    recipe = short_recipe(method, tmp_path, model=f"embedded/{name}", **more)
    model = built(recipe)
    counts = build.check_trainable(model, recipe)
    assert counts["head"] == 10 * {"vit": 161, "swin": 193, "convnext": 193}[name]
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_full_fine_tuning_freezes_nothing(tmp_path):
    recipe = short_recipe("full", tmp_path)
    model = built(recipe)
    next(iter(model.parameters())).requires_grad_(False)
    with pytest.raises(SanError, match=r"full .* 1 are frozen"):
        build.check_trainable(model, recipe)


class Square(nn.Module):
    """Two layers; the backward pass needs the input of a trained layer and the output of ReLU."""

    def __init__(self, train_first):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        self.first.requires_grad_(train_first)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(("train_first", "numbers"), [(True, 5 * 8 + 5 * 16), (False, 5 * 16)])
def test_saved_activations_are_counted_once_and_without_weights(train_first, numbers):
    model = Square(train_first)
    state = torch.get_rng_state()
    assert build.saved_activation_bytes(model, {"x": torch.randn(5, 8)}) == 4 * numbers
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(state)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with both packages, whose provenance.py asks for its commit."""
    here = tmp_path / "src/san_bench/run/provenance.py"
    for path in (here, tmp_path / "src/san_peft/layer.py", tmp_path / "README.md"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(here))

    def git(*words):
        done = subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return tmp_path, git


def test_the_commit_is_marked_where_either_package_was_changed(checkout):
    folder, git = checkout
    assert provenance._commit() is None  # no checkout yet
    git("init", "-q")
    assert provenance._commit() is None  # it does not track the file
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "commit", "-q", "-m", "t")
    head = git("rev-parse", "HEAD")
    (folder / "README.md").write_text("2\n")
    assert provenance._commit() == head
    (folder / "src/san_peft/layer.py").write_text("2\n")
    assert provenance._commit() == f"{head}+changes"
    git("checkout", "-q", "src")
    (folder / "src/san_peft/new.py").write_text("2\n")
    assert provenance._commit() == f"{head}+changes"


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "file"
    provenance.write_atomically(file, "old")

    def fail(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            provenance.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in file.parent.iterdir()] == ["file"]
    provenance.write_atomically(file, b"\x00new")
    assert file.read_bytes() == b"\x00new"
