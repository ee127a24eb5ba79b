r"""Compares backbones in detectors or segmenters, as a YAML file describes it.

python experiments/transfer/compare.py table4 --data COCO --settings '*_resnet18' \
    --weights baseline:resnet18=EXPORT1 --weights mtkd_rl:resnet18=EXPORT2
torchrun --nproc-per-node 8 experiments/transfer/compare.py table5 --data CITYSCAPES ...

Runs that are finished are not run again: the same command goes on where it was interrupted. The
table shows every finished run of the file in the output folder, not only those just asked for.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.comparison.statistics import paired_difference, spread
from experiments.config import read_yaml
from experiments.console import console
from experiments.running.device import together
from experiments.running.failures import Parser, run_program
from experiments.running.result import read_result
from experiments.tables import csv_text, markdown_row
from experiments.transfer import detection, segmentation
from experiments.transfer.detection import DetectionConfig
from experiments.transfer.program import RECIPES, TaskResult, TransferConfig, parse
from experiments.transfer.segmentation import SegmentationConfig
from mtkd_env import distributed
from mtkd_env.errors import ConfigError, check_arguments, check_name
from mtkd_env.files import name_in_path, path_or_name, user_path, write_text

TABLES = RECIPES / "tables"

# What a task's runs are described by, and what does them.
TASKS: dict[str, tuple[type[TransferConfig], Callable[..., TaskResult]]] = {
    "detection": (DetectionConfig, detection.run),
    "segmentation": (SegmentationConfig, segmentation.run),
}

# A backbone that begins at random, in place of a file.
RANDOM = "random"

NOTHING = "–"

# Columns of the table that hold no numbers.
TEXTS = ("setting", "metric")

NOTE = (
    "The main metric at the end of the training in %, ± its standard deviation over seeds. Gains: "
    "in points over the baseline, paired by seed."
)


@dataclass(frozen=True)
class Comparison:
    """Backbones from several places, in several settings.

    Attributes:
        title: Its title.
        task: detection or segmentation.
        baseline: Name of the backbones that the others are compared with.
        settings: Keys and values of each setting's configuration, by its name.
        weights: Files of the backbones: by name, from the ResNet to the export.
        base: Keys and values of all configurations; like those of a setting, with a recipe.
        seeds: Seeds.
        paper: Published figures [%] by setting and name, where they are known.

    Raises:
        ConfigError: A value that cannot be used; names it.
    """

    title: str
    task: str
    baseline: str
    settings: dict[str, dict[str, Any]]
    weights: dict[str, dict[str, str]]
    base: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(TASKS, self.task, "task")
        for key in ("settings", "weights", "paper"):
            for name, values in _checked(key, getattr(self, key)).items():
                _checked(f"{key}.{name}", values)
                if name_in_path(name) != name:
                    raise ConfigError(f"{key}: expected names of letters and digits, got '{name}'")
        _checked("base", self.base)
        if not self.seeds or not all(isinstance(seed, int) for seed in self.seeds):
            raise ConfigError(f"seeds: expected a list of whole numbers, got {self.seeds}")
        check_name(self.weights, self.baseline, "baseline")
        for setting, figures in self.paper.items():
            check_name(self.settings, setting, "setting of paper")
            for name in figures:
                check_name(self.weights, name, f"backbone of paper.{setting}")


def _checked(key: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: expected keys and values, got {values!r}")
    return values


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        setting: Name of its setting.
        weights: Name of its backbone.
        seed: Its seed.
        folder: Its folder.
    """

    setting: str
    weights: str
    seed: int
    folder: Path


def load_comparison(file: str, given: Sequence[str] = ()) -> Comparison:
    """A comparison from its file.

    Args:
        file: A YAML file, or the name of one in configs/transfer/tables.
        given: Further files of backbones, as `NAME:RESNET=PATH`.

    Raises:
        ConfigError: No such file, an unknown key, or a value that cannot be used.
    """
    path = path_or_name(file)
    if path is None:
        shipped = {path.stem: path for path in TABLES.glob("*.yaml")}
        check_name(shipped, file, "comparison")
        path = shipped[file]
    values = read_yaml(path, "comparison")
    check_arguments(Comparison, values, str(path))
    for text in given:
        _add(values, text)
    try:
        return Comparison(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).partition(' ')[2]}") from None


def _add(values: dict[str, Any], text: str) -> None:
    """Adds the file of a backbone to those of a comparison."""
    where, equals, path = text.partition("=")
    name, colon, resnet = where.partition(":")
    if not (equals and colon):
        raise ConfigError(f"--weights: expected NAME:RESNET=PATH, got '{text}'")
    known = _checked("weights", values.setdefault("weights", {}))
    values["weights"] = known | {name: _checked(name, known.get(name, {})) | {resnet: path}}


def planned(comparison: Comparison, output: Path, settings: Sequence[str]) -> list[Run]:
    """All runs of a comparison's settings whose names fit one of some patterns.

    Raises:
        ConfigError: A pattern that no setting's name fits.
    """
    for pattern in settings:
        if not any(fnmatch(setting, pattern) for setting in comparison.settings):
            known = ", ".join(comparison.settings)
            raise ConfigError(f"--settings: nothing fits '{pattern}' (known: {known})")
    return [
        Run(setting, name, seed, output / setting / name / f"seed{seed}")
        for setting in comparison.settings
        if any(fnmatch(setting, pattern) for pattern in settings)
        for name in comparison.weights
        for seed in comparison.seeds
    ]


