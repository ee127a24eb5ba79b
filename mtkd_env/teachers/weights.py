"""Teachers' weights: from a user's file, published ones, or kept in the cache; checked wherever."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.networks.base import Network
from mtkd_env.networks.libraries import published_weights

# Where a file may hold the state_dict: this package's key, and those of other training programs.
STATE_KEYS = ("network", "state_dict", "model")


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors of a state_dict, wherever they are and however they are laid out."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load_given(network: Network, name: str, checkpoint: str) -> None:
    """Loads a user's file, or weights that a library publishes.

    The file holds a `state_dict`, or one under the key `network`, `state_dict` or `model`.

    Args:
        network: What they are loaded into.
        name: The network's name.
        checkpoint: The file, or the name of the weights.

    Raises:
        ConfigError: An unreadable file, unknown weights, or tensors that do not fit; names the file
            and the first tensor.
    """
    if not Path(checkpoint).exists():
        _load_state(network, published_weights(name, checkpoint), checkpoint)
        return
    content = load_checkpoint(Path(checkpoint))
    key = next((key for key in STATE_KEYS if key in content), None)
    state = content if key is None else content[key]
    if not isinstance(state, dict):
        raise ConfigError(f"{checkpoint} holds no state_dict under '{key}'")
    _load_state(network, state, checkpoint)


def keep(network: Network, path: Path, made_from: str) -> None:
    """Writes a trained teacher into the cache.

    Args:
        network: The teacher.
        path: The file.
        made_from: All that it depends on.
    """
    state = network.state_dict()
    content = {"network": state, "made_from": made_from, "digest": weights_digest(state)}
    save_checkpoint(path, content)


def load_kept(network: Network, path: Path, made_from: str) -> None:
    """Loads what `keep` wrote.

    Raises:
        ConfigError: The file holds something else, such as other weights.
    """
    content = load_checkpoint(path)
    state = content.get("network")
    tensors = isinstance(state, dict) and all(isinstance(one, Tensor) for one in state.values())
    known = content.get("made_from"), content.get("digest")
    if not tensors or known != (made_from, weights_digest(content["network"])):
        raise ConfigError(
            f"{path} does not hold the weights that were trained for this teacher; remove it to "
            "train them again, or give other weights as the teacher's checkpoint"
        )
    _load_state(network, content["network"], str(path))


def _other_classes(found: tuple[int, ...], expected: tuple[int, ...], num_classes: int) -> str:
    """What to do if only the number of outputs is another one."""
    if expected[:1] != (num_classes,) or found[1:] != expected[1:] or len(expected) > 2:
        return ""
    return (
        f": {found[0]} outputs, not {num_classes}; `classes` names the classes of the data set "
        "that a teacher's outputs are of"
    )


def _load_state(network: Network, state: Mapping[str, Any], source: str) -> None:
    """Checks a state_dict tensor by tensor and loads it."""
    state = network.native_state(state)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            raise ConfigError(f"{source} lacks the tensor '{name}'")
        if not isinstance(state[name], Tensor):
            kind = type(state[name]).__name__
            raise ConfigError(f"{source} has '{name}', which is not a tensor but a {kind}")
        found = tuple(state[name].shape)
        if found != shape:
            raise ConfigError(
                f"{source} has '{name}' of shape {found}, the network expects {shape}"
                + _other_classes(found, shape, network.num_classes)
            )
    unexpected = sorted(set(state) - set(expected))
    if unexpected:
        raise ConfigError(f"{source} has the unexpected tensor '{unexpected[0]}'")
    network.load_state_dict(state)
