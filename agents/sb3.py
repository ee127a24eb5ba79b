"""Any Stable-Baselines3 or sb3-contrib algorithm as an agent."""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from jaxtyping import Float
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
)
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.tensorboard import SummaryWriter

from agents.base import (
    PATH,
    SHARED,
    AtRest,
    EpochEnd,
    PolicyAgent,
    Settings,
    nothing,
    steps_left,
)
from agents.isolation import Isolation
from agents.learning import StepCount
from agents.policies import shared_policy_of
from agents.sb3_state import load_model_state, model_state, variables_of
from mtkd_env import distributed
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_arguments, check_choice, did_you_mean, errors_of
from mtkd_env.files import write_atomically
from mtkd_env.imports import Kind, Named, is_class, name_of, optional
from mtkd_env.options import build, field_names, plain
from mtkd_env.seeding import derive_seed
from mtkd_env.vector import StepRecord
from mtkd_env.wrappers.sb3 import SB3VecEnv

# Where the algorithms of sb3-contrib are; it is optional, so they are known without importing it.
CONTRIB: Mapping[str, str] = {
    "ars": "agents.ars",
    **dict.fromkeys(
        ("crossq", "maskableppo", "qrdqn", "recurrentppo", "tqc", "trpo"), "sb3_contrib"
    ),
}

NOISES: Mapping[str, Callable[..., ActionNoise]] = {
    "normal": NormalActionNoise,
    "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise,
}

# Numbers that may be given in epochs, and whether they count environment steps or samples.
COUNTED_IN_STEPS = ("n_steps", "train_freq", "gradient_steps")
COUNTED_IN_SAMPLES = ("batch_size", "buffer_size", "learning_starts")

# What Stable-Baselines3 warns of: small networks on a GPU, where the observations are already, and
# minibatches of unequal sizes, which `n_minibatches` asks for.
ON_GPU = ".*on the GPU, but it is primarily intended"
UNEQUAL = "You have specified a mini-batch size of"

# How torch's distributions and the environment complain of what a diverged policy makes.
DIVERGED = re.compile("distribution .* to satisfy the constraint|holds NaN or infinity", re.DOTALL)

EPOCHS = re.compile(r"^(\d+(?:\.\d+)?) epochs?$")


def is_algorithm(found: Any) -> bool:
    """Whether something is a class of an algorithm."""
    return is_class(found, BaseAlgorithm)


ALGORITHM: Kind[type[BaseAlgorithm]] = Kind(
    {}, "agent", is_algorithm, "a Stable-Baselines3 algorithm"
)


def algorithm_class(given: Named, others: Iterable[str] = ()) -> type[BaseAlgorithm]:
    """The class of an algorithm.

    Args:
        given: A name of Stable-Baselines3 or sb3-contrib in any case (`ppo`, `TQC`); or a class of
            the user's own, or its `module:Class`.
        others: Further names that an error may suggest.

    Raises:
        ConfigError: Unknown name, a package that is not installed, or not an algorithm.
    """
    if not isinstance(given, str) or ":" in given:
        return ALGORITHM.find(given)
    name, library = given.lower(), _algorithms(stable_baselines3)
    if name in CONTRIB:
        with errors_of(f"agent: '{given}'"):
            optional("sb3_contrib")
        library = _algorithms(importlib.import_module(CONTRIB[name]))
    if name in library:
        return library[name]
    known = sorted({*library, *CONTRIB, *others})
    raise ConfigError(
        f"agent: unknown name '{given}'{did_you_mean(name, known)} "
        f"(known: {', '.join(known)}, or module:Class)"
    )


def _algorithms(library: Any) -> dict[str, type[BaseAlgorithm]]:
    members = {name.lower(): getattr(library, name) for name in library.__all__}
    return {name: member for name, member in members.items() if is_algorithm(member)}


class _Finished(Exception):  # noqa: N818 - not an error
    """Ends an algorithm's `learn`, amid a rollout if need be."""


