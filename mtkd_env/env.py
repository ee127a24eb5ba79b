"""Multi-teacher knowledge distillation as a vectorized Gymnasium environment."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mtkd_env.action import (
    FUSIONS,
    PARTS,
    PRIOR,
    Prior,
    WeightFusion,
    fusion_coefficients,
)
from mtkd_env.data.stream import BatchStream
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, check_at_least_1, check_name, check_positive, lookup
from mtkd_env.evaluation import Evaluation
from mtkd_env.imports import Named, name_of
from mtkd_env.inference import as_under_no_grad, ordinary
from mtkd_env.observation import (
    LABEL_FREE,
    UNSCALED,
    OutputObserver,
    RunningStandardizer,
    ShortObservation,
    find_blocks,
    make_observer,
    needs_label,
)
from mtkd_env.options import Options
from mtkd_env.rendering import draw_batch
from mtkd_env.reward import NORMALIZATIONS, REWARD, Rewards, make_reward
from mtkd_env.seeding import continued, derive_seed, module_states
from mtkd_env.teachers.store import StoredTeachers
from mtkd_env.types import Batch, DistillState, LossTerms, TeacherOutputs, TeacherWeights
from mtkd_env.vector import SharedStudentEnv, Splits, StepOutcome, StepRecord

OBSERVATION_DTYPES = {"float32": torch.float32, "float16": torch.float16}

# The valid values of every argument of the environment that is one of a few names.
CHOICES: Mapping[str, Collection[str]] = {
    "reward_timing": ("before", "after"),
    "reward_normalization": NORMALIZATIONS,
    "observation_dtype": OBSERVATION_DTYPES,
    "fusion": (*FUSIONS, PRIOR),
    "episode": ("batch", "epoch", "training"),
    "output": ("numpy", "torch"),
    "on_nan": ("stop", "skip"),
}
# Batches that may be skipped one after the other; after more, it is the student that is broken.
MOST_SKIPPED = 10


@dataclass(frozen=True)
class EnvSpec(Options):
    """What an agent sees, does and is paid for.

    Attributes:
        reward: paper, alignment, aggregate, reference, improvement, cross_entropy, heldout or
            cross; see `mtkd_env.reward`. Or one's own: a function of (state, distillation) that
            gives (B, M), or a `RewardRule`, as `module:name` or as an object.
        reward_timing: before or after the student's step; after costs a student forward.
        reward_normalization: minmax_center, raw_mean, center, running, zscore, zscore_clamp or
            none, in place of the reward's own.
        heldout_size: Labelled images that the reward heldout draws anew for every batch.
        observation: all, performance or gaps: the blocks of Equ. 5 that are seen; or, without the
            sample's label, label_free, or relative, which means the same for all data sets and
            teachers. By default all if every label is there, and label_free if not. A single block
            by its name, or one's own: a function of the state that gives (B, M), or a `Block`, as
            `module:name` or as an object; or a list of these.
        normalize_observation: Whether observations are standardised, column by column; by default
            all but label_free and relative are, whose numbers are of the order of 1.
        observation_dtype: float32, or float16 to halve what agents store.
        fusion: paper, generator, learnable, ...; or the three coefficients of Equ. 9-14; or prior.
            By default paper if every label is there, and generator if not.
        prior: Weights that an action adds to, for the fusion prior: a weighting, such as gate. Or
            one's own: a class of Weighting, or a function of a distiller that makes one, as
            `module:name` or as an object.
        logit_bound: Bound of the action box.
        episode: batch, epoch or training.
        output: numpy, or torch for tensors on the device: what reset and step give; agents of this
            package get tensors in any case.
        on_nan: What becomes of batches with NaN or infinity in a loss or a gradient: stop lets
            them pass, so that whoever watches the steps can stop; skip draws another batch
            instead, before anyone has seen it, or leaves out the student's step where only the
            gradient is bad, and counts them. The host then waits for the device in every step.

    Raises:
        ConfigError: A value that is not among the valid ones.
    """

    reward: Named = "paper"
    reward_timing: str = "before"
    reward_normalization: str | None = None
    heldout_size: int = 128
    observation: Named | None = None
    normalize_observation: bool | None = None
    observation_dtype: str = "float32"
    fusion: str | list[float] | None = None
    prior: Named | None = None
    logit_bound: float = 3.0
    episode: str = "batch"
    output: str = "numpy"
    on_nan: str = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if isinstance(value := getattr(self, name), str):
                check_name(choices, value, name)
        REWARD.find(self.reward)
        if self.observation is not None:
            find_blocks(self.observation)
        if self.fusion is not None and self.fusion != PRIOR:
            fusion_coefficients(self.fusion)
        if (self.fusion == PRIOR) != (self.prior is not None):
            expected = "fusion prior" if self.prior is not None else "a prior, such as gate"
            raise ConfigError(f"prior: expected {expected}, got {self.prior!r} and {self.fusion!r}")
        check_positive(logit_bound=self.logit_bound)
        check_at_least_1(heldout_size=self.heldout_size)

    def resolved(self, *, complete: bool) -> "EnvSpec":
        """The same with what was left open chosen.

        Args:
            complete: Whether every image that the student learns from has a label.

        Raises:
            ConfigError: Something that was chosen needs labels that are not there.
        """
        observation = self.observation or ("all" if complete else LABEL_FREE)
        fusion = self.fusion or ("paper" if complete else "generator")
        standardised = observation not in UNSCALED
        if not complete:
            if REWARD.find(self.reward).needs_label:
                raise _without_labels("reward", self.reward, "heldout")
            if needs_label(observation):
                raise _without_labels("observation", observation, LABEL_FREE)
            if fusion != PRIOR and fusion_coefficients(fusion)[PARTS.index("confidence")] > 0:
                raise _without_labels("fusion", fusion, "generator")
        if self.normalize_observation is not None:
            standardised = self.normalize_observation
        return replace(
            self, observation=observation, fusion=fusion, normalize_observation=standardised
        )


def _without_labels(key: str, value: Any, instead: str) -> ConfigError:
    named = value if isinstance(value, list) else name_of(value)
    return ConfigError(
        f"env.{key}: {named!r} needs the label of every sample, and some are missing; "
        f"'{instead}' does not"
    )


class _NewRecord(StepRecord):
    """A record of a step that has just been made.

    Args:
        step: SGD steps of this student before this one.
        state: The batch.
        weights: The weights that were used, with the graph that they may carry.
        losses: The terms of the loss before the step.
        pay: Makes the rewards.
    """

    def __init__(
        self,
        step: int,
        state: DistillState,
        weights: TeacherWeights,
        losses: LossTerms,
        pay: Callable[[], Rewards],
    ) -> None:
        detached = weights.logit.detach(), weights.feature.detach()
        vars(self).update(
            step=step,
            weights=TeacherWeights(*detached, weights.parts),
            losses=losses,
            index=state.batch.index,
            targets=state.batch.targets,
        )
        self._state, self._pay = state, pay

    @cached_property
    @as_under_no_grad
    def rewards(self) -> Rewards:
        return self._pay()

    @cached_property
    @as_under_no_grad
    def correct(self) -> Tensor:
        return (self._state.teachers.logits.argmax(-1) == self._state.batch.targets).T


class MTKDVectorEnv(SharedStudentEnv):
    """A student learns from M frozen teachers; the agent weights the teachers of every sample.

    ## Description
    Every sub-environment is one sample of the student's current mini-batch. The agent sees what
    the teachers know of the sample and how far the student is from each of them, and answers how
    much each teacher counts for this sample, once for the logit terms of the loss and once for
    its feature terms. One `step` is one SGD step of the student on the whole batch under these
    weights (Equ. 2 of the paper), followed by the next batch. Because the batch's rewards do not
    depend on what comes after it, the environment is a contextual bandit whose contexts drift
    while the student learns.

    ## Action Space
    `Box(-logit_bound, logit_bound, (2·M,), float32)` per sample: one logit per teacher and head.

    | Num     | Action                              | Min          | Max         |
    |---------|-------------------------------------|--------------|-------------|
    | 0..M-1  | logits of the logit-term weights    | -logit_bound | logit_bound |
    | M..2M-1 | logits of the feature-term weights  | -logit_bound | logit_bound |

    Their softmaxes over the teachers are the generated weights, which `fusion` mixes with
    confidence-aware and divergence-aware weights (Equ. 9-14). The bound exists because
    Stable-Baselines3 needs a finite box; logits beyond it are taken as they are.

    ## Observation Space
    `Box(-inf, inf, (F,), float32)` per sample, F = Σ_m (D_m + C + 3) (Equ. 5); the blocks repeat
    for every teacher, and `obs_layout` gives the slice of each, named `teacher/block`.

    | Block           | Width | Meaning                                                    |
    |-----------------|-------|------------------------------------------------------------|
    | `feature`       | D_m   | the teacher's pooled feature f^m                           |
    | `logits`        | C     | the teacher's logits z^m                                   |
    | `cross_entropy` | 1     | the teacher's cross-entropy with the true class [nats]     |
    | `similarity`    | 1     | cosine of the student's projected feature and f^m          |
    | `divergence`    | 1     | T² KL(teacher || student) at temperature T [nats]          |

    With `normalize_observation`, columns are standardised by the mean and variance of all batches
    of a student's first epoch (the statistics grow during that epoch, then stay).

    ## Rewards
    Per teacher R_i^m = −CE_i − α KL_i^m − β dis_i^m (Equ. 6), rescaled over the teachers and
    centred to advantages A_i^m (Equ. 8), and from these the scalar reward
    r_i = ½ Σ_m (w_l + w_f)[i, m] · A_i^m in [-1, 1] with the executed weights w. `reward` names
    other rules; see `mtkd_env.reward`.

    ## Starting State
    `reset(seed=s)` starts a new student (weights, optimiser, schedule, data order) and reproduces
    everything that follows. `reset()` goes on with the student that is there, at the batch that
    waits; `reset(options={"reinit": True})` starts a new one from the environment's own generator.

    ## Episode End
    * `episode="batch"` (the paper): every step terminates; an episode is one decision.
    * `episode="epoch"`: truncated at the end of each epoch; the student goes on.
    * `episode="training"`: truncated when the student's schedule ends; a new student follows within
      the same step. Whoever wants to evaluate the finished one does so from `subscribe`.

    ## Information
    All arrays have a leading axis B.

    | Key                                  | Shape | Meaning                                      |
    |--------------------------------------|-------|----------------------------------------------|
    | `teacher_rewards`                    | B, M  | R, raw                                       |
    | `advantages`                         | B, M  | A, normalised; what the scalar is made of    |
    | `logit_weights`, `feature_weights`   | B, M  | executed weights                             |
    | `cross_entropy`, `total`             | B     | terms of the loss before the step            |
    | `kd`, `feature`                      | B, M  | terms of the loss before the step            |
    | `index`                              | B     | position of the sample in the training split |
    | `final_obs`, `_final_obs`            | B, F; B | last observation of an episode that ended |
    | `final_info`, `_final_info`          | dict; B | the same of an episode that ended |

    At episode ends in scope `batch`, `final_obs` is the observation that was acted on: nobody may
    bootstrap from a terminated episode, so no second forward is spent on it.

    ## Arguments
    `gymnasium.make_vec("MTKD/Digits-v0", ...)` takes those of `mtkd_env.make_env`; what they mean
    stands in `EnvSpec`, `DataSpec`, `PoolSpec`, `StudentSpec`, `Recipe`, `Distillation` and
    `Computing`.

    ## Autoreset
    `AutoresetMode.SAME_STEP`: the observation returned by a step that ends an episode is the first
    of the next one. Under NEXT_STEP every second step would be thrown away.

    Gymnasium's wrappers of observations refuse it. The options that do the same: for
    `NormalizeObservation`, `normalize_observation` (the default); for `DtypeObservation`,
    `observation_dtype`; for `FilterObservation` and `TransformObservation`, `observation`, which
    names blocks or one's own; for conversions to torch, `output`. Observations are flat already.

    ## Rendering
    `render_mode="rgb_array"`: `render()` gives a picture of each image of the last step, with the
    weights of its teachers, for `gymnasium.wrappers.vector.RecordVideo` and others.

    ## Version History
    * v0: initial version.

    ## References
    Yang et al., "Multi-Teacher Knowledge Distillation with Reinforcement Learning for Visual
    Recognition", AAAI 2025.

    Args:
        distiller: Student and teachers.
        stream: Training batches; its batch size is `num_envs`, of several processes that of each.
        splits: What `evaluate` can evaluate on: name to a maker of batches.
        options: What the agent sees, does and is paid for.
        prior: Weights that an action adds to, for the fusion `prior`.

    Raises:
        ConfigError: A choice that needs labels that are not there, or a prior and another fusion.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        **SharedStudentEnv.metadata,
        "render_modes": ["rgb_array"],
        "render_fps": 4,
    }

    def __init__(
        self,
        distiller: Distiller,
        stream: BatchStream,
        splits: Splits,
        options: EnvSpec | None = None,
        prior: Prior | None = None,
    ) -> None:
        options = (options or EnvSpec()).resolved(complete=distiller.complete)
        self.distiller = distiller
        self.stream = stream
        self.splits = splits
        self.device = distiller.device
        self.options = options
        self.skips = options.on_nan == "skip"
        self.teacher_names = distiller.teachers.names
        self._make_sides(options, prior)
        self.set_spaces(stream.local_batch_size, self.observer.width, len(self.teacher_names))
        self.steps = 0
        self._state: DistillState | None = None
        self._observation: tuple[Tensor, Tensor | ShortObservation] | None = None
        # Where stream and random generators stood before the waiting batch, and whether the
        # normaliser knows it.
        self._origin = stream.state_dict()
        self._drawn_from = module_states(self.device)
        self._counted = False
        # Of the last step, for pictures.
        self._acted: tuple[Batch, StepRecord] | None = None

    def _make_sides(self, options: EnvSpec, prior: Prior | None) -> None:
        """Makes what observes and pays, and what makes weights of an action."""
        assert options.observation is not None
        assert options.fusion is not None
        self.reward = make_reward(
            options.reward,
            self.distiller,
            normalization=options.reward_normalization,
            timing=options.reward_timing,
            heldout_size=options.heldout_size,
        )
        self.fusion = WeightFusion(options.fusion, prior).to(self.device)
        self.observer = make_observer(
            options.observation, self.distiller.teachers, lambda: self.distiller.reference
        )
        self._begin_statistics()
        self._dtype = OBSERVATION_DTYPES[options.observation_dtype]

    def _begin_statistics(self) -> None:
        """Forgets what observations have been like, where they are normalised by that."""
        known = RunningStandardizer(self.observer.width, self.device)
        self.normalizer = known if self.options.normalize_observation else None

    # What own agents, weightings and experiments use: tensors in, tensors out.

    @property
    def obs_layout(self) -> dict[str, slice]:
        """Slice of the observation for every `teacher/block`."""
        return self.observer.layout

    @property
    def steps_per_epoch(self) -> int:
        """SGD steps of one epoch."""
        return self.stream.steps_per_epoch

    @property
    def steps_in_training(self) -> int:
        """SGD steps of the student's schedule."""
        return self.steps_per_epoch * self.distiller.recipe.epochs

    @property
    @as_under_no_grad
    def state(self) -> DistillState:
        """The batch that waits for its weights; computed when first asked for.

        Raises:
            ResetNeeded: The environment was never reset.
            ClosedEnvironmentError: It was closed.
            FloatingPointError: Batches are to be skipped, but too many came one after the other.
        """
        self.check_ready()
        if self._state is None:
            self._state = self._next_state()
        return self._state

    def _next_state(self) -> DistillState:
        for _ in range(MOST_SKIPPED):
            self._origin = self.stream.state_dict()
            self._drawn_from = module_states(self.device)
            batch = next(self.stream)
            if not self.skips:
                return self.reward.observe(self.distiller.forward(batch))
            if (state := self.distiller.forward_if_finite(batch)) is not None:
                return self.reward.observe(state)
            warnings.warn(_why_skipped(batch, self.steps), stacklevel=3)
        raise FloatingPointError(
            f"{MOST_SKIPPED} batches one after the other became NaN or infinite after step "
            f"{self.steps}, so that it is the student that is broken; a lower optimizer.lr, "
            "distillation.alpha or distillation.beta may help"
        )

    @property
    def observation(self) -> Float[Tensor, "B F"]:
        """The observation of the batch that waits."""
        return self._observe()[0]

    def normalize(self, raw: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Raw observations as an agent sees them, by the statistics gathered so far."""
        return (self.normalizer(raw) if self.normalizer else raw).to(self._dtype)

    @property
    def keepable_observation(self) -> Float[Tensor, "B F"] | ShortObservation:
        """What `recall` makes the observation of later: the raw one, or a short form of it.

        Raw is before normalisation; it is short where there is a store of teacher outputs.
        """
        return self._observe()[1]

    def recall(self, kept: Float[Tensor, "B F"] | ShortObservation) -> Float[Tensor, "B F"]:
        """The observation of an earlier batch, normalised by the statistics gathered so far.

        The host waits for the device where it was kept short.
        """
        if isinstance(kept, Tensor):
            return self.normalize(kept)
        stored = self.stream.teaching
        assert isinstance(stored, StoredTeachers)
        return self.normalize(self._restored(kept, stored.recall(kept.keys)))

    def _restored(self, kept: ShortObservation, teachers: TeacherOutputs) -> Float[Tensor, "B F"]:
        assert isinstance(self.observer, OutputObserver)
        return self.observer.restore(kept, teachers)

    @torch.no_grad()
    def to_weights(self, action: Float[Tensor, "B A"]) -> TeacherWeights:
        """Weights that an action stands for in the current state (Equ. 9-14)."""
        return self.fusion(action, self.state)

    @torch.no_grad()
    def advantages(self) -> Float[Tensor, "B M"]:
        """A of every teacher in the current state, by the reward's own normalisation.

        Before the student's step, and of the teachers, whatever the reward pays for.
        """
        return self.reward.advantages(self.reward.teacher_rewards(self.state))

    @as_under_no_grad
    def distill(self, weights: TeacherWeights) -> StepRecord:
        """One SGD step of the student under given weights; every method goes through here.

        The next batch is drawn when its state is first asked for.
        """
        state = self.state
        weights = replace(weights, logit=ordinary(weights.logit), feature=ordinary(weights.feature))
        losses = self.distiller.update(state, weights, if_finite=self.skips)
        updated = self.distiller.revisit(state) if self.reward.needs_update else None
        pay = self.reward.when_asked(state, weights, updated)
        record = _NewRecord(self.steps, state, weights, losses, pay)
        self.steps += 1
        if self.render_mode is not None:
            self._acted = state.batch, record
        self._forget_batch()
        self._tell(record)
        return record

    @as_under_no_grad
    def evaluate(self, split: str = "test") -> Evaluation:
        """The student's accuracy and cross-entropy on a split; nothing is trained.

        Raises:
            ConfigError: Unknown split.
        """
        return self.distiller.evaluate(lookup(self.splits, split, "split")())

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed, for a checkpoint between two steps.

        The tensors are the environment's own, as in torch: save or copy them before the next step.
        """
        waits = self._state is not None
        return {
            "steps": self.steps,
            "distiller": self.distiller.state_dict(),
            "stream": self._origin if waits else self.stream.state_dict(),
            "waits": waits,
            "drawn_from": self._drawn_from,
            "counted": self._counted,
            "random": self.np_random.bit_generator.state,
            "fusion": self.fusion.state_dict(),
            "reward": self.reward.state_dict(),
            "direction": self._state.direction if self._state is not None else None,
            "normalizer": self.normalizer.state_dict() if self.normalizer else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; an unseeded `reset` then gives the waiting batch."""
        self.steps = int(state["steps"])
        self.distiller.load_state_dict(state["distiller"])
        self.stream.load_state_dict(state["stream"])
        self.fusion.load_state_dict(state["fusion"])
        self.reward.load_state_dict(state["reward"])
        if self.normalizer:
            self.normalizer.load_state_dict(state["normalizer"])
        self.np_random.bit_generator.state = state["random"]
        self._forget_batch()
        if state["waits"]:
            self._origin = state["stream"]
            self._drawn_from = state["drawn_from"]
            # A student with dropout sees the batch through the same mask again.
            with continued(self._drawn_from, self.device):
                waiting = self.distiller.forward(next(self.stream), again=True)
            # The reward has taken it into account already.
            self._state = replace(waiting, direction=state["direction"])
            self._counted = state["counted"]

    @as_under_no_grad
    def advance(self, actions: Any) -> StepOutcome:
        """`step` with tensors on the device and flags on the host; for adapters."""
        scope, before = self.options.episode, self.observation
        lengths = {"batch": 1, "epoch": self.steps_per_epoch, "training": self.steps_in_training}
        record = self.distill(self.to_weights(self.checked(actions)))
        ended = self.steps % lengths[scope] == 0
        final = before if scope == "batch" else self.observation
        if ended and scope == "training":
            self.reinit()
        return StepOutcome(
            observation=self.observation,
            record=record,
            terminated=ended and scope == "batch",
            truncated=ended and scope != "batch",
            final_observation=final if ended else None,
        )

    def begin(self, seed: int) -> None:
        """Starts a new student with a data order of its own."""
        self.distiller.reinitialize(derive_seed(seed, "student"))
        self.stream.reseed(derive_seed(seed, "data"))
        self.reward.reseed(derive_seed(seed, "reward"))
        self._begin_statistics()
        self.steps = 0
        self._acted = None
        self._forget_batch()

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A picture (height, width, 3) of each image of the last step with its teachers' weights.

        Before the first step, of the batch that waits, without weights. Nothing without the
        `render_mode` `rgb_array`.

        Raises:
            ResetNeeded: The environment was never reset.
        """
        if self.render_mode is None:
            return None
        if self._acted is None:
            batch = self.state.batch
            return draw_batch(batch.inputs, batch.targets, self.teacher_names)
        batch, record = self._acted
        return draw_batch(
            batch.inputs, batch.targets, self.teacher_names, record.weights, record.correct
        )

    def _forget_batch(self) -> None:
        self._state = self._observation = None
        self._counted = False

    @as_under_no_grad
    def _observe(self) -> tuple[Tensor, Tensor | ShortObservation]:
        """The observation as an agent sees it, and as it can be kept."""
        if self._observation is None:
            state = self.state
            short = self.observer.shorten(state)
            raw = self.observer(state) if short is None else self._restored(short, state.teachers)
            if self.normalizer and not self._counted and self.steps < self.steps_per_epoch:
                self.normalizer.update(raw)
            self._counted = True
            self._observation = self.normalize(raw), raw if short is None else short
        return self._observation


def _why_skipped(batch: Batch, steps: int) -> str:
    """What is known of a batch that is skipped after so many steps."""
    bad = batch.index[~batch.inputs.flatten(1).isfinite().all(1)].tolist()
    images = f"its images {bad} are so themselves" if bad else "its images are finite"
    return f"skipped a batch after step {steps}: its losses are NaN or infinite; {images}"
