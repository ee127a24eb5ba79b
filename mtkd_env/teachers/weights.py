"""Teachers' weights: from a user's file, published ones, or kept in the cache; checked wherever."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtkd_env.errors import ConfigError
from mtkd_env.files import digest_of, load_checkpoint, save_checkpoint
from mtkd_env.networks.base import Network
from mtkd_env.networks.libraries import published_weights

# Where a file may hold the state_dict: this package's key, and those of other training programs.
STATE_KEYS = ("network", "state_dict", "model", "net", "model_state_dict")

# Of a teacher's `weights`: the exponential moving average of the weights, and where files hold it.
EMA = "ema"
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")

# Where training programs write the accuracy of the weights.
ACCURACY_KEYS = ("accuracy", "best_accuracy", "best_acc", "best_acc1", "acc", "acc1", "test_acc")

# Counters of batch norms, which old files lack and nothing reads; that of torch's averaged models.
COUNTER, AVERAGED = "num_batches_tracked", "n_averaged"

# How many names an error quotes.
QUOTED = 5

# Weights by the names of their tensors, and the keys under which they stand in a file.
Found = tuple[str, Mapping[str, Any]]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors of a state_dict, wherever they are and however they are laid out."""
    return digest_of(
        part
        for name, one in sorted(state.items())
        for part in (
            f"{name} {one.dtype} {tuple(one.shape)}\n".encode(),
            one.cpu().contiguous().view(-1).view(torch.uint8).numpy().data,
        )
    )


def load_given(
    network: Network, name: str, checkpoint: str, chosen: str | None = None
) -> float | None:
    """Loads a user's file, or weights that a library publishes.

    The file holds a `state_dict`, maybe under one of `STATE_KEYS`. Of its names, what stands before
    those of the network does not count, such as `module.`.

    Args:
        network: What they are loaded into.
        name: The network's name.
        checkpoint: The file, or the name of the weights.
        chosen: Which of the file's weights: `ema`, or a key or beginning of names in it.

    Returns:
        The accuracy that the file states; None if it states none.

    Raises:
        ConfigError: An unreadable file, unknown weights, or tensors that do not fit; names the file
            and the first tensor.
    """
    if not Path(checkpoint).exists():
        if chosen is not None:
            raise ConfigError(f"weights: expected a file as checkpoint, got {checkpoint}")
        load_state(network, published_weights(name, checkpoint), checkpoint)
        return None
    content = load_checkpoint(Path(checkpoint))
    place, state = _find_state(network, content, chosen, checkpoint)
    load_state(network, state, checkpoint, place)
    return _stated_accuracy(content)


def _stated_accuracy(content: Mapping[str, Any]) -> float | None:
    """What a file says of the accuracy of its weights, as a share."""
    for key in ACCURACY_KEYS:
        value = content.get(key)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and 0 < value <= 100:
            return value / 100 if value > 1 else value
    return None


def _find_state(
    network: Network, content: Mapping[str, Any], chosen: str | None, source: str
) -> Found:
    """The weights in a file that are the network's, or those that are nearest to it."""
    found = list(_candidates(network, content))
    if chosen is not None:
        keys = EMA_KEYS if chosen == EMA else (chosen,)
        parts = [(key, content[key]) for key in keys if isinstance(content.get(key), dict)]
        found = [one for key, part in parts for one in _candidates(network, part, key)] or [
            one for one in found if chosen in one[0].split(".")
        ]
    if not found:
        held = ", ".join(list(content)[:QUOTED])
        raise ConfigError(f"weights: {source} holds no '{chosen}'; it has {held}")
    misfits = [_misfit(network, state) for _, state in found]
    fitting = [place for (place, _), misfit in zip(found, misfits, strict=True) if misfit == (0, 0)]
    if len(fitting) > 1:
        raise ConfigError(
            f"weights: {source} has several that fit; expected one of {', '.join(fitting)}"
        )
    return found[misfits.index(min(misfits))]


