"""Checks of a vector environment, for a reward, an observation or a wrapper of one's own.

`check_env` makes the environment again and again and runs every check that it is due. Those of
`STEP_CHECKS` and `GYMNASIUM_CHECKS` hold for anybody's vector environment, so for a wrapped one
too, those of `INTERFACE_CHECKS` for every one of this package, whatever is rewarded and shown. A
check takes a maker of equal environments with NumPy output, not yet reset, and raises an
`AssertionError` that says what is wrong. None of them opens the student. As tests of pytest:

    @pytest.mark.parametrize("check", mtkd_env.testing.checks(make_env))
    def test_my_reward(check):
        check(make_env)
"""

import warnings
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import partial
from itertools import combinations
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.utils import env_checker, passive_env_checker
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mtkd_env.vector import SharedStudentEnv
from mtkd_env.weighting import WEIGHTING

# In which episodes end.
MOST_STEPS = 40

Env = VectorEnv[Any, Any, Any]
MakeEnv = Callable[[], Env]
Check = Callable[[MakeEnv], None]
# Observation, reward, terminated, truncated, info.
Transition = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def check_env(make_env: MakeEnv) -> None:
    """Runs all the checks that an environment is due.

    Args:
        make_env: Makes an environment with NumPy output, at each call an equal one.

    Raises:
        AssertionError: It does not fulfil one; a note names the check.

    Example:
        A wrapper of one's own, with a teacher that is trained in a second:

        >>> import gymnasium
        >>> from gymnasium.wrappers.vector import TransformReward
        >>> import mtkd_env.testing
        >>> def make_env():
        ...     env = gymnasium.make_vec(
        ...         "MTKD/Digits-v0",
        ...         num_envs=4,
        ...         data={"train_size": 64},
        ...         teachers={"teachers": [{"network": "resnet8"}], "recipe": {"epochs": 1}},
        ...         device="cpu",
        ...     )
        ...     return TransformReward(env, lambda rewards: rewards.clip(-0.5, 0.5))
        >>> mtkd_env.testing.check_env(make_env)
    """
    for check in checks(make_env):
        try:
            check(make_env)
        except Exception as error:
            error.add_note(f"{check.__name__}: {check.__doc__}")
            raise


def small_env(**arguments: Any) -> Env:
    """A small environment on the digits, whose two teachers know nothing.

    Args:
        arguments: Further ones of `mtkd_env.make_env`.
    """
    teacher = {"network": "resnet8", "width": 0.125, "kind": "random"}
    return gymnasium.make_vec(
        "MTKD/Digits-v0",
        num_envs=4,
        data={"train_size": 32},
        teachers=[{**teacher, "name": "first"}, {**teacher, "name": "second", "seed": 1}],
        width=0.125,
        device="cpu",
        **arguments,
    )


def check_reward(reward: Any) -> None:
    """Runs the checks of an environment that pays a reward of one's own.

    Raises:
        AssertionError: It does not fulfil one; a note names the check.
        ConfigError: What it gives is no reward.
    """
    check_env(partial(small_env, reward=reward))


def check_observation(observation: Any) -> None:
    """Runs the checks of an environment that shows a block of one's own, or a list of blocks.

    Raises:
        AssertionError: It does not fulfil one; a note names the check.
        ConfigError: What it gives is no block.
    """
    check_env(partial(small_env, observation=observation))


def check_weighting(weighting: Any) -> None:
    """Checks a weighting of one's own: rows on the simplex, the same again in the same state.

    Raises:
        AssertionError: It does not fulfil one of these.
        ConfigError: It is no weighting.

    Example:
        >>> from mtkd_env import TeacherWeights
        >>> from mtkd_env.weighting import Weighting
        >>> class Confident(Weighting):
        ...     def __call__(self, state):
        ...         weights = state.teachers.logits.softmax(-1).amax(-1).T.softmax(1)
        ...         return TeacherWeights(logit=weights, feature=weights)
        >>> import mtkd_env.testing
        >>> mtkd_env.testing.check_weighting(Confident)
    """
    env: Any = small_env().unwrapped
    env.reset(seed=0)
    weigh = WEIGHTING.find(weighting)(env.distiller)
    first, second = weigh(env.state), weigh(env.state)
    for name in ("logit", "feature"):
        rows, again = getattr(first, name), getattr(second, name)
        expected = (env.num_envs, len(env.teacher_names))
        _expect_equal(tuple(rows.shape), expected, f"shape of the {name} weights")
        _expect((rows >= 0).all(), f"{name}: negative weights: {rows}")
        _expect(np.allclose(rows.detach().sum(1), 1, atol=1e-4), f"{name}: rows do not sum to 1")
        _expect(rows.equal(again), f"{name}: other weights in the same state")
    state = env.state
    env.distill(first)
    weigh.after_update(state)


