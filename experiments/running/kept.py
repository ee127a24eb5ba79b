"""One kept run, whatever trains: found or begun in its folder, gone on with, stopped, finished."""

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from agents.isolation import Isolation
from experiments.config import RunConfig, read_yaml
from experiments.running.folder import (
    CONFIG,
    checkpoints_in,
    clear,
    flat,
    holds_run,
    make_new,
)
from experiments.running.lock import run_lock
from experiments.running.log import MetricsLog
from experiments.running.result import RESULT, RunResult, read_result
from experiments.running.signals import to_go_on, way_back
from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import parse_yaml, write_text
from mtkd_env.keeping import Keeper, StopRequest, Trainable

Found = TypeVar("Found", bound=RunResult)
Config = TypeVar("Config", bound=RunConfig)


class KeptRun(Trainable, Generic[Config, Found]):
    """A run that is kept in a folder; one object is one run, a subclass one kind of them.

    The folder gets `config.yaml`, the files of the log and TensorBoard's, what the kind writes, and
    `result.json`, which is written last: a folder without it holds an unfinished run, and in
    `checkpoints` what that can go on from. Of several processes only process 0 looks for, reads
    and writes these.

    Args:
        config: The run.

    Attributes:
        config: The same.
        log: Its log, as far as it is written, while it trains.
        program: What goes on with such a run, when given `--resume` and its folder.
        result_type: What its `result.json` holds.
        lines: The files of its log with one line each; the first is that of the rows.
        clock: What in a row says when it was.
        written: What else it writes before its result.
        place: Keys of its configuration that its numbers do not depend on.
    """

    log: MetricsLog
    program: str
    result_type: type[Found]
    lines: Sequence[str]
    clock: str
    written: Sequence[str]
    place: Collection[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    def check_same(self, folder: Path) -> None:
        """Checks that a folder holds no run of another configuration.

        Raises:
            ConfigError: It does; names the keys that differ.
        """
        theirs = read_yaml(folder / CONFIG, "--resume") if (folder / CONFIG).is_file() else None
        if theirs is not None and (changes := self._changes(theirs)):
            raise ConfigError(f"output: {folder} holds a run of another configuration: {changes}")

    def _changes(self, theirs: Mapping[str, Any]) -> str:
        """The keys that another configuration differs in, with both values; empty if in none."""
        own, theirs = flat(parse_yaml(self.config.to_yaml())), flat(theirs)
        keys = [key for key in {**own, **theirs} if key.split(".")[0] not in self.place]
        changed = [key for key in keys if own.get(key) != theirs.get(key)]
        return ", ".join(f"{key} {own.get(key)} instead of {theirs.get(key)}" for key in changed)

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Loads what the run needs, before a folder is made for it.

        Returns:
            What has to be the same for a run to go on as if it had never stopped.

        Raises:
            ConfigError: Anything in the configuration that cannot be used.
        """

    @abstractmethod
    def begin(self) -> None:
        """Makes what trains, at its beginning; it writes into the log."""

    @abstractmethod
    def result(self) -> Found:
        """What the run came to; called in all processes."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Writes what has been trained, in process 0."""

    def complete(self, folder: Path | Callable[[], Path], *, resume: bool = False) -> Found:
        """Trains to the end and writes everything into the run's folder.

        Args:
            folder: The run's folder, or what makes a new one; that is called once nothing stands in
                the way of the run.
            resume: Whether the folder may hold this run. A finished one is not done again; an
                unfinished one goes on from its last checkpoint, on a CPU with the numbers that it
                would have had without the interruption, or from its beginning if it has none.

        Raises:
            ConfigError: Anything in the configuration that cannot be used (no folder is made then),
                a folder that holds another run, or that another process uses.
            FloatingPointError: Something became NaN or infinite.
            Stopped: A signal came; there is a checkpoint to go on from, or the result.
            OSError: Something cannot be written; as after a crash, the run can be gone on with.
        """
        writes = distributed.rank() == 0
        with ExitStack() as held:
            found = self._find(folder, held, resume=resume) if writes else None
            result, state = distributed.agree(found) or (None, None)
            if result is not None:
                return result
            held.enter_context(Isolation()())
            identity = self.prepare()
            if state is not None:
                self._check_identity(identity, state)
            ready = self._ready(folder, held, anew=state is None) if writes else None
            kept = distributed.agree(ready) or Path()
            with way_back(self.program, kept):
                return self._train_in(kept, identity, state)

    def _check_identity(self, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Checks that a checkpoint is of the same run.

        Raises:
            ConfigError: It is another configuration's, other teachers', or of another device, whose
                random generators and rounding are others.
        """
        # Where a run has a digest of its configuration, some other keys may differ.
        same = "configuration" in identity and (
            identity["configuration"] == state["identity"]["configuration"]
        )
        if not same and (changes := self._changes(parse_yaml(state["configuration"]))):
            raise ConfigError(f"resume: the checkpoint is of another configuration: {changes}")
        for name, expected in identity.items():
            if (found := state["identity"][name]) != expected:
                raise ConfigError(
                    f"resume: the checkpoint is of another {name}: expected {expected}, "
                    f"found {found}"
                )

    def _find(
        self, folder: Path | Callable[[], Path], held: ExitStack, *, resume: bool
    ) -> tuple[Found | None, dict[str, Any] | None]:
        """The result of the run that a folder holds, or else its checkpoint; locks the folder."""
        if callable(folder) or not folder.is_dir():
            return None, None
        if not resume and holds_run(folder):
            raise ConfigError(f"output: {folder} holds a run already; --resume goes on with it")
        held.enter_context(run_lock(folder))
        self.check_same(folder)
        checkpoints = checkpoints_in(folder)
        if (result := read_result(self.result_type, folder)) is not None:
            checkpoints.clear()
            return result, None
        return None, checkpoints.load()

    def _ready(self, folder: Path | Callable[[], Path], held: ExitStack, *, anew: bool) -> Path:
        """The run's folder, locked if it is new, without what is not to be gone on from."""
        if callable(folder):
            folder = folder()
        elif folder.is_dir():
            if anew:
                clear(folder, [*self.lines, *self.written])
            return folder
        elif not make_new(folder):
            raise ConfigError(f"output: {folder} is there already")
        held.enter_context(run_lock(folder))
        return folder

    def _train_in(
        self, folder: Path, identity: dict[str, Any], state: dict[str, Any] | None
    ) -> Found:
        writes = distributed.rank() == 0
        if writes and not (folder / CONFIG).is_file():
            write_text(folder / CONFIG, self.config.to_yaml())
        stop = StopRequest()
        with stop if self.config.checkpoint.enabled else nullcontext():
            with MetricsLog(folder, state and state["log"], self.lines, self.clock) as self.log:
                self.begin()
                keeper = Keeper(
                    self,
                    checkpoints_in(folder),
                    self.config.checkpoint,
                    stop,
                    state,
                    to_go_on=to_go_on(self.program, folder),
                    beside=lambda: self._beside(identity),
                )
                if state is not None:
                    self.log.began = time.perf_counter() - state["seconds"]
                keeper.train()
            result = self.result()
            if writes:
                self.write(folder)
                write_text(folder / RESULT, json.dumps(asdict(result), indent=2) + "\n")
                checkpoints_in(folder).clear()
            keeper.stop_if_asked()
        return result

    def _beside(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds beside where the training is."""
        return {
            "configuration": self.config.to_yaml(),
            "identity": identity,
            "log": self.log.state_dict(),
            "seconds": self.log.seconds,
        }
