"""Has the runs of a comparison done that are not finished, and their teachers before them."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from experiments.comparison.plan import Comparison, PlannedRun
from experiments.comparison.progress import Board
from experiments.executors import Executor, Failure, Task, work_off
from experiments.running.lock import run_lock
from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import remove_unfinished, write_text

# In the folder of a run that failed.
ERROR = "error.txt"


class Execution(Board):
    """Does the runs of a comparison that are not finished, and shows how that goes.

    Args:
        comparison: The comparison.
        output: Its folder.
        make_executor: Makes what does the work; called once there is something to do.
        out: Where progress is shown.
        threads: CPU threads of a run whose configuration does not say; none for torch's choice.
        retries: How often a run is begun again whose process has died.

    Attributes:
        failures: The runs that failed, and why.
    """

    def __init__(
        self,
        comparison: Comparison,
        output: Path,
        make_executor: Callable[[], Executor],
        out: Console,
        *,
        threads: int | None = None,
        retries: int = 0,
    ) -> None:
        left = distributed.agree([run for run in comparison.runs if run.result is None])
        self._planned = {run.task(threads): run for run in left}
        finished = len(comparison.runs) - len(left)
        super().__init__(out, runs=list(self._planned), finished=finished)
        self._kind = comparison.kind
        self._output = output
        self._folders = [run.folder for run in comparison.runs]
        self._make_executor = make_executor
        self._retries = retries
        self.failures: list[tuple[PlannedRun, Failure]] = []

    def work(self) -> None:
        """Trains the teachers, one pool after the other, then the students.

        Raises:
            ConfigError: A folder that cannot be made or is worked in already, or an executor that
                cannot be used.
        """
        for folder in self._folders:
            remove_unfinished(folder)
        if not self._planned:
            return
        with ExitStack() as stack:
            _make_folder(self._output)
            if distributed.rank() == 0:
                stack.enter_context(run_lock(self._output))
            executor = self._make_executor()
            stack.callback(executor.close)
            stack.enter_context(self)
            failed = self._train_teachers(executor)
            for task, failure in failed.items():
                self.started(task)
                self.ended(task, failure)
            tasks = [task for task in self._planned if task not in failed]
            work_off(tasks, executor, self, retries=self._retries)

    def _train_teachers(self, executor: Executor) -> dict[Task, Failure]:
        """One pool after the other, since they share teachers; gives the runs that lack theirs."""
        runs, lacking = list(self._planned.values()), dict[int, Failure]()
        log = self._output / "teachers.jsonl"
        for pool, users in self._kind.teachers([run.config for run in runs], log):
            failures = work_off([pool], executor, self, retries=self._retries)
            for failure in failures.values():
                told = Failure(f"{pool.name}: {failure.message}", failure.details)
                lacking |= dict.fromkeys(users, told)
        return {task: lacking[n] for n, task in enumerate(self._planned) if n in lacking}

    def started(self, task: Task) -> None:
        """A run is about to begin, or to go on; why it failed before is no longer true."""
        if task in self._planned:
            (self._planned[task].folder / ERROR).unlink(missing_ok=True)
        super().started(task)

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A run has ended; its folder says why, if it failed."""
        if failure is not None and task in self._planned:
            run = self._planned[task]
            self.failures.append((run, failure))
            write_text(run.folder / ERROR, f"{failure.message}\n\n{failure.details}")
        super().ended(task, failure)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make {folder}: {error.strerror}") from error
