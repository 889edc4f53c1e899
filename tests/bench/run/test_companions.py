"""What a model needs beside its weights: `san check` and `san train` say the same where it is missing."""

from __future__ import annotations

import shutil

import pytest
from tests.bench.small import small_scale

from san_bench import cli
from san_bench.models.embedded import embedded_path


def said(capsys, *words: str) -> tuple[int, str]:
    try:
        cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


def copy_without(name: str, file: str, folder) -> str:
    shutil.copytree(embedded_path(name), folder)
    for path in folder.glob(file):
        path.unlink()
    return str(folder)


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("recipe", "name", "file", "text"),
    [
        ("demo/san", "vit", "preprocessor_config.json", r"it has no preprocessor_co"),
        ("demo/san", "vit", "config.json", r"it has no config.json"),
        ("language/san", "decoder", "tokenizer*", r"has no tokenizer that transformers can load"),
    ],
)
def test_check_and_train_say_what_is_missing(capsys, tmp_path, verb, recipe, name, file, text):
    folder = copy_without(name, file, tmp_path / "model")
    if file == "config.json":
        (tmp_path / "model" / "preprocessor_config.json").unlink()
    with small_scale():
        code, error = said(capsys, verb, recipe, "--set", f"model={folder}", f"output={tmp_path / 'run'}")
    assert code == 2
    assert text in error
    assert "Traceback" not in error
    if "images" in text:
        assert "Set input.size, input.normalization and input.interpolation" in error
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_recipe_that_says_how_images_are_read_needs_no_file(capsys, tmp_path):
    folder = copy_without("vit", "preprocessor_config.json", tmp_path / "model")
    chosen = ("input.size=32", "input.normalization=inception", "input.interpolation=bilinear")
    assert said(capsys, "check", "demo/san", "--set", f"model={folder}", *chosen) == (0, "")


def test_a_model_that_is_not_there_is_one_message(capsys, tmp_path):
    with small_scale():
        code, error = said(
            capsys, "train", "demo/san", "--set", f"model={tmp_path / 'nowhere'}", f"output={tmp_path / 'run'}"
        )
    assert code == 2
    assert "nowhere cannot be loaded" in error


def test_a_complete_folder_is_fine(capsys, tmp_path):
    folder = copy_without("vit", "PROVENANCE.json", tmp_path / "model")
    assert said(capsys, "check", "demo/san", "--set", f"model={folder}") == (0, "")
