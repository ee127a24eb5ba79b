"""What the learning agents of this package share: a policy, a history, and parts to be saved."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from agents.arguments import Check, among, at_least_0, at_least_1, check_values
from agents.base import Agent, AtRest, EpochEnd, nothing, steps_left
from agents.history import History
from agents.policies import TeacherPolicy
from mtkd_env import distributed
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import lookup
from mtkd_env.files import save_checkpoint
from mtkd_env.seeding import derive_seed, seeded

OPTIMIZERS: Mapping[str, Callable[..., optim.Optimizer]] = {"adam": optim.Adam, "sgd": optim.SGD}

Memory = TypeVar("Memory")


class Stateful(Protocol):
    """Whatever can be saved and goes on from what was saved."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning has changed."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Goes on from what `state_dict` gave."""


class RandomNumbers:
    """A generator of random numbers on a device, which can be saved.

    Args:
        device: Where the numbers are drawn.
        seed: Seed of all of them.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(derive_seed(seed, "exploration"))

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave, on the same kind of device."""
        self.generator.set_state(state["generator"].cpu())


class StepCount:
    """Counts the steps of an optimiser from now on.

    Attributes:
        steps: How many there were.
    """

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.steps = 0
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave."""
        self.steps = int(state["steps"])


def make_optimizer(name: str, parameters: Iterable[Tensor], lr: float) -> optim.Optimizer:
    """An optimiser by its name in `OPTIMIZERS`.

    Raises:
        ConfigError: Unknown name.
    """
    return lookup(OPTIMIZERS, name, "optimizer")(parameters, lr=lr)


def descend(optimizer: optim.Optimizer, loss: Float[Tensor, ""]) -> None:
    """One step of an optimiser; of several processes, by the mean of their gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


class LearningAgent(Agent, Generic[Memory]):
    """Acts on batches, remembers them, and learns from its history when that is full.

    A subclass says what it does with a batch and keeps of it, and how it learns from that.

    Args:
        env: The environment.
        seed: Seed of the policy's initialisation.
        agent_every: Batches between two updates; None for once an epoch. An update at the end of
            every epoch takes what is left.
        hidden: Width of the policy's hidden layer.
        history_bytes: Bytes that the history of one update may take; see `History`.
        others: Further arguments of the subclass, which are checked with these.

    Attributes:
        remembers: The dataclass of what is kept of a batch.
        checks: Which values arguments may have.
        policy: The network.
        parts: Everything that learning changes but the history, by the name that it is saved under.
        history: The batches since the last update.

    Raises:
        ConfigError: A value that `checks` refuses.
    """

    remembers: type[Memory]
    checks: Mapping[str, Check] = {
        "agent_every": at_least_1,
        "hidden": at_least_1,
        "history_bytes": at_least_1,
        "lr": at_least_0,
        "optimizer": among(OPTIMIZERS, "optimizer"),
    }

    def __init__(
        self,
        env: MTKDVectorEnv,
        *,
        seed: int,
        agent_every: int | None,
        hidden: int,
        history_bytes: int,
        **others: Any,
    ) -> None:
        super().__init__(env)
        own = {"agent_every": agent_every, "hidden": hidden, "history_bytes": history_bytes}
        check_values(self.checks, own | others)
        with seeded(derive_seed(seed, "agent")):
            policy = TeacherPolicy(env.observer.width, len(env.teacher_names), hidden)
        self.policy: nn.Module = policy.to(env.device)
        self.parts: dict[str, Stateful] = {"policy": self.policy}
        self.history_bytes = history_bytes
        self._agent_every = min(agent_every or env.steps_per_epoch, env.steps_per_epoch)
        self.history = History(
            self.remembers,
            steps=self._agent_every,
            max_bytes=history_bytes,
            recall=lambda short: env.normalize(env.recall(short)),
        )

    def _learns_by(self, optimizer: optim.Optimizer) -> None:
        """Says what the policy is updated by."""
        self.optimizer = optimizer
        self._steps = StepCount(optimizer)
        self.parts |= {"optimizer": optimizer, "updates": self._steps}

    @property
    def updates(self) -> int:
        """Steps of the policy's optimiser so far."""
        return self._steps.steps

    @abstractmethod
    def _step(self) -> Memory:
        """Trains the student on the batch that waits; gives what is worth keeping of it."""

    @abstractmethod
    def _learn_from(self, history: History[Memory]) -> None:
        """Updates the agent."""

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits of the policy."""
        logits: Tensor = self.policy(observation)
        return logits

    def learn(self, epochs: int, on_epoch_end: EpochEnd, at_rest: AtRest = nothing) -> None:
        """Student steps with the policy as it is, then an update from all of them (Algorithm 2)."""
        for _ in range(epochs):
            for _ in range(steps_left(self.env)):
                at_rest()
                # Before the statistics settle, what was seen could not be recalled.
                short = self.env.short_observation if self.env.settled else None
                self.history.append(self._step(), short)
                if self.history.seen == self._agent_every:
                    self._flush()
            self._flush()
            on_epoch_end()

    def _flush(self) -> None:
        if self.history.seen:
            self._learn_from(self.history)
            self.history.clear()

    def state_dict(self) -> dict[str, Any]:
        """All parts, and the history, which is empty where an epoch has ended."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {**parts, "history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, or from what `save` wrote."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history.load_state_dict(state["history"], self.env.device)

    def save(self, folder: Path) -> None:
        """Writes `agent.pt`: all parts, and what the policy needs of the environment elsewhere.

        That is the fusion with its learnt coefficients, and the statistics of the observations.
        """
        env = self.env
        normalizer = env.normalizer.state_dict() if env.normalizer else None
        around = {"fusion": env.fusion.state_dict(), "normalizer": normalizer}
        save_checkpoint(folder / "agent.pt", {**self.state_dict(), **around})
