"""What a comparison came to: tables for people and for programs, and a picture."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from experiments.comparison.plan import Comparison, PlannedRun
from experiments.comparison.statistics import (
    Difference,
    Spread,
    paired_difference,
    spread,
    t_interval,
)
from experiments.console import console
from experiments.drawing import LENGTH, drawn, picture
from experiments.experiment import Result
from experiments.tables import csv_text, markdown_row
from mtkd_env.files import write_text

Finished = Sequence[tuple[PlannedRun, Result]]
NOTHING = "–"

# Characters of a line of a heading on the terminal.
HEADING_WIDTH = 8

NOTE = (
    "last: accuracy after the last epoch, the result; best: the highest, chosen on test. "
    "± is the standard deviation over seeds.\n"
    "Differences in points, paired by seed, with 95 % t intervals.\n"
    "agent score: 0 is equal weights, 1 all weight on each sample's best teacher. "
    "Scores and weights are those of the last epoch."
)


@dataclass(frozen=True)
class Summary:
    """What a method came to in a setting, over its finished seeds. Accuracies are fractions.

    Attributes:
        method: Label of the method.
        setting: Name of the setting.
        accuracies: Accuracy after the last epoch, by seed.
        accuracy: Their mean and standard deviation.
        interval: 95 % t interval of their mean; see `t_interval`.
        best: The same for the best epoch, chosen on the test images.
        difference: Paired difference to the baseline; none for itself and without it.
        score: Mean agent score.
        weights: Mean weight of every teacher.
        seconds: Mean seconds of a run.
        slowness: Seconds as a ratio to the baseline's with the same seeds.
        paper: The published accuracy in %.
    """

    method: str
    setting: str
    accuracies: Mapping[int, float]
    accuracy: Spread
    interval: tuple[float, float] | None
    best: Spread
    difference: Difference | None
    score: float
    weights: Mapping[str, float]
    seconds: float
    slowness: float | None
    paper: Spread | None


def summarize(comparison: Comparison, finished: Finished) -> list[Summary]:
    """A summary of every setting and method with a finished run, in the order of the file."""
    groups: dict[tuple[str, str], dict[int, Result]] = {}
    for run, result in finished:
        groups.setdefault((run.setting, run.method), {})[run.config.seed] = result
    order = [(setting, method) for setting in comparison.settings for method in comparison.methods]
    return [_summary(comparison, groups, key) for key in order if key in groups]


def _summary(
    comparison: Comparison,
    groups: Mapping[tuple[str, str], Mapping[int, Result]],
    key: tuple[str, str],
) -> Summary:
    setting, method = key
    results = groups[key]
    baseline = groups.get((setting, comparison.baseline or ""), {})
    accuracies = _by_seed(results, lambda result: result.last)
    other = _by_seed(baseline, lambda result: result.last)
    return Summary(
        method=method,
        setting=setting,
        accuracies=accuracies,
        accuracy=spread(list(accuracies.values())),
        interval=t_interval(list(accuracies.values())),
        best=spread([result.best for result in results.values()]),
        difference=None if method == comparison.baseline else paired_difference(accuracies, other),
        score=_mean(results, lambda result: result.score),
        weights=_mean_weights(list(results.values())),
        seconds=_mean(results, lambda result: result.seconds),
        slowness=_slowness(results, baseline),
        paper=comparison.paper.get((method, setting)),
    )


def _by_seed(results: Mapping[int, Result], value: Callable[[Result], float]) -> dict[int, float]:
    return {seed: value(results[seed]) for seed in sorted(results)}


def _mean(results: Mapping[int, Result], value: Callable[[Result], float]) -> float:
    return spread(list(_by_seed(results, value).values())).mean


def _mean_weights(results: Sequence[Result]) -> dict[str, float]:
    return {
        name: spread([result.weights[name] for result in results]).mean
        for name in results[0].weights
    }


def _slowness(results: Mapping[int, Result], baseline: Mapping[int, Result]) -> float | None:
    common = results.keys() & baseline.keys()
    if not common:
        return None
    own, other = (sum(group[seed].seconds for seed in common) for group in (results, baseline))
    return own / other if other > 0 else None


# Texts.


def _percent(value: Spread, scale: float = 100) -> str:
    std = "" if value.std is None else f" ± {scale * value.std:.2f}"
    return f"{scale * value.mean:.2f}{std}"


def _difference(summary: Summary) -> str:
    found = summary.difference
    if found is None:
        return NOTHING
    if found.interval is None:
        return f"{100 * found.mean:+.2f}"
    low, high = found.interval
    return f"{100 * found.mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


@dataclass(frozen=True)
class _Column:
    """A column of the tables.

    Attributes:
        heading: Its heading.
        text: Its text for a method.
        room: How much it matters where there is little room: the largest go first, 0 stays.
    """

    heading: str
    text: Callable[[Summary], str]
    room: int = 0


def _columns(comparison: Comparison, teachers: Sequence[str]) -> list[_Column]:
    """Every column but the first, the method's."""
    baseline = comparison.baseline
    columns = [
        _Column("n", lambda s: str(len(s.accuracies))),
        _Column("test last [%]", lambda s: _percent(s.accuracy)),
        _Column("test best [%]", lambda s: _percent(s.best)),
    ]
    if baseline is not None:
        columns.append(_Column(f"− {baseline}", _difference))
    columns.append(_Column("agent score", lambda s: f"{s.score:z.3f}", room=1))
    columns += [_Column(f"weight {name}", _weight(name), room=3) for name in teachers]
    if baseline is None:
        columns.append(_Column("seconds", lambda s: f"{s.seconds:.1f}", room=2))
    else:
        columns.append(_Column(f"seconds / {baseline}", lambda s: _ratio(s.slowness), room=2))
    if comparison.paper:
        columns.append(_Column(comparison.paper_title, lambda s: _paper(s.paper)))
    return columns


