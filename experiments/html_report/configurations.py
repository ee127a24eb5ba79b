"""The configuration and the versions of every run, with what differs between them."""

from collections import Counter
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from experiments.html_report.naming import OF_RUN, Group, Setting
from experiments.html_report.runs import FinishedRun, describe
from experiments.html_report.table import VERSIONS, PageTable


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
