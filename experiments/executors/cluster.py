"""A cluster of machines, or this machine alone, under Ray."""

import importlib
import os
import socket
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import floor, isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.executors.base import GRACE_SECONDS, Failure, Task, one_line
from experiments.executors.place import attempt_in, nothing
from mtkd_env.errors import ConfigError
from mtkd_env.files import cache_folder
from mtkd_env.imports import optional

# The folder that the packages of this project are in.
SOURCE = Path(__file__).parents[2]

KNOCK_SECONDS = 10.0

# To Ray: start one here, which ends with the program.
LOCAL = "local"


@dataclass(frozen=True)
class RunResources:
    """What a run takes of its node.

    Attributes:
        cpus: CPU cores; its threads are as many.
        gpus: Whole GPUs, or a share of one; by default one where the cluster has any.
    """

    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.cpus) and self.cpus > 0):
            raise ConfigError(f"--cpus-per-run: expected a number > 0, got {self.cpus:g}")
        gpus = self.gpus or 0.0
        if not (0 <= gpus <= 1 or gpus.is_integer()) or gpus < 0:
            raise ConfigError(
                f"--gpus-per-run: expected a share up to 1 or a whole number, got {gpus:g}"
            )

    @property
    def threads(self) -> int:
        """CPU threads of a run."""
        return max(1, floor(self.cpus))

    def fits(self, available: Mapping[str, float]) -> int:
        """How many runs a node with these resources has room for; a share lies on one GPU."""
        runs = floor(available.get("CPU", 0.0) / self.cpus)
        if not self.gpus:
            return runs
        gpus = floor(available.get("GPU", 0.0))
        return min(runs, gpus * floor(1 / self.gpus) if self.gpus < 1 else floor(gpus / self.gpus))


class RayExecutor:
    """Tasks on all nodes of a Ray cluster, those that join it later included.

    Args:
        address: HOST:PORT or ray://HOST:PORT of a cluster, auto for the one of this machine; by
            default $RAY_ADDRESS, or a Ray of this machine alone, which ends with the executor.
        resources: What a task takes.
        most: Tasks at a time; by default as many as there is room for.
        shared: Folders that all nodes must see, besides the working folder.

    Raises:
        ConfigError: No Ray, no cluster, no room, or a node that does not see a folder.
    """

    def __init__(
        self,
        address: str | None,
        resources: RunResources,
        *,
        most: int | None = None,
        shared: Collection[Path] = (),
    ) -> None:
        self._ray = optional("ray")
        self._most = most
        self._running: dict[Future[Failure | None], Any] = {}
        with ExitStack() as stack:
            tokens = [_put_token(folder.absolute(), stack) for folder in shared]
            _connect(self._ray, address)
            stack.callback(self._ray.shutdown)
            self._place = Path.cwd(), tokens
            if resources.gpus is None:
                gpus = 1.0 if self._ray.cluster_resources().get("GPU") else 0.0
                resources = replace(resources, gpus=gpus)
            self._resources = resources
            taken = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
            # Ray tries nothing again by itself; whoever asks does.
            self._remote = self._ray.remote(**taken, max_retries=0)(attempt_in)
            self._check_nodes()
            self._ends = stack.pop_all()

    def _rooms(self) -> dict[str, int]:
        """For how many tasks every node has room, by the nodes' ids."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        rooms = {node["NodeID"]: self._resources.fits(node["Resources"]) for node in nodes}
        return {name: room for name, room in rooms.items() if room}

    def _check_nodes(self) -> None:
        """Enters the place on every node, so that mistakes show before anything is begun.

        Raises:
            ConfigError: There is no node, or one that cannot do the work.
        """
        rooms = self._rooms()
        if not rooms:
            raise ConfigError(
                f"--executor ray: no node has {self._resources.cpus:g} CPUs and "
                f"{self._resources.gpus:g} GPUs; see --cpus-per-run and --gpus-per-run"
            )
        on_nodes = [self._remote.options(**_on_node(name)) for name in rooms]
        for check in [self._begin(remote, nothing) for remote in on_nodes]:
            if (failure := check.result()) is not None:
                raise ConfigError(failure.message)

    def room(self) -> int:
        """How many tasks it can do at a time, by now."""
        room = sum(self._rooms().values())
        return room if self._most is None else min(room, self._most)

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task on a node that has room, as soon as one has."""
        return self._begin(self._remote, task.work)

    def _begin(self, remote: Any, work: Callable[[], None]) -> "Future[Failure | None]":
        reference = remote.remote(*self._place, work)
        ended: Future[Failure | None] = Future()
        reference.future().add_done_callback(lambda done: ended.set_result(self._outcome(done)))
        self._running[ended] = reference
        return ended

    def _outcome(self, future: "Future[Failure | None]") -> Failure | None:
        errors = self._ray.exceptions
        try:
            return future.result()
        except errors.RayTaskError as error:  # The node could not even begin.
            return Failure(f"--executor ray: {one_line(error.cause)}", str(error))
        except errors.RayError as error:
            kind = type(error).__name__
            return Failure(f"its worker was lost ({kind})", f"{error}\n", died=True)

    def close(self) -> None:
        """Interrupts what is not finished, which may first keep what it has; leaves the cluster."""
        with self._ends:
            for ended, reference in self._running.items():
                if not ended.done():
                    self._ray.cancel(reference)
            wait(self._running, timeout=GRACE_SECONDS)


def _on_node(name: str) -> dict[str, Any]:
    """Options of something that takes nothing, but has to be done on one node."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    here = strategies.NodeAffinitySchedulingStrategy(name, soft=False)
    return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": here}


def _put_token(folder: Path, stack: ExitStack) -> Path:
    """A new file in a folder, which is removed in the end.

    Raises:
        ConfigError: The folder cannot be written to.
    """
    token = folder / f".shared-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise ConfigError(f"--executor ray: cannot write {folder}: {error.strerror}") from error
    stack.callback(token.unlink, missing_ok=True)
    return token


def _connect(ray: ModuleType, address: str | None) -> None:
    """Connects to a cluster, or starts one of this machine.

    Raises:
        ConfigError: There is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": _environment()},
            **options,
        )
    except (OSError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"--address: cannot connect to {address}: {one_line(error)}") from error


def _check_reachable(address: str) -> None:
    """Knocks at a cluster's door: Ray itself would try for minutes.

    Raises:
        OSError: Nobody answers.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _environment() -> dict[str, str]:
    """What workers need to know of this process."""
    known = {
        "MTKD_CACHE": str(cache_folder().absolute()),
        # A run that takes no GPU sees none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    }
    if (SOURCE / "pyproject.toml").is_file():
        paths = [str(SOURCE), os.environ.get("PYTHONPATH", "")]
        known["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return known
