"""What a vector environment must fulfil; nothing here opens the student.

`StepContract` and `GymnasiumContract` hold for anybody's environments, `InterfaceContract` for
every `MTKDVectorEnv`, whatever its arguments. Subclass a contract in a test module and give it a
fixture `make_env`, a maker of equal environments with NumPy output, not yet reset.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.utils import env_checker, passive_env_checker
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

# In which episodes end.
MOST_STEPS = 40

Env = VectorEnv[Any, Any, Any]
MakeEnv = Callable[[], Env]
# Observation, reward, terminated, truncated, info.
Transition = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def random_action(env: Env, seed: int = 0) -> Any:
    space = env.single_action_space
    if not isinstance(space, Box):
        batched = deepcopy(env.action_space)
        batched.seed(seed)
        return batched.sample()
    generator = np.random.default_rng(seed)
    bound = float(space.high[0])
    return generator.uniform(-bound, bound, env.action_space.shape).astype(np.float32)


def rollout(env: Env, steps: int, seed: int = 0) -> list[Transition]:
    """Copies of what some steps with random actions give."""
    return [deepcopy(env.step(random_action(env, seed + step))) for step in range(steps)]


def arrays_of(info: dict[str, Any]) -> Iterator[np.ndarray]:
    """All arrays of an info, those of the info of ended episodes too."""
    for value in info.values():
        if isinstance(value, dict):
            yield from arrays_of(value)
        else:
            assert isinstance(value, np.ndarray)
            yield value


def equal(first: object, second: object) -> bool:
    return env_checker.data_equivalence(first, second, exact=True)


def bad_actions(env: Env) -> dict[str, tuple[Any, str]]:
    """Actions that must be refused, and what the message must say."""
    good = random_action(env)
    rows, columns = good.shape
    bad = {
        "too few rows": (good[:-1], rf"expected shape \({rows}, {columns}\).*got \({rows - 1},"),
        "too many rows": (np.concatenate([good, good[:1]]), rf"got \({rows + 1}, {columns}\)"),
        "too few columns": (good[:, 1:], rf"got \({rows}, {columns - 1}\)"),
        "one row": (good[0], rf"got \({columns},\)"),
        "scalar": (0.0, r"got \(\)"),
    }
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("minus infinity", -np.inf)):
        spoiled = good.copy()
        spoiled[2, 1] = value
        bad[name] = spoiled, "row 2 holds NaN or infinity"
    return bad


class StepContract:
    """What `reset` and `step` return; short, to be run for very many environments."""

    def test_what_is_returned_lies_in_the_spaces(self, make_env: MakeEnv) -> None:
        env = make_env()
        size = env.num_envs
        observation, info = env.reset(seed=0)
        assert isinstance(info, dict)
        transitions = [(observation, None), *((step[0], step) for step in rollout(env, 2))]
        for observation, step in transitions:
            assert isinstance(observation, np.ndarray)
            assert observation.dtype == env.observation_space.dtype
            assert observation in env.observation_space
            assert observation[0] in env.single_observation_space
            assert np.isfinite(observation).all()
            if step is None:
                continue
            _, reward, terminated, truncated, info = step
            assert np.issubdtype(reward.dtype, np.floating)
            assert np.isfinite(reward).all()
            assert terminated.dtype == truncated.dtype == np.bool_
            assert reward.shape == terminated.shape == truncated.shape == (size,)
            assert all(len(array) == size for array in arrays_of(info))

    def test_writing_into_what_was_returned_changes_nothing(self, make_env: MakeEnv) -> None:
        env, untouched = make_env(), make_env()
        returned = [env.reset(seed=0)[0]]
        untouched.reset(seed=0)
        for step in range(2):
            for array in returned:
                array.fill(1)
            observation, reward, terminated, truncated, info = env.step(random_action(env, step))
            arrays = (observation, reward, terminated, truncated, info)
            assert equal(deepcopy(arrays), rollout(untouched, 1, seed=step)[0])
            returned = [observation, reward, terminated, truncated, *arrays_of(info)]

    def test_a_seed_reproduces_everything_that_follows(self, make_env: MakeEnv) -> None:
        used, new = make_env(), make_env()
        used.reset(seed=8)
        rollout(used, 1)
        first, second = ([env.reset(seed=7)[0], *rollout(env, 2)] for env in (used, new))
        assert equal(first, second)


class GymnasiumContract:
    """The rest of what Gymnasium asks of anybody's vector environment."""

    def test_spaces_are_those_of_one_sample_batched(self, make_env: MakeEnv) -> None:
        env = make_env()
        assert env.observation_space == batch_space(env.single_observation_space, env.num_envs)
        assert env.action_space == batch_space(env.single_action_space, env.num_envs)

    def test_episodes_end_as_the_autoreset_mode_says(self, make_env: MakeEnv) -> None:
        env = make_env()
        env.reset(seed=0)
        mode = env.metadata["autoreset_mode"]
        assert isinstance(mode, AutoresetMode)
        before = np.zeros(env.num_envs, dtype=bool)
        ends = 0
        for seed in range(MOST_STEPS):
            _, reward, terminated, truncated, info = env.step(random_action(env, seed))
            done = terminated | truncated
            if mode is AutoresetMode.SAME_STEP:
                check_final(env, info, done)
            else:
                # The step after the last one begins the next episode and ignores the action.
                assert "final_obs" not in info
                assert not (done & before).any()
                assert not reward[before].any()
            before = done
            ends += int(done.sum())
            if ends > 2 * env.num_envs:
                break
        assert ends > 0

    def test_returned_arrays_are_fresh(self, make_env: MakeEnv) -> None:
        env = make_env()
        returned: list[Any] = []
        copies: list[Any] = []
        for step in range(3):
            returned.append(env.step(random_action(env, step)) if step else env.reset(seed=0))
            copies.append(deepcopy(returned[-1]))
        for first, second in combinations(returned, 2):
            assert not passive_env_checker.data_shares_objects(first[0], second[0])
            assert not passive_env_checker.data_shares_objects(first[-1], second[-1])
        assert equal(returned, copies)  # later steps wrote into nothing

    def test_another_seed_gives_something_else(self, make_env: MakeEnv) -> None:
        env = make_env()
        assert not np.allclose(env.reset(seed=7)[0], env.reset(seed=8)[0])

    def test_closing_twice_is_no_error(self, make_env: MakeEnv) -> None:
        env = make_env()
        env.reset(seed=0)
        env.close()
        env.close()


