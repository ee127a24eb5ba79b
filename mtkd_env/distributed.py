"""Several processes that train one student, each on its part of every batch.

Every process runs the same program on `torch.distributed`'s default group. These functions are the
few places where the processes meet; with a single process, or without a group, each of them gives
back what it was given. All processes have to call them in the same order.
"""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch import distributed as group
from torch.nn.parallel import DistributedDataParallel

from mtkd_env.errors import ConfigError

Value = TypeVar("Value")
Layers = TypeVar("Layers", bound=nn.Module)


def active() -> bool:
    """Whether there is more than one process."""
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def rank() -> int:
    """Number of this process, from 0; the process 0 is the one that writes."""
    return group.get_rank() if active() else 0


def processes() -> int:
    """Number of processes."""
    return group.get_world_size() if active() else 1


def shard() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return rank(), processes()


def launched() -> bool:
    """Whether `torchrun`, or whatever sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def place_on_machine() -> int:
    """Number of this process among those on its machine, and of the GPU that it is to take."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: torch.device) -> None:
    """Joins the group that `torchrun` has started.

    Args:
        device: Where this process computes; decides between NCCL and Gloo.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        group.init_process_group("nccl", device_id=device)
    else:
        group.init_process_group("gloo")


def leave() -> None:
    """Leaves the group, if there is one."""
    if group.is_available() and group.is_initialized():
        group.destroy_process_group()


def local_part(rows: Tensor) -> Tensor:
    """This process's rows of a tensor that all processes have."""
    size = len(rows) // processes()
    return rows[rank() * size : (rank() + 1) * size]


@torch.no_grad()
def total(values: Tensor) -> Tensor:
    """Sum over the processes; no gradient."""
    if not active():
        return values
    summed = values.detach().clone()
    group.all_reduce(summed)
    return summed


@torch.no_grad()
def mean(values: Tensor) -> Tensor:
    """Mean over the processes; no gradient. Means of parts of a batch give that of the batch."""
    return total(values) / processes() if active() else values


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient of its own reaches each from all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        del ctx
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(processes())]
        group.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return local_part(total(gradients[0]))


def gather(rows: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "N ..."]:
    """The rows of all processes, in their order. Every process gives equally many.

    A gradient is that of the sum of what all processes make of the rows; all of them have to ask
    for it.
    """
    gathered: Tensor = _Gather.apply(rows) if active() else rows
    return gathered


@torch.no_grad()
def broadcast(values: Tensor) -> Tensor:
    """The values of process 0; the others give a tensor of the same shape and type."""
    if not active():
        return values
    values = values.detach().clone().contiguous()
    group.broadcast(values, src=0)
    return values


def agree(value: Value) -> Value:
    """What process 0 says, for plain values that can be pickled."""
    if not active():
        return value
    box: list[Any] = [value]
    group.broadcast_object_list(box, src=0)
    agreed: Value = box[0]
    return agreed


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces gradients by their means over the processes; those of the loss of a whole batch.

    A parameter without a gradient must lack it in every process.
    """
    if not active():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def check_gradients(module: nn.Module) -> None:
    """Checks that every parameter of a `data_parallel` module has a gradient, after a backward.

    Raises:
        ConfigError: Some have none, for which the processes would wait in vain; names them.
    """
    if not active():
        return
    lacking = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if lacking:
        raise ConfigError(
            f"several processes: the forward of {type(module).__name__} does not use "
            f"{', '.join(lacking)}; remove these parameters, or set requires_grad to False"
        )


def data_parallel(module: nn.Module) -> nn.Module:
    """A module whose parameters get the gradients of the whole batch in every process.

    Batch norms have to be synchronised before; see `synchronize_norms`.
    """
    if not active():
        return module
    device = next(module.parameters()).device
    # Synchronised batch norms keep the same statistics everywhere, so no buffer has to be sent.
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def synchronize_norms(module: Layers) -> Layers:
    """Makes the batch norms inside a module normalise by the whole batch, in place.

    Tensors keep their names.
    """
    if not active():
        return module
    on_gpu = next(module.parameters()).device.type == "cuda"
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_gpu else _with_synchronized_norms
    for name, child in list(module.named_children()):
        setattr(module, name, convert(child))
    return module


def _with_synchronized_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return SynchronizedBatchNorm.of(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _with_synchronized_norms(child))
    return module


def _mean_with_gradient(values: Tensor) -> Tensor:
    """Mean over the processes; its gradient is the mean of theirs."""
    return gather(values.unsqueeze(0)).mean(0)


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the parts of all processes; torch has it on GPUs only.

    Every process has to give equally many samples.
    """

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "SynchronizedBatchNorm":
        """The same layer, with the same tensors."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        new.train(norm.training)
        return new

    def forward(self, input: Float[Tensor, "B K ..."]) -> Float[Tensor, "B K ..."]:
        """The input, normalised by the statistics of the whole batch; in evaluation by the kept."""
        if not self.training:
            normalised: Tensor = super().forward(input)
            return normalised
        others = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        average = _mean_with_gradient(input.mean(others))
        centred = input - average.view(shape)
        variance = _mean_with_gradient(centred.square().mean(others))
        self._track(average, variance, input.numel() // input.shape[1] * processes())
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if not self.affine:
            return scaled
        return scaled * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, average: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        factor = 1 / int(self.num_batches_tracked) if momentum is None else momentum
        self.running_mean.lerp_(average, factor)
        self.running_var.lerp_(variance * (count / (count - 1)), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ConfigError(f"batch norm: expected at least 2 axes, got {input.ndim}")
