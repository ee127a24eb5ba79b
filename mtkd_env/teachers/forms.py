"""Exact forms of a frozen network: the same outputs up to rounding, at different speeds.

Which of them is fastest depends on the network, the images and the machine, so it is measured, and
remembered on disk.
"""

import copy
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd_env import distributed
from mtkd_env.files import write_text
from mtkd_env.precision import FULL
from mtkd_env.types import NetworkOutput

# What a teacher's outputs are asked of.
Ask = Callable[[Tensor], NetworkOutput]

# Called with a line about how the teachers are computed.
Note = Callable[[str], None]

# Whether other forms than the eager one are looked for.
COMPILE = ("none", "auto")

EAGER = "eager"

# How many times as fast as the eager form another one has to be; less is noise.
WORTHWHILE = 1.03

# How far outputs may differ, relative to their norm. Formats round at 2⁻²³, 2⁻¹⁰ and 2⁻⁷.
TOLERANCES = {FULL: 1e-4, "fp16": 1e-2, "bf16": 5e-2}

# Of one measurement: rounds at least and at most, and seconds after which there are no more.
FEWEST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 5, 40, 2.0


def _channels_first(network: nn.Module, _inputs: Tensor) -> Ask:
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


def _compiled(network: nn.Module, _inputs: Tensor) -> Ask:
    ask: Ask = torch.compile(network, dynamic=False, options={"freezing": True})
    return ask


def _compiled_graph(network: nn.Module, _inputs: Tensor) -> Ask:
    """Compiled, and replayed as one CUDA graph, which overwrites what it gave before."""
    compiled = torch.compile(network, dynamic=False, mode="reduce-overhead")
    return lambda inputs: _copied(compiled(inputs))


class _Captured:
    """A network's kernels as one CUDA graph, without compilation."""

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        self._inputs = inputs.clone()
        stream = torch.cuda.Stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            network(self._inputs)  # Libraries set themselves up on a first call.
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs: NetworkOutput = network(self._inputs)

    def __call__(self, inputs: Tensor) -> NetworkOutput:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return _copied(self._outputs)


def _copied(output: NetworkOutput) -> NetworkOutput:
    return NetworkOutput(
        logits=output.logits.clone(),
        feature=output.feature.clone(),
        feature_map=output.feature_map.clone(),
    )


