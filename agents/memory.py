"""What an agent remembers, in the form that a checkpoint can hold: dictionaries of tensors."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from mtkd_env import distributed
from mtkd_env.types import TeacherWeights

WEIGHTS = {entry.name for entry in fields(TeacherWeights)}


def packed(value: Any) -> Any:
    """Dataclasses as dictionaries of their fields, at any depth, with the rows of all processes."""
    if is_dataclass(value):
        return {entry.name: packed(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {name: packed(entry) for name, entry in value.items()}
    return distributed.gather(value)


def unpacked(value: Any, device: torch.device) -> Any:
    """What was packed, on a device, this process's rows of it.

    Of the dataclasses, teacher weights are made anew.
    """
    if isinstance(value, Tensor):
        return distributed.local_part(value).to(device)
    entries = {name: unpacked(entry, device) for name, entry in value.items()}
    return TeacherWeights(**entries) if entries.keys() == WEIGHTS else entries


def moved(value: Any, device: torch.device) -> Any:
    """A state with its tensors on a device.

    Bytes stay on the host: they are the states of generators, which are set from there.
    """
    if isinstance(value, Tensor):
        return value if value.dtype == torch.uint8 else value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(entry, device) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(entry, device) for entry in value)
    return value
