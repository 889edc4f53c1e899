"""The Ray engine on a real Ray of several workers, one of which is killed."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bench import jobs
from tests.bench.suites.test_engines import outcomes

from san_bench.suites.engines import Outcome
from san_bench.suites.ray import RayEngine
from san_peft.errors import SanError

pytestmark = pytest.mark.slow

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
    assert found["killed"].error.startswith("Ray failed to run killed (WorkerCrashedError): ")
    assert found["killed"].value is None


def test_jobs_run_at_the_same_time_in_fresh_processes(engine, tmp_path):
    found = outcomes(engine, jobs.meet, {n: (str(tmp_path), 2) for n in "abcd"})
    assert {outcome.error for outcome in found.values()} == {None}
    assert len(list(tmp_path.iterdir())) == 4


def test_torch_gets_as_many_threads_as_processors(engine):
    found = outcomes(engine, jobs.facts, {"a": None})
    assert found["a"].value["OMP_NUM_THREADS"] == "1"


def test_what_no_machine_can_hold_is_refused(engine):
    with pytest.raises(SanError, match=r"1 CPU and 0\.5 GPU.* 2 CPU and 0 GPU\."):
        list(RayEngine(workers=2, gpus_per_job=0.5).run(jobs.double, {"a": 1}))


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
from tests.bench import jobs
from san_bench.suites.ray import RayEngine

store = 100 * 2**20
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False}
)
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=store)
values = {"a": None, "lost": sys.argv[1], "b": None}
outcomes = RayEngine(workers=1, address=cluster.address).run(jobs.lose_machine_once, values)
print(json.dumps({outcome.job: [outcome.value, outcome.error] for outcome in outcomes}))
cluster.shutdown()
"""


def test_a_cluster_is_joined_and_the_jobs_of_a_lost_machine_go_on_elsewhere(tmp_path):
    """Three machines by name: the first runs nothing, one of the others is lost."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    run = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path / "marker")],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **token},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line) == {"a": ["at once", None], "lost": ["again", None], "b": ["at once", None]}
    assert (tmp_path / "marker").exists()


def test_a_cluster_that_does_not_answer_is_an_error_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SanError, match=rf"{address}: .*refused.*ray start --head"):
            RayEngine(workers=1, address=address)._connect()
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SanError, match=address):
            RayEngine(workers=1)._connect()


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SanError, match=r'pip install "san-peft\[sweep\]"'):
        list(RayEngine(workers=1).run(jobs.double, {"a": 1}))


def test_a_function_needs_an_import_path():
    with pytest.raises(SanError, match="Another process cannot import"):
        list(RayEngine(workers=1).run(lambda value: value, {"a": 1}))
