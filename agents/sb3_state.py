"""The whole state of a Stable-Baselines3 algorithm in tensors and numbers: no pickles.

The library's own files leave out counters, buffers' positions and random generators, and hold
pickles, which may run anything when they are read. What is kept here is complete where an algorithm
is about to begin a rollout; `load_model_state` at the same point makes another one go on as it.
"""

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.save_util import recursive_getattr
from torch import Tensor, nn
from torch.optim import Optimizer

from mtkd_env.errors import ConfigError

# Attributes for logs that are never written, and the clock that they go by.
UNUSED = ("ep_info_buffer", "ep_success_buffer", "start_time")

# Learning does not change what is of these types, nor classes, functions and schedules.
CONSTANT = (Space, torch.device, Enum)

NOISE_MATRICES = ("exploration_mat", "exploration_matrices")


def model_state(model: BaseAlgorithm) -> dict[str, Any]:
    """Everything that learning has changed, where the algorithm is about to begin a rollout.

    Not the global random generators, nor the environment. Arrays share their memory with the
    algorithm's: save or copy them before the next step.

    Raises:
        ConfigError: The algorithm keeps something else than tensors, arrays and numbers.
    """
    return {
        "parameters": model.get_parameters(),
        "variables": {name: value.detach() for name, value in variables_of(model).items()},
        "attributes": _all_kept(model, _attributes(model)),
        "replay": _replay_state(getattr(model, "replay_buffer", None)),
        "noise": [_all_kept(one, vars(one)) for one in _noises(model.action_noise)],
        "matrices": {name: matrix.detach() for name, _, matrix in _noise_matrices(model)},
        "actions": model.action_space.np_random.bit_generator.state,
        "logged": _logged(model),
    }


def variables_of(model: BaseAlgorithm) -> dict[str, Tensor]:
    """Tensors that an algorithm learns beside its networks, by their names."""
    _, names = model._get_torch_save_params()
    return {name: recursive_getattr(model, name) for name in names}


