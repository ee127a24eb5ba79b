"""Compiled networks: what `torch.compile` makes of student and teachers."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mtkd_env.errors import ConfigError, check_name
from mtkd_env.types import map_tensors

NONE = "none"

# Nothing, or the modes of `torch.compile`. The last two record CUDA graphs on a GPU.
MODES = (NONE, "default", "reduce-overhead", "max-autotune")


def check_compile(mode: str, device: torch.device | str) -> None:
    """Checks that networks can be compiled, by compiling something small.

    Raises:
        ConfigError: An unknown mode, or there is no compiler for the device.
    """
    check_name(MODES, mode, "compile")
    if mode == NONE:
        return
    try:
        compiled(nn.Tanh(), mode)(torch.zeros(8, device=device))
    except Exception as error:  # Which one depends on the compiler and on torch's version.
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"compile: expected {NONE}, torch cannot compile for '{device}' here: {reason}"
        ) from error


def compiled(network: nn.Module, mode: str) -> nn.Module:
    """A network with the same parameters; its calls are compiled at the first one of each shape."""
    if mode == NONE:
        return network
    call = cast("nn.Module", torch.compile(network, dynamic=False, mode=mode))
    # CUDA graphs overwrite what they gave before.
    return call if mode == "default" else _Copying(call)


class _Copying(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network

    def forward(self, inputs: Tensor) -> Any:
        return map_tensors(torch.clone, self._network(inputs))
