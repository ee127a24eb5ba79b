"""What every method came to, with how sure that is; and its cost."""

from collections.abc import Sequence
from itertools import chain, islice

from matplotlib.figure import Figure

from experiments.comparison.statistics import paired_difference
from experiments.comparison.summary import POOLS, Results, Summary, adjust, summarize, varying_of
from experiments.html_report.naming import Setting
from experiments.html_report.style import PLOT_WIDTH, Palette, label_ends, plot_height


def summarize_settings(settings: Sequence[Setting]) -> list[list[Summary]]:
    """A summary of every method of every setting."""
    varying = varying_of(run.result for s in settings for group in s.groups for run in group.runs)
    summaries = [_summarize(setting, varying) for setting in settings]
    adjusted = iter(adjust(list(chain.from_iterable(summaries))))
    return [list(islice(adjusted, len(found))) for found in summaries]


def _summarize(setting: Setting, varying: str) -> list[Summary]:
    other = {} if setting.baseline is None else setting.baseline.results
    return [
        summarize((group.method, setting.name), group.results, other, varying)
        for group in setting.groups
    ]


# The outcome in words.


def outcome(setting: Setting, summaries: Sequence[Summary]) -> str:
    """Which method is ahead of which by how much, and whether that may be chance.

    Methods with fewer pools or seeds than others are not in it.
    """
    most = max(len(summary.values) for summary in summaries)
    ranked = [s for s in summaries if len(s.values) == most]
    ranked.sort(key=lambda summary: -summary.last.mean)
    best, baseline = ranked[0], setting.baseline and setting.baseline.method
    against = [s for s in ranked[1:] if s.method == baseline or s is ranked[1]]
    results = {group.method: group.results for group in setting.groups}
    ahead = [
        _margin(results[best.method], results[other.method], other.method, best.varying)
        for other in sorted(against, key=lambda other: other.last.mean)
    ]
    number = f"n = {most} {best.varying if most > 1 else best.varying.removesuffix('s')}"
    reached = f"{best.method} reaches {100 * best.last.mean:.2f} % {best.metric}"
    return f"{reached}{': ' if ahead else ''}{' and '.join(ahead)}, {number}."


def _margin(own: Results, other: Results, method: str, varying: str) -> str:
    """A paired difference in points, with what it is worth."""
    values = [{seeds: each.last for seeds, each in results.items()} for results in (own, other)]
    found = paired_difference(*values, by_pool=varying == POOLS)
    if found is None:
        return f"not measured with any seed of {method}"
    ahead = f"{100 * found.mean:z.2f} points ahead of {method}"
    if found.interval is None:
        return f"{ahead} (no interval)"
    low, high = found.interval
    chance = "" if low > 0 else ": may be chance"
    return f"{ahead} (95 % interval {100 * low:z.2f} to {100 * high:z.2f}{chance})"


# The picture.


def draw_cost(summaries: Sequence[Summary], palette: Palette) -> Figure:
    """Result against seconds; bars are standard deviations over pools or seeds."""
    figure = Figure(figsize=(PLOT_WIDTH, plot_height(len(summaries))), layout="constrained")
    axes = figure.subplots()
    for summary in summaries:
        reached, seconds = summary.last, summary.seconds
        axes.errorbar(
            seconds.mean,
            100 * reached.mean,
            xerr=seconds.std,
            yerr=None if reached.std is None else 100 * reached.std,
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            color=palette.methods[summary.method],
        )
    axes.set(xlabel="seconds of the training", ylabel=f"{summaries[0].metric} [%]")
    axes.margins(0.05, 0.08)
    ends = [(s.seconds.mean, 100 * s.last.mean, s.method) for s in summaries]
    label_ends(axes, ends, palette)
    return figure
