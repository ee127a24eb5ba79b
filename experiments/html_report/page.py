"""The page as a whole: its heading, its sections, and what was left out of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import mtkd_env
from experiments.comparison.statistics import paired_difference
from experiments.comparison.summary import (
    NOTHING,
    POOLS,
    Results,
    difference_text,
    interval_text,
    p_text,
    text_of,
)
from experiments.drawing import literal_text
from experiments.html_report.naming import Grouping, Setting, group_runs
from experiments.html_report.runs import Found
from experiments.html_report.sections import make_sections
from experiments.html_report.style import SETTINGS, make_palette
from experiments.html_report.table import number

TEMPLATES = Path(__file__).parent / "templates"


def render(found: Found, title: str) -> str:
    """The whole page as text, under a heading."""
    grouping = group_runs(found.runs)
    palette = make_palette(grouping.methods, grouping.teachers)
    with literal_text(SETTINGS):
        sections = make_sections(grouping.settings, palette)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "spread": text_of,
        "interval": interval_text,
        "difference": difference_text,
        "p": p_text,
        "number": number,
    }
    return environment.get_template("page.html").render(
        title=title,
        outcomes=[(setting, outcome(setting)) for setting in grouping.settings],
        facts=facts(grouping),
        notes=notes(found, grouping),
        sections=sections,
        palette=palette,
        nothing=NOTHING,
        version=mtkd_env.__version__,
    )


def outcome(setting: Setting) -> str:
    """Which method is ahead of which by how much, and whether that may be chance.

    Methods with fewer pools or seeds than others are not in it.
    """
    most = max(len(summary.values) for summary in setting.summaries)
    ranked = [s for s in setting.summaries if len(s.values) == most]
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


def facts(grouping: Grouping) -> list[str]:
    """What the page is about, in a few words each."""
    runs = [run for group in grouping.groups for run in group.runs]
    pools = {run.result.pool for run in runs}
    return [
        counted(len(runs), "finished run"),
        counted(len(grouping.methods), "method"),
        counted(len(grouping.settings), "setting"),
        *([f"pools {_listed(pools)}"] if len(pools) > 1 else []),
        f"seeds {_listed({run.result.seed for run in runs})}",
        f"epochs {_listed({run.result.epochs for run in runs})}",
        f"data {_listed({run.dataset for run in runs})}",
        f"student {_listed({run.student for run in runs})}",
        *([f"teachers {_listed(grouping.teachers)}"] if grouping.teachers else []),
    ]


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(values: Iterable[Any]) -> str:
    ordered = sorted(values) if isinstance(values, set) else values
    return ", ".join(map(str, ordered))


def notes(found: Found, grouping: Grouping) -> list[str]:
    """What was left out of the page, and why."""
    said: list[str] = []
    if found.unreadable:
        said.append(f"Left out, because they cannot be read: {', '.join(found.unreadable)}.")
    if grouping.repeated:
        names = ", ".join(grouping.repeated)
        said.append(f"Left out, because a later run has the same configuration and seeds: {names}.")
    return said
