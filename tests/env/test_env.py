import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.wrappers import vector as wrappers
from torch import Tensor

from mtkd_env.data import BatchStream
from mtkd_env.env import CHOICES, MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.observation import OBSERVATIONS
from mtkd_env.optimization import Recipe
from mtkd_env.reward import NORMALIZATIONS, REWARDS
from mtkd_env.testing import STEP_CHECKS, Check, checks, equal, random_action, rollout
from mtkd_env.types import Batch, TeacherWeights
from mtkd_env.vector import StepRecord
from mtkd_env.weighting import WEIGHTINGS
from refusals import REFUSALS
from tiny import (
    CLASSES,
    NUM_ENVS,
    STEPS_PER_EPOCH,
    TEACHERS,
    assert_same,
    make_tiny_distiller,
    make_tiny_env,
    seldom,
    snapshot,
    states_equal,
    stream,
)

M = len(TEACHERS)
# A reward does not know what is shown: each, at either time, meets one observation in turn.
MET = set(zip(product(("before", "after"), REWARDS), cycle(OBSERVATIONS)))
PRODUCT = [
    pytest.param(
        {"observation": observation, "reward": reward, "reward_timing": timing},
        id=f"{observation}-{reward}-{timing}",
        marks=() if ((timing, reward), observation) in MET else pytest.mark.slow,
    )
    for observation, reward, timing in product(OBSERVATIONS, REWARDS, ("before", "after"))
]
TWO_EPOCHS = Recipe(epochs=2, lr=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one teacher": {"count": 1},
    "half precision": {"observation_dtype": "float16"},
    "raw": {"normalize_observation": False, "fusion": "learnable", "logit_bound": 1.5},
    "epochs": {"episode": "epoch", "fusion": "generator"},
    "trainings": {"episode": "training", "recipe": Recipe(epochs=1, lr=0.1)},
}


@pytest.mark.parametrize("case", PRODUCT)
@pytest.mark.parametrize("check", STEP_CHECKS, ids=lambda check: check.__name__)
def test_every_observation_and_reward_fulfils_the_contract(
    check: Check, case: dict[str, Any]
) -> None:
    check(partial(make_tiny_env, **case))


# Every check meets the default and one variant more, and every variant some checks.
CHECKS = [*checks(make_tiny_env), *REFUSALS]
OTHERS = {*zip(CHECKS, cycle([*VARIANTS][1:]))}
CHECKED = seldom(product(CHECKS, VARIANTS), {*product(CHECKS, ["default"])} | OTHERS)


