"""What every environment of this package takes and refuses, whatever is rewarded and shown."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from mtkd_env.testing import Check, MakeEnv, equal, random_action, rollout


def bad_actions(env: Any) -> dict[str, tuple[Any, str]]:
    """Actions that must be refused, and the pattern of what the message must say."""
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
        spoiled[-1, 1] = value
        bad[name] = spoiled, f"row {rows - 1} holds NaN or infinity"
    return bad


def _started(make_env: Callable[[], Any]) -> Any:
    env = make_env()
    env.reset(seed=0)
    return env


def step_before_reset_is_refused(make_env: MakeEnv) -> None:
    env = make_env()
    with pytest.raises(ResetNeeded, match=r"call env\.reset\(\)"):
        env.step(random_action(env))


def bad_actions_are_refused_and_change_nothing(make_env: MakeEnv) -> None:
    env, untouched = _started(make_env), _started(make_env)
    for action, message in bad_actions(env).values():
        with pytest.raises(ValueError, match=f"^actions: .*{message}"):
            env.step(action)
    assert equal(rollout(env, 2), rollout(untouched, 2))


def actions_may_be_of_any_float_kind_and_read_only(make_env: MakeEnv) -> None:
    action = random_action(make_env())
    frozen = action.copy()
    frozen.flags.writeable = False
    kinds = (action, frozen, action.astype(np.float64), action.tolist())
    steps = [deepcopy(_started(make_env).step(kind)) for kind in kinds]
    assert all(equal(first, second) for first, second in pairwise(steps))


def seeds_that_are_no_integer_are_refused(make_env: MakeEnv) -> None:
    env: Any = make_env()
    for seed in ([1, 2, 3, 4], 1.5, "1"):
        with pytest.raises(ValueError, match="seed: expected one int"):
            env.reset(seed=seed)


def an_integer_of_numpy_is_a_seed(make_env: MakeEnv) -> None:
    env: Any = make_env()
    expected = deepcopy(env.reset(seed=3)[0])
    assert equal(env.reset(seed=np.int64(3))[0], expected)


def unknown_reset_options_are_refused_with_the_nearest(make_env: MakeEnv) -> None:
    with pytest.raises(ValueError, match="unknown reset option 'reint'; did you mean 'reinit'"):
        make_env().reset(options={"reint": True})


REFUSALS: tuple[Check, ...] = (
    step_before_reset_is_refused,
    bad_actions_are_refused_and_change_nothing,
    actions_may_be_of_any_float_kind_and_read_only,
    seeds_that_are_no_integer_are_refused,
    an_integer_of_numpy_is_a_seed,
    unknown_reset_options_are_refused_with_the_nearest,
)
