"""What a comparison came to: tables for people and for programs, and a picture."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from experiments.comparison.normalised import NOTE as SCORE_NOTE
from experiments.comparison.normalised import score_lines
from experiments.comparison.plan import Comparison
from experiments.comparison.statistics import Seeds
from experiments.comparison.summary import (
    NOTHING,
    POOLS,
    Summary,
    difference_text,
    interval_text,
    p_text,
    summarize,
    text_of,
)
from experiments.console import console, plain_table
from experiments.drawing import LENGTH, drawn, picture
from experiments.running.result import RESULT, RunResult, read_result
from experiments.tables import csv_text, markdown_table
from mtkd_env.files import write_text

Finished = Sequence[RunResult]

# Heading of the scores.
OVERALL = "Over all settings"

# Characters of a line of a heading on the terminal.
HEADING_WIDTH = 8

NOTE = (
    "last: after the last epoch, the result; best: the highest, chosen on the same images, or "
    "after the epoch that validation images chose, if there are any. "
    "± is the standard deviation over the n {}.\n"
    "Differences in points, paired by {}; intervals are 95 % t intervals. Bold: other than zero "
    "by Holm's correction (p < 0.05) over all differences of these tables; red in the picture."
)
SCORES = (
    "agent score: 0 is equal weights, 1 all weight on each sample's best teacher. "
    "Scores and weights are those of the last epoch."
)


def _note(summaries: Sequence[Summary]) -> str:
    """What the columns of the tables mean."""
    varying = summaries[0].varying
    paired = "pool and seed, each pool the mean of its seeds" if varying == POOLS else "seed"
    note = NOTE.format(varying, paired)
    return f"{note}\n{SCORES}" if any(summary.score for summary in summaries) else note


def find_finished(comparison: Comparison, output: Path) -> Finished:
    """The finished runs that were asked for, and those of the file's other methods and settings.

    The latter are found by what their results say of them, as they may have been asked for
    with other flags.
    """
    asked = [result for run in comparison.runs if (result := run.result) is not None]
    found = {(result.method, result.setting, result.seeds): result for result in asked}
    pairs = {(run.method, run.setting) for run in comparison.runs}
    for path in sorted(
        (output / "runs").glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime
    ):
        result = read_result(comparison.kind.result_type, path.parent)
        if result is not None and (result.method, result.setting) not in pairs:
            found[result.method, result.setting, result.seeds] = result
    return list(found.values())


def summaries_of(comparison: Comparison, finished: Finished) -> list[Summary]:
    """A summary of every setting and method with a finished run, in the order of the file."""
    groups: dict[tuple[str, str], dict[Seeds, RunResult]] = {}
    for result in finished:
        groups.setdefault((result.method, result.setting), {})[result.seeds] = result
    order = [(method, setting) for setting in comparison.settings for method in comparison.methods]
    baselines = dict.fromkeys(comparison.settings, comparison.baseline or "")
    ordered = {pair: groups[pair] for pair in order if pair in groups}
    return list(summarize(ordered, baselines, comparison.paper).values())


@dataclass(frozen=True)
class _Column:
    """A column of the tables.

    Attributes:
        heading: Its heading.
        text: Its text for a method.
        room: How much it matters where there is little room: the largest go first, 0 stays.
        bold: Whether what is certain is bold.
    """

    heading: str
    text: Callable[[Summary], str]
    room: int = 0
    bold: bool = False


def _columns(comparison: Comparison, summaries: Sequence[Summary]) -> list[_Column]:
    """Every column but the first, the method's."""
    baseline, metric = comparison.baseline, summaries[0].metric
    columns = [
        _Column(f"n {summaries[0].varying}", lambda s: str(len(s.values))),
        _Column(f"{metric} last [%]", lambda s: text_of(s.last, scale=100)),
        _Column("95 % interval", lambda s: interval_text(s.interval) or NOTHING, room=2),
        _Column(f"{metric} best [%]", lambda s: text_of(s.best, scale=100)),
    ]
    if baseline is not None:
        columns += [
            _Column(f"− {baseline}", difference_text, bold=True),
            _Column("p (Holm)", lambda s: p_text(s.adjusted_p), room=2),
        ]
    if any(summary.score for summary in summaries):
        columns.append(
            _Column(
                "agent score", lambda s: _number(s.score.mean if s.score else None, "z.3f"), room=1
            )
        )
    teachers = dict.fromkeys(name for summary in summaries for name in summary.weights)
    columns += [_Column(f"weight {name}", _weight(name), room=3) for name in teachers]
    if baseline is None:
        columns.append(_Column("seconds", lambda s: f"{s.seconds.mean:.1f}", room=2))
    else:
        heading = f"seconds / {baseline}"
        columns.append(_Column(heading, lambda s: _number(s.slowness, ".2f"), room=2))
    if comparison.paper:
        columns.append(
            _Column(comparison.paper_title, lambda s: text_of(s.paper) if s.paper else NOTHING)
        )
    return columns


