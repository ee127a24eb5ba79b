"""What every agent has in common: it acts on observations and learns by stepping."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.action import PRIOR
from mtkd_env.agent_file import FILE, AgentFile, save_agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.files import write_text
from mtkd_env.imports import name_of
from mtkd_env.inference import as_under_no_grad, leave_inference
from mtkd_env.observation import RELATIVE, RELATIVE_VERSION, RelativeObserver
from mtkd_env.options import Options
from mtkd_env.types import TeacherWeights

EpochEnd = Callable[[], None]
AtRest = Callable[[], None]

# Where hyperparameters stand in a configuration.
PATH = "agent.arguments"

# The policy that is one network for each teacher.
SHARED = "shared"

# 1/M keeps the scale of the loss for what follows; the paper's "equal weights" are ones, which
# make the teachers count M times as much during the warm-up.
WARMUP_WEIGHTS = ("uniform", "ones", PRIOR)


def nothing() -> None:
    """Does nothing: what happens at rest unless someone asks for more."""


def steps_left(env: MTKDVectorEnv) -> int:
    """Steps until the student's epoch ends; those of a whole one where it has just begun."""
    return env.steps_per_epoch - env.steps % env.steps_per_epoch


def warm_up_weights(env: MTKDVectorEnv, kind: str) -> TeacherWeights:
    """The weights of a warm-up for the batch that waits.

    Args:
        env: The environment.
        kind: `uniform` (1/M), `ones`, or `prior`: those of the fusion's prior.

    Raises:
        ConfigError: Unknown weights, or a prior where there is none.
    """
    check_name(WARMUP_WEIGHTS, kind, "warm-up weights")
    if kind == PRIOR:
        if env.fusion.prior is None:
            raise ConfigError("warmup.weights: 'prior' needs env.fusion prior")
        return env.fusion.prior(env.state)
    teachers = len(env.teacher_names)
    weight = 1.0 if kind == "ones" else 1 / teachers
    equal = torch.full((env.num_envs, teachers), weight, device=env.device)
    return TeacherWeights(logit=equal, feature=equal)


@dataclass(frozen=True)
class Settings(Options):
    """Hyperparameters of an agent that has none."""


class Agent(ABC):
    """Chooses teacher weights in an environment that it was made for.

    Args:
        env: The environment.
        seed: Seed of everything that it draws.
        arguments: Fields of `settings_type`.

    Attributes:
        settings_type: The dataclass of its hyperparameters.
        settings: Its hyperparameters.

    Raises:
        ConfigError: A hyperparameter that cannot be used.
    """

    settings_type: type[Settings] = Settings

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        leave_inference(cls, "learn", "step")

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, **arguments: Any) -> None:
        self.env = env
        self.seed = seed
        self.settings = self.settings_type(**arguments)

    @property
    def updates(self) -> int:
        """Updates of the policy so far; 0 for agents that do not learn."""
        return 0

    @abstractmethod
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits (B, 2·M) without exploration, on the device of the observation."""

    def warm_up(self, steps: int, weights: str = "uniform", at_rest: AtRest = nothing) -> None:
        """Trains the student under equal weights; the agent's own actions are not asked for.

        Agents that can learn from actions that are not theirs do so at the end (Algorithm 1).

        Args:
            steps: SGD steps of the student.
            weights: In `WARMUP_WEIGHTS`.
            at_rest: See `learn`.

        Raises:
            ConfigError: Unknown weights.
        """
        for _ in range(steps):
            at_rest()
            # The statistics that normalise observations know of those that were asked for.
            _ = self.env.observation
            self.env.distill(warm_up_weights(self.env, weights))

    @as_under_no_grad
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
        for _ in range(epochs):
            for _ in range(steps_left(self.env)):
                at_rest()
                self.step()
            on_epoch_end()

    @as_under_no_grad
    def step(self) -> None:
        """Trains the student on the batch that waits."""
        self.env.distill(self.env.to_weights(self.act(self.env.observation)))

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

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes the agent into a run's folder, or a note that there is nothing to load.

        Args:
            folder: The folder.
            notes: What else is known of it, such as what it was trained on.
        """
        del notes
        write_text(folder / "agent.txt", f"{self.name}: nothing was learned\n")

    def load(self, found: AgentFile) -> None:
        """Takes what another agent has learned, in an environment of the same spaces.

        Args:
            found: What `mtkd_env.agent_file.load_agent` gave.

        Raises:
            ConfigError: This kind of agent learns nothing, or the other's spaces differ.
        """
        del found
        raise ConfigError(f"{self.name} learns nothing that could be loaded")

    @property
    def name(self) -> str:
        """What files call it."""
        return type(self).__name__


