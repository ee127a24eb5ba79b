"""A GPU for machines without one: tensors on the host that count as being on a device of their own.

A program finds `cuda:0`. What it computes there is computed on the host, so results can be compared
exactly, but what a GPU refuses is refused: an operation on tensors of both sides, an array made of
a tensor on the other side, waiting where `torch.cuda.set_sync_debug_mode("error")` forbids it, and
what has no deterministic form where `torch.use_deterministic_algorithms` asks for one.
There are no kernels, and no streams beside each other; nothing is known of time or memory.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from experiments.benchmarks.operations import INDEXING, blocks, needs_values
from mtkd_env.data import decoding

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)

# Operations on tensors of both sides.
ACROSS = ("copy_", "set_")

# What has no deterministic form: the documentation of `torch.use_deterministic_algorithms`, in the
# names of the operations. Where `interpolate` is bilinear, torch takes a form that has one.
UNREPEATABLE = {
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "avg_pool3d_backward", "grid_sampler_2d_backward"),
    *("upsample_linear1d_backward", "upsample_bicubic2d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "max_unpool2d"),
    *("nll_loss2d_forward", "nll_loss2d_backward", "put_", "histc", "bincount", "median"),
}

# Calls that read all values and leave no operation behind.
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)

# Calls that make a tensor of what lies on the host.
IMPORTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)

# What tensors say of themselves when they are on the GPU.
ANSWERS = {Tensor.device: GPU, Tensor.is_cuda: True, Tensor.is_cpu: False}

# How torch sorts the tensors that an optimiser changes.
GROUP = "_group_tensors_by_device_and_dtype"


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def tensors(values: Any) -> list[Tensor]:
    """Those in lists, tuples and dictionaries at any depth."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [one for value in values for one in tensors(value)]


def storage(tensor: Tensor) -> torch.UntypedStorage:
    """A tensor's memory; what `torch.func` wraps has none of its own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


class Memory:
    """Which storages are on the GPU."""

    def __init__(self) -> None:
        self._there: dict[int, StorageWeakRef] = {}
        self._most = 64
        self.waiting = "default"
        # Of the calls that are under way, the innermost last: whether what they make is there.
        self.calls = [False]

    def has(self, tensor: Tensor) -> bool:
        known = self._there.get(storage(tensor)._cdata)
        return known is not None and not known.expired()

    def put(self, tensor: Tensor, *, there: bool) -> None:
        reference = StorageWeakRef(storage(tensor))
        if not there:
            self._there.pop(reference.cdata, None)
            return
        if len(self._there) >= self._most:
            # What is left of storages that are gone keeps the allocator from using their place.
            self._there = {key: one for key, one in self._there.items() if not one.expired()}
            self._most = 64 + 2 * len(self._there)
        self._there[reference.cdata] = reference

    def set_sync_debug_mode(self, mode: str) -> None:
        self.waiting = mode

    def wait(self, what: str) -> None:
        """What waits says so.

        Raises:
            RuntimeError: It is not to wait.
        """
        if self.waiting == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    @contextmanager
    def calling(self, *, there: bool) -> Iterator[None]:
        self.calls.append(there)
        try:
            yield
        finally:
            self.calls.pop()


class Operations(TorchDispatchMode):
    """Refuses operations on tensors of both sides, and says where their results are."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        sides = [self._memory.has(one) for one in given]
        there = any(sides)
        if there:
            self._check(func, args, kwargs, mixed=not all(sides))
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ not in ACROSS and (
            there or (not given and self._memory.calls[-1])
        ):
            for one in tensors(result):
                self._memory.put(one, there=True)
        return result

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: Any, *, mixed: bool) -> None:
        name = func.overloadpacket.__name__
        if name in ACROSS:
            if mixed and blocks(func, args, kwargs):
                self._memory.wait(str(func))
            return
        if name in UNREPEATABLE and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        # Indices may be on the host, from where they are fetched.
        if needs_values(func, args) or (mixed and name in INDEXING):
            self._memory.wait(str(func))
        together = tensors((args[:1], args[2:], kwargs) if name in INDEXING else (args, kwargs))
        # A single number may come from the host.
        strangers = [one for one in together if one.dim() and not self._memory.has(one)]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: of {func}, those of shapes "
                f"{[tuple(one.shape) for one in strangers]} are on the host"
            )


