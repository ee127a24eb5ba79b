"""The configuration and the versions of every run, with what differs between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.html_report.naming import OF_RUN, Group, Setting
from experiments.html_report.runs import FinishedRun, describe


@dataclass(frozen=True)
class Entry:
    """A key of a configuration.

    Attributes:
        key: The key.
        value: Its value; several with bars between them where runs of one group differ.
        differs: Whether other groups have another.
    """

    key: str
    value: str
    differs: bool


@dataclass(frozen=True)
class Configuration:
    """The runs of one method in one setting.

    Attributes:
        setting: The setting.
        group: The runs.
        entries: Their configuration.
    """

    setting: Setting
    group: Group
    entries: Sequence[Entry]

    @property
    def differences(self) -> list[Entry]:
        """What is not the same in all groups."""
        return [entry for entry in self.entries if entry.differs]


def configurations(settings: Sequence[Setting]) -> list[Configuration]:
    """The configuration of every group; keys that only some have are differences."""
    pairs = [(setting, group) for setting in settings for group in setting.groups]
    found = [_values(group) for _, group in pairs]
    keys = {key for values in found for key in values}
    common = {key for key in keys if len({values.get(key) for values in found}) == 1}
    return [
        Configuration(*pair, [_entry(key, value, common) for key, value in values.items()])
        for pair, values in zip(pairs, found, strict=True)
    ]


def _entry(key: str, value: str, common: set[str]) -> Entry:
    return Entry(key, value, differs=key not in common and key not in OF_RUN)


def _values(group: Group) -> dict[str, str]:
    """The values of a group as text; several values of one key in one text."""
    keys = dict.fromkeys(key for run in group.runs for key in run.config)
    return {key: " | ".join(_texts(group.runs, key)) for key in keys}


def _texts(runs: Sequence[FinishedRun], key: str) -> list[str]:
    return list(dict.fromkeys(describe(run.config[key]) for run in runs if key in run.config))


@dataclass(frozen=True)
class VersionRow:
    """A piece of software.

    Attributes:
        name: Its name.
        versions: Its versions, and the number of runs with each.
    """

    name: str
    versions: Mapping[str, int]


def version_rows(runs: Sequence[FinishedRun]) -> list[VersionRow]:
    """What the numbers of all runs depend on."""
    names = dict.fromkeys(name for run in runs for name in run.result.versions)
    return [VersionRow(name, _count(runs, name)) for name in names]


def _count(runs: Sequence[FinishedRun], name: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for run in runs:
        version = run.result.versions.get(name, "not recorded")
        counts[version] = counts.get(version, 0) + 1
    return counts
