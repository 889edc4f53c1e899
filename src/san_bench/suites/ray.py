"""Execute the runs of a suite on a Ray cluster, or in a local Ray instance."""

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
"""Maximum restarts of a job whose worker was lost."""

STORE_BYTES = 100 * 2**20
"""Object store memory of a local Ray instance; it holds only the values and results of jobs."""


@dataclass(frozen=True)
class RayEngine:
    """Runs jobs as Ray tasks, each in a fresh process, on all machines of the cluster.

    The engine connects to a running cluster: the one at `address`, at `RAY_ADDRESS`, or on this machine. If there is
    none, a local Ray instance is started, and stopped after the last job. A job whose worker or machine is lost is
    restarted up to three times. Code is imported, not sent, so all machines need the same packages.

    Attributes:
        workers: Number of parallel jobs in a local Ray instance; a cluster runs as many as its CPUs and GPUs allow.
        cpus_per_job: CPUs per job, and torch threads.
        gpus_per_job: GPUs per job, such as 0.5 for two jobs on each GPU; a job sees only its own GPUs.
        address: Address of the cluster's head node, such as `10.0.0.1:6379`, or `local` for a local Ray instance.
    """

    workers: int
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    address: str | None = None

    def run(self, function: Callable[[Any], Any], jobs: Mapping[str, Any]) -> Iterator[Outcome]:
        """Calls a function with the value of each job, and yields each outcome as it comes, in any order.

        Raises:
            SanError: If Ray is not installed, the cluster cannot be reached or has too few resources for a job, or
                its machines cannot import the function.
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
        """Connects to a cluster, or starts a local Ray instance."""
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
                        f"Cannot connect to a Ray cluster at {wanted}: {error}. Start one with `ray start --head`, or "
                        "choose another address or RAY_ADDRESS (`local` starts a Ray instance on this machine). "
                        "If the cluster requires a token, set RAY_AUTH_MODE=token here as well."
                    ) from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(1, round(self.workers * self.cpus_per_job)),
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            _system_config={"task_oom_retries": RETRIES},  # the default retries out-of-memory jobs forever
            **options,
        )

    def _check_room(self) -> None:
        """Raises `SanError` if no machine has the resources of a job; Ray would wait forever."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = {"CPU": self.cpus_per_job, "GPU": self.gpus_per_job}
        if not any(all(machine.get(kind, 0) >= count for kind, count in need.items()) for machine in machines):
            have = "; ".join(f"{m.get('CPU', 0):g} CPU and {m.get('GPU', 0):g} GPU" for m in machines)
            raise san_error(
                f"A job needs {self.cpus_per_job:g} CPU and {self.gpus_per_job:g} GPU, more than any machine of the "
                f"Ray cluster has. Machines: {have}."
            )


def _check_reachable(address: str) -> None:
    """Raises `OSError` if nothing listens at `host:port`; Ray would retry for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _outcome(job: str, reference: Any) -> Outcome:
    """Returns the outcome of a finished task."""
    import ray
    from ray.exceptions import RayError

    try:
        return Outcome(job, *ray.get(reference))
    except RayError as error:
        cause = " ".join(str(error).split())
        return Outcome(job, None, f"Ray failed to run {job} ({type(error).__name__}): {cause}")