# Seeds of other types than the annotated one are among what is tried.
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize(
    ("check", "variant"), CHECKED, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_variant_fulfils_the_contract(check: Check, variant: str) -> None:
    check(partial(make_tiny_env, **VARIANTS[variant]))


def started(seed: int | None = 0, **kwargs: Any) -> MTKDVectorEnv:
    env = make_tiny_env(**kwargs)
    env.reset(seed=seed)
    return env


def step(env: MTKDVectorEnv, seed: int = 0) -> Any:
    return env.step(random_action(env, seed))


def students_equal(*envs: MTKDVectorEnv) -> bool:
    modules = [env.distiller.module for env in envs]
    return all(states_equal(module, modules[0]) for module in modules[1:])


# Spaces and arguments.


def test_action_space_is_bounded_by_the_logit_bound() -> None:
    env = make_tiny_env(logit_bound=1.5)
    assert env.single_action_space.shape == (2 * M,)
    assert env.single_action_space.low.min() == -1.5
    assert env.single_action_space.high.max() == 1.5
    assert env.single_action_space.dtype == np.float32


def test_observation_space_has_the_width_of_equation_5() -> None:
    env = make_tiny_env()
    widths = env.distiller.teachers.feature_dims
    assert env.single_observation_space.shape == (sum(width + CLASSES + 3 for width in widths),)
    assert max(part.stop for part in env.obs_layout.values()) == sum(
        width + CLASSES + 3 for width in widths
    )


def test_half_precision_observations_are_the_rounded_ones() -> None:
    full, half = (started(observation_dtype=dtype) for dtype in ("float32", "float16"))
    for seed in range(3):
        expected, found = step(full, seed)[0], step(half, seed)[0]
        np.testing.assert_array_equal(found, expected.astype(np.float16))


WRONG: dict[str, tuple[Any, str]] = {
    "reward": ("papr", "unknown reward 'papr'; did you mean 'paper'"),
    "reward_timing": ("before_", "unknown reward_timing 'before_'; did you mean 'before'"),
    "reward_normalization": ("centre", "unknown reward_normalization 'centre'; did you mean"),
    "observation": ("al", "unknown observation 'al'; did you mean 'all'"),
    "observation_dtype": ("float64", "unknown observation_dtype 'float64'"),
    "fusion": ([1.0, 1.0, 1.0], "fusion: expected 3 coefficients"),
    "logit_bound": (0.0, "logit_bound: expected a finite number > 0, got 0.0"),
    "episode": ("epochs", "unknown episode 'epochs'; did you mean 'epoch'"),
    "output": ("nump", "unknown output 'nump'; did you mean 'numpy'"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_arguments_that_cannot_be_used_are_named(argument: str) -> None:
    value, message = WRONG[argument]
    with pytest.raises(ConfigError, match=message):
        make_tiny_env(**{argument: value})


# One step.


def test_a_step_is_one_update_of_the_student_on_the_batch_that_was_seen() -> None:
    env = started()
    batch, action = env.state.batch, random_action(env)
    by_hand = make_tiny_distiller()
    by_hand.module.load_state_dict(deepcopy(env.distiller.module.state_dict()))
    state = by_hand.forward(batch, again=True)
    by_hand.update(state, env.to_weights(torch.as_tensor(action)))
    env.distill(env.to_weights(torch.as_tensor(action)))
    assert states_equal(env.distiller.module, by_hand.module)
    assert env.steps == 1


def test_a_step_is_the_same_where_gradients_are_off() -> None:
    env, other = started(), make_tiny_env()
    with torch.no_grad():
        other.reset(seed=0)
        found = [step(other, seed) for seed in range(2)]
    assert equal([step(env, seed) for seed in range(2)], found)
    assert students_equal(env, other)


def test_the_student_sees_each_batch_once() -> None:
    env = started()
    env.step(random_action(env))
    counts = [
        buffer.item()
        for name, buffer in env.distiller.module.named_buffers()
        if name.endswith("num_batches_tracked")
    ]
    assert set(counts) == {2}  # the batch that was learned from, and the one that waits


def test_observations_are_equation_5_of_the_state() -> None:
    env = started(normalize_observation=False)
    for seed in range(2):
        observation = step(env, seed)[0]
        state = env.state
        for m, teacher in enumerate(TEACHERS):
            expected = {
                "feature": state.teachers.features[m],
                "logits": state.teachers.logits[m],
                "cross_entropy": state.teacher_cross_entropy[:, m, None],
                "similarity": state.similarity[:, m, None],
                "divergence": state.divergence[:, m, None],
            }
            for block, tensor in expected.items():
                found = observation[:, env.obs_layout[f"{teacher}/{block}"]]
                np.testing.assert_array_equal(found, tensor.numpy(), err_msg=block)


def test_info_is_what_the_step_did() -> None:
    env = started()
    state, action = env.state, torch.as_tensor(random_action(env))
    weights, rewards = env.to_weights(action), env.reward.teacher_rewards(env.state)
    _, reward, _, _, info = env.step(action)
    np.testing.assert_array_equal(info["logit_weights"], weights.logit)
    np.testing.assert_array_equal(info["feature_weights"], weights.feature)
    np.testing.assert_array_equal(info["teacher_rewards"], rewards)
    np.testing.assert_array_equal(info["index"], state.batch.index)
    np.testing.assert_array_equal(info["kd"], state.kd.detach())
    np.testing.assert_array_equal(info["feature"], state.feature.detach())
    np.testing.assert_array_equal(info["cross_entropy"], state.cross_entropy.detach())
    terms = (info["logit_weights"] * info["kd"]).sum(1)
    features = (info["feature_weights"] * info["feature"]).sum(1)
    np.testing.assert_allclose(
        info["total"], info["cross_entropy"] + terms + 5 * features, rtol=1e-5
    )
    advantages = info["advantages"]
    expected = 0.5 * ((info["logit_weights"] + info["feature_weights"]) * advantages).sum(1)
    np.testing.assert_allclose(reward, expected, rtol=1e-5, atol=1e-7)


def test_other_losses_train_another_student_who_is_observed_in_the_same_way() -> None:
    plain, other = started(), started(logit="dist", feature="none")
    assert plain.observation.equal(other.observation)
    logit = other.state.kd.detach()
    (_, reward, *_, expected), (_, same, *_, found) = step(plain), step(other)
    np.testing.assert_array_equal(same, reward)
    np.testing.assert_array_equal(found["kd"], logit)
    assert not found["feature"].any()
    np.testing.assert_array_equal(found["cross_entropy"], expected["cross_entropy"])
    assert not np.allclose(found["kd"], expected["kd"])
    assert not students_equal(plain, other)


def test_a_single_teacher_has_weight_one_and_earns_nothing() -> None:
    env = started(count=1)
    _, reward, _, _, info = step(env)
    np.testing.assert_allclose(info["logit_weights"], 1)
    np.testing.assert_array_equal(reward, 0)


def test_running_advantages_are_those_of_their_step_whenever_they_are_asked_for() -> None:
    def rewards(*, later: bool) -> list[Tensor]:
        env = started(reward="cross")
        records = []
        for _ in range(3):
            records.append(env.distill(TeacherWeights.uniform(env.state.divergence)))
            if not later:
                assert records[-1].rewards is not None
        return [record.rewards.advantages for record in records]

    pairs = zip(rewards(later=True), rewards(later=False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_running_advantages_are_centred_and_of_the_deviation_1_at_first() -> None:
    info = step(started(reward_normalization="running"))[4]
    centred = NORMALIZATIONS["center"](torch.as_tensor(info["teacher_rewards"]))
    expected = centred / centred.square().mean().sqrt()
    np.testing.assert_allclose(info["advantages"], expected, rtol=1e-5)


def test_subscribers_hear_of_every_step_whoever_chose_the_weights() -> None:
    env = started()
    records: list[StepRecord] = []
    env.subscribe(records.append)
    step(env)
    env.distill(TeacherWeights.uniform(env.state.divergence))
    assert [record.step for record in records] == [0, 1]
    assert records[1].weights.logit.eq(1 / M).all()
    assert set(records[0].weights.parts) == {"generator", "confidence", "divergence"}


def test_records_carry_no_gradient() -> None:
    env = started(fusion="learnable")
    weights = env.fusion(torch.as_tensor(random_action(env)), env.state)
    assert weights.logit.requires_grad
    record = env.distill(weights)
    pairs = [record.weights, *record.weights.parts.values()]
    assert not any(pair.logit.requires_grad or pair.feature.requires_grad for pair in pairs)
    assert env.fusion.logits.grad is not None  # but the update did go through them


# One path for every method.


def test_equal_weights_by_any_path_give_the_same_student() -> None:
    by_weighting, by_action = make_tiny_env(), make_tiny_env(fusion="generator")
    bare, batches = make_tiny_distiller(), stream()
    for env in (by_weighting, by_action):
        env.reset()
    aver = WEIGHTINGS["aver"](by_weighting.distiller)
    for _ in range(2 * STEPS_PER_EPOCH + 1):
        by_weighting.distill(aver(by_weighting.state))
        by_action.step(np.zeros((NUM_ENVS, 2 * M), dtype=np.float32))
        state = bare.forward(next(batches))
        bare.update(state, TeacherWeights.uniform(state.divergence))
    by_weighting.state, bare.forward(next(batches))  # as the last step of the action did
    assert states_equal(by_weighting.distiller.module, bare.module)
    assert states_equal(by_action.distiller.module, bare.module)


def test_a_seed_of_the_assembly_is_the_seed_of_a_reset() -> None:
    first, second = make_tiny_env(), make_tiny_env(seed=99)
    for env in (first, second):
        env.reset(seed=4)
    assert students_equal(first, second)


# Samples are independent.


class Reordered(BatchStream):
    """A stream whose batches come in another order of their samples."""

    order = torch.arange(NUM_ENVS)

    def __next__(self) -> Batch:
        batch, order = super().__next__(), self.order
        return Batch(batch.inputs[order], batch.targets[order], batch.index[order])


def reordered_env(order: list[int], **kwargs: Any) -> MTKDVectorEnv:
    batches = Reordered(stream().views, batch_size=NUM_ENVS, seed=0)
    batches.order = torch.tensor(order)
    return make_tiny_env(batches=batches, **kwargs)


@pytest.mark.parametrize("reward", ["paper", "alignment", "aggregate", "reference"])
def test_permuting_the_samples_permutes_rewards_and_observations(reward: str) -> None:
    order = [2, 0, 3, 1]
    frozen = {"recipe": Recipe(lr=0.0), "reward": reward}
    env, permuted = reordered_env([0, 1, 2, 3], **frozen), reordered_env(order, **frozen)
    np.testing.assert_allclose(permuted.reset()[0], env.reset()[0][order], rtol=1e-3, atol=1e-4)
    for seed in range(3):
        action = random_action(env, seed)
        expected, found = env.step(action), permuted.step(action[order])
        np.testing.assert_allclose(found[0], expected[0][order], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[1], expected[1][order], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(found[4]["index"], expected[4]["index"][order])


@pytest.mark.parametrize("reward", ["paper", "alignment", "aggregate"])
def test_the_action_of_one_sample_leaves_the_rewards_of_the_others_alone(reward: str) -> None:
    env, other = (started(reward=reward, fusion="generator") for _ in range(2))
    action = random_action(env)
    changed = action.copy()
    changed[1] = -action[1]
    first, second = env.step(action)[1], other.step(changed)[1]
    np.testing.assert_array_equal(np.delete(first, 1), np.delete(second, 1))
    assert first[1] != second[1]


def test_actions_change_the_student_and_so_what_comes_next() -> None:
    env, other = started(), started()
    first, second = env.step(random_action(env, 0)), other.step(random_action(env, 1))
    assert not students_equal(env, other)
    layout = env.obs_layout["narrow/divergence"]
    assert not np.allclose(first[0][:, layout], second[0][:, layout], rtol=1e-4)


# Before or after the update.


def test_rewards_after_the_update_train_the_same_student_with_the_same_statistics() -> None:
    before, after = started(), started(reward_timing="after")
    for seed in range(STEPS_PER_EPOCH + 1):
        first, second = step(before, seed), step(after, seed)
        np.testing.assert_array_equal(first[0], second[0])
        assert not np.allclose(first[4]["teacher_rewards"], second[4]["teacher_rewards"])
    assert students_equal(before, after)


def test_rewards_after_the_update_are_those_of_the_updated_student() -> None:
    env = started(reward_timing="after")
    state, action = env.state, torch.as_tensor(random_action(env))
    rewards = env.distill(env.to_weights(action)).rewards.teacher
    revisited = env.distiller.forward(state.batch, again=True)
    expected = -revisited.cross_entropy[:, None] - revisited.kd - 5 * revisited.feature
    torch.testing.assert_close(rewards, expected.detach())


def test_rewards_before_and_after_agree_while_the_student_stands_still() -> None:
    frozen = Recipe(lr=0.0)
    before, after = started(recipe=frozen), started(recipe=frozen, reward_timing="after")
    np.testing.assert_array_equal(step(before)[1], step(after)[1])


# Normalised observations.


def test_statistics_are_those_of_the_first_epoch_and_then_stay() -> None:
    env = started()
    seen = [env.keepable_observation]
    for seed in range(2 * STEPS_PER_EPOCH):
        step(env, seed)
        seen.append(env.keepable_observation)
    rows = torch.cat(seen[:STEPS_PER_EPOCH]).double()
    assert env.normalizer is not None
    assert env.normalizer.count == len(rows)
    torch.testing.assert_close(env.normalizer.mean, rows.mean(0))
    variance = env.normalizer.squares / env.normalizer.count
    torch.testing.assert_close(variance, rows.var(0, correction=0))


def test_statistics_do_not_count_a_batch_twice_however_often_it_is_looked_at() -> None:
    env = started()
    for _ in range(3):
        assert env.observation is env.observation
        env.reset()
    assert env.normalizer is not None
    assert env.normalizer.count == NUM_ENVS


def test_a_new_student_forgets_the_statistics_of_the_old_one() -> None:
    env = started()
    step(env)
    env.reset(seed=1)
    assert env.normalizer is not None
    assert env.normalizer.count == NUM_ENVS


def test_observations_are_normalised_by_the_statistics_so_far() -> None:
    env = started()
    for seed in range(STEPS_PER_EPOCH + 2):
        step(env, seed)
    torch.testing.assert_close(env.observation, env.normalize(env.keepable_observation))
    assert not torch.allclose(env.observation, env.keepable_observation)


def test_raw_observations_are_left_alone() -> None:
    env = started(normalize_observation=False)
    assert env.normalizer is None
    assert env.observation.equal(env.keepable_observation)


# Episodes.


def test_every_step_ends_an_episode_of_one_batch() -> None:
    env = make_tiny_env()
    acted_on = env.reset(seed=0)[0]
    for seed in range(STEPS_PER_EPOCH + 1):
        observation, _, terminated, truncated, info = step(env, seed)
        assert terminated.all()
        assert not truncated.any()
        np.testing.assert_array_equal(info["final_obs"], acted_on)
        acted_on = observation


def test_an_episode_of_an_epoch_is_truncated_at_its_end_and_the_student_goes_on() -> None:
    env, batches = started(episode="epoch"), started()
    for seed in range(1, 2 * STEPS_PER_EPOCH + 1):
        observation, _, terminated, truncated, info = step(env, seed)
        np.testing.assert_array_equal(observation, step(batches, seed)[0])
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (seed % STEPS_PER_EPOCH == 0)
        if truncated.all():
            np.testing.assert_array_equal(info["final_obs"], observation)
    assert students_equal(env, batches)


def test_an_episode_of_a_training_is_truncated_at_its_end_and_a_new_student_follows() -> None:
    env = started(episode="training", recipe=TWO_EPOCHS)
    batches = started(recipe=TWO_EPOCHS)
    length = 2 * STEPS_PER_EPOCH
    for seed in range(1, length):
        _, _, terminated, truncated, info = step(env, seed)
        step(batches, seed)
        assert not (terminated | truncated).any()
        assert "final_obs" not in info
    assert env.distiller.optimizer.param_groups[0]["lr"] < TWO_EPOCHS.lr
    observation, _, terminated, truncated, info = step(env, length)
    assert truncated.all()
    assert not terminated.any()
    # The last observation is of the student whose training ended, the returned one of the next.
    np.testing.assert_array_equal(info["final_obs"], step(batches, length)[0])
    assert not np.allclose(observation, info["final_obs"])
    assert env.steps == 0
    assert env.distiller.optimizer.param_groups[0]["lr"] == TWO_EPOCHS.lr
    assert env.distiller.optimizer.state_dict()["state"] == {}
    truncations = [step(env, seed)[3].all() for seed in range(length)]
    assert truncations == [False] * (length - 1) + [True]


def test_students_of_successive_trainings_differ_and_are_reproducible() -> None:
    recipe = Recipe(epochs=1, lr=0.1)

    def initial_weights() -> list[Tensor]:
        env = started(5, episode="training", recipe=recipe)
        weights = []
        for seed in range(2 * STEPS_PER_EPOCH):
            step(env, seed)
            if env.steps == 0:
                weights.append(env.distiller.student.state_dict()["classifier.weight"].clone())
        return weights

    first, second = initial_weights(), initial_weights()
    assert not first[0].equal(first[1])
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])


def test_a_seeded_reset_begins_an_epoch_and_an_unseeded_one_does_not() -> None:
    def truncations(env: MTKDVectorEnv) -> list[bool]:
        return [bool(step(env, seed)[3].all()) for seed in range(STEPS_PER_EPOCH)]

    whole = [False] * (STEPS_PER_EPOCH - 1) + [True]
    env = started(episode="epoch")
    step(env)
    env.reset()
    assert truncations(env) == [*whole[1:], False]
    env.reset(seed=0)
    assert truncations(env) == whole


# Before the first reset.


@pytest.mark.parametrize(
    "use",
    [
        lambda env: env.state,
        lambda env: env.observation,
        lambda env: env.advantages(),
        lambda env: env.distill(TeacherWeights.uniform(torch.zeros(NUM_ENVS, M))),
    ],
    ids=["state", "observation", "teacher_rewards", "distill"],
)
def test_nothing_can_be_used_before_the_first_reset(use: Callable[[MTKDVectorEnv], Any]) -> None:
    with pytest.raises(ResetNeeded):
        use(make_tiny_env())


@pytest.mark.parametrize(
    "use",
    [
        lambda env: env.reset(),
        lambda env: env.step(random_action(env)),
        lambda env: env.distill(TeacherWeights.uniform(torch.zeros(NUM_ENVS, M))),
    ],
    ids=["reset", "step", "distill"],
)
def test_a_closed_environment_is_refused(use: Callable[[MTKDVectorEnv], Any]) -> None:
    env = started()
    env.close()
    with pytest.raises(ClosedEnvironmentError, match=r"closed by env\.close\(\)"):
        use(env)
    assert env.steps == 0


@pytest.mark.parametrize("copy", [deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_copy_is_refused_and_the_state_named_instead(copy: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"load_state_dict\(env\.state_dict\(\)\)"):
        copy(started())


ROWS, COLUMNS = NUM_ENVS, 2 * M


def bad_at(row: int, value: float) -> np.ndarray:
    """Actions of which one entry is bad."""
    actions = np.zeros((ROWS, COLUMNS))
    actions[row, 1] = value
    return actions


# What the contract's checks do not try.
ACTIONS: dict[str, tuple[Any, str]] = {
    "transposed": (np.zeros((COLUMNS, ROWS)), rf"got \({COLUMNS}, {ROWS}\)"),
    "a batch of batches": (np.zeros((1, ROWS, COLUMNS)), rf"got \(1, {ROWS}, {COLUMNS}\)"),
    "a tensor": (torch.from_numpy(bad_at(1, np.nan)), rf"row 1 holds NaN .* \(1 of {ROWS} rows"),
    "everywhere": (np.full((ROWS, COLUMNS), np.nan), rf"row 0 holds .* \({ROWS} of {ROWS} rows"),
    "too large for float32": (bad_at(2, 1e300), "row 2 holds NaN or infinity"),
    "text": ("left", "expected real numbers, got <U4"),
    "nothing": (None, "expected real numbers, got object"),
    "complex": (np.zeros((ROWS, COLUMNS), complex), "expected real numbers, got complex128"),
    "complex tensor": (torch.zeros(ROWS, COLUMNS, dtype=torch.cfloat), "got torch.complex64"),
    "longdouble": (np.zeros((ROWS, COLUMNS), np.longdouble), f"got {np.dtype(np.longdouble)}"),
    "sparse": (torch.zeros(ROWS, COLUMNS).to_sparse(), "got torch.sparse_coo"),
    "rows of two lengths": ([[0.0], [0.0, 1.0]], "one length"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("case", ACTIONS)
def test_actions_that_cannot_be_taken_are_refused_and_the_student_stays(case: str) -> None:
    actions, message = ACTIONS[case]
    env = started()
    before = snapshot(env.distiller.module)
    with pytest.raises(ValueError, match=f"^actions: .*{message}"):
        env.step(actions)
    assert_same(env.distiller.module, before)
    assert env.steps == 0


# Inference mode.


def trained_in(mode: Callable[[], Any], **kwargs: Any) -> list[Tensor]:
    """Observations and rewards of a few steps that were made in a mode of torch."""
    env, found = make_tiny_env(output="torch", **kwargs), []
    with mode():
        env.reset(seed=0)
        for _ in range(3):
            observation, reward, *_ = env.step(torch.zeros(NUM_ENVS, 2 * M) + env.steps)
            found += [observation, reward]
    # What was made in inference mode can be trained on outside of it.
    return [*found, *env.step(torch.zeros(NUM_ENVS, 2 * M))[:2]]


@pytest.mark.parametrize("variant", ["epochs", "trainings"])
@pytest.mark.parametrize("timing", ["before", "after"])
def test_inference_mode_is_as_no_grad(variant: str, timing: str) -> None:
    arguments = {**VARIANTS[variant], "reward_timing": timing}
    expected = trained_in(torch.no_grad, **arguments)
    found = trained_in(torch.inference_mode, **arguments)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


# Tensors instead of arrays.


def in_arrays(info: dict[str, Any]) -> dict[str, Any]:
    """An info of tensors, and the one of ended episodes inside it, with arrays instead."""
    return {
        name: in_arrays(value) if isinstance(value, dict) else value.numpy()
        for name, value in info.items()
    }


@pytest.mark.parametrize("episode", CHOICES["episode"])
def test_torch_output_is_the_numpy_output_in_tensors(episode: str) -> None:
    arrays, tensors = started(episode=episode), make_tiny_env(episode=episode, output="torch")
    observation, _ = tensors.reset(seed=0)
    assert isinstance(observation, Tensor)
    for seed in range(STEPS_PER_EPOCH):
        expected = step(arrays, seed)
        found = tensors.step(torch.as_tensor(random_action(tensors, seed)))
        assert equal([value.numpy() for value in found[:4]], list(expected[:4]))
        assert equal(in_arrays(found[4]), expected[4])
        assert not any(value.requires_grad for value in found[:4])


def test_writing_into_returned_tensors_changes_nothing() -> None:
    env, untouched = started(output="torch"), started(output="torch")
    for seed in range(3):
        observation, reward, _, _, info = step(env, seed)
        step(untouched, seed)
        for tensor in (observation, reward, *info.pop("final_info").values(), *info.values()):
            tensor.zero_()
    assert env.observation.equal(untouched.observation)
    assert students_equal(env, untouched)


# Evaluation.


def test_evaluation_trains_nothing_and_measures_the_split() -> None:
    env, untouched = started(), started()
    for seed in range(3):
        results = {split: env.evaluate(split) for split in env.splits}
        assert all(0 <= result.accuracy <= 1 for result in results.values())
        assert equal(step(env, seed), step(untouched, seed))
    assert students_equal(env, untouched)
    assert env.evaluate() == env.evaluate("test") != env.evaluate("train")


def test_an_unknown_split_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown split 'tset'; did you mean 'test'"):
        make_tiny_env().evaluate("tset")


# Going on from a checkpoint.

RESUMABLE: dict[str, dict[str, Any]] = {
    "default": {},
    "raw": {"normalize_observation": False},
    "learnable": {"fusion": "learnable", "reward_timing": "after"},
    "epoch": {"episode": "epoch"},
    "training": {"episode": "training", "recipe": TWO_EPOCHS},
}


@pytest.mark.parametrize("case", RESUMABLE)
@pytest.mark.parametrize("steps", [1, 2 * STEPS_PER_EPOCH - 1])
def test_resuming_equals_going_on(case: str, steps: int, tmp_path: Path) -> None:
    uninterrupted = started(3, **RESUMABLE[case])
    rollout(uninterrupted, steps)
    save_checkpoint(tmp_path / "env.pt", uninterrupted.state_dict())
    waiting = uninterrupted.observation.clone()
    resumed = started(8, **RESUMABLE[case])
    rollout(resumed, 2)
    resumed.load_state_dict(load_checkpoint(tmp_path / "env.pt"))
    assert resumed.observation.equal(waiting)
    assert equal(resumed.reset(), uninterrupted.reset())
    future = STEPS_PER_EPOCH + 2  # beyond the end of an epoch and of a training
    assert equal(rollout(resumed, future, steps), rollout(uninterrupted, future, steps))
    assert students_equal(resumed, uninterrupted)


def test_resuming_where_no_batch_waits_equals_going_on(tmp_path: Path) -> None:
    uninterrupted, resumed = started(3), started(8)
    aver = WEIGHTINGS["aver"](uninterrupted.distiller)
    for _ in range(2):
        uninterrupted.distill(aver(uninterrupted.state))
    save_checkpoint(tmp_path / "env.pt", uninterrupted.state_dict())
    resumed.load_state_dict(load_checkpoint(tmp_path / "env.pt"))
    for _ in range(STEPS_PER_EPOCH):
        for env in (resumed, uninterrupted):
            env.distill(aver(env.state))
    assert students_equal(resumed, uninterrupted)
    assert resumed.observation.equal(uninterrupted.observation)


def test_a_new_environment_goes_on_from_a_checkpoint_after_a_reset(tmp_path: Path) -> None:
    original = started(3)
    rollout(original, 2)
    save_checkpoint(tmp_path / "env.pt", original.state_dict())
    new = make_tiny_env()
    new.load_state_dict(load_checkpoint(tmp_path / "env.pt"))
    new.reset()
    assert equal(rollout(new, 2), rollout(original, 2))


# Gymnasium's wrappers.


def test_record_episode_statistics_counts_episodes() -> None:
    env = wrappers.RecordEpisodeStatistics(make_tiny_env(episode="epoch"))
    env.reset(seed=0)
    rewards = np.zeros(NUM_ENVS)
    for seed in range(STEPS_PER_EPOCH):
        _, reward, _, truncated, info = env.step(random_action(env, seed))
        rewards += reward
    assert truncated.all()
    np.testing.assert_allclose(info["episode"]["r"], rewards, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(info["episode"]["l"], STEPS_PER_EPOCH)


def test_clip_action_and_rescale_action_act_on_the_box() -> None:
    plain, clipped, rescaled = started(), make_tiny_env(), make_tiny_env()
    clip = wrappers.ClipAction(clipped)
    unit = np.ones(rescaled.single_action_space.shape, dtype=np.float32)
    rescale = wrappers.RescaleAction(rescaled, min_action=-unit, max_action=unit)
    for env in (clip, rescale):
        env.reset(seed=0)
    action = random_action(plain)
    beyond = np.where(action > 0, np.float32(50), np.float32(-50))
    bound = np.where(action > 0, np.float32(3), np.float32(-3))
    expected = plain.step(bound)
    assert equal(clip.step(beyond), expected)
    weights = rescale.step((bound / 3).astype(np.float32))[4]["logit_weights"]
    np.testing.assert_allclose(weights, expected[4]["logit_weights"], rtol=1e-5)


def test_dict_info_to_list_gives_every_sample_its_info() -> None:
    env = wrappers.DictInfoToList(make_tiny_env())
    env.reset(seed=0)
    infos = env.step(random_action(env))[4]
    assert len(infos) == NUM_ENVS
    assert infos[0]["teacher_rewards"].shape == (M,)
    assert infos[0]["final_obs"].shape == env.single_observation_space.shape


def test_array_conversion_makes_tensors_of_arrays_and_arrays_of_tensors() -> None:
    arrays, tensors = make_tiny_env(), make_tiny_env(output="torch")
    to_torch = wrappers.NumpyToTorch(arrays)
    to_numpy = wrappers.ArrayConversion(tensors, env_xp=torch, target_xp=np)
    first, second = to_torch.reset(seed=0)[0], to_numpy.reset(seed=0)[0]
    assert isinstance(first, Tensor)
    assert isinstance(second, np.ndarray)
    np.testing.assert_array_equal(first, second)
    action = random_action(arrays)
    found, expected = to_torch.step(torch.as_tensor(action)), to_numpy.step(action)
    assert isinstance(found[4]["final_obs"], Tensor)
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gymnasiums_observation_wrappers_refuse_the_autoreset_mode() -> None:
    """Why observations are normalised inside; if this fails, they could be outside."""
    with pytest.raises(ValueError, match=r"SAME_STEP|autoreset"):
        wrappers.NormalizeObservation(make_tiny_env())
