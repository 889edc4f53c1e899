"""The local engine: jobs in fresh processes, of which some raise, die, or are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from tests.bench import jobs

from san_bench.image import tasks as vision
from san_bench.suites import engines
from san_bench.suites.engines import LocalEngine, Outcome, import_path, in_fresh_process
from san_peft.errors import SanError

ROOT = Path(__file__).parents[3]


def outcomes(engine, function, values):
    found = list(engine.run(function, values))
    assert sorted(outcome.job for outcome in found) == sorted(values)
    return {outcome.job: outcome for outcome in found}


def gone(pid, seconds=20.0):
    """Waits for a process to end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_every_job_has_its_outcome():
    values = {f"job {n}": n for n in range(5)}
    found = outcomes(LocalEngine(workers=2, threads=1), jobs.double, values)
    assert found == {f"job {n}": Outcome(f"job {n}", 2 * n, None) for n in range(5)}


def test_each_job_has_its_own_process_and_threads():
    found = outcomes(LocalEngine(workers=2, threads=1), jobs.facts, {"a": None, "b": None, "c": None})
    facts = [outcome.value for outcome in found.values()]
    assert len({fact["pid"] for fact in facts} | {os.getpid()}) == 4
    assert all(fact["OMP_NUM_THREADS"] == "1" for fact in facts)
    assert all(fact["threads"] == 1 for fact in facts)  # forked from a server that has torch


def test_a_job_that_raises_says_why_and_the_rest_goes_on():
    found = outcomes(LocalEngine(workers=2, threads=1), jobs.double_or_raise, {"a": 1, "b": -3, "c": 2})
    assert (found["a"].value, found["c"].value) == (2, 4)
    first, *frames = found["b"].error.splitlines()
    assert first == "ArithmeticError: -3 is negative"
    assert 'raise ArithmeticError(f"{value} is negative")' in "\n".join(frames)
    assert found["b"].value is None


def test_errors_of_san_are_their_message():
    found = outcomes(LocalEngine(workers=1, threads=1), jobs.refuse, {"a": "This"})
    assert found["a"] == Outcome("a", None, "This does not fit.")


def test_a_job_that_is_killed_is_an_error_and_the_rest_goes_on():
    values = {"a": 1, "killed": -1, "b": 2, "ended": -2, "c": 3}
    found = outcomes(LocalEngine(workers=2, threads=1), jobs.double_or_die, values)
    assert [found[job].value for job in "abc"] == [2, 4, 6]
    assert found["killed"].error == (
        "The process of killed was killed by SIGKILL before it returned a result. It may have run out of memory."
    )
    assert found["ended"].error == "The process of ended ended with code 7 before it returned a result."


def test_what_cannot_be_sent_back_is_an_error():
    error = outcomes(LocalEngine(workers=1, threads=1), jobs.unsendable, {"a": None})["a"].error
    assert error.startswith("The return value cannot be pickled. ")
    assert "lambda" in error


def test_jobs_run_at_the_same_time(tmp_path):
    found = outcomes(LocalEngine(workers=2, threads=1), jobs.meet, {n: (str(tmp_path), 2) for n in "ab"})
    assert {outcome.error for outcome in found.values()} == {None}


def test_gpus_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_devices", lambda: ["4", "7"])
    found = outcomes(LocalEngine(workers=4, threads=1), jobs.meet, {n: (str(tmp_path), 4) for n in "abcd"})
    assert Counter(outcome.value for outcome in found.values()) == {"4": 2, "7": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
@pytest.mark.parametrize(("devices", "expected"), [(["0"], False), ([], True)], ids=["gpu", "cpu"])
def test_no_job_on_a_gpu_is_forked_from_a_process_that_may_have_looked_for_it(devices, expected, monkeypatch):
    monkeypatch.setattr(engines, "_devices", lambda: devices)
    assert outcomes(LocalEngine(workers=1, threads=1), jobs.imported, {"a": "peft"})["a"].value is expected


def test_gpus_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engines._devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert engines._devices() == ["3", "5"]


def test_ctrl_c_ends_the_jobs_and_keeps_what_is_done(tmp_path):
    file = tmp_path / "pid"
    run = LocalEngine(workers=2, threads=1).run(jobs.sleep_after, {"long": str(file), "short": None})
    first = next(run)
    assert first.job == "short"

    main = threading.get_ident()

    def is_asked():
        """Whether the main thread is inside the engine, and no more on its way there."""
        frames = traceback.walk_stack(sys._current_frames()[main])
        return any(frame.f_code is LocalEngine.run.__code__ for frame, _ in frames)

    def interrupt():
        while not file.exists() or not file.read_text() or not is_asked():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            next(run)
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert gone(int(file.read_text()))


def test_jobs_end_when_the_caller_stops_asking(tmp_path):
    run = LocalEngine(workers=2, threads=1).run(jobs.sleep_after, {"long": str(tmp_path / "pid"), "short": None})
    next(run)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    run.close()
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_jobs_end_with_the_process_that_started_them(tmp_path):
    program = f"""
from san_bench.image import tasks as vision
from san_bench.suites import engines
from tests.bench import jobs
engines.PRELOAD = []
engines._devices = list
list(engines.LocalEngine(workers=1, threads=1).run(jobs.sleep_after, {{"long": {str(tmp_path / "pid")!r}}}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_function_needs_an_import_path():
    assert import_path(jobs.double) == "tests.bench.jobs:double"
    for function in (lambda value: value, gone.__get__(1)):
        with pytest.raises(SanError, match="import"):
            list(LocalEngine(workers=1, threads=1).run(function, {"a": 1}))


@pytest.mark.slow
def test_a_fresh_process_returns_and_raises():
    assert in_fresh_process(jobs.facts, None)["pid"] != os.getpid()
    with pytest.raises(SanError, match="no task 'digit'"):
        in_fresh_process(vision.load_task, "digit")
    with pytest.raises(SanError, match=r"double_or_die .*SIGKILL"):
        in_fresh_process(jobs.double_or_die, -1)
