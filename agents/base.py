"""What every agent has in common: it acts on observations and learns by stepping."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from agents.history import HISTORY_BYTES
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.types import TeacherWeights


@dataclass(frozen=True, slots=True)
class Transition:
    """What an agent keeps of one step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw.
        advantages: A, what each teacher was worth for each sample.
        evidence: The parts of the weights that no agent chooses (`confidence`, `divergence`), and
            if the agent chose, what it generated (`generator`).
    """

    observation: Float[Tensor, "B F"]
    advantages: Float[Tensor, "B M"]
    evidence: Mapping[str, TeacherWeights]


EpochEnd = Callable[[], None]
AtRest = Callable[[], None]


def nothing() -> None:
    """Does nothing: what happens at rest unless someone asks for more."""


def steps_left(env: MTKDVectorEnv) -> int:
    """Steps until the student's epoch ends; those of a whole one where it has just begun."""
    return env.steps_per_epoch - env.steps % env.steps_per_epoch


class Agent(ABC):
    """Chooses teacher weights in an environment that it was made for.

    Attributes:
        env: The environment.
        learns_from_warmup: Whether `pretrain` wants the warm-up's transitions.
        history_bytes: Bytes that these may take.
    """

    learns_from_warmup: bool = False
    history_bytes: int = HISTORY_BYTES

    @property
    def updates(self) -> int:
        """Updates of the policy so far; 0 for agents that do not learn."""
        return 0

    def __init__(self, env: MTKDVectorEnv) -> None:
        self.env = env

    @abstractmethod
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits (B, 2·M) without exploration, on the device of the observation."""

    @abstractmethod
    def learn(self, epochs: int, on_epoch_end: EpochEnd, at_rest: AtRest = nothing) -> None:
        """Trains the student under weights of its own for some epochs, and learns from that.

        Args:
            epochs: Epochs of the student; one that has begun counts as one.
            on_epoch_end: Called after the last step of every epoch.
            at_rest: Called between two steps, wherever `state_dict` and the environment's together
                hold all that the rest depends on, but for the global random generators. An agent
                that was given them, asked for the epochs that are left, calls it first thing, and
                goes on as the one that they are of.
        """

    def pretrain(self, history: Sequence[Transition]) -> None:
        """Learns from the warm-up epoch, in which all teachers counted the same (Algorithm 1).

        Does nothing for agents that can only learn from actions of their own.

        Args:
            history: The transitions, each made when it is asked for; they are there during this
                call only.
        """
        del history

    def log_to(self, folder: Path) -> None:
        """Sends what the agent itself logs to TensorBoard events in a folder.

        Events there of steps that the agent has not made are void: it is about to make them again.
        """
        del folder

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning has changed; empty for agents that do not learn.

        Raises:
            ConfigError: The agent keeps something that no checkpoint can hold.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        del state

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the agent into a run's folder."""
