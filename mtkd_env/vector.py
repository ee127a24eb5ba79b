"""Gymnasium's side of environments whose samples share one student: spaces, resets, infos."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from mtkd_env.errors import check_name
from mtkd_env.evaluation import Evaluation
from mtkd_env.inference import as_under_no_grad
from mtkd_env.reward import Rewards
from mtkd_env.types import Batch, LossTerms, TeacherWeights

Splits = Mapping[str, Callable[[], Iterable[Batch]]]

RESET_OPTIONS = ("reinit",)


@dataclass(frozen=True)
class StepRecord:
    """What one step did, as tensors on the device; given to subscribers and to own agents.

    An environment may make rewards and what is correct when they are first asked for, of the batch,
    which it keeps until then: whoever keeps a record keeps `whole()`.

    Attributes:
        step: SGD steps of this student before this one.
        weights: The weights that were used, detached, with their parts.
        losses: The terms of the loss before the step.
        rewards: Rewards per teacher, advantages and scalar.
        index: Positions of the samples in the training split.
        targets: Classes of the samples.
        correct: Whether each teacher has the class of each sample right.
    """

    step: int
    weights: TeacherWeights
    losses: LossTerms
    rewards: Rewards
    index: Tensor
    targets: Int64[Tensor, " B"]
    correct: Bool[Tensor, "B M"]

    def whole(self) -> "StepRecord":
        """The same with everything made."""
        return StepRecord(**{entry.name: getattr(self, entry.name) for entry in fields(self)})


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step leads to; all sub-environments end together.

    Attributes:
        observation: Observation of the next batch.
        record: What the step did.
        terminated: Whether the episodes terminated.
        truncated: Whether the episodes were truncated.
        final_observation: Last observation of the episodes, if they ended.
    """

    observation: Tensor
    record: StepRecord
    terminated: bool
    truncated: bool
    final_observation: Tensor | None


