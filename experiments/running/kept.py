"""One kept run, whatever trains: found or begun in its folder, gone on with, stopped, finished."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from agents.isolation import Isolation
from experiments.config import RunConfig, read_yaml
from experiments.running.checkpoint import Checkpoints, Timetable
from experiments.running.folder import (
    CONFIG,
    clear,
    flat,
    holds_run,
    make_new,
)
from experiments.running.lock import run_lock
from experiments.running.log import MetricsLog
from experiments.running.result import RESULT, RunResult, read_result
from experiments.running.signals import Stopped, StopRequest, way_back
from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import parse_yaml, write_text
from mtkd_env.seeding import random_states, set_random_states

# Steps after which several processes agree anew on whether to stop or to write a checkpoint.
AGREEMENT = 20

AtRest = Callable[[], None]


Found = TypeVar("Found", bound=RunResult)
Config = TypeVar("Config", bound=RunConfig)


class KeptRun(ABC, Generic[Config, Found]):
    """A run that is kept in a folder; one object is one run, a subclass one kind of them.

    It trains step by step, and can be put back to where it was between two steps.

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

    @property
    @abstractmethod
    def steps(self) -> int:
        """SGD steps so far; the same in all processes."""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Epochs that are over."""

    @abstractmethod
    def train(self, at_rest: AtRest) -> None:
        """Trains to the end, from wherever it is.

        Args:
            at_rest: To be called between two steps, wherever `state_dict` and the global random
                generators together hold all that the rest depends on.

        Raises:
            FloatingPointError: Something became NaN or infinite.
        """

    @abstractmethod
    def check_finite(self) -> None:
        """Checks what a checkpoint would hold.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log has been cut to it before."""

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
        checkpoints = Checkpoints(folder)
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
                keeper = _Keeper(self, identity, stop, state)
                keeper.train()
            result = self.result()
            if writes:
                self.write(folder)
                write_text(folder / RESULT, json.dumps(asdict(result), indent=2) + "\n")
                Checkpoints(folder).clear()
            keeper.stop_if_asked()
        return result


class _Keeper:
    """Lets a run train to its end; keeps checkpoints, and stops on signals.

    Args:
        run: The run.
        identity: What every checkpoint is to say of it beside its state.
        stop: Takes note of signals.
        state: The checkpoint to go on from, if there is one.
    """

    def __init__(
        self,
        run: KeptRun[Any, Any],
        identity: Mapping[str, Any],
        stop: StopRequest,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._run = run
        self._identity = dict(identity)
        self._stop = stop
        self._checkpoints = Checkpoints(run.log.folder)
        self._saved: int | None = None
        self._agreed = 0
        self._random: dict[str, Any] | None = None
        if state is not None:
            run.load_state_dict(state["training"])
            # Set where the state was taken, since the way there draws as well.
            self._random = state["random"]
            self._saved = run.steps
            run.log.began = time.perf_counter() - state["seconds"]
        self._timetable = Timetable(run.config.checkpoint, epochs=run.epochs)

    def train(self) -> None:
        """Trains to the end.

        Raises:
            FloatingPointError: Something became NaN or infinite; says which checkpoint is left.
            Stopped: A signal came; there is a checkpoint to go on from.
        """
        try:
            self._run.train(self._at_rest)
        except FloatingPointError as error:
            before = f"; there is a checkpoint from before it, after step {self._saved}"
            raise FloatingPointError(f"{error}{before * (self._saved is not None)}") from error

    def _at_rest(self) -> None:
        if self._random is not None:
            set_random_states(self._random)
            self._random = None
        if distributed.active() and 0 < self._run.steps - self._agreed < AGREEMENT:
            return
        self._agreed = self._run.steps
        due = self._timetable.due(self._run.epochs)
        asked, due = distributed.agree((self._stop.number is not None, due))
        if asked or due:
            self._save()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Ends the program if a signal has asked for it.

        Raises:
            Stopped: It has.
        """
        number = distributed.agree(self._stop.number)
        if number is not None:
            raise Stopped(number, str(self._run.log.folder), self._run.steps, self._run.program)

    def _save(self) -> None:
        """Writes a checkpoint of all processes, unless this is where the last one was taken.

        Raises:
            FloatingPointError: Something is NaN or infinite; the checkpoints are those before it.
        """
        started = time.perf_counter()
        steps = self._run.steps
        if steps == self._saved:
            return
        self._run.check_finite()
        content = {
            "configuration": self._run.config.to_yaml(),
            "identity": self._identity,
            "training": self._run.state_dict(),
            "log": self._run.log.state_dict(),
            "random": random_states(),
            "seconds": self._run.log.seconds,
        }
        if distributed.rank() == 0:
            self._checkpoints.save(steps, content)
        self._saved = steps
        self._timetable.written(self._run.epochs, time.perf_counter() - started)