def _paper(figure: Spread | None) -> str:
    return NOTHING if figure is None else _percent(figure, 1)


def _weight(teacher: str) -> Callable[[Summary], str]:
    return lambda s: f"{s.weights[teacher]:.3f}" if teacher in s.weights else NOTHING


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _teachers(summaries: Sequence[Summary]) -> list[str]:
    """All teachers' names, each once."""
    return list(dict.fromkeys(name for summary in summaries for name in summary.weights))


def _by_setting(comparison: Comparison, summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    groups = {
        setting: [summary for summary in summaries if summary.setting == setting]
        for setting in comparison.settings
    }
    return {setting: group for setting, group in groups.items() if group}


def _heading(comparison: Comparison, setting: str) -> str:
    return f"{comparison.title}: {setting}" if setting else comparison.title


# For people.


def comparison_table(comparison: Comparison, summaries: Sequence[Summary], width: int) -> Table:
    """The table of one setting; what matters least is left out where the width does not do."""
    columns = _columns(comparison, _teachers(summaries))
    title = _heading(comparison, summaries[0].setting)
    for room in sorted({column.room for column in columns}, reverse=True):
        columns = [column for column in columns if column.room <= room]
        table = _table(title, columns, summaries)
        if _width(table) <= width:
            break
    return table


def _table(title: str, columns: Sequence[_Column], summaries: Sequence[Summary]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for column in columns:
        lines = textwrap.wrap(column.heading, HEADING_WIDTH, break_long_words=False)
        table.add_column("\n".join(lines), justify="right")
    for summary in summaries:
        table.add_row(summary.method, *(column.text(summary) for column in columns))
    return table


def _width(table: Table) -> int:
    """Characters that a table needs to stand unbroken."""
    return Measurement.get(wide := console(width=1000), wide.options, table).maximum


def print_comparison(
    out: Console, comparison: Comparison, finished: Finished, folder: Path
) -> None:
    """The table of every setting."""
    for group in _by_setting(comparison, summarize(comparison, finished)).values():
        out.print(comparison_table(comparison, group, out.width))
    out.print(NOTE)
    out.print(f"kept in {folder}", soft_wrap=True)


def markdown(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """The tables of all settings in Markdown."""
    parts = [f"# {comparison.title}\n"]
    for setting, group in _by_setting(comparison, summaries).items():
        columns = _columns(comparison, _teachers(group))
        rows = [["method", *(column.heading for column in columns)]]
        rows.append(["---", *("---:" for _ in columns)])
        rows += [[summary.method, *(c.text(summary) for c in columns)] for summary in group]
        heading = f"## {setting}\n\n" if setting else ""
        parts.append(heading + "".join(map(markdown_row, rows)))
    parts.append(NOTE + "\n")
    return "\n".join(parts)


# For programs.


def summary_rows(summaries: Sequence[Summary]) -> list[dict[str, object]]:
    """One row for every method and setting; accuracies as fractions, the paper's in %."""
    teachers = _teachers(summaries)
    return [_summary_row(summary, teachers) for summary in summaries]


def _summary_row(summary: Summary, teachers: Sequence[str]) -> dict[str, object]:
    difference, paper = summary.difference, summary.paper
    low, high = (difference and difference.interval) or (None, None)
    return {
        "setting": summary.setting,
        "method": summary.method,
        "n": len(summary.accuracies),
        "accuracy_mean": summary.accuracy.mean,
        "accuracy_std": summary.accuracy.std,
        "best_accuracy_mean": summary.best.mean,
        "best_accuracy_std": summary.best.std,
        "difference_n": difference and difference.n,
        "difference_mean": difference and difference.mean,
        "difference_low": low,
        "difference_high": high,
        "score": summary.score,
        "seconds": summary.seconds,
        "seconds_ratio": summary.slowness,
        "paper_mean": paper and paper.mean,
        "paper_std": paper and paper.std,
        **{f"weight_{name}": summary.weights.get(name) for name in teachers},
    }


def run_rows(finished: Finished) -> list[dict[str, object]]:
    """One row for every run."""
    teachers = dict.fromkeys(name for _, result in finished for name in result.weights)
    return [
        {
            "setting": run.setting,
            "method": run.method,
            "seed": run.config.seed,
            "accuracy": result.last,
            "best_accuracy": result.best,
            "best_epoch": result.best_epoch,
            "epochs": result.epochs,
            "score": result.score,
            "score_logit": result.score_logit,
            "score_feature": result.score_feature,
            "seconds": result.seconds,
            **{f"weight_{name}": result.weights.get(name) for name in teachers},
            "folder": result.folder,
        }
        for run, result in finished
    ]


def write_comparison(comparison: Comparison, finished: Finished, folder: Path) -> None:
    """Writes `comparison.csv`, `runs.csv`, `comparison.md` and `comparison.png`."""
    summaries = summarize(comparison, finished)
    write_text(folder / "comparison.csv", csv_text(summary_rows(summaries)))
    write_text(folder / "runs.csv", csv_text(run_rows(finished)))
    write_text(folder / "comparison.md", markdown(comparison, summaries))
    draw_comparison(comparison, summaries, folder / "comparison.png")


# The picture.


def draw_comparison(comparison: Comparison, summaries: Sequence[Summary], path: Path) -> None:
    """Draws a panel for every setting: every seed, the mean with its interval, the baseline."""
    groups = _by_setting(comparison, summaries)
    methods = [m for m in comparison.methods if any(s.method == m for s in summaries)]
    size = (3 + 4 * len(groups), 1.6 + 0.32 * len(methods))
    with picture(path, size) as figure:
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, (setting, group) in zip(panels, groups.items(), strict=True):
            _draw_setting(axes, group, methods, comparison.baseline)
            axes.set(title=drawn(setting), xlabel="test accuracy, last epoch [%]")
        panels[0].set_yticks(range(len(methods)), [drawn(method) for method in methods])
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        title = drawn(comparison.title, 2 * LENGTH)
        figure.suptitle(f"{title}: seeds, mean and 95 % t interval")


def _draw_setting(
    axes: Axes, group: Sequence[Summary], methods: Sequence[str], baseline: str | None
) -> None:
    for summary in group:
        row = methods.index(summary.method)
        values = [100 * value for value in summary.accuracies.values()]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.35, markersize=5)
        if summary.interval is not None:
            low, high = summary.interval
            axes.plot([100 * low, 100 * high], [row, row], color="black", linewidth=1.5)
        axes.plot(100 * summary.accuracy.mean, row, "D", color="black", markersize=5)
        if summary.method == baseline:
            axes.axvline(100 * summary.accuracy.mean, color="grey", linestyle=":", zorder=1)
    axes.grid(alpha=0.3)