class _Epochs:
    """Tells when an epoch of the student has ended; ends `learn` after the last one.

    It hears of a step from the environment, before the next batch is drawn or another student
    follows, so that every method's student is evaluated at the same moment.
    """

    def __init__(self, agent: "SB3Agent", epochs: int, on_epoch_end: EpochEnd) -> None:
        self._agent = agent
        self._remaining = (epochs - 1) * agent.env.steps_per_epoch + steps_left(agent.env)
        self._on_epoch_end = on_epoch_end

    def __call__(self, record: StepRecord) -> None:
        if not self._remaining:
            return
        self._remaining -= 1
        model, env = self._agent.model, self._agent.env
        # Stable-Baselines3 counts a step only when it has the answer to it.
        seen = model.num_timesteps + model.n_envs
        if (record.step + 1) % env.steps_per_epoch == 0:
            self._agent.check_finite()
            self._on_epoch_end()
            if distributed.rank() == 0:
                model.logger.dump(seen)
        if not self._remaining:
            model.num_timesteps = seen
            raise _Finished

    def stop(self) -> None:
        """Hears of no further step."""
        self._remaining = 0


class _Rest(BaseCallback):
    """Is at rest where an algorithm begins a rollout.

    What a rollout or an update keeps in variables of its own is made only after that.
    """

    def __init__(self, at_rest: AtRest) -> None:
        super().__init__()
        self._at_rest = at_rest

    def _on_rollout_start(self) -> None:
        self._at_rest()

    def _on_step(self) -> bool:
        return True


@dataclass(frozen=True)
class SB3Settings(Settings):
    """What can be chosen beside the arguments of the algorithm's own class.

    Attributes:
        policy: Policy name of Stable-Baselines3; or `shared`, one network for each teacher, which
            needs the observation `relative`; see `agents.policies`.
        noise_type: `normal` or `ornstein-uhlenbeck`, for algorithms with action noise.
        noise_std: Standard deviation of the action noise in the box scaled to [-1, 1].
        policy_kwargs: As in Stable-Baselines3; `activation_fn` may be a name of `torch.nn`.
        n_minibatches: Parts that an on-policy rollout is split into, instead of `batch_size`; the
            last one is smaller where they cannot be equal.

    Raises:
        ConfigError: A value that cannot be used.
    """

    policy: str = "MlpPolicy"
    noise_type: str = "normal"
    noise_std: float | None = None
    policy_kwargs: Mapping[str, Any] | None = None
    n_minibatches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(NOISES, noise_type=self.noise_type)
        activation = (self.policy_kwargs or {}).get("activation_fn")
        if isinstance(activation, str) and not is_class(getattr(nn, activation, None), nn.Module):
            raise ConfigError(f"policy_kwargs.activation_fn: torch.nn has no module '{activation}'")

    @property
    def described(self) -> dict[str, Any]:
        """What has to be alike of two networks for one to be loaded into the other."""
        kwargs = self.policy_kwargs or {}
        found = {key: kwargs[key] for key in ("net_arch", "activation_fn") if key in kwargs}
        if isinstance(activation := found.get("activation_fn"), type):
            found["activation_fn"] = activation.__name__
        return {"network": self.policy, **({"policy_kwargs": plain(found)} if found else {})}


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of an `SB3Agent`: those of `SB3Settings`, and the algorithm's own."""
    own = {name: arguments[name] for name in field_names(SB3Settings) if name in arguments}
    return own, {name: plain(value) for name, value in arguments.items() if name not in own}


