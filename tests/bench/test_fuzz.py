"""Damaged, wrong and hostile files: each command refuses them in one message, and leaves the folder as it was."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.bench.small import short_recipe, small_scale

from san_bench import cli
from san_bench.config.recipe import shipped
from san_bench.models.embedded import asset
from san_bench.run.train import train

SUITES = importlib.util.spec_from_file_location("suite_folders", Path(__file__).with_name("suites.py"))
"""By its path, since the folder of tests `suites/` has the same name."""
suite_folders = importlib.util.module_from_spec(SUITES)
SUITES.loader.exec_module(suite_folders)

RECIPE = shipped()["demo/san"].read_text(encoding="utf-8")
SUITE = shipped("suites")["mini-vision"].read_text(encoding="utf-8")
SECONDS, BYTES = 10, 4096


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of small files."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and os.access(path, os.R_OK) and path.stat().st_size < 100_000
        found[str(path.relative_to(folder))] = path.read_bytes() if small else None
    return found


def outcome(*words: object) -> tuple[Any, str]:
    """Exit code and message of a command; an exception would be a traceback, and passes."""
    error, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            cli.main([str(word) for word in words])
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
    said = error.getvalue()
    assert "Traceback" not in said
    message = said[said.rfind("san: ") :] if "san: " in said else said
    assert len(message.encode("utf-8", "replace")) < BYTES
    assert time.perf_counter() - start < SECONDS
    return code, message


def refused(folder: Path, *words: object) -> str:
    """The message of a command that must fail, and change nothing in a folder."""
    before = listing(folder)
    code, message = outcome(*words)
    assert code == 2, message
    assert message.strip()
    assert listing(folder) == before
    return message


def cuts(content: bytes, count: int, end: int | None = None) -> list[bytes]:
    """The beginnings of a file at evenly spread bytes, the empty one first."""
    size = len(content) if end is None else end
    return [content[: size * place // count] for place in range(count)]


@contextlib.contextmanager
def holding(file: Path, content: bytes):
    """A file with another content."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_bytes(before)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + last] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n"
MERGES += "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + last] * 9)}]}}\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "anchors": BOMB.encode(),
    "merged anchors": MERGES.encode(),
    "an anchor in itself": b"task: &a [*a]\n",
    "anchors of a long text": b"a: &a " + b"x" * 10_000 + b"\nb: [" + b", ".join([b"*a"] * 2_000) + b"]\n",
    "deep lists": b"task: " + b"[" * 5_000,
    "deep lists in a block": b"- " * 8_000,
    "deep mappings": b"{a: " * 4_000,
    "many values": b"a: [" + b"x,\n" * 20_000 + b"]\n",
    "a key that comes often": b"a: 1\n" * 10_000,
    "a long number": b"seed: " + b"9" * 10_000,
    "a long hexadecimal number": b"seed: 0x" + b"f" * 10_000,
    "a sexagesimal number": b"seed: " + b":".join([b"59"] * 5_000),
    "a long key": b"x" * 1_000 + b": 1\n",
    "many keys": b"".join(b"key%d: 1\n" % number for number in range(5_000)),
    "a large file": b"# " + b"x" * 2**20,
    "python": b"task: !!python/object/apply:os.system ['touch evil']\n",
    "a tag of an integer": b"seed: !!int 'x'\n",
    "a tag of a date": b"seed: !!timestamp 'x'\n",
    "a tag of a bool": b"seed: !!bool 'x'\n",
    "a tag of binary data": b"task: !!binary '?'\n",
    "an unknown tag": b"task: !evil x\n",
    "UTF-16": RECIPE.encode("utf-16"),
    "latin-1": "task: é\n".encode("latin-1"),
    "null characters": b"task: \0\n",
    "an escaped null character": RECIPE.replace("task: digits", 'task: "di\\0gits"').encode(),
    "half a surrogate": RECIPE.replace("task: digits", 'task: "\\ud800"').encode(),
    "a list": b"- a\n- b\n",
    "a number": b"1\n",
    "keys that are lists": b"? [a]\n: 1\n",
    "keys that are numbers": b"1: 2\n" + RECIPE.encode(),
    "two documents": RECIPE.encode() + b"---\n" + RECIPE.encode(),
    "a long unknown task": RECIPE.replace("task: digits", f"task: {'x' * 50_000}").encode(),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}
NAMES = (
    "",
    ".",
    "..",
    "/",
    "/dev/null",
    "/proc/self/mem",
    "x" * 300,
    "x" * 5_000,
    "../../etc/passwd",
    "a\nb",
    "\udc80",
)


QUICK = ("empty", "anchors", "an anchor in itself", "python", "UTF-16", "keys that are lists", "a long number")


