"""Pretrained models inside packages: what is missing is named, what is damaged refused, and the pins are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from san_bench.models import local_model
from san_bench.models.architectures import empty_model
from san_bench.models.real import REAL, RealModel, install_command, missing, real_path
from san_peft import SanError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache with nothing in it."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))


def known(monkeypatch, **changes) -> RealModel:
    """Puts a model of a package of our own into the table."""
    model = RealModel("pretend==1.0", "pretend", "models/weights.bin", "0" * 64, copied, "MIT", "Pretends")
    model = dataclasses.replace(model, **changes)
    monkeypatch.setitem(REAL, "pretend", model)
    return model


def copied(weights: Path, folder: Path) -> None:
    (folder / "weights.bin").write_bytes(weights.read_bytes())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported."""
    home = tmp_path / "site" / "pretend"
    (home / "models").mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "models" / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(home.parent)
    return home


def test_an_unknown_name_is_answered_with_the_close_one():
    for build in (real_path, lambda name: empty_model(f"real/{name}")):
        with pytest.raises(SanError, match=r"no model 'real/smolm2'\. Did you mean 'smollm2'"):
            build("smolm2")
    assert local_model("org/model") is None


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "mine").mkdir(parents=True)
    assert local_model("real/mine") is None


def test_what_is_missing_is_named_with_one_command(monkeypatch):
    known(monkeypatch, reads_with=(("pretend_too", "pretend-too==2.0"), ("numpy", "numpy==2.0")))
    assert missing("pretend") == ["pretend==1.0", "pretend-too==2.0"]
    command = "pip install --no-deps pretend==1.0 pretend-too==2.0 numpy==2.0"
    assert install_command("pretend") == command
    with pytest.raises(SanError, match=rf"needs pretend==1.0 and pretend-too==2.0\..*{re.escape(command)}"):
        real_path("pretend")


def test_the_weights_are_compared_and_nothing_is_imported(package, monkeypatch):
    model = known(monkeypatch)
    digest = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(SanError, match=rf"weights\.bin .*{digest}.* 0{{64}}"):
        real_path("pretend")
    known(monkeypatch, sha256=digest)
    place = real_path("pretend")
    assert (place / "weights.bin").read_bytes() == b"weights"
    assert list(place.parent.iterdir()) == [place]
    (package / "models" / "weights.bin").unlink()
    assert real_path("pretend") == place, "it is in the cache"
    known(monkeypatch, sha256="1" * 64)
    with pytest.raises(SanError, match=rf"pretend .*{model.weights}"):
        real_path("pretend")


def test_the_pins_are_those_of_the_requirements():
    lines = [line for size in ("small", "large") for line in requirements(size)]
    pins = {pin for model in REAL.values() for pin in (model.package, *(pin for _, pin in model.reads_with))}
    with_extras = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(lines) == {pin for pin in pins if pin not in with_extras}
    assert len(lines) == len(set(lines))
    for model in REAL.values():
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
    assert len({model.sha256 for model in REAL.values()}) == len(REAL)


def requirements(size: str) -> list[str]:
    text = (ROOT / f"tests/real/requirements-{size}.txt").read_text(encoding="utf-8")
    found = [line.split(" ")[0] for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert text.count("--hash=sha256:") >= len(found)
    return found


def test_the_page_shows_the_pins():
    page = (ROOT / "docs/guides/real-models.md").read_text(encoding="utf-8")
    for name, model in REAL.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `real/{name}` "))
        wanted = install_command(name).removeprefix("pip install --no-deps ").replace(" timm==1.0.31", "")
        assert f"`{wanted}`" in row
        assert model.licence.split(",")[0] in row