class SB3Agent(PolicyAgent):
    """Lets a Stable-Baselines3 algorithm drive the environment.

    Args:
        env: The environment.
        algorithm: See `algorithm_class`.
        seed: Seed of the algorithm.
        arguments: Fields of `SB3Settings`, and any argument of the algorithm's class. Those in
            `COUNTED_IN_STEPS` and `COUNTED_IN_SAMPLES` may be given as `"1 epoch"` or `"5 epochs"`.

    Raises:
        ConfigError: Unknown algorithm or argument, or one that cannot be used.
    """

    settings_type = SB3Settings
    settings: SB3Settings

    def __init__(
        self, env: MTKDVectorEnv, algorithm: Named, *, seed: int = 0, **arguments: Any
    ) -> None:
        own, theirs = split(arguments)
        super().__init__(env, seed=seed, **own)
        self.algorithm = name_of(algorithm)
        self.shared = self.settings.policy == SHARED
        self.check_env(env)
        self.vec_env = SB3VecEnv(env)
        self._isolated = Isolation()
        self.model = self._build(algorithm_class(algorithm), theirs)
        self.network = {"algorithm": self.name, **self.settings.described}
        self.modules = {"policy": self.model.policy}
        self.variables = {name: one.detach() for name, one in variables_of(self.model).items()}
        _fuse_steps(self.model)
        optimizer = _policy_optimizer(self.model)
        self._steps = None if optimizer is None else StepCount(optimizer)
        # The seed is the algorithm's: the next reset must not start a new student.
        self.vec_env._reset_seeds()
        self._learning = False
        # The state of an agent that was amid its learning, until this one goes on with it.
        self._interrupted: Mapping[str, Any] | None = None

    @property
    def updates(self) -> int:
        """Steps of the policy's optimiser so far, or the updates that the algorithm counts."""
        return int(self.model._n_updates) if self._steps is None else self._steps.steps

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """The policy's deterministic action."""
        action, _ = self.model.predict(observation.cpu().numpy(), deterministic=True)
        return torch.as_tensor(action, device=observation.device)

    def learn(self, epochs: int, on_epoch_end: EpochEnd, at_rest: AtRest = nothing) -> None:
        """Hands the environment over to the algorithm's own `learn`.

        It is at rest where the algorithm begins a rollout. Of several processes only process 0 runs
        the algorithm, on the samples of all; the others do in their parts what it says.
        """
        epoch = _Epochs(self, epochs, on_epoch_end)
        self.env.subscribe(epoch)
        try:
            self._learning = True
            with suppress(_Finished):
                if distributed.rank() == 0:
                    self._run_algorithm(epochs, at_rest)
                else:
                    self.vec_env.follow(at_rest)
        finally:
            self._learning = False
            epoch.stop()

    def _run_algorithm(self, epochs: int, at_rest: AtRest) -> None:
        model = self.model
        if self._interrupted is None:
            # Forgets the observation of an earlier call, which its last step has made outdated.
            model.set_env(self.vec_env)
            samples = epochs * self.env.steps_per_epoch * model.n_envs
        else:
            samples = model._total_timesteps - model.num_timesteps
        begins = model.num_timesteps == 0 and self._interrupted is None
        with self._isolated(), self._divergence_named():
            model.learn(
                samples,
                callback=_Rest(partial(self._begin_rollout, at_rest)),
                log_interval=None,  # type: ignore[arg-type] # None: never; the stub says int
                reset_num_timesteps=begins,
            )

    def _begin_rollout(self, at_rest: AtRest) -> None:
        if self._interrupted is not None:
            # Once more, because the way to here has reset and drawn some of it.
            load_model_state(self.model, self._interrupted)
            self._interrupted = None
        self.vec_env.rest(at_rest)

    def log_to(self, folder: Path) -> None:
        """Sends the algorithm's own log to TensorBoard events in a folder."""
        output = TensorBoardOutputFormat(str(folder))
        output.writer.close()
        output.writer = SummaryWriter(str(folder), purge_step=self.model.num_timesteps + 1)
        self.model.set_logger(Logger(str(folder), [output]))

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's state, and whether it is amid a call of `learn`.

        Of several processes, that of process 0 counts.
        """
        return {
            "model": model_state(self.model),
            "learning": self._learning,
            "updates": self._steps and self._steps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; `learn` then from where it was called at rest."""
        load_model_state(self.model, state["model"])
        if self._steps is not None:
            self._steps.load_state_dict(state["updates"])
        self._interrupted = state["model"] if state["learning"] else None

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes what it has learned, and `agent.zip`, which the algorithm's own `load` reads."""
        super().save(folder, notes)
        write_atomically(folder / "agent.zip", lambda temporary: self.model.save(temporary))

    @property
    def name(self) -> str:
        """That of the algorithm's class."""
        return type(self.model).__name__

    def check_finite(self) -> None:
        """Checks that the policy has not diverged.

        Raises:
            FloatingPointError: It has; names the algorithm and the student's step.
        """
        fine = [part.isfinite().all() for part in self.model.policy.parameters()]
        if not torch.stack(fine).all():  # The host waits once for all of them.
            raise self._divergence()

    def _divergence(self) -> FloatingPointError:
        return FloatingPointError(
            f"agent: {self.algorithm} became NaN or infinite by step {self.env.steps} of the "
            "student; a lower agent.arguments.learning_rate may help"
        )

    @contextmanager
    def _divergence_named(self) -> Iterator[None]:
        """Says who diverged, where torch or the environment only complain of an action."""
        try:
            yield
        except ValueError as error:
            if not self.env.observation.isfinite().all():
                raise FloatingPointError(
                    f"the observations of {self.algorithm} became NaN or infinite by step "
                    f"{self.env.steps} of the student, which has diverged; a lower optimizer.lr, "
                    "distillation.alpha or distillation.beta may help"
                ) from error
            if DIVERGED.search(str(error)):
                raise self._divergence() from error
            raise

    def _build(self, kind: type[BaseAlgorithm], given: Mapping[str, Any]) -> BaseAlgorithm:
        settings = self.settings
        arguments = {key: self._count(key, value) for key, value in given.items()}
        arguments.setdefault("device", self.env.device)
        policy: Any = shared_policy_of(kind) if self.shared else settings.policy
        if settings.n_minibatches is not None:
            arguments["batch_size"] = self._minibatch(arguments, settings.n_minibatches)
        if settings.noise_std is not None:
            size = 2 * len(self.env.teacher_names)
            spread = np.full(size, settings.noise_std)
            arguments["action_noise"] = NOISES[settings.noise_type](np.zeros(size), spread)
        if settings.policy_kwargs:
            arguments["policy_kwargs"] = kwargs = dict(settings.policy_kwargs)
            if isinstance(name := kwargs.get("activation_fn"), str):
                kwargs["activation_fn"] = getattr(nn, name)
        seed = derive_seed(self.seed, "agent") % 2**31
        try:
            with self._isolated(ignore=(ON_GPU, UNEQUAL) if settings.n_minibatches else (ON_GPU,)):
                return kind(policy, self.vec_env, seed=seed, **arguments)
        except ConfigError:
            raise
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"agent: {self.algorithm} cannot be built: {error}") from error

    def _count(self, key: str, value: Any) -> Any:
        match = EPOCHS.match(value) if isinstance(value, str) else None
        if match is None:
            return value
        steps = round(float(match[1]) * self.env.steps_per_epoch)
        if key in COUNTED_IN_STEPS:
            return steps
        if key in COUNTED_IN_SAMPLES:
            return steps * self.vec_env.num_envs
        raise ConfigError(f"agent.arguments.{key}: cannot be given in epochs, got '{value}'")

    def _minibatch(self, arguments: Mapping[str, Any], count: int) -> int:
        if not isinstance(arguments.get("n_steps"), int):
            raise ConfigError("agent.arguments.n_minibatches: needs n_steps, which is not given")
        samples: int = arguments["n_steps"] * self.vec_env.num_envs
        if not 1 <= count <= samples:
            raise ConfigError(
                f"agent.arguments.n_minibatches: expected 1 to {samples}, the number of samples "
                f"of a rollout, got {count}"
            )
        return math.ceil(samples / count)


