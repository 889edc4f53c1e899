"""Errors: one message for a user, with the thing, the cause and the way out, and never more than 4 kB."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
from PIL import Image

from san_bench import cli
from san_bench.config.errors import cause_of, explain, loading, shorten, shown
from san_peft.errors import SanError


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, 9999])
def test_every_error_of_the_system_names_path_number_and_way_out(number):
    said = explain(OSError(number, os.strerror(number), "there/file"))
    assert said.startswith("there/file: ")
    assert errno.errorcode.get(number, str(number)) in said
    assert len(said.split(". ")) == 2


def test_loading_turns_any_failure_into_one_error():
    for error in (KeyError("weight"), RuntimeError("bad\nmore"), Image.DecompressionBombError("big"), TypeError("no")):
        with pytest.raises(
            SanError, match=rf"^The image a\.png cannot be loaded: .*{type(error).__name__}.* Replace it"
        ):
            fail(error)
    with pytest.raises(SanError, match="plain"):
        fail(SanError("plain"))
    with pytest.raises(OSError, match="No space left"):
        fail(OSError(errno.ENOSPC, "No space left on device"))


def fail(error: Exception) -> None:
    with loading("The image a.png", "Replace it."):
        raise error


def test_a_worker_s_traceback_is_left_out():
    inner = "Traceback (most recent call last):\n  File\nsan_peft.errors.SanError: a.png is broken. Replace it.\n"
    error = SanError(f"Caught SanError in DataLoader worker process 0.\nOriginal {inner}")
    assert explain(error) == "a.png is broken. Replace it."
    assert "File" not in cause_of(error)


def test_errors_of_the_program_are_none_for_a_user():
    assert explain(RuntimeError("a bug")) is None
    assert explain(AssertionError()) is None
    assert "UTF-8" in explain(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert "invalid" in explain(json.JSONDecodeError("Expecting value", "", 0))


def test_messages_and_values_are_short():
    long = "\n".join(f"line {number} " + "é" * 3_000 for number in range(500))
    assert len(shorten(long).encode()) < 4_096
    assert "more line" in shorten(long).splitlines()[-1]
    assert shorten("a\nb") == "a\nb"
    assert len(shown("x" * 10_000)) < 200
    assert "int" in shown(10**10_000)


def test_sigterm_is_one_message_and_its_exit_code(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.Env, "run", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        cli.main(["env"])
    assert stop.value.code == 143
    assert capsys.readouterr().err.startswith("san: SIGTERM: ")
    assert signal.getsignal(signal.SIGTERM) == before