@pytest.mark.parametrize("name", QUICK)
def test_hostile_recipes_are_refused(name, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(HOSTILE[name])
    refused(tmp_path, "check", tmp_path / "mine.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_each_command_that_reads_yaml(name, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(HOSTILE[name])
    for verb in ("check", "train", "bench"):
        refused(tmp_path, verb, tmp_path / "mine.yaml")
    refused(tmp_path, "bench", "mini-vision", "--protocol", tmp_path / "mine.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["..", "/dev/null", "x" * 300, "\udc80"])
def test_an_odd_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "check", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["check", name], ["bench", name], ["table", name], ["eval", name], ["recipes", "--copy", name]):
        refused(tmp_path, *words)
    if name not in ("", "."):
        refused(tmp_path, "check", "demo/san", "--set", f"optimizer.lr={name}")


EVIL = ("..", "/evil", "a/b", "", ".hidden", "a\nb", "x" * 200, "a\\b")


@pytest.mark.parametrize(
    "name", ["../../evil", *(pytest.param(name, marks=pytest.mark.slow) for name in EVIL)], ids=lambda name: name[:12]
)
@pytest.mark.parametrize("place", ["methods", "models", "groups"])
def test_names_in_a_suite_never_become_paths(place, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    suite = yaml.safe_load(SUITE)
    if place == "groups":
        name = f"mini-vision/{name}" if name in ("", "a\nb", ".hidden") else name
        if name == "a/b":
            name = "a/../b"
        suite["groups"] = {"all": [name]}
        suite["search"]["tasks"] = []
    else:
        suite[place] = {name: next(iter(suite[place].values()))}
    Path("mine.yaml").write_text(yaml.safe_dump(suite))
    said = refused(tmp_path, "bench", "mine.yaml", "--set", "optimizer.lr=0.1", "--out", "out")
    assert place in said


def recipe_cuts(count: int) -> list[bytes]:
    return cuts(RECIPE.encode(), count, RECIPE.index("batch_size:"))  # the last key without a default value


def test_recipes_that_are_cut_off_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in recipe_cuts(5):
        (tmp_path / "mine.yaml").write_bytes(content)
        refused(tmp_path, "check", "mine.yaml")


@pytest.mark.slow
def test_recipes_and_suites_that_are_cut_off_at_many_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in recipe_cuts(150):
        (tmp_path / "mine.yaml").write_bytes(content)
        refused(tmp_path, "check", "mine.yaml")
    for content in cuts(SUITE.encode(), 60, SUITE.index("rates:")):
        (tmp_path / "mine.yaml").write_bytes(content)
        refused(tmp_path, "bench", "mine.yaml", "--out", "out")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from([10**30, -1, 1e300])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
KEYS = [key for key in yaml.safe_load(RECIPE)] + [
    f"{key}.{inner}" for key, value in yaml.safe_load(RECIPE).items() if isinstance(value, dict) for inner in value
]
FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.slow
@FUZZED
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key_is_accepted_or_refused_in_one_message(key, value, tmp_path_factory):
    recipe, (parent, _, inner) = yaml.safe_load(RECIPE), key.partition(".")
    if inner:
        recipe[parent][inner] = value
    else:
        recipe[parent] = value
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    try:
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    except (UnicodeError, ValueError):
        return
    code, message = outcome("check", file)
    assert code in (0, 2)
    assert bool(message) == (code == 2)


@pytest.mark.slow
@FUZZED
@given(content=st.binary(max_size=300))
def test_any_bytes_are_no_recipe(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(content)
    assert outcome("check", file)[0] == 2


@pytest.fixture
def results(tmp_path):
    """A folder of a suite with logs and scales."""
    rows = [suite_folders.row("digits", method, seed) for method in ("san", "ssf") for seed in (0, 1)]
    return suite_folders.write_suite(
        tmp_path / "suite",
        rows,
        losses=lambda _: (2.0, 1.0),
        scales=lambda one: suite_folders.pattern(one["task"], one["seed"]),
    )


def test_damaged_results_are_refused(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage_results(results, tmp_path, 6)


@pytest.mark.slow
def test_results_damaged_at_many_places_are_refused(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage_results(results, tmp_path, 40)


def damage_results(results: Path, root: Path, count: int) -> None:
    rows = results / "rows.jsonl"
    line = rows.read_bytes().splitlines()[0]
    for content in cuts(line, count):
        with holding(rows, content):
            refused(root, "table", results)
            refused(root, "report", results)
    for value in (b"[]", b"1", b"null", b'"x"', b"{}", b"{", b"\xff\xfe", b"NaN", b"[" * 10_000):
        with holding(rows, value):
            refused(root, "table", results)
    for name in ("task", "seed", "accuracy", "n_test", "versions", "recipe_fingerprint", "finished"):
        for value in (None, [], {}, -1, 10**30, "x" * 5_000) if count > 6 else ({},):
            broken = {**json.loads(line), name: value}
            if isinstance(value, str) and isinstance(json.loads(line)[name], str):
                continue
            with holding(rows, json.dumps(broken).encode()):
                refused(root, "table", results) if isinstance(value, dict) and name != "versions" else outcome(
                    "table", results
                )
    first = next(results.glob("runs/*/*/*/*"))
    for name in ("log.jsonl", "scales.safetensors"):
        content = (first / name).read_bytes()
        for part in cuts(content, count)[1:]:
            if not part.rstrip().endswith(b"}"):
                with holding(first / name, part):
                    refused(root, "plot", results, "--out", "plots")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with small_scale():
        folder = tmp_path_factory.mktemp("finished")
        train(short_recipe("san", folder / "run", optimizer__epochs=1, method__shift=True))
        yield folder / "run"


@pytest.mark.slow
def test_runs_with_damaged_files_are_refused(finished):
    """Each file that a command reads, cut off at many bytes, replaced and removed."""
    adapter = finished / "adapter"
    for file, count in ((adapter / "adapter_config.json", 40), (adapter / "adapter_model.safetensors", 25)):
        for content in cuts(file.read_bytes(), count):
            with holding(file, content):
                refused(finished.parent, "eval", finished)
        for content in (b"[]", b"null", b"{}", b"\xff" * 100, b"[" * 100_000):
            with holding(file, content):
                refused(finished.parent, "export", finished, "--out", finished.parent / "plain", "--merged")
    recipe = finished / "recipe.yaml"
    for content in cuts(recipe.read_bytes(), 20, recipe.read_bytes().index(b"output:")):
        with holding(recipe, content):
            refused(finished.parent, "eval", finished)
    words = ("train", recipe, "--set", f"output={finished}")
    for content in cuts((finished / "result.json").read_bytes(), 20):
        with holding(finished / "result.json", content):
            refused(finished.parent, *words)
    away = finished.parent / "away"
    for name in ("adapter", "recipe.yaml", "result.json", "adapter/adapter_config.json"):
        (finished / name).rename(away)
        refused(finished.parent, "eval", finished)
        refused(finished.parent, "export", finished, "--out", finished.parent / "plain", "--merged")
        away.rename(finished / name)
    assert outcome("eval", finished)[0] == 0


@pytest.mark.slow
def test_damaged_models_are_refused_and_leave_no_folder(tmp_path):
    """A model folder whose files are cut off, or hold values of other types; none becomes a run."""
    model, out = tmp_path / "model", tmp_path / "out" / "run"
    with small_scale():
        shutil.copytree(asset("vit"), model)
        words = ("train", "demo/linear", "--set", f"model={model}", f"output={out}", "optimizer.epochs=1")
        config = json.loads((model / "config.json").read_text())
        for name, count in (("config.json", 25), ("preprocessor_config.json", 12), ("model.safetensors", 8)):
            for content in cuts((model / name).read_bytes(), count):
                with holding(model / name, content):
                    refused(tmp_path, *words)
        wrong = ("x", [], {}, -1, 10**15, None)
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size", "image_size"):
            for value in wrong if key != "num_hidden_layers" else wrong[:3]:
                with holding(model / "config.json", json.dumps({**config, key: value}).encode()):
                    refused(tmp_path, *words)
        for value in ("llama", "none", 1, [], None):
            with holding(model / "config.json", json.dumps({**config, "model_type": value}).encode()):
                refused(tmp_path, *words)
    text = tmp_path / "text"
    shutil.copytree(asset("decoder"), text)
    words = ("train", "language/san", "--set", f"model={text}", f"output={out}")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for content in cuts((text / name).read_bytes(), 6)[1:]:
            with holding(text / name, content):
                refused(tmp_path, *words)
    assert not out.parent.exists()


UNWRITABLE = ("/proc/x", "/dev/null/x", "here.txt/x", "x" * 300, "/sys/x")


@pytest.mark.slow
@pytest.mark.parametrize("place", UNWRITABLE)
def test_places_that_cannot_be_written_are_refused(place, finished, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("mine")
    short = ("optimizer.epochs=1", "optimizer.batch_size=16")
    few = ("--models", "vit", "--methods", "linear", "--tasks", "mini-vision/count")
    for words in (
        ("train", "demo/linear", "--set", *short, f"output={place}"),
        ("bench", "mini-vision", *few, "--out", place),
        ("export", finished, "--merged", "--out", place),
        ("export", finished, "--as-lora", "2", "--out", place),
        ("table", results, "--format", "csv", "--out", place),
        ("trace", "embedded", "--json", "--out", place),
        ("recipes", "--copy", "demo/san", "--out", place),
        ("plot", results, "--out", place),
        ("report", results, "--out", place),
        ("data", "check", "vtab/cifar", place),
    ):
        refused(tmp_path, *words)