def _missing(network: Network, state: Mapping[str, Any]) -> list[str]:
    """The names of a network's tensors that are not there, but for counters."""
    there = network.native_state(state).keys()
    return [name for name in network.state_dict() if name not in there and COUNTER not in name]


def _unexpected(network: Network, state: Mapping[str, Any]) -> list[str]:
    """The names there that are none of a network's tensors."""
    own = network.state_dict()
    return [name for name in network.native_state(state) if name not in own]


def _misfit(network: Network, state: Mapping[str, Any]) -> tuple[int, int]:
    """How many tensors are missing, and how many are too many, such as those of a loss."""
    return len(_missing(network, state)), len(_unexpected(network, state))


def _candidates(network: Network, content: Mapping[str, Any], place: str = "") -> Iterator[Found]:
    """What may be a network's weights: under known keys, or behind what names have in common."""
    inner = [key for key, value in content.items() if isinstance(value, dict)]
    known = [key for key in STATE_KEYS if key in inner][:1]
    for key in known or [key for key in inner if key not in EMA_KEYS]:
        yield from _candidates(network, content[key], f"{place}.{key}".strip("."))
    if known:
        return
    content = {str(name): value for name, value in content.items() if name != AVERAGED}
    yield place, content
    groups: dict[str, dict[str, Any]] = {}
    for name, value in content.items() if _misfit(network, content) != (0, 0) else ():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    for first, group in groups.items():
        # Less than half of it would be no part to look into, nor one to quote.
        if 2 * len(group) > len(network.state_dict()):
            yield from _candidates(network, group, f"{place}.{first}".strip("."))


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
    load_state(network, content["network"], str(path))


def _other_classes(found: tuple[int, ...], expected: tuple[int, ...], num_classes: int) -> str:
    """What to do if only the number of outputs is another one."""
    if expected[:1] != (num_classes,) or found[1:] != expected[1:] or len(expected) > 2:
        return ""
    return (
        f": {found[0]} outputs, not {num_classes}; `classes` names the classes of the data set "
        "that a teacher's outputs are of"
    )


def load_state(network: Network, given: Mapping[str, Any], source: str, place: str = "") -> None:
    """Checks a state_dict tensor by tensor and loads it.

    Args:
        network: What it is loaded into.
        given: The tensors.
        source: The file that holds them, and
        place: where in it, for errors.

    Raises:
        ConfigError: A tensor that is missing, too many, or of another shape; names the source.
    """
    own = network.state_dict()
    if missing := _missing(network, given):
        raise ConfigError(f"{source} {_lacking(network, missing, given, place)}")
    counters = {name: tensor for name, tensor in own.items() if COUNTER in name}
    state = {**counters, **network.native_state(given)}
    for name, tensor in own.items():
        if not isinstance(state[name], Tensor):
            kind = type(state[name]).__name__
            raise ConfigError(f"{source} has '{name}', which is not a tensor but a {kind}")
        found, shape = tuple(state[name].shape), tuple(tensor.shape)
        if found != shape:
            raise ConfigError(
                f"{source} has '{name}' of shape {found}, the network expects {shape}"
                + _other_classes(found, shape, network.num_classes)
            )
    if unexpected := _unexpected(network, state):
        raise ConfigError(f"{source} has the unexpected tensor '{min(unexpected)}'")
    network.load_state_dict(state)


def _lacking(network: Network, missing: Sequence[str], given: Mapping[str, Any], place: str) -> str:
    """Which tensors are missing, and what stands there instead."""
    other = _unexpected(network, given)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    under = f" under '{place}'" if place else ""
    has = ", ".join(other[:QUOTED]) or "nothing else"
    return (
        f"lacks the tensor '{missing[0]}'{more}: expected {', '.join(missing[:QUOTED])}; it "
        f"has{under} {has}"
    )