# Forms that may be faster than the eager one, by the kind of device; a maker gets the network and
# images like those that it will see.
FORMS: Mapping[str, Mapping[str, Callable[[nn.Module, Tensor], Ask]]] = {
    "cpu": {"channels_first": _channels_first, "compiled": _compiled},
    "cuda": {
        "channels_first": _channels_first,
        "graph": _Captured,
        "compiled": _compiled_graph,
    },
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A network in the form that is fastest for images of one shape, and eager for all others.

    Attributes:
        form: Name of the form.
        eager: The network.
        ask: The network in that form.
        shape: Shape of the images (B, K, H, W).
    """

    form: str
    eager: Ask
    ask: Ask
    shape: torch.Size

    def __call__(self, inputs: Tensor) -> NetworkOutput:
        """The network's outputs."""
        if inputs.shape != self.shape:
            return self.eager(inputs)
        return self.ask(inputs.contiguous())  # In the layout that the form was measured with.


@torch.no_grad()
def fastest_forms(
    networks: Mapping[str, nn.Module], inputs: Tensor, *, precision: str, cache: Path, note: Note
) -> dict[str, Fitted]:
    """The form of each network that is fastest for such images; those that stay eager are left out.

    A form whose outputs are not the eager one's, or that cannot be built, does not count. Of
    several processes, the first one chooses for all.

    Args:
        networks: Frozen networks by their names, under the autocast that they will be asked in.
        inputs: Images to measure with, of the shape of those to come.
        precision: What the networks compute in.
        cache: Folder in which choices are remembered.
        note: Told what was chosen, how much faster it is, and how long it took to build.
    """
    fitted = {}
    for name, network in networks.items():
        search = _Search(name, network, inputs, precision, note)
        form = distributed.agree(search.choose(cache) if distributed.rank() == 0 else EAGER)
        ask = search.build(form)
        if ask is not None and form != EAGER:
            fitted[name] = Fitted(form, network, ask, inputs.shape)
    return fitted


class _Search:
    """Builds, checks and measures the forms of one network."""

    def __init__(
        self, name: str, network: nn.Module, inputs: Tensor, precision: str, note: Note
    ) -> None:
        self._name = name
        self._network = network
        self._inputs = inputs.contiguous()
        self._precision = precision
        self._note = note
        self._makers = FORMS.get(inputs.device.type, {})
        self._built: dict[str, Ask | None] = {EAGER: network}
        self._build_seconds: dict[str, float] = {}

    def choose(self, cache: Path) -> str:
        """Name of the fastest form, measured unless it is remembered."""
        about = self._about()
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = cache / "forms" / f"{digest[:32]}.json"
        form = self._remembered(path)
        if form is not None:
            form = EAGER if self.build(form) is None else form
            self._say(form, "as measured before" + self._build_time(form))
            return form
        speeds = self._speeds()
        form = max(speeds, key=lambda form: speeds[form]) if speeds else EAGER
        if speeds.get(form, 0) < WORTHWHILE:
            form = EAGER
        write_text(path, json.dumps({"form": form, "speeds": speeds, "about": about}) + "\n")
        shown = [f"{one} {speed:.2f}x{self._build_time(one)}" for one, speed in speeds.items()]
        self._say(form, f"against eager: {', '.join(shown) or 'no other form'}")
        return form

    def build(self, form: str) -> Ask | None:
        """The network in a form; none if it cannot be built or does not give the same outputs."""
        if form not in self._built:
            started = time.perf_counter()
            self._built[form] = self._checked(form)
            self._build_seconds[form] = time.perf_counter() - started
        return self._built[form]

    def _checked(self, form: str) -> Ask | None:
        try:
            ask = self._makers[form](self._network, self._inputs)
            found = ask(self._inputs)
        # Compilers fail in many ways, and none of them is a reason to end a run.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._leave_out(form, reason)
            return None
        difference = _difference(found, self._network(self._inputs))
        if not difference <= self._tolerance():
            self._leave_out(form, f"its outputs differ by {difference:.1e}")
            return None
        return ask

    def _tolerance(self) -> float:
        # Convolutions on a GPU may take float32 in TF32, which rounds as fp16 does.
        rough = self._precision == FULL and self._inputs.device.type == "cuda"
        return TOLERANCES["fp16" if rough else self._precision]

    def _remembered(self, path: Path) -> str | None:
        try:
            form = json.loads(path.read_text(encoding="utf-8"))["form"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return form if form in (EAGER, *self._makers) else None

    def _speeds(self) -> dict[str, float]:
        """How many times as fast as the eager form each of the others is."""
        asks = {EAGER: self._built[EAGER]} | {form: self.build(form) for form in self._makers}
        built = {form: ask for form, ask in asks.items() if ask is not None}
        seconds = _seconds(built, self._inputs)
        return {
            form: statistics.median(
                eager / own for eager, own in zip(seconds[EAGER], found, strict=True)
            )
            for form, found in seconds.items()
            if form != EAGER
        }

    def _build_time(self, form: str) -> str:
        seconds = self._build_seconds.get(form)
        return "" if seconds is None else f" (built in {seconds:.1f} s)"

    def _leave_out(self, form: str, reason: str) -> None:
        self._note(f"teacher {self._name}: no form '{form}': {reason}")

    def _say(self, form: str, text: str) -> None:
        self._note(f"teacher {self._name}: {form}; {text}")

    def _about(self) -> dict[str, Any]:
        """Everything that the choice depends on."""
        network, inputs = self._network, self._inputs
        tensors = [(name, str(t.dtype), list(t.shape)) for name, t in network.state_dict().items()]
        architecture = f"{type(network).__qualname__} {network} {tensors}"
        return {
            "network": hashlib.sha256(architecture.encode()).hexdigest(),
            "images": [list(inputs.shape), str(inputs.dtype)],
            "device": _device_name(inputs.device),
            "precision": self._precision,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "forms": list(self._makers),
            "compiler": shutil.which(os.environ.get("CXX", "g++")),
        }


def _difference(found: NetworkOutput, expected: NetworkOutput) -> float:
    """Largest distance of an output to what it should be, relative to its norm."""
    pairs = (
        (found.logits, expected.logits),
        (found.feature, expected.feature),
        (found.feature_map, expected.feature_map),
    )
    ratios = [
        (one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12)
        for one, other in pairs
    ]
    return float(torch.stack(ratios).max())


def _seconds(asks: Mapping[str, Ask], inputs: Tensor) -> dict[str, list[float]]:
    """Seconds of calls, taken in turns, after one that does not count."""
    for ask in asks.values():
        ask(inputs)
    seconds: dict[str, list[float]] = {form: [] for form in asks}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS if len(asks) > 1 else 0):
        if done >= FEWEST_ROUNDS and time.perf_counter() - started > ENOUGH_SECONDS:
            break
        for form, ask in asks.items():
            seconds[form].append(_seconds_of(ask, inputs))
    return seconds


def _seconds_of(ask: Ask, inputs: Tensor) -> float:
    # Other programs disturb the CPU time of a single thread least.
    alone = inputs.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    _wait(inputs.device)
    started = clock()
    ask(inputs)
    _wait(inputs.device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8") if described.is_file() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    processor = model[1] if model else platform.processor()
    return f"{processor} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"
