"""The number format that networks compute in; what learns, losses and weights are in float32."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from mtkd_env.errors import ConfigError, check_name
from mtkd_env.types import NetworkOutput

FULL = "fp32"

PRECISIONS: Mapping[str, torch.dtype] = {
    FULL: torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

INT8 = "int8"

# On a CPU teachers, which learn nothing, can also compute in whole numbers.
TEACHER_PRECISIONS = (*PRECISIONS, INT8)


def check_precision(precision: str, device: torch.device | str) -> None:
    """Checks that a device computes in a precision, by a small convolution.

    Raises:
        ConfigError: An unknown precision, or one that the device does not have.
    """
    check_name(PRECISIONS, precision, "precision")
    if precision == FULL:
        return
    image = torch.zeros(1, 1, 3, 3, device=device)
    try:
        # Where autocast does not know a format, it warns and computes in float32.
        with warnings.catch_warnings(action="error"), autocast(precision, image.device):
            found = functional.conv2d(image, image).dtype
    except (RuntimeError, UserWarning) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"precision: '{device}' has no {precision}: {reason}") from error
    if found != PRECISIONS[precision]:
        raise ConfigError(f"precision: '{device}' has no {precision}, it computes in {found}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context in which networks on a device compute in a precision."""
    if precision == FULL:
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def widened(output: NetworkOutput) -> NetworkOutput:
    """An output with logits and feature in float32.

    The feature map stays in the precision that it was computed in, at half the memory.
    """
    return replace(output, logits=widen(output.logits), feature=widen(output.feature))


def widen(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
