"""Training inside of `torch.inference_mode`, which works as inside of `torch.no_grad`."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def as_under_no_grad(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A function that leaves inference mode while it runs: whoever trains needs graphs.

    Tensors that are made in inference mode can never be part of one.
    """

    @wraps(function)
    def called(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Returned:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **keywords)
        with torch.inference_mode(mode=False), torch.no_grad():
            return function(*arguments, **keywords)

    return called


def leave_inference(kind: type, *methods: str) -> None:
    """Makes those methods that a class defines leave inference mode while they run."""
    for name in methods:
        if name in vars(kind):
            setattr(kind, name, as_under_no_grad(vars(kind)[name]))


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that a graph can hold: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