def check_final(env: Env, info: dict[str, Any], done: np.ndarray) -> None:
    """What a step leaves of the episodes that it ended, where it begins the next ones as well."""
    for name in ("final_obs", "final_info"):
        assert (name in info) == (f"_{name}" in info) == done.any()
        if done.any():
            assert info[f"_{name}"].dtype == np.bool_
            assert np.array_equal(info[f"_{name}"], done)
    for row in np.flatnonzero(done):
        last = np.asarray(info["final_obs"][row])
        assert last in env.single_observation_space
        assert last.dtype == env.observation_space.dtype


class InterfaceContract(GymnasiumContract):
    """All else: how the environment answers, whatever the values of its steps."""

    def test_actions_are_bounded(self, make_env: MakeEnv) -> None:
        env = make_env()
        assert np.isfinite(env.action_space.low).all()
        assert np.isfinite(env.action_space.high).all()

    def test_rewards_are_in_single_precision_and_episodes_end_in_one_way(
        self, make_env: MakeEnv
    ) -> None:
        env = make_env()
        env.reset(seed=0)
        for _, reward, terminated, truncated, _ in rollout(env, 3):
            assert reward.dtype == np.float32
            assert not (terminated & truncated).any()

    def test_autoreset_happens_in_the_same_step(self, make_env: MakeEnv) -> None:
        env = make_env()
        assert env.autoreset_mode is AutoresetMode.SAME_STEP
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP

    # The box has the width that the softmax of its logits needs.
    @pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
    def test_gymnasiums_checkers_have_no_complaint(self, make_env: MakeEnv) -> None:
        env = make_env()
        # Without a spec, the checkers would not look for determinism.
        env.spec = EnvSpec(id="Tiny-v0", entry_point=None, vector_entry_point="tiny:make_tiny_env")
        checked: Any = env
        env_checker.check_reset_seed_determinism(checked)
        env_checker.check_reset_return_type(checked)
        env_checker.check_reset_options(checked)
        env_checker.check_seed_deprecation(checked)
        for space, kind in (
            (env.action_space, "action"),
            (env.observation_space, "observation"),
            (env.single_action_space, "action"),
            (env.single_observation_space, "observation"),
        ):
            check_box = getattr(passive_env_checker, f"_check_box_{kind}_space")
            passive_env_checker.check_space(space, kind, check_box)
        env_checker.check_space_limit(env.single_action_space, "action")
        passive_env_checker.env_reset_passive_checker(checked, seed=1)
        previous = env.reset(seed=1)
        for step in range(2):
            observation, _, _, _, info = env.step(random_action(env, step))
            passive_env_checker.check_obs(observation, env.observation_space, "step")
            passive_env_checker.env_data_reuse_passive_checker(
                previous, (observation, info), "reset", "step"
            )
            previous = observation, info

    def test_an_episode_that_ended_leaves_its_info_again(self, make_env: MakeEnv) -> None:
        env = make_env()
        env.reset(seed=0)
        for _, _, terminated, truncated, info in rollout(env, 3):
            if (terminated | truncated).any():
                final = info["final_info"]
                assert equal(final, {name: info[name] for name in final})
                assert info.keys() - final.keys() == {
                    "final_obs",
                    "_final_obs",
                    "final_info",
                    "_final_info",
                }
                assert info["final_obs"] in env.observation_space

    def test_step_before_reset_is_refused(self, make_env: MakeEnv) -> None:
        env = make_env()
        with pytest.raises(ResetNeeded, match=r"call env\.reset\(\)"):
            env.step(random_action(env))

    def test_bad_actions_are_refused_and_change_nothing(self, make_env: MakeEnv) -> None:
        env, untouched = make_env(), make_env()
        for each in (env, untouched):
            each.reset(seed=0)
        for action, message in bad_actions(env).values():
            with pytest.raises(ValueError, match=f"^actions: .*{message}"):
                env.step(action)
        assert equal(rollout(env, 2), rollout(untouched, 2))

    def test_actions_may_be_of_any_float_kind_and_read_only(self, make_env: MakeEnv) -> None:
        action = random_action(make_env())
        frozen = action.copy()
        frozen.flags.writeable = False
        results = []
        for kind in (action, frozen, action.astype(np.float64), action.tolist()):
            env = make_env()
            env.reset(seed=0)
            results.append(deepcopy(env.step(kind)))
        assert all(equal(first, second) for first, second in pairwise(results))

    def test_actions_beyond_the_bound_are_taken(self, make_env: MakeEnv) -> None:
        env = make_env()
        env.reset(seed=0)
        action = 100 * random_action(env)
        weights = env.step(action)[4]["logit_weights"]
        assert np.isfinite(weights).all()

    def test_an_unseeded_reset_goes_on_and_loses_no_batch(self, make_env: MakeEnv) -> None:
        env, uninterrupted = make_env(), make_env()
        env.reset(seed=0)
        uninterrupted.reset(seed=0)
        for step in range(3):
            observation, info = env.reset()
            assert equal(observation, env.reset(options={})[0])
            assert info == {}
            assert equal(rollout(env, 1, step), rollout(uninterrupted, 1, step))

    def test_reinit_starts_a_new_student_in_a_reproducible_way(self, make_env: MakeEnv) -> None:
        env = make_env()

        def begin() -> list[Any]:
            started = env.reset(seed=3)[0]
            return [started, env.reset(options={"reinit": True})[0], *rollout(env, 2)]

        started, first, *steps = begin()
        assert not np.allclose(first, started)
        assert equal([started, first, *steps], begin())
        assert equal(env.reset(options={"reinit": False})[0], env.reset()[0])

    @pytest.mark.usefixtures("_unchecked_shapes")
    @pytest.mark.parametrize("seed", [[1, 2, 3, 4], 1.5, "1"])
    def test_seeds_that_are_no_integer_are_refused(self, make_env: MakeEnv, seed: object) -> None:
        env = make_env()
        with pytest.raises(ValueError, match="seed: expected one int"):
            env.reset(seed=seed)  # type: ignore[arg-type] # that is the point

    @pytest.mark.usefixtures("_unchecked_shapes")
    def test_an_integer_of_numpy_is_a_seed(self, make_env: MakeEnv) -> None:
        env = make_env()
        assert equal(env.reset(seed=np.int64(3))[0], env.reset(seed=3)[0])  # type: ignore[arg-type] # idem

    def test_unknown_reset_options_are_refused_with_the_nearest(self, make_env: MakeEnv) -> None:
        env = make_env()
        with pytest.raises(ValueError, match="unknown reset option 'reint'; did you mean 'reinit'"):
            env.reset(options={"reint": True})

    def test_the_order_of_the_samples_does_not_depend_on_the_actions(
        self, make_env: MakeEnv
    ) -> None:
        orders = []
        for seed in (0, 100):
            env = make_env()
            env.reset(seed=0)
            orders.append([step[4]["index"] for step in rollout(env, 3, seed)])
        assert equal(orders[0], orders[1])
        assert not equal(orders[0][0], orders[0][1])