def configuration(comparison: Comparison, run: Run, flags: Sequence[str]) -> TransferConfig:
    """The configuration of a run.

    Args:
        comparison: What it is a part of.
        run: The run.
        flags: Flags of all runs.

    Raises:
        ConfigError: Anything that cannot be used, or a backbone whose file nobody has named.
    """
    values = {**comparison.base, **comparison.settings[run.setting]}
    kind, _ = TASKS[comparison.task]
    own = [*_flags(values), *flags, f"--seed={run.seed}", f"--output={run.folder}"]
    config, _ = parse(kind, own, "compare.py")
    path = comparison.weights[run.weights].get(config.backbone)
    if path is None:
        raise ConfigError(
            f"weights: expected a file for {run.weights} and {config.backbone}, which "
            f"{run.setting} begins with: --weights {run.weights}:{config.backbone}=PATH, or "
            f"{RANDOM} in its place"
        )
    return replace(config, weights=None if path == RANDOM else path)


def _flags(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested keys and values as flags."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        else:
            yield f"--{prefix}{key}={json.dumps(value) if isinstance(value, list) else value}"


def finished_runs(comparison: Comparison, output: Path) -> dict[Run, dict[str, float]]:
    """The metrics of all finished runs in a comparison's folder, in the order of its file."""
    found = {r: read_result(TaskResult, r.folder) for r in planned(comparison, output, ["*"])}
    return {run: result.metrics for run, result in found.items() if result is not None}


def table(
    comparison: Comparison, finished: Mapping[Run, Mapping[str, float]]
) -> list[dict[str, str]]:
    """A row of texts for every setting with a finished run: what it came to, and the paper.

    Figures are those of the main metric at the end [%], as mean ± standard deviation over seeds;
    differences to the baseline are paired by seed.
    """
    return [
        _row(comparison, finished, setting)
        for setting in comparison.settings
        if any(run.setting == setting for run in finished)
    ]


def _row(
    comparison: Comparison, finished: Mapping[Run, Mapping[str, float]], setting: str
) -> dict[str, str]:
    values = {
        name: {
            run.seed: 100 * next(iter(metrics.values()))
            for run, metrics in finished.items()
            if (run.setting, run.weights) == (setting, name)
        }
        for name in comparison.weights
    }
    published = comparison.paper.get(setting, {})
    metric = next(next(iter(m)) for run, m in finished.items() if run.setting == setting)
    row = {"setting": setting, "metric": metric}
    row |= {name: _spread(list(values[name].values())) for name in values}
    others = [name for name in values if name != comparison.baseline]
    row |= {f"{name} gains": _gain(values[name], values[comparison.baseline]) for name in others}
    for name in comparison.weights:
        # A column without any figure would only widen the table.
        if any(name in figures for figures in comparison.paper.values()):
            row[f"paper {name}"] = f"{published[name]:.1f}" if name in published else NOTHING
    return row


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    found = spread(values)
    return f"{found.mean:.2f}" + ("" if found.std is None else f" ± {found.std:.2f}")


def _gain(values: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    difference = paired_difference(values, baseline)
    return NOTHING if difference is None else f"{difference.mean:+.2f}"


def markdown(comparison: Comparison, rows: Sequence[Mapping[str, str]]) -> str:
    """The table, with its title."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = "".join(map(markdown_row, lines))
    return f"# {comparison.title}\n\n{table}\n{NOTE}\n"


def run_rows(finished: Mapping[Run, Mapping[str, float]]) -> str:
    """All metrics of every finished run, as CSV."""
    return csv_text([{**asdict(run), **metrics} for run, metrics in finished.items()])


def report(comparison: Comparison, output: Path, out: Console) -> None:
    """Prints the table of the finished runs and writes `comparison.md` and `comparison.csv`."""
    finished = finished_runs(comparison, output)
    if not finished:
        return
    rows = table(comparison, finished)
    shown = Table(title=comparison.title, title_justify="left", box=SIMPLE_HEAD)
    for heading in rows[0]:
        shown.add_column(heading, justify="left" if heading in TEXTS else "right")
    for row in rows:
        shown.add_row(*row.values())
    out.print(shown)
    out.print(NOTE)
    write_text(output / "comparison.md", markdown(comparison, rows))
    write_text(output / "comparison.csv", run_rows(finished))


def _parser() -> Parser:
    parser = Parser(
        prog="compare.py",
        description=__doc__,
        epilog="Every other flag is one of detection.py or segmentation.py, for all runs: --data "
        "ROOT --schedule.epochs 12 ...; ",
    )
    parser.add_argument("file", help="YAML file, or the name of one in configs/transfer/tables")
    parser.add_argument("--output", help="folder (default: runs/NAME OF THE FILE)")
    parser.add_argument(
        "--settings", help="only these of the file's, with * for anything: 'mask_rcnn_*,retina*'"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME:RESNET=PATH",
        help=f"an export, or {RANDOM}; may be given several times",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    return run_program(_run, argv, "the same command goes on with the comparison")


def _run(argv: Sequence[str]) -> int:
    arguments, flags = _parser().parse_known_args(argv)
    comparison = load_comparison(arguments.file, arguments.weights)
    output = user_path(arguments.output or Path("runs") / Path(arguments.file).stem)
    settings = arguments.settings.split(",") if arguments.settings else ["*"]
    runs = planned(comparison, output, settings)
    _, run_one = TASKS[comparison.task]
    # All of them before the first, which takes hours.
    configurations = [configuration(comparison, run, flags) for run in runs]
    with together(configurations[0].device):
        out = console(quiet=distributed.rank() != 0)
        for number, (run, config) in enumerate(zip(runs, configurations, strict=True), 1):
            out.print(f"{number}/{len(runs)} {run.setting}, {run.weights}, seed {run.seed}")
            run_one(config, run.folder, resume=True)
        if distributed.rank() == 0:
            report(comparison, output, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
