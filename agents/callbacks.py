"""Callbacks for the `learn` of Stable-Baselines3's algorithms."""

from stable_baselines3.common.callbacks import BaseCallback

from mtkd_env import distributed
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.evaluation import Evaluation
from mtkd_env.vector import SharedStudentEnv, StepRecord
from mtkd_env.wrappers.sb3 import SB3VecEnv


class StudentEvaluation(BaseCallback):
    """Evaluates the student at the end of every epoch and logs how good it is.

    It writes `student/accuracy` and `student/cross_entropy` to the algorithm's logger. It takes the
    place of `EvalCallback`, which steps an environment to evaluate a policy: here every step trains
    a student. With `episode="training"` it sees the student that has ended its schedule, not the
    new one that follows within the same step.

    Args:
        split: Split of the data to evaluate on.
        verbose: As in Stable-Baselines3.

    Attributes:
        evaluations: The results of all epochs so far, in their order.

    Raises:
        ConfigError: Unknown split, or several processes, when learning begins.
        TypeError: The algorithm does not act in an `SB3VecEnv`, when learning begins.
    """

    def __init__(self, split: str = "test", verbose: int = 0) -> None:
        super().__init__(verbose)
        self.split = split
        self.evaluations: list[Evaluation] = []
        self._env: SharedStudentEnv | None = None
        self._learning = False
        self._unwritten = False

    def _init_callback(self) -> None:
        if distributed.active():
            raise ConfigError(
                "StudentEvaluation: runs in a single process only; several processes evaluate "
                "together, and only one of them has the algorithm"
            )
        adapter = self.training_env.unwrapped
        if not isinstance(adapter, SB3VecEnv):
            raise TypeError(f"StudentEvaluation: expected an SB3VecEnv, got {adapter!r}")
        check_name(adapter.env.splits, self.split, "split")
        if adapter.env is not self._env:
            self._env = adapter.env
            self._env.subscribe(self._after_step)

    def _on_training_start(self) -> None:
        self._learning = True

    def _on_training_end(self) -> None:
        self._learning = False

    def _after_step(self, record: StepRecord) -> None:
        """Called within the student's step, before another student may take its place."""
        env = self._env
        assert env is not None
        if not self._learning or (record.step + 1) % env.steps_per_epoch:
            return
        evaluation = env.evaluate(self.split)
        self.evaluations.append(evaluation)
        self.logger.record("student/accuracy", evaluation.accuracy)
        self.logger.record("student/cross_entropy", evaluation.cross_entropy)
        self._unwritten = True

    def _on_step(self) -> bool:
        if self._unwritten:
            self._unwritten = False
            self.logger.dump(self.num_timesteps)
        return True