def _weight(teacher: str) -> Callable[[Summary], str]:
    return lambda s: _number(s.weights.get(teacher), ".3f")


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _by_setting(comparison: Comparison, summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    groups = {
        setting: [summary for summary in summaries if summary.setting == setting]
        for setting in comparison.settings
    }
    return {setting: group for setting, group in groups.items() if group}


# For people.


def comparison_table(comparison: Comparison, summaries: Sequence[Summary], width: int) -> Table:
    """The table of one setting; what matters least is left out where the width does not do."""
    columns = _columns(comparison, summaries)
    title = ": ".join(filter(None, (comparison.title, summaries[0].setting)))
    unbroken = console(width=1000)
    for room in sorted({column.room for column in columns}, reverse=True):
        columns = [column for column in columns if column.room <= room]
        table = _table(title, columns, summaries)
        if Measurement.get(unbroken, unbroken.options, table).maximum <= width:
            break
    return table


def _table(title: str, columns: Sequence[_Column], summaries: Sequence[Summary]) -> Table:
    lines = (textwrap.wrap(c.heading, HEADING_WIDTH, break_long_words=False) for c in columns)
    table = plain_table(title, ["method"], ["\n".join(each) for each in lines])
    for summary in summaries:
        style = "bold" if summary.is_certain else ""
        cells = [Text(c.text(summary), style if c.bold else "") for c in columns]
        table.add_row(summary.method, *cells)
    return table


def print_comparison(
    out: Console, comparison: Comparison, finished: Finished, folder: Path
) -> None:
    """The table of every setting."""
    summaries = summaries_of(comparison, finished)
    for group in _by_setting(comparison, summaries).values():
        out.print(comparison_table(comparison, group, out.width))
    out.print(_note(summaries))
    if scores := score_lines(comparison, summaries):
        table = plain_table(OVERALL, scores[0][:1], scores[0][1:])
        for row in scores[1:]:
            table.add_row(*row)
        out.print(table)
        out.print(_score_note(comparison))
    out.print(f"kept in {folder}", soft_wrap=True)


def markdown(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """The tables of all settings in Markdown, and the scores over all of them."""
    parts = [f"# {comparison.title}\n"]
    for setting, group in _by_setting(comparison, summaries).items():
        columns = _columns(comparison, group)
        rows = [["method", *(column.heading for column in columns)]]
        for summary in group:
            form = "**{}**" if summary.is_certain else "{}"
            cells = ((form if c.bold else "{}").format(c.text(summary)) for c in columns)
            rows.append([summary.method, *cells])
        heading = f"## {setting}\n\n" if setting else ""
        parts.append(heading + markdown_table(rows))
    parts.append(_note(summaries) + "\n")
    if scores := score_lines(comparison, summaries):
        parts += [f"## {OVERALL}\n\n{markdown_table(scores)}", _score_note(comparison) + "\n"]
    return "\n".join(parts)


def _score_note(comparison: Comparison) -> str:
    return SCORE_NOTE.format(baseline=comparison.baseline, ceiling=comparison.ceiling)


# For programs.


def summary_row(summary: Summary) -> dict[str, object]:
    """A row of `comparison.csv`; the metric as fractions, the paper's in %."""
    difference, paper = summary.difference, summary.paper
    low, high = (difference and difference.interval) or (None, None)
    interval = summary.interval or (None, None)
    return {
        "setting": summary.setting,
        "method": summary.method,
        "n": len(summary.values),
        "varying": summary.varying,
        "metric": summary.metric,
        "last_mean": summary.last.mean,
        "last_std": summary.last.std,
        "last_low": interval[0],
        "last_high": interval[1],
        "best_mean": summary.best.mean,
        "best_std": summary.best.std,
        "baseline": summary.baseline,
        "difference_n": difference and len(difference.values),
        "difference_mean": difference and difference.mean,
        "difference_low": low,
        "difference_high": high,
        "difference_p": difference and difference.p,
        "difference_p_adjusted": summary.adjusted_p,
        "score": summary.score and summary.score.mean,
        "seconds": summary.seconds.mean,
        "seconds_ratio": summary.slowness,
        "paper_mean": paper and paper.mean,
        "paper_std": paper and paper.std,
        **{f"weight_{name}": weight for name, weight in summary.weights.items()},
    }


def run_row(result: RunResult) -> dict[str, object]:
    """A row of `runs.csv`: all numbers of a result, by their names."""
    values = asdict(result)
    known = {"setting": values["setting"], "method": values["method"]}
    known |= {k: v for k, v in values.items() if not isinstance(v, dict)}
    known |= {f"weight_{name}": weight for name, weight in values.get("weights", {}).items()}
    return known | values.get("metrics", {})


def write_comparison(comparison: Comparison, finished: Finished, folder: Path) -> None:
    """Writes `comparison.csv`, `runs.csv`, `comparison.md` and `comparison.png`."""
    summaries = summaries_of(comparison, finished)
    write_text(folder / "comparison.csv", csv_text([*map(summary_row, summaries)]))
    write_text(folder / "runs.csv", csv_text([*map(run_row, finished)]))
    write_text(folder / "comparison.md", markdown(comparison, summaries))
    draw_comparison(comparison, summaries, folder / "comparison.png")


# The picture.


def draw_comparison(comparison: Comparison, summaries: Sequence[Summary], path: Path) -> None:
    """Draws two panels for every setting: pools or seeds with their means; differences below."""
    groups = _by_setting(comparison, summaries)
    methods = [m for m in comparison.methods if any(s.method == m for s in summaries)]
    rows = 2 if any(summary.difference for summary in summaries) else 1
    size = (3 + 4 * len(groups), 0.8 + rows * (0.8 + 0.32 * len(methods)))
    with picture(path, size) as figure:
        panels = figure.subplots(rows, len(groups), sharey=True, squeeze=False)
        for axes, (setting, group) in zip(panels.T, groups.items(), strict=True):
            _draw_means(axes[0], group, methods)
            axes[0].set(title=drawn(setting), xlabel=f"{group[0].metric}, last epoch [%]")
            if rows == 2:
                _draw_differences(axes[1], group, methods)
                axes[1].set(xlabel=f"− {drawn(comparison.baseline or '')} [points]")
        panels[0, 0].set_yticks(range(len(methods)), [drawn(method) for method in methods])
        panels[0, 0].set_ylim(len(methods) - 0.5, -0.5)
        title = drawn(comparison.title, 2 * LENGTH)
        figure.suptitle(f"{title}: {summaries[0].varying}, mean and 95 % t interval")


def _draw_means(axes: Axes, group: Sequence[Summary], methods: Sequence[str]) -> None:
    for summary in group:
        row = methods.index(summary.method)
        values = [100 * value for value in summary.values]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.35, markersize=5)
        _draw_interval(axes, row, summary.last.mean, summary.interval)
        if summary.method == summary.baseline:
            axes.axvline(100 * summary.last.mean, color="grey", linestyle=":", zorder=1)
    axes.grid(alpha=0.3)


def _draw_differences(axes: Axes, group: Sequence[Summary], methods: Sequence[str]) -> None:
    """The differences to the baseline; what Holm's correction leaves in colour."""
    for summary in group:
        if (found := summary.difference) is not None:
            colour = "tab:red" if summary.is_certain else "black"
            row = methods.index(summary.method)
            _draw_interval(axes, row, found.mean, found.interval, colour)
    axes.axvline(0, color="grey", linestyle=":", zorder=1)
    axes.grid(alpha=0.3)


def _draw_interval(
    axes: Axes,
    row: int,
    mean: float,
    interval: tuple[float, float] | None,
    colour: str = "black",
) -> None:
    if interval is not None:
        axes.plot([100 * end for end in interval], [row, row], color=colour, linewidth=1.5)
    axes.plot(100 * mean, row, "D", color=colour, markersize=5)