class SharedStudentEnv(VectorEnv[Any, Any, Any], ABC):
    """A vector environment whose sub-environments are the samples of one student's batch.

    A subclass says what a student, an observation and a step are; it calls `set_spaces`.

    Attributes:
        device: Where the student is.
        options: What the agent sees, does and is given: see `EnvSpec`.
        splits: What `evaluate` can evaluate on: name to a maker of batches.
        steps: SGD steps of this student so far.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    autoreset_mode = AutoresetMode.SAME_STEP
    device: torch.device
    options: Any
    splits: Splits
    steps: int
    _ready = False

    @property
    @abstractmethod
    def observation(self) -> Float[Tensor, "B F"]:
        """The observation of the batch that waits."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """SGD steps of one epoch of the student that is there."""

    @abstractmethod
    def begin(self, seed: int) -> None:
        """Starts a new student."""

    def reinit(self) -> None:
        """Starts a new student by the environment's own generator."""
        self.begin(int(self.np_random.integers(2**31)))

    def go_on(self) -> None:
        """What an unseeded reset does beside giving the batch that waits: nothing."""

    @abstractmethod
    def advance(self, actions: Any) -> StepOutcome:
        """`step` with tensors on the device and flags on the host; for adapters."""

    def subscribe(self, subscriber: Callable[[StepRecord], None]) -> None:
        """Calls `subscriber` after every SGD step, whoever chose the weights.

        Of one task after the other, after those of every student, with its teachers alone.
        """
        self._subscribers.append(subscriber)

    def _tell(self, record: StepRecord) -> None:
        for subscriber in self._subscribers:
            subscriber(record)

    @abstractmethod
    def evaluate(self, split: str = "test") -> Evaluation:
        """The student's accuracy and cross-entropy on a split; nothing is trained."""

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A picture of each sample; nothing without a `render_mode`, which not all can have."""
        return None

    def set_spaces(self, num_envs: int, width: int, teachers: int) -> None:
        """Sets the spaces of the options: observations of a width, two logits for each teacher."""
        dtype, bound = np.dtype(self.options.observation_dtype).type, self.options.logit_bound
        self.num_envs = num_envs
        self.render_mode = None
        self._subscribers: list[Callable[[StepRecord], None]] = []
        self.single_observation_space = Box(-np.inf, np.inf, (width,), dtype)
        self.single_action_space = Box(-bound, bound, (2 * teachers,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @as_under_no_grad
    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins episodes; see "Starting State" for what a seed does.

        Args:
            seed: An int, or None.
            options: None, or `reinit`: whether to start a new student.

        Raises:
            ValueError: A seed per sub-environment (they share one student), or an unknown option.
            ClosedEnvironmentError: The environment was closed.
        """
        self._check_open()
        if seed is not None and not isinstance(seed, int | np.integer):
            raise ValueError(f"seed: expected one int, the student is shared; got {seed!r}")
        for name in options or {}:
            check_name(RESET_OPTIONS, name, "reset option")
        super().reset(seed=None if seed is None else int(seed))
        if seed is not None:
            self.begin(int(seed))
        elif options and options.get("reinit"):
            self.reinit()
        else:
            self.go_on()
        self._ready = True
        return self._export(self.observation), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One SGD step of the student under the weights that `actions` stand for.

        Args:
            actions: Logits (B, 2·M), an array or a tensor.

        Raises:
            ResetNeeded: The environment was never reset.
            ClosedEnvironmentError: It was closed.
            ValueError: Wrong shape, or a row with NaN or infinity; the student is not touched.
        """
        outcome = self.advance(actions)
        return (
            self._export(outcome.observation),
            self._export(outcome.record.rewards.scalar),
            self._export_flag(outcome.terminated),
            self._export_flag(outcome.truncated),
            self._info(outcome),
        )

    def check_ready(self) -> None:
        """Checks that there is a batch to act on.

        Raises:
            ResetNeeded: The environment was never reset.
            ClosedEnvironmentError: It was closed.
        """
        self._check_open()
        if not self._ready:
            raise ResetNeeded("call env.reset() before env.step() or env.distill()")

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError(
                "the environment was closed by env.close(); make a new one"
            )

    def __reduce__(self) -> NoReturn:
        """Refuses to be copied or pickled: subscribers, streams and graphs would come along.

        Raises:
            TypeError: Always; says what to do instead.
        """
        raise TypeError(
            f"an {type(self).__name__} cannot be copied or pickled; make another one with the "
            "same arguments, and give it the state of this one by "
            "load_state_dict(env.state_dict())"
        )

    def checked(self, actions: Any) -> Tensor:
        """Actions (B, 2·M) as a tensor; on the device, or on its way there.

        Raises:
            ValueError: Wrong shape, or a row with NaN or infinity.
        """
        action = _as_numbers(actions)
        expected = self.action_space.shape
        assert expected is not None
        if tuple(action.shape) != expected:
            raise ValueError(
                f"actions: expected shape {expected}, one row of 2·M logits for each of the "
                f"{expected[0]} samples, got {tuple(action.shape)}"
            )
        bad = (~action.isfinite()).any(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"actions: row {row} holds NaN or infinity: {action[row].tolist()} "
                f"({int(bad.sum())} of {expected[0]} rows are bad)"
            )
        # To the host a copy has to be waited for.
        return action.to(self.device, non_blocking=action.device.type == "cpu")

    def info_of(self, record: StepRecord) -> dict[str, Any]:
        """What `info` says of every step, with a leading axis B."""
        return {name: self._export(tensor) for name, tensor in info_tensors(record).items()}

    def _info(self, outcome: StepOutcome) -> dict[str, Any]:
        info = self.info_of(outcome.record)
        if outcome.final_observation is None:
            return info
        # Consumers of Gymnasium's contract look for the info of an ended episode in `final_info`.
        return info | {
            "final_obs": self._export(outcome.final_observation),
            "_final_obs": self._export_flag(flag=True),
            "final_info": info,
            "_final_info": self._export_flag(flag=True),
        }

    def _export(self, tensor: Tensor) -> Any:
        """A copy in the requested kind, so that callers may write into what they get."""
        tensor = tensor.detach().clone()
        return tensor if self.options.output == "torch" else tensor.cpu().numpy()

    def _export_flag(self, flag: bool) -> Any:
        if self.options.output == "torch":
            return torch.full((self.num_envs,), flag, dtype=torch.bool, device=self.device)
        return np.full(self.num_envs, flag)


def _as_numbers(actions: Any) -> Tensor:
    """Actions as float32, where they are."""
    if isinstance(actions, Tensor):
        dense = actions.layout is torch.strided
        numbers = dense and not actions.is_complex() and not actions.is_quantized
        kind = str(actions.dtype if dense else actions.layout)
    else:
        try:
            # A copy, because torch warns of arrays that it could not write into.
            actions = np.array(actions)
        except ValueError as error:
            raise ValueError(f"actions: expected rows of one length: {error}") from None
        # Torch has no wider floats than of 8 bytes.
        numbers = actions.dtype.kind in "biuf" and actions.dtype.itemsize <= 8
        kind = str(actions.dtype)
    if not numbers:
        raise ValueError(f"actions: expected real numbers, got {kind}")
    return torch.as_tensor(actions, dtype=torch.float32)


def info_tensors(record: StepRecord) -> dict[str, Tensor]:
    """The entries of `info` that every step has, as tensors with a leading axis B."""
    return {
        "teacher_rewards": record.rewards.teacher,
        "advantages": record.rewards.advantages,
        "logit_weights": record.weights.logit,
        "feature_weights": record.weights.feature,
        "cross_entropy": record.losses.cross_entropy,
        "kd": record.losses.kd,
        "feature": record.losses.feature,
        "total": record.losses.total,
        "index": record.index,
    }