def checks(make_env: MakeEnv) -> tuple[Check, ...]:
    """The checks that an environment is due."""
    own = INTERFACE_CHECKS if isinstance(make_env(), SharedStudentEnv) else ()
    return (*STEP_CHECKS, *GYMNASIUM_CHECKS, *own)


def random_action(env: Env, seed: int = 0) -> Any:
    """Random actions for all sub-environments; in a box, within its bound."""
    space = deepcopy(env.action_space)
    space.seed(seed)
    return space.sample()


def rollout(env: Env, steps: int, seed: int = 0) -> list[Transition]:
    """Copies of what some steps with random actions give."""
    return [deepcopy(env.step(random_action(env, seed + step))) for step in range(steps)]


def equal(first: object, second: object) -> bool:
    """Whether two values, or nested containers of them, are the same bit for bit."""
    return env_checker.data_equivalence(first, second, exact=True)


def _started(make_env: MakeEnv) -> Any:
    """An environment, reset by seed 0."""
    env = make_env()
    env.reset(seed=0)
    return env


def _expect(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _expect_equal(found: Any, expected: Any, what: str) -> None:
    """Names the first part of nested containers that is another."""
    if equal(found, expected):
        return
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        parts: Collection[Any] = found.keys()
    elif isinstance(found, list | tuple) and len(found) == len(expected):
        parts = range(len(found))
    else:
        parts = ()
    for part in parts:
        _expect_equal(found[part], expected[part], f"{what}[{part!r}]")
    raise AssertionError(f"{what}: expected {expected}, got {found}")


def _arrays_of(info: dict[str, Any]) -> Iterator[np.ndarray]:
    """All arrays of an info, those of the info of ended episodes too."""
    for name, value in info.items():
        if isinstance(value, dict):
            yield from _arrays_of(value)
        else:
            _expect(isinstance(value, np.ndarray), f"info: {name}: expected an array, got {value}")
            yield value


# What `reset` and `step` return; short, to be run for very many environments.


def returned_values_lie_in_the_spaces(make_env: MakeEnv) -> None:
    """Observations are in their space, rewards are finite, flags are flags, one for each sample."""
    env = make_env()
    observation, info = env.reset(seed=0)
    _expect(isinstance(info, dict), f"info: expected a dict, got {info}")
    _check_observation(env, observation)
    for observation, reward, terminated, truncated, info in rollout(env, 2):
        _check_observation(env, observation)
        _expect(np.issubdtype(reward.dtype, np.floating), f"reward: {reward.dtype} is no float")
        _expect(np.isfinite(reward).all(), f"reward: not finite: {reward}")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            _expect(flag.dtype == np.bool_, f"{name}: expected bool, got {flag.dtype}")
        for array in (reward, terminated, truncated):
            _expect_equal(array.shape, (env.num_envs,), "shape of rewards or flags")
        for array in _arrays_of(info):
            _expect_equal(len(array), env.num_envs, "length of an array of info")


def _check_observation(env: Env, observation: Any) -> None:
    _expect(isinstance(observation, np.ndarray), f"observation: no array: {observation}")
    expected = env.observation_space.dtype
    _expect(observation.dtype == expected, f"observation: {observation.dtype} is not {expected}")
    _expect(observation in env.observation_space, f"observation: not in {env.observation_space}")
    _expect(observation[0] in env.single_observation_space, "observation[0]: not in its space")
    _expect(np.isfinite(observation).all(), "observation: holds NaN or infinity")


def writing_into_what_was_returned_changes_nothing(make_env: MakeEnv) -> None:
    """Whoever writes into observations, rewards, flags or infos changes no later step."""
    env, untouched = make_env(), make_env()
    returned = [env.reset(seed=0)[0]]
    untouched.reset(seed=0)
    for step in range(2):
        for array in returned:
            array.fill(1)
        arrays = env.step(random_action(env, step))
        _expect_equal(deepcopy(arrays), rollout(untouched, 1, seed=step)[0], f"step {step}")
        returned = [*arrays[:-1], *_arrays_of(arrays[-1])]


def a_seed_reproduces_everything_that_follows(make_env: MakeEnv) -> None:
    """The same seed and actions give the same, in a used environment too."""
    used, new = _started(make_env), make_env()
    rollout(used, 1)
    first, second = ([env.reset(seed=7)[0], *rollout(env, 2)] for env in (used, new))
    _expect_equal(first, second, "reset(seed=7) and two steps")


STEP_CHECKS: tuple[Check, ...] = (
    returned_values_lie_in_the_spaces,
    writing_into_what_was_returned_changes_nothing,
    a_seed_reproduces_everything_that_follows,
)


# The rest of what Gymnasium asks of anybody's vector environment.


def spaces_are_those_of_one_sample_batched(make_env: MakeEnv) -> None:
    """The spaces of all sub-environments are `num_envs` times that of one."""
    env = make_env()
    for space, single in (
        (env.observation_space, env.single_observation_space),
        (env.action_space, env.single_action_space),
    ):
        expected = batch_space(single, env.num_envs)
        _expect(space == expected, f"expected {expected}, got {space}")


def episodes_end_as_the_autoreset_mode_says(make_env: MakeEnv) -> None:
    """What ends is followed by the next episode in the step that `autoreset_mode` names."""
    env = _started(make_env)
    mode = env.metadata["autoreset_mode"]
    _expect(isinstance(mode, AutoresetMode), f"metadata['autoreset_mode']: {mode} is no mode")
    before = np.zeros(env.num_envs, dtype=bool)
    ends = 0
    for seed in range(MOST_STEPS):
        _, reward, terminated, truncated, info = env.step(random_action(env, seed))
        done = terminated | truncated
        if mode is AutoresetMode.SAME_STEP:
            _check_final(env, info, done)
        else:
            # The step after the last one begins the next episode and ignores the action.
            _expect("final_obs" not in info, f"final_obs in the info of {mode}")
            _expect(not (done & before).any(), "an episode ended in its first step")
            _expect(not reward[before].any(), "a reward for the step that begins an episode")
        before = done
        ends += int(done.sum())
        if ends > 2 * env.num_envs:
            break
    _expect(ends > 0, f"no episode ended within {MOST_STEPS} steps; check one with shorter ones")


def _check_final(env: Env, info: dict[str, Any], done: np.ndarray) -> None:
    """What a step leaves of the episodes that it ended, where it begins the next ones as well."""
    for name in ("final_obs", "final_info"):
        for key in (name, f"_{name}"):
            _expect((key in info) == done.any(), f"info: {key}: wanted where episodes end")
        if done.any():
            _expect_equal(info[f"_{name}"], done, f"info: _{name}")
    for row in np.flatnonzero(done):
        last = np.asarray(info["final_obs"][row])
        _expect(last in env.single_observation_space, f"final_obs[{row}]: not in its space")
        expected = env.observation_space.dtype
        _expect(last.dtype == expected, f"final_obs[{row}]: {last.dtype} is not {expected}")


def returned_arrays_are_fresh(make_env: MakeEnv) -> None:
    """No step writes into what an earlier one returned."""
    env = make_env()
    returned: list[Any] = []
    copies: list[Any] = []
    for step in range(3):
        returned.append(env.step(random_action(env, step)) if step else env.reset(seed=0))
        copies.append(deepcopy(returned[-1]))
    for first, second in combinations(returned, 2):
        for part, name in ((0, "observations"), (-1, "infos")):
            shared = passive_env_checker.data_shares_objects(first[part], second[part])
            _expect(not shared, f"two steps share memory of their {name}")
    _expect_equal(returned, copies, "what earlier steps returned")


def another_seed_gives_something_else(make_env: MakeEnv) -> None:
    """A seed has an effect."""
    env = make_env()
    same = np.allclose(env.reset(seed=7)[0], env.reset(seed=8)[0])
    _expect(not same, "seeds 7 and 8 give the same observation")


def closing_twice_is_no_error(make_env: MakeEnv) -> None:
    """`close` may be called again."""
    env = _started(make_env)
    env.close()
    env.close()


GYMNASIUM_CHECKS: tuple[Check, ...] = (
    spaces_are_those_of_one_sample_batched,
    episodes_end_as_the_autoreset_mode_says,
    returned_arrays_are_fresh,
    another_seed_gives_something_else,
    closing_twice_is_no_error,
)


# How the environments of this package answer, whatever the values of its steps.


def actions_are_bounded(make_env: MakeEnv) -> None:
    """The action space has finite bounds."""
    space = make_env().action_space
    bounded = isinstance(space, Box) and np.isfinite([space.low, space.high]).all()
    _expect(bounded, f"action space: not bounded: {space}")


def rewards_are_in_single_precision_and_episodes_end_in_one_way(make_env: MakeEnv) -> None:
    """Rewards are float32; no episode is both terminated and truncated."""
    env = _started(make_env)
    for _, reward, terminated, truncated, _ in rollout(env, 3):
        _expect(reward.dtype == np.float32, f"reward: expected float32, got {reward.dtype}")
        _expect(not (terminated & truncated).any(), "an episode is terminated and truncated")


def autoreset_happens_in_the_same_step(make_env: MakeEnv) -> None:
    """The mode of autoreset is SAME_STEP, and said so."""
    env: Any = make_env()
    for mode in (env.autoreset_mode, env.metadata["autoreset_mode"]):
        _expect(mode is AutoresetMode.SAME_STEP, f"expected {AutoresetMode.SAME_STEP}, got {mode}")


def gymnasiums_checkers_have_no_complaint(make_env: MakeEnv) -> None:
    """Gymnasium's own checks of an environment pass, and warn of nothing."""
    env: Any = make_env()
    # Without a spec, the checkers would not look for determinism.
    env.spec = EnvSpec(id="Checked-v0", entry_point=None, vector_entry_point="checked:make")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The box has the width that the softmax of its logits needs.
        symmetric = ".*we recommend using a symmetric and normalized space"
        warnings.filterwarnings("ignore", message=symmetric)
        env_checker.check_reset_seed_determinism(env)
        env_checker.check_reset_return_type(env)
        env_checker.check_reset_options(env)
        env_checker.check_seed_deprecation(env)
        for prefix in ("", "single_"):
            for kind in ("action", "observation"):
                space = getattr(env, f"{prefix}{kind}_space")
                check_box = getattr(passive_env_checker, f"_check_box_{kind}_space")
                passive_env_checker.check_space(space, kind, check_box)
        env_checker.check_space_limit(env.single_action_space, "action")
        passive_env_checker.env_reset_passive_checker(env, seed=1)
        previous = env.reset(seed=1)
        for step in range(2):
            observation, _, _, _, info = env.step(random_action(env, step))
            passive_env_checker.check_obs(observation, env.observation_space, "step")
            passive_env_checker.env_data_reuse_passive_checker(
                previous, (observation, info), "reset", "step"
            )
            previous = observation, info


def an_episode_that_ended_leaves_its_info_again(make_env: MakeEnv) -> None:
    """`final_info` is the info of the last step, and nothing else is added to it."""
    env = _started(make_env)
    for _, _, terminated, truncated, info in rollout(env, 3):
        if not (terminated | truncated).any():
            continue
        final = info["final_info"]
        _expect_equal(final, {name: info[name] for name in final}, "final_info")
        added = {"final_obs", "_final_obs", "final_info", "_final_info"}
        _expect_equal(info.keys() - final.keys(), added, "what info has beside final_info")
        _expect(info["final_obs"] in env.observation_space, "final_obs: not in its space")


def actions_beyond_the_bound_are_taken(make_env: MakeEnv) -> None:
    """Actions outside of the action space still give weights."""
    env = _started(make_env)
    weights = env.step(100 * random_action(env))[4]["logit_weights"]
    _expect(np.isfinite(weights).all(), f"logit_weights: not finite: {weights}")


def an_unseeded_reset_goes_on_and_loses_no_batch(make_env: MakeEnv) -> None:
    """`reset` without a seed gives what waits, and the student goes on."""
    env, uninterrupted = _started(make_env), _started(make_env)
    for step in range(3):
        observation, info = env.reset()
        _expect_equal(observation, env.reset(options={})[0], "observation of a second reset")
        _expect_equal(info, {}, "info of reset")
        expected = rollout(uninterrupted, 1, step)
        _expect_equal(rollout(env, 1, step), expected, "a step after reset")


def reinit_starts_a_new_student_in_a_reproducible_way(make_env: MakeEnv) -> None:
    """`reset(options={"reinit": True})` begins anew with other numbers, by the seed before."""
    env = make_env()

    def begin() -> list[Any]:
        started = env.reset(seed=3)[0]
        return [started, env.reset(options={"reinit": True})[0], *rollout(env, 2)]

    started, first, *steps = begin()
    _expect(not np.allclose(first, started), "reinit gives the observation of before")
    _expect_equal([started, first, *steps], begin(), "the same seed and reinit again")
    went_on = env.reset(options={"reinit": False})[0]
    _expect_equal(went_on, env.reset()[0], "observation with reinit False")


def the_order_of_the_samples_does_not_depend_on_the_actions(make_env: MakeEnv) -> None:
    """Every method sees the same images in the same order."""
    orders = []
    for seed in (0, 100):
        env = _started(make_env)
        orders.append([step[4]["index"] for step in rollout(env, 3, seed)])
    _expect_equal(orders[0], orders[1], "info: index under other actions")
    _expect(not equal(orders[0][0], orders[0][1]), "info: index: two batches are the same")


INTERFACE_CHECKS: tuple[Check, ...] = (
    actions_are_bounded,
    rewards_are_in_single_precision_and_episodes_end_in_one_way,
    autoreset_happens_in_the_same_step,
    gymnasiums_checkers_have_no_complaint,
    an_episode_that_ended_leaves_its_info_again,
    actions_beyond_the_bound_are_taken,
    an_unseeded_reset_goes_on_and_loses_no_batch,
    reinit_starts_a_new_student_in_a_reproducible_way,
    the_order_of_the_samples_does_not_depend_on_the_actions,
)