def _fuse_steps(model: BaseAlgorithm) -> None:
    """Lets Adam make its steps in one call each, which is most of what they cost here."""
    for owner in (model.policy, *(getattr(model, name, None) for name in ("actor", "critic"))):
        optimizer = getattr(owner, "optimizer", None)
        if type(optimizer) is Adam:
            for group in optimizer.param_groups:
                group["fused"] = True


def _policy_optimizer(model: BaseAlgorithm) -> Optimizer | None:
    """What a gradient updates the policy by; none where it is not updated by a gradient alone."""
    owner = getattr(model, "actor", None) or model.policy
    # TRPO's optimiser is its critic's; the policy takes steps that a line search has found.
    searches = hasattr(model, "line_search_max_iter")
    return None if searches else getattr(owner, "optimizer", None)


def check_sb3_arguments(algorithm: type[BaseAlgorithm], arguments: Mapping[str, Any]) -> None:
    """Checks an algorithm's arguments before anything is built.

    Args:
        algorithm: Its class.
        arguments: What `SB3Agent` would be given.

    Raises:
        ConfigError: An unknown argument, or a value that `SB3Agent` cannot take.
    """
    own, theirs = split(arguments)
    check_arguments(algorithm, theirs, PATH)
    if build(SB3Settings, own, PATH).policy == SHARED:
        try:
            shared_policy_of(algorithm)
        except ConfigError as error:
            raise ConfigError(f"{PATH}.{error}") from None
        if theirs.get("use_sde"):
            raise ConfigError(f"{PATH}.use_sde: cannot be used with policy '{SHARED}'")
