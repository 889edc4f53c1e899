"""Runs of a suite on a Ray cluster of several machines, or on a Ray of this machine's own."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from san_bench.config.strict import san_error
from san_bench.suites.engines import Outcome, attempt, import_path

RETRIES = 3
"""How often a job starts again whose worker was lost."""

STORE_BYTES = 100 * 2**20
"""Memory for the objects that the tasks of the own Ray pass around: values and results of jobs alone."""


@dataclass(frozen=True)
class RayEngine:
    """Runs jobs as tasks of Ray, each in a fresh process, on as many machines as the cluster has.

    A cluster that `ray start` began is joined: the one at `address`, or that `RAY_ADDRESS` names, or on this machine.
    Where there is none, a Ray of this process's own starts, and ends with the jobs. A job whose worker or machine is
    lost starts again, three times at most. Its code is imported, not sent: the machines have the same packages.

    Attributes:
        workers: Jobs at the same time in a Ray of its own. A cluster runs as many as it has processors and GPUs for.
        cpus_per_job: Processors that a job takes; torch gets as many threads.
        gpus_per_job: GPUs that a job takes, such as 0.5 for two jobs on each; a job sees those that it got.
        address: Address of the cluster's first machine, such as `10.0.0.1:6379`, or `local` for a Ray of its own.
    """

    workers: int
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    address: str | None = None

    def run(self, function: Callable[[Any], Any], jobs: Mapping[str, Any]) -> Iterator[Outcome]:
        """Calls a function with the value of each job, and yields each outcome as it comes, in any order.

        Raises:
            SanError: If Ray is not installed, a cluster cannot be reached or could never run a job, or its machines
                could not import the function.
        """
        path = import_path(function)
        if importlib.util.find_spec("ray") is None:
            raise san_error('The engine "ray" needs Ray: pip install "san-peft[sweep]"')
        import ray

        own = not ray.is_initialized()
        pending: dict[Any, str] = {}
        try:
            if own:
                self._connect()
            self._check_room()
            task = ray.remote(num_cpus=self.cpus_per_job, num_gpus=self.gpus_per_job, max_calls=1, max_retries=RETRIES)(
                attempt
            )
            threads = max(1, int(self.cpus_per_job))
            pending.update((task.options(name=job).remote(path, value, threads), job) for job, value in jobs.items())
            while pending:
                (done,), _ = ray.wait(list(pending), num_returns=1)
                yield _outcome(pending.pop(done), done)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            if own:
                ray.shutdown()

    def _connect(self) -> None:
        """Joins a cluster, or starts a Ray of its own."""
        import ray

        wanted = self.address or os.environ.get("RAY_ADDRESS") or "auto"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if wanted != "local":
            try:
                _check_reachable(wanted)
                ray.init(address=wanted, **options)
                return
            except Exception as error:
                nobody_here = wanted == "auto" and isinstance(error, ConnectionError)
                if not nobody_here:
                    raise san_error(
                        f"No Ray cluster can be joined at {wanted}: {error}. Start one there with `ray start --head`, "
                        "or choose another address or RAY_ADDRESS (`local` is a Ray of this process). "
                        "If the cluster asks for a token, set RAY_AUTH_MODE=token here as well."
                    ) from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(1, round(self.workers * self.cpus_per_job)),
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            _system_config={"task_oom_retries": RETRIES},  # else a job that Ray ends for want of memory starts for ever
            **options,
        )

    def _check_room(self) -> None:
        """Raises `SanError` where no machine could hold a job: Ray would wait for one for ever."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = {"CPU": self.cpus_per_job, "GPU": self.gpus_per_job}
        if not any(all(machine.get(kind, 0) >= count for kind, count in need.items()) for machine in machines):
            have = "; ".join(f"{m.get('CPU', 0):g} CPU and {m.get('GPU', 0):g} GPU" for m in machines)
            raise san_error(
                f"A job takes {self.cpus_per_job:g} CPU and {self.gpus_per_job:g} GPU, but no machine of the Ray "
                f"cluster has as many. Machines: {have}."
            )


def _check_reachable(address: str) -> None:
    """Raises `OSError` where nobody listens at `host:port`: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _outcome(job: str, reference: Any) -> Outcome:
    """What came of a task that has ended."""
    import ray
    from ray.exceptions import RayError

    try:
        return Outcome(job, *ray.get(reference))
    except RayError as error:
        cause = " ".join(str(error).split())
        return Outcome(job, None, f"Ray gave {job} up ({type(error).__name__}): {cause}")
