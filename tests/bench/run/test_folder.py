"""Run folders: claimed when training begins, locked while it runs, and gone where nothing was trained."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bench.small import short_recipe, small_scale

from san_bench import cli
from san_bench.config.recipe import load_recipe
from san_bench.run import folder as folders
from san_bench.run.folder import LOCK, check_free, check_unlocked, claimed, held
from san_bench.run.train import train
from san_peft.errors import SanError

HOLD = """
import sys, time
from pathlib import Path
from san_bench.run.folder import held

with held(Path(sys.argv[1]), lambda: True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """The id of another process that holds the lock of `run`, and the folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child, tmp_path / "run"
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_command_is_told_who_holds_the_folder_until_that_process_is_killed(holder):
    child, folder = holder
    recipe = load_recipe("demo/san", {"output": str(folder)})
    for look in (lambda: check_free(folder, recipe), lambda: train(recipe), lambda: enter(folder)):
        with pytest.raises(SanError) as error:
            look()
        for words in (str(folder), f"process {child.pid}", socket.gethostname(), "since 20"):
            assert words in str(error.value)
    assert [path.name for path in folder.iterdir()] == [LOCK]
    child.send_signal(signal.SIGKILL)
    child.wait()
    check_unlocked(folder)
    with held(folder, lambda: False):
        assert (folder / LOCK).exists()
    assert not list(folder.iterdir())


def enter(folder: Path) -> None:
    with held(folder, lambda: True):
        pass


def test_a_folder_without_progress_is_removed_with_its_new_parents(tmp_path):
    recipe = load_recipe("demo/san")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "new" / "deep" / "run", tmp_path / "there"):
        with pytest.raises(SanError, match="no memory"):
            fail_in(folder, recipe, begun=False)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there", "there/mine.txt"]
    with pytest.raises(SanError, match="no memory"):
        fail_in(tmp_path / "new" / "run", recipe, begun=True)
    assert {path.name for path in (tmp_path / "new" / "run").iterdir()} == {"recipe.yaml", "checkpoints"}


def fail_in(folder: Path, recipe: object, begun: bool) -> None:
    with claimed(folder, recipe, lambda: begun):
        (folder / "checkpoints").mkdir()
        raise SanError("no memory")


def test_a_recipe_may_change_until_something_was_trained(tmp_path):
    first, second = load_recipe("demo/san"), load_recipe("demo/ssf")
    for recipe in (first, second):
        with claimed(tmp_path / "run", recipe, lambda: True):
            assert load_recipe(tmp_path / "run" / "recipe.yaml").fingerprint == recipe.fingerprint
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(SanError, match=f"{second.fingerprint[:12]}, this one is {first.fingerprint[:12]}"):
        check_free(tmp_path / "run", first)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders.fcntl, "lockf", refuse)
    with held(tmp_path / "run", lambda: True):
        (tmp_path / "run" / "file").touch()
    assert str(tmp_path / "run") in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "override",
    [
        "model=/nowhere",
        pytest.param("input.size=64", marks=pytest.mark.slow),
        pytest.param("optimizer.batch_size=16", marks=pytest.mark.slow),
        "drop_path=0.5",
    ],
    ids=lambda override: override[:5],
)
def test_a_command_that_fails_before_its_first_step_leaves_no_folder(override, tmp_path, monkeypatch, capsys):
    """A missing model, one of another size, no memory, and an option that the model lacks."""
    from san_bench.run import trainer

    def no_memory(self):
        raise MemoryError

    words = ["train", "demo/linear", "--set", f"output={tmp_path}/runs/one", "optimizer.epochs=1", override]
    with small_scale(), monkeypatch.context() as patch:
        if override.startswith("optimizer"):
            patch.setattr(trainer._Trainer, "get_train_dataloader", no_memory)
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
    assert stop.value.code == 2
    assert "san: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_result_is_named(tmp_path):
    recipe = short_recipe("linear", tmp_path / "run")
    with claimed(tmp_path / "run", recipe, lambda: True):
        (tmp_path / "run" / "result.json").write_text('{"accuracy": 0.')
    with pytest.raises(SanError, match=r"result\.json cannot be loaded"):
        train(recipe)
