"""What a piece of work asks of a device: operations, waits of the host, and arithmetic.

It is counted as torch dispatches it. What was compiled runs uncompiled meanwhile, and is counted as
it was written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from experiments.benchmarks.timing import Reading, Stopwatch

# No views, yet they start nothing: they take memory, or say anew how it is to be seen.
WITHOUT_KERNEL = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("_unsafe_view", "resize_", "set_", "record_stream"),
        *("as_strided_", "detach_", "squeeze_", "t_", "transpose_", "unsqueeze_"),
    }
)

# Parts of torch that watch other operations.
WATCHERS = ("prim", "profiler")

# What only the values can tell: a number for the host, or the shape of the result.
VALUE_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

# Says whether a matrix was singular; torch gives it no tag.
CHECK = "_linalg_check_errors"

# Have to know the shape of their result only where they are given a mask.
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
MASKS = (torch.bool, torch.uint8)

COPIES = ("_to_copy", "copy_")

# Calls that read a tensor, and leave no operation behind where it is on the host already.
READS = (torch.Tensor.cpu, torch.Tensor.tolist)


class OperationCounter(TorchDispatchMode):
    """Counts while it is entered; backward passes are counted too.

    Of a GPU, only what has to do with its tensors counts.

    Args:
        device: The device.

    Attributes:
        operations: Operations that start something like a kernel: no views, no mere allocations;
            an operation on a list of tensors (`_foreach_add_`) counts once.
        synchronizations: How often the host waits for a GPU: for a value (`item`, `bool(tensor)`,
            `equal`), for a shape that depends on values (`nonzero`, `masked_select`, `unique`,
            `bincount`, an index that is a mask), for copies between the two that are not
            `non_blocking`. On a CPU nothing waits, and those count that would wait for a GPU if all
            tensors were there; of the copies, the calls of `cpu()` and `tolist()`; not what torch's
            optimisers read, which are their counters of steps and on the host everywhere.
        flops: Multiplications and additions of matrix products and convolutions [FLOP].
        optimizing: Whether an optimiser makes its step.
    """

    def __init__(self, device: torch.device) -> None:
        TorchDispatchMode.__init__(self)
        self.operations = 0
        self.synchronizations = 0
        self.flops = 0
        self.optimizing = False
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Does an operation, or the operations that it is made of, and counts."""
        del types
        kwargs = kwargs or {}
        with self:
            # In inference mode operations come whole that otherwise come in parts.
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._count(func, args, kwargs, result)
        return result

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        if func.namespace in WATCHERS or self._device.type not in kinds:
            return
        name = func.overloadpacket.__name__
        self.operations += not (func.is_view or name in WITHOUT_KERNEL)
        if not self.optimizing and (needs_values(func, args) or blocks(func, args, kwargs)):
            self.synchronizations += name not in COPIES or len(kinds) > 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)


def needs_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host has to know values to go on after an operation."""
    name = func.overloadpacket.__name__
    if name in INDEXING:
        return any(index is not None and index.dtype in MASKS for index in args[1])
    return name == CHECK or not VALUE_TAGS.isdisjoint(func.tags)


def blocks(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is a copy that, if it is between host and device, is waited for."""
    name = func.overloadpacket.__name__
    return name in COPIES and True not in (kwargs.get("non_blocking"), *args[2:3])


class _HostReads(TorchFunctionMode):
    """Counts calls that on a CPU copy nothing, but would wait for a GPU."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Makes the call and counts it."""
        del types
        self._counter.synchronizations += func in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(device: torch.device) -> Iterator[OperationCounter]:
    """Counts what happens in a block; the counts can be read at any time."""
    counter = OperationCounter(device)
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(_HostReads(counter))
            begin, end = (partial(setattr, counter, "optimizing", now) for now in (True, False))
            stack.callback(register_optimizer_step_pre_hook(lambda *_: begin()).remove)
            stack.callback(register_optimizer_step_post_hook(lambda *_: end()).remove)
        stack.enter_context(counter)
        yield counter


class OperationWatch(Stopwatch):
    """Counts operations instead of seconds.

    Args:
        device: Where the work is done.
    """

    clocks = ("operations", "synchronizations", "flops")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack = ExitStack()

    def start(self) -> None:
        """Begins to count."""
        self._counter = self._stack.enter_context(counting(self._device))

    def stop(self) -> Reading:
        """Ends it; gives the counts."""
        self._stack.close()
        return {name: float(getattr(self._counter, name)) for name in self.clocks}