def load_model_state(model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Goes on from what `model_state` gave of an algorithm that was built alike."""
    model.set_parameters(state["parameters"], exact_match=True)
    for name, variable in variables_of(model).items():
        variable.data.copy_(state["variables"][name])
    _restore(model, state["attributes"])
    if state["replay"] is not None:
        _load_replay_state(getattr(model, "replay_buffer", None), state["replay"])
    # Not one for every sample before learning has begun, which makes them.
    for one, saved in zip(_noises(model.action_noise), state["noise"], strict=False):
        _restore(one, saved)
    for name, owner, matrix in _noise_matrices(model):
        saved = state["matrices"].get(name)
        if saved is not None:
            setattr(owner, name.rpartition(".")[2], saved.to(matrix.device))
    model.action_space.np_random.bit_generator.state = state["actions"]
    if hasattr(model, "_logger"):
        for name, entries in state["logged"].items():
            getattr(model.logger, name).update(entries)


def _attributes(model: BaseAlgorithm) -> dict[str, Any]:
    """What an algorithm has beside its parameters, its buffers and what it was built from."""
    parameters, variables = model._get_torch_save_params()
    given = {
        name
        for kind in type(model).__mro__
        if "__init__" in vars(kind)
        for name in inspect.signature(vars(kind)["__init__"]).parameters
    }
    elsewhere = {name.split(".")[0] for name in (*parameters, *variables)}
    skipped = given | elsewhere | {*model._excluded_save_params(), *UNUSED}
    inside = {id(module) for module in model.policy.modules()}
    return {
        name: value
        for name, value in vars(model).items()
        if name not in skipped and id(value) not in inside
    }


def _all_kept(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an object as a checkpoint can hold them, but those that no learning changes."""
    return {
        name: _kept(value, f"{type(owner).__name__}.{name}")
        for name, value in values.items()
        if not isinstance(value, CONSTANT) and (isinstance(value, nn.Module) or not callable(value))
    }


def _restore(owner: Any, kept: Mapping[str, Any]) -> None:
    for name, saved in kept.items():
        setattr(owner, name, _restored(getattr(owner, name, None), saved))


def _kept(value: Any, name: str) -> Any:
    """A value as a checkpoint can hold it; dictionaries say what they stand for."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"array": torch.from_numpy(value)}
    if isinstance(value, nn.Module | Optimizer):
        return {"state": value.state_dict()}
    if isinstance(value, list | tuple):
        return {"sequence": [_kept(entry, name) for entry in value]}
    if isinstance(value, dict):
        return {"mapping": {key: _kept(entry, name) for key, entry in value.items()}}
    raise ConfigError(
        f"agent: a checkpoint cannot hold {name}, which is of type {type(value).__name__}; such a "
        "run is possible without checkpoints: checkpoint.epochs 0 and checkpoint.minutes 0"
    )


def _restored(now: Any, saved: Any) -> Any:
    """The value that was kept. A tensor is written into, since others may share it."""
    if isinstance(saved, Tensor):
        if isinstance(now, Tensor) and now.shape == saved.shape:
            now.data.copy_(saved)
            return now
        return saved
    if not isinstance(saved, dict):
        return saved
    if "state" in saved:
        now.load_state_dict(saved["state"])
        return now
    if "array" in saved:
        return saved["array"].numpy().copy()
    if "mapping" in saved:
        entries = now if isinstance(now, dict) else {}
        return {key: _restored(entries.get(key), entry) for key, entry in saved["mapping"].items()}
    return _restored_sequence(now, saved["sequence"])


def _restored_sequence(now: Any, saved: list[Any]) -> Any:
    alike = isinstance(now, list | tuple) and len(now) == len(saved)
    before = now if alike else [None] * len(saved)
    entries = [_restored(old, entry) for old, entry in zip(before, saved, strict=True)]
    if hasattr(now, "_make"):
        return now._make(entries)
    return tuple(entries) if isinstance(now, tuple) else entries


def _arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}


def _replay_state(buffer: ReplayBuffer | None) -> dict[str, Any] | None:
    """The rows in use of every array, and where the next one goes."""
    if buffer is None:
        return None
    # One more than there are steps may hold the observation after the last.
    rows = buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)
    arrays = {name: torch.from_numpy(array[:rows]) for name, array in _arrays(buffer).items()}
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _load_replay_state(buffer: Any, state: Mapping[str, Any]) -> None:
    buffer.pos, buffer.full = state["pos"], state["full"]
    arrays = _arrays(buffer)
    for name, saved in state["arrays"].items():
        arrays[name][: len(saved)] = saved.numpy()


def _noises(noise: ActionNoise | None) -> list[ActionNoise]:
    if isinstance(noise, VectorizedActionNoise):
        return noise.noises
    return [] if noise is None else [noise]


def _noise_matrices(model: BaseAlgorithm) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, owner and value of what state-dependent exploration has drawn for a rollout."""
    modules: dict[str, nn.Module] = dict(model.policy.named_modules())
    for path, module in modules.items():
        owner = getattr(module, "action_dist", None)
        if isinstance(owner, StateDependentNoiseDistribution):
            for name in NOISE_MATRICES:
                if hasattr(owner, name):
                    yield f"{path}.{name}", owner, getattr(owner, name)


def _logged(model: BaseAlgorithm) -> dict[str, dict[str, Any]]:
    """What has been recorded for the log since it was last written, as far as it is numbers."""
    if not hasattr(model, "_logger"):
        return {}
    logger = model.logger
    numbers = {
        name: float(value)
        for name, value in logger.name_to_value.items()
        if isinstance(value, int | float | np.number)
    }
    others = {
        table: {name: entry for name, entry in getattr(logger, table).items() if name in numbers}
        for table in ("name_to_count", "name_to_excluded")
    }
    return {"name_to_value": numbers, **others}
