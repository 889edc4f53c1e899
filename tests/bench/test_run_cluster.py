"""The Ray engine on a real Ray of several workers, one of which is killed."""

from __future__ import annotations

import sys

import pytest
from tests.bench import jobs
from tests.bench.test_run_engines import outcomes

from san_bench.run.cluster import RayEngine
from san_bench.run.engines import Outcome
from san_peft.errors import SanError

ray = pytest.importorskip("ray", reason="Ray is in the extra sweep")


@pytest.fixture(scope="module")
def engine():
    """An engine whose own Ray serves all tests of this module."""
    own = RayEngine(workers=2, address="local")
    own._connect()
    yield own
    ray.shutdown()


def test_a_killed_worker_is_replaced_and_its_job_retried(engine, tmp_path):
    marker = tmp_path / "marker"
    found = outcomes(engine, jobs.die_once, {"a": None, "killed": str(marker), "b": None})
    assert found["killed"] == Outcome("killed", "after marker", None)
    assert found["a"].value == found["b"].value == "at once"
    assert int(marker.read_text()) > 0


def test_a_job_that_raises_says_why_and_the_rest_goes_on(engine):
    found = outcomes(engine, jobs.double_or_raise, {"a": 1, "b": -3, "c": 2})
    assert (found["a"].value, found["c"].value) == (2, 4)
    assert found["b"].value is None
    first, *frames = found["b"].error.splitlines()
    assert first == "ArithmeticError: -3 is negative"
    assert 'raise ArithmeticError(f"{value} is negative")' in "\n".join(frames)


def test_what_cannot_go_on_is_given_up_and_the_rest_goes_on(engine):
    found = outcomes(engine, jobs.double_or_die, {"a": 1, "killed": -1})
    assert found["a"].value == 2
    assert found["killed"].error.startswith("Ray gave killed up (WorkerCrashedError): ")
    assert found["killed"].value is None


def test_jobs_run_at_the_same_time_in_fresh_processes(engine, tmp_path):
    found = outcomes(engine, jobs.meet, {n: (str(tmp_path), 2) for n in "abcd"})
    assert {outcome.error for outcome in found.values()} == {None}
    assert len(list(tmp_path.iterdir())) == 4


def test_torch_gets_as_many_threads_as_processors(engine):
    found = outcomes(engine, jobs.facts, {"a": None})
    assert found["a"].value["OMP_NUM_THREADS"] == "1"


def test_what_no_machine_can_hold_is_refused(engine):
    with pytest.raises(SanError, match=r"takes 1 CPU and 0\.5 GPU, but no machine .* Machines: 2 CPU and 0 GPU\."):
        list(RayEngine(workers=2, gpus_per_job=0.5).run(jobs.double, {"a": 1}))


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SanError, match=r'pip install "san-peft\[sweep\]"'):
        list(RayEngine(workers=1).run(jobs.double, {"a": 1}))


def test_a_function_needs_an_import_path():
    with pytest.raises(SanError, match="Another process cannot import"):
        list(RayEngine(workers=1).run(lambda value: value, {"a": 1}))
