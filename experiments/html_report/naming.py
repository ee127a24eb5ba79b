"""Which runs belong together: methods, settings, pools of teachers and seeds.

Results say what their method and setting are called. Runs that were not given such names are named
by their algorithm, and by those keys of their configurations that differ.
"""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.comparison.statistics import Seeds
from experiments.config import PLACE, algo_layers
from experiments.experiment import Result
from experiments.html_report.runs import Run, describe, flatten

# What belongs to the method rather than to the setting that it is compared in.
OF_METHOD = ("env.", "agent.")

# What no two runs need to have in common.
OF_RUN = ("seed", "teachers.seed", "algo", *PLACE)

# What may be the pool's.
OF_POOL = ("data.labelled_seed", "data.label_noise_seed")

BASELINE = "aver"

# A setting beside others that no key tells from them.
UNNAMED = "no other setting"

# Where no comparison gives an order, these come first.
FIRST = ("none", BASELINE)


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting.

    Attributes:
        method: Label of the method.
        setting: Label of the setting; empty where there is but one.
        runs: One for each pool and seed, in ascending order.
    """

    method: str
    setting: str
    runs: Sequence[Run]

    @property
    def algo(self) -> str:
        """The algorithm behind the method."""
        return self.runs[0].result.algo

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""
        return tuple(self.runs[0].result.weights)

    @property
    def results(self) -> dict[Seeds, Result]:
        """What the runs came to, by their seeds."""
        return {run.result.seeds: run.result for run in self.runs}


@dataclass(frozen=True)
class Grouping:
    """All runs, grouped.

    Attributes:
        settings: Groups by setting; both in the order of the page.
        repeated: Names of runs that a later one with the same configuration and seeds replaces.
    """

    settings: Mapping[str, Sequence[Group]]
    repeated: Sequence[str]

    @property
    def groups(self) -> list[Group]:
        """All groups."""
        return [group for groups in self.settings.values() for group in groups]

    @property
    def methods(self) -> list[str]:
        """Labels of all methods, each once."""
        return list(dict.fromkeys(group.method for group in self.groups))

    @property
    def teachers(self) -> list[str]:
        """Names of all teachers, each once."""
        return list(dict.fromkeys(name for group in self.groups for name in group.teachers))


def group_runs(runs: Sequence[Run]) -> Grouping:
    """Sorts runs by setting, method, pool and seed."""
    origins: dict[Path, list[Run]] = {}
    for run in runs:
        origins.setdefault(run.folder.parent, []).append(run)
    members: dict[tuple[str, str], dict[Seeds, Run]] = {}
    repeated: list[str] = []
    for origin, own in origins.items():
        prefix = _origin_name(own[0]) or origin.name if len(origins) > 1 else ""
        for run, (method, setting) in _label(origin, own):
            key = ": ".join(filter(None, (prefix, setting))), method
            earlier = members.setdefault(key, {}).get(run.result.seeds)
            repeated += [earlier.name] if earlier else []
            members[key][run.result.seeds] = run
    settings: dict[str, list[Group]] = {}
    for (setting, method), found in members.items():
        group = Group(method, setting, [found[seeds] for seeds in sorted(found)])
        settings.setdefault(setting, []).append(group)
    if len(settings) > 1 and "" in settings:
        settings = {name or UNNAMED: groups for name, groups in settings.items()}
    return Grouping(settings, repeated)


def baseline_of(groups: Iterable[Group]) -> Group | None:
    """What the methods of a setting are compared with: equal weights, if they were run."""
    candidates = [group for group in groups if group.algo == BASELINE]
    named = [group for group in candidates if group.method == BASELINE]
    return (named or candidates)[0] if named or len(candidates) == 1 else None


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that have several values; of place, seeds and algorithm nothing is said.

    A key that a configuration lacks, as one of an older version does, is no difference.
    """
    values: dict[str, set[str]] = {}
    for config in configs:
        for key, value in config.items():
            of_pool = key in OF_POOL and value == config.get("teachers.seed")
            if key not in OF_RUN and not of_pool:
                values.setdefault(key, set()).add(describe(value))
    return [key for key, found in values.items() if len(found) > 1]


def _origin_name(run: Run) -> str:
    parts = run.name.split("/")[:-1]
    return "/".join(parts[:-1] if parts[-1:] == ["runs"] else parts)


Labels = tuple[str, str]


def _label(origin: Path, runs: Sequence[Run]) -> list[tuple[Run, Labels]]:
    """Method and setting of every run of one folder, in the order of the page."""
    bases = {run.name: (run.result.method, run.result.setting) for run in runs}
    clashing, said = _clashing_keys(runs, bases), _said_keys(runs)
    keys = {run.name: clashing | said.get(run.name, set()) for run in runs}
    labelled = [(run, _extend(run, bases[run.name], keys[run.name])) for run in runs]
    order = _order(origin)
    return sorted(labelled, key=lambda pair: _rank(bases[pair[0].name], order))


def _order(origin: Path) -> list[Labels]:
    """Methods and settings in the order of a comparison, from its `runs.csv`."""
    try:
        with (origin.parent / "runs.csv").open(encoding="utf-8", newline="") as file:
            return [(row["method"], row["setting"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError):
        return []


def _rank(base: Labels, order: Sequence[Labels]) -> tuple[int, int, Labels]:
    if base in order:
        return 0, order.index(base), base
    method = base[0]
    return 1, FIRST.index(method) if method in FIRST else len(FIRST), base


def _clashing_keys(runs: Sequence[Run], bases: Mapping[str, Labels]) -> set[str]:
    """Keys that differ between runs of the same name, which must not be taken for one another."""
    named: dict[Labels, list[Mapping[str, Any]]] = {}
    for run in runs:
        named.setdefault(bases[run.name], []).append(run.config)
    return {key for configs in named.values() for key in differing_keys(configs)}


def _said_keys(runs: Sequence[Run]) -> dict[str, set[str]]:
    """Keys that say in which setting a run without given names took place, by the run's name.

    These are the keys that differ between such runs, but for those that a method's own file sets.
    """
    plain = [run for run in runs if run.config.get("method") is None]
    free = {run.name: _without_own(run) for run in plain}
    differing = differing_keys(list(free.values()))
    keys = {key for key in differing if not key.startswith(OF_METHOD)}
    return {name: keys & config.keys() for name, config in free.items()}


def _without_own(run: Run) -> dict[str, Any]:
    """The configuration without the keys that the method's own file sets."""
    own = {key for layer in algo_layers(run.result.algo) for key, _ in flatten(layer.values)}
    return {key: value for key, value in run.config.items() if key not in own}


def _extend(run: Run, base: Labels, keys: Collection[str]) -> Labels:
    """Names with the values of the keys that tell runs apart."""
    found = {key: describe(value) for key, value in run.config.items() if key in keys}
    of_method = [f"{k}={value}" for k, value in found.items() if k.startswith(OF_METHOD)]
    of_setting = [f"{k}={value}" for k, value in found.items() if not k.startswith(OF_METHOD)]
    method = f"{base[0]} ({', '.join(of_method)})" if of_method else base[0]
    return method, ", ".join(filter(None, (base[1], *of_setting)))
