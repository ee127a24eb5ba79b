"""The page as a whole: its heading, its sections, and what was left out of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import mtkd_env
from experiments.comparison.summary import NOTHING, difference_text, interval_text, p_text, text_of
from experiments.html_report.naming import Grouping, group_runs
from experiments.html_report.runs import Found
from experiments.html_report.sections import SECTIONS, Contents
from experiments.html_report.style import drawing, make_palette
from experiments.html_report.summary import outcome, summarize_settings
from experiments.html_report.table import number

TEMPLATES = Path(__file__).parent / "templates"


def render(found: Found, title: str) -> str:
    """The whole page as text.

    Args:
        found: The runs.
        title: Its heading.
    """
    grouping = group_runs(found.runs)
    settings = list(zip(grouping.settings, summarize_settings(grouping.settings), strict=True))
    contents = Contents(settings, make_palette(grouping.methods, grouping.teachers))
    with drawing():
        sections = [make(contents) for make in SECTIONS]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            outcomes=[(setting, outcome(setting, found)) for setting, found in settings],
            facts=facts(grouping),
            notes=notes(found, grouping),
            sections=sections,
            version=mtkd_env.__version__,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"nothing": NOTHING}
    environment.filters |= {
        "spread": text_of,
        "interval": interval_text,
        "difference": difference_text,
        "p": p_text,
        "number": number,
    }
    return environment


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
