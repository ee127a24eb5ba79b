"""Tables of the page that are texts alone: the paper's results beside ours, configurations."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from experiments.comparison.plan import read_figure
from experiments.comparison.summary import NOTHING, text_of
from experiments.config import CONFIGS, read_yaml
from experiments.html_report.naming import OF_RUN, Group, Setting
from experiments.html_report.runs import FinishedRun, describe

# Headings of columns that hold texts; all others hold numbers.
TEXTS = frozenset({"algorithm", "method", "our method", "setting", "software", "teacher"})
VERSIONS = "version (number of runs)"

# Fewer columns leave room beside them.
WIDE = 7


@dataclass(frozen=True)
class PageTable:
    """Headings of columns, and their texts row by row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]

    @property
    def classes(self) -> list[str]:
        """How each column is set."""
        return ["name" if name in {*TEXTS, VERSIONS} else "" for name in self.headings]

    @property
    def narrow(self) -> bool:
        """Whether it leaves room beside it."""
        return len(self.headings) < WIDE


def number(value: float) -> str:
    """A weight or a score; nothing for NaN."""
    return NOTHING if math.isnan(value) else f"{value:z.3f}"


# The comparison that says what the paper's Table 6(a) says [%].
TABLE_6A = CONFIGS / "benchmark" / "table6a.yaml"


def paper_table(settings: Sequence[Setting]) -> PageTable | None:
    """A row for each algorithm, method and setting; none if none of its algorithms was run."""
    headings = ["algorithm", "paper [%]", "ours [%]", "n", "our method", "setting"]
    paper = read_yaml(TABLE_6A, "report")["paper"]
    rows: list[list[str]] = []
    for algo, by_setting in paper.items():
        ours = [
            [text_of(s.last, scale=100), str(len(s.values)), s.method, setting.heading or NOTHING]
            for setting in settings
            for s in setting.summaries
            if s.algo == algo
        ]
        missing = [["not run", NOTHING, NOTHING, NOTHING]]
        figure = text_of(read_figure(algo, by_setting["paper"]))
        rows += [[algo, figure, *one] for one in ours or missing]
    run = any(s.algo in paper for setting in settings for s in setting.summaries)
    return PageTable(headings, rows) if run else None


# Configurations and versions.


def configurations(
    settings: Sequence[Setting],
) -> list[tuple[Setting, Group, Mapping[str, str], list[str]]]:
    """The configuration of every group, and its keys that are not the same in all of them.

    Keys that only some have are differences.
    """
    pairs = [(setting, group) for setting in settings for group in setting.groups]
    found = [_values(group) for _, group in pairs]
    keys = {key for values in found for key in values} - OF_RUN
    differ = {key for key in keys if len({values.get(key) for values in found}) > 1}
    return [
        (*pair, values, [key for key in values if key in differ])
        for pair, values in zip(pairs, found, strict=True)
    ]


def _values(group: Group) -> dict[str, str]:
    """The values of a group as text; several values of one key in one text."""
    found: dict[str, dict[str, None]] = {}
    for run in group.runs:
        for key, value in run.config.items():
            found.setdefault(key, {})[describe(value)] = None
    return {key: " | ".join(texts) for key, texts in found.items()}


def version_table(runs: Sequence[FinishedRun]) -> PageTable:
    """What the numbers of all runs depend on, marked where runs have several versions."""
    names = dict.fromkeys(name for run in runs for name in run.result.versions)
    rows = []
    for name in names:
        counts = Counter(run.result.versions.get(name, "not recorded") for run in runs)
        form = Markup("<mark>{}</mark> ({})") if len(counts) > 1 else Markup("{} ({})")
        rows.append([name, Markup(", ").join(form.format(*pair) for pair in counts.items())])
    return PageTable(["software", VERSIONS], rows)
