"""What an epoch costs under agents and their rivals, relative to equal weights.

The paper's Table 6(c); configs/benchmark/table6c.yaml says what is measured.
"""

from collections.abc import Mapping
from importlib.util import find_spec

from agents.sb3 import CONTRIB
from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import Contestant, comparable_configs
from experiments.benchmarks.memory import allocated_bytes
from experiments.benchmarks.timing import Percentiles, stopwatch_for, take_turns
from experiments.benchmarks.timing_report import REFERENCE, TimingReport
from experiments.config import CONFIGS, read_yaml

NOTHING = "–"

NOTES = (
    "epoch: all steps of the student, and all that the agent learns from them; no evaluation",
    "history: most tensors and arrays that an agent keeps to learn from; learners: its networks "
    "and optimisers; peak: of a CUDA device, with the student and the teachers",
    "paper: ShuffleNetV2 on CIFAR-100, one RTX 4090 (arXiv 2502.18510, Table 6c)",
)


TABLE = CONFIGS / "benchmark" / "table6c.yaml"


def default_methods() -> list[str]:
    """Those of configs/benchmark/table6c.yaml whose library is installed."""
    missing = () if find_spec("sb3_contrib") else CONTRIB
    return [name for name in read_yaml(TABLE, "--what")["methods"] if name not in missing]


def paper_ratios(quantity: str) -> dict[str, float]:
    """The published figures of some methods as ratios to those of the reference.

    Args:
        quantity: epoch (its time) or memory.
    """
    figures = read_yaml(TABLE, "--what")["paper"]
    reference = figures[REFERENCE][quantity]
    return {method: figure[quantity] / reference for method, figure in figures.items()}


def measure(request: Request) -> Outcome:
    """Times an epoch of every method, all with one ensemble of teachers.

    Raises:
        ConfigError: A method that does not exist, or has other teachers than the others.
    """
    configs = comparable_configs(request, request.methods or default_methods())
    assembly = request.build(configs[REFERENCE])
    device = assembly.env.device
    shared = allocated_bytes(device)
    contestants = {
        name: Contestant(assembly, configs[name])
        for name in request.count(list(configs), "warm-up epochs")
    }
    memory: dict[str, dict[str, float]] = {
        name: {"history": contestant.history(), "learners": contestant.learners()}
        for name, contestant in request.count(contestants.items(), "epochs watched for memory")
    }
    rounds = request.count(range(request.rounds), "rounds")
    readings = take_turns(contestants, stopwatch_for(device), rounds)
    if contestants[REFERENCE].peaks:
        peaks = {n: shared + Percentiles.of(one.peaks).median for n, one in contestants.items()}
        for name, peak in peaks.items():
            memory[name] |= {"peak": peak, "peak_ratio": peak / peaks[REFERENCE]}
    paper = {quantity: paper_ratios(quantity) for quantity in ("epoch", "memory")}
    return TimingReport(
        title=f"Cost of an epoch, as a ratio to {REFERENCE}",
        readings=readings,
        unit="epoch",
        assembly=assembly,
        config=configs[REFERENCE],
        notes=NOTES,
        extra=_columns(memory, paper),
        values={"memory": memory, "paper_ratios": paper},
    ).outcome()


def _columns(
    memory: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, str]]:
    """Columns of the table: heading, then text by method."""
    columns = {
        f"{kind}\nMB": {name: f"{sizes[kind] / 1e6:.2f}" for name, sizes in memory.items()}
        for kind in ("history", "learners")
    }
    if "peak_ratio" in memory[REFERENCE]:
        columns["peak\nratio"] = {n: f"{sizes['peak_ratio']:.3f}" for n, sizes in memory.items()}
    for quantity, ratios in paper.items():
        columns[f"paper\n{quantity}"] = {
            name: f"{ratios[name]:.2f}" if name in ratios else NOTHING for name in memory
        }
    return columns
