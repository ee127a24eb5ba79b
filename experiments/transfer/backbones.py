"""Puts an exported backbone into the network of another task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.export import ABOUT, TORCH
from mtkd_env.errors import ConfigError
from mtkd_env.files import file_digest, load_checkpoint

# Names that a message gives of each kind; a wrong backbone has hundreds.
NAMED = 5

# Counters of batch norms, which nothing that normalises by its running statistics reads.
COUNTER = ".num_batches_tracked"


def load_backbone(path: Path) -> Mapping[str, Tensor]:
    """The tensors of an exported backbone, on the CPU.

    Args:
        path: `backbone.safetensors` or `backbone.pt`, or the folder of the export. If the
            `backbone.json` of an export that names the file lies beside it, the digest is checked.

    Raises:
        ConfigError: No such file, one that holds something else, or another one than was exported.
    """
    path = path / TORCH if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"weights: {path}: no such file")
    _check_digest(path)
    state = load_checkpoint(path)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"weights: {path}: expected tensors only, found {type(value).__name__} '{name}'"
            )
    return state


def _check_digest(path: Path) -> None:
    try:
        about = json.loads((path.parent / ABOUT).read_text(encoding="utf-8"))
        expected = about["digests"].get(path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if expected is not None and (found := file_digest(path)) != expected:
        raise ConfigError(
            f"weights: {path}: not the file that was exported: expected SHA-256 {expected[:16]}, "
            f"got {found[:16]}"
        )


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills a network's body with all of a backbone's tensors, and nothing else.

    Args:
        module: The body, whose tensors have the backbone's names: a ResNet of torchvision's, the
            part of one that a detector keeps, or an encoder of segmentation-models-pytorch.
        state: What `load_backbone` gave.

    Raises:
        ConfigError: A tensor of either is missing in the other, or has another shape; the module
            is as it was then.
    """
    own = {name: t for name, t in module.state_dict().items() if not name.endswith(COUNTER)}
    given = {name: t for name, t in state.items() if not name.endswith(COUNTER)}
    shared = [name for name in own if name in given]
    problems = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
            for name in shared
            if given[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise ConfigError(f"weights: not the backbone of this network; {'; '.join(found)}")
    for name in shared:
        own[name].copy_(given[name])


def _some(names: Sequence[str]) -> str:
    """`a, b and 5 more`."""
    first = ", ".join(names[:NAMED])
    return f"{first} and {len(names) - NAMED} more" if len(names) > NAMED else first