class Calls(TorchFunctionMode):
    """Answers where tensors are, and brings them from one side to the other."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":
            known = ANSWERS if self._memory.has(args[0]) else {}
            return known[func.__self__] if func.__self__ in known else func(*args)
        if func in MOVES:
            return self._moved(func, *args, **kwargs)
        if func in READS and self._memory.has(args[0]):
            if func is not Tensor.tolist:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            self._memory.wait("tolist")
        return self._called(func, args, kwargs)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked, given = kwargs.get("device"), tensors((args, kwargs))
        there = any(map(self._memory.has, given)) if asked is None else is_gpu(asked)
        generator = kwargs.get("generator")
        if isinstance(generator, Generator) and generator.there != there:
            raise RuntimeError(f"Expected a generator of the same device in {func}")
        if asked is None:
            with self._memory.calling(there=there):
                result = func(*args, **kwargs)
            if func is Tensor.__deepcopy__:
                self._memory.put(result, there=there)
            return result
        if there and func in IMPORTS and not any(map(self._memory.has, given)):
            self._memory.wait(str(func))
        kwargs["device"] = HOST if there else asked
        with self._memory.calling(there=there and not given):
            result = func(*args, **kwargs)
        return tree_map(lambda one: self._brought(one, there=there), result)

    def _brought(self, made: Any, *, there: bool) -> Any:
        """A new tensor on the side where it was asked for."""
        if not isinstance(made, Tensor) or self._memory.has(made) == there:
            return made
        copy = made.detach().clone().requires_grad_(made.requires_grad)
        self._memory.put(copy, there=there)
        return copy

    def _moved(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest, before = list(args), self._memory.has(tensor)
        there = before if func is Tensor.to else func is Tensor.cuda
        if isinstance(target := kwargs.pop("device", None), str | torch.device):
            there = is_gpu(target)
        elif func is Tensor.to and rest and isinstance(rest[0], Tensor):
            there, rest[0] = self._memory.has(rest[0]), rest[0].dtype
        elif func is Tensor.to and rest and not isinstance(rest[0], torch.dtype):
            target = rest.pop(0)
            there = before if target is None else is_gpu(target)
        kwargs |= zip(("dtype", "non_blocking", "copy"), rest, strict=False)
        if not kwargs.pop("non_blocking", False) and there != before:
            self._memory.wait(str(func))
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        with self._memory.calling(there=before):
            result = tensor.to(**kwargs) if kwargs else tensor
            if there != before and storage(result)._cdata == storage(tensor)._cdata:
                result = result.clone()
        self._memory.put(result, there=there)
        return result


class Generator(torch.Generator):
    """A generator of either side; both draw the host's numbers."""

    there = False

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.there = is_gpu(device)
        return made


class Stream:
    """All streams are one."""

    # What annotations ask for.
    __class__ = torch.cuda.Stream  # type: ignore[assignment]

    def __init__(self, *_: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False


class Event:
    """A moment that has always passed."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Autocast(torch.autocast):
    """Computes in half precision as the host does."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class UnpinnedLoader(DataLoader[Any]):
    """Leaves the memory that it loads into as it is; to pin it needs a driver."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"pin_memory": False}))


def loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load`, for either side."""

    def loaded(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if not is_gpu(map_location):
            return load(*args, map_location=map_location, **kwargs)
        content = load(*args, map_location=HOST, **kwargs)
        return tree_map(lambda one: one.to(GPU) if isinstance(one, Tensor) else one, content)

    return loaded


def grouping(group: Callable[..., Any], memory: Memory) -> Callable[..., Any]:
    """Sorts tensors by device, which it does below Python, where they are on the host."""

    def grouped(tensor_lists: Any, with_indices: bool = False) -> Any:
        return {
            (GPU if any(map(memory.has, tensors(found))) else device, dtype): found
            for (device, dtype), found in group(tensor_lists, with_indices).items()
        }

    return grouped


# The functions and classes of `torch.cuda` that programs here use.
STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "get_device_name": lambda *_: "pretended",
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "set_rng_state_all": lambda _: None,
    "manual_seed_all": lambda _: None,
    "is_current_stream_capturing": lambda: False,
    "Stream": Stream,
    "Event": Event,
    "current_stream": Stream,
    "stream": lambda _: nullcontext(),
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Programs find a GPU in this block."""
    memory = Memory()
    replaced = [
        *((torch.cuda, name, value) for name, value in STAND_INS.items()),
        (torch.cuda, "set_sync_debug_mode", memory.set_sync_debug_mode),
        (torch.accelerator, "current_stream", Stream),
        (torch, "Generator", Generator),
        (torch, "autocast", Autocast),
        (torch, "load", loading(torch.load)),
        (torch._C, GROUP, grouping(getattr(torch._C, GROUP), memory)),
        (decoding, "DataLoader", UnpinnedLoader),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Operations(memory))
        stack.enter_context(Calls(memory))
        yield