class Frozen(Agent):
    """Acts as another agent does, which learns no more.

    Args:
        agent: The other one; its environment is this one's.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent.env, seed=agent.seed)
        self.agent = agent

    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """The other's logits."""
        return self.agent.act(observation)

    def state_dict(self) -> dict[str, Any]:
        """The other's."""
        return self.agent.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the other what it was."""
        self.agent.load_state_dict(state)

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes the other."""
        self.agent.save(folder, notes)


class PolicyAgent(Agent):
    """Has a policy of networks, which other agents can take over from its files.

    Attributes:
        shared: Whether the policy is the same network for each teacher.
        network: What network it is, as far as another one has to be alike.
        modules: What it has learned by networks: `policy`, and others.
        variables: What it has learned beside that, such as an entropy coefficient.
    """

    shared: bool
    network: dict[str, Any]
    modules: Mapping[str, nn.Module]
    variables: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def spaces(self) -> dict[str, Any]:
        """Where its policy can be used, and what network it is."""
        options = self.env.options
        prior = {} if options.prior is None else {"prior": name_of(options.prior)}
        if self.shared:
            seen = {"observation": RELATIVE, "version": RELATIVE_VERSION, "policy": SHARED}
            return {**seen, **prior, **self.network}
        env = self.env
        observation = options.observation
        if not isinstance(observation, str):  # Blocks of the user's own.
            named = (block.rpartition("/")[2] for block in env.obs_layout)
            observation = ", ".join(dict.fromkeys(named))
        return {
            "observation": observation,
            "normalized": env.normalizer is not None,
            "policy": "teacher",
            "width": env.observer.width,
            "teachers": len(env.teacher_names),
            **prior,
            **self.network,
        }

    def check_env(self, env: MTKDVectorEnv) -> None:
        """Raises a `ConfigError` unless the policy knows what is seen in an environment."""
        # Of many tasks, in which nothing else is seen.
        if not self.shared or not isinstance(env, MTKDVectorEnv):
            return
        if not isinstance(env.observer, RelativeObserver):
            raise ConfigError(
                f"policy: '{SHARED}' needs the observation '{RELATIVE}', "
                f"found '{env.options.observation}'"
            )
        if env.normalizer:
            raise ConfigError(
                f"policy: '{SHARED}' needs observations as they are; normalize_observation is true"
            )

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes what it has learned, but not what it would need to go on bit for bit.

        With it goes what its policy needs of the environment elsewhere: the fusion with its learnt
        coefficients, and the statistics of the observations.
        """
        parts: dict[str, Mapping[str, Any]] = {
            name: module.state_dict() for name, module in self.modules.items()
        }
        parts["variables"] = self.variables
        if isinstance(env := self.env, MTKDVectorEnv):
            parts["fusion"] = env.fusion.state_dict()
            parts["normalizer"] = env.normalizer.state_dict() if env.normalizer else {}
        tensors = {
            f"{part}.{name}": torch.as_tensor(value)
            for part, state in parts.items()
            for name, value in state.items()
        }
        save_agent(folder / FILE, self.spaces, tensors, {"agent": self.name, **(notes or {})})

    def load(self, found: AgentFile) -> None:
        """Takes the networks of another agent; parts that it lacks, and optimisers, stay."""
        found.check(self.spaces)
        for name, module in self.modules.items():
            if name == "policy" or found.part(name):
                found.load_into(module, name)
        saved = found.part("variables")
        for name in self.variables.keys() & saved.keys():
            self.variables[name].copy_(saved[name])
        if not isinstance(env := self.env, MTKDVectorEnv):
            return
        if env.fusion.learnable and "logits" in found.part("fusion"):
            found.load_into(env.fusion, "fusion")
        if env.normalizer:
            env.normalizer.load_state_dict(found.part("normalizer"))
