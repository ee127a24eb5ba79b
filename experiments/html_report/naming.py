"""Which runs belong together: methods, settings, pools of teachers and seeds.

Results say what their method and setting are called. Where runs have the same names, or none, the
keys of their configurations that differ tell them apart.
"""

import csv
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.comparison.statistics import Seeds
from experiments.comparison.summary import Summary, summarize
from experiments.config import PLACE, algo_layers
from experiments.html_report.runs import FinishedRun, describe
from experiments.running.folder import flat
from experiments.running.result import RunResult
from experiments.transfer.program import PLACE as PLACE_OF_TASKS

# What belongs to the method rather than to the setting that it is compared in.
OF_METHOD = ("env.", "agent.")

# What no two runs need to have in common, nor need tell of.
OF_RUN = {"seed", "teachers.seed", "algo", "weights", *PLACE, *PLACE_OF_TASKS}

# What may be the pool's.
OF_POOL = ("data.labelled_seed", "data.label_noise_seed")

BASELINE = "aver"

# Where no comparison gives an order, these come first.
FIRST = ("none", BASELINE)


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, one for each pool and seed in ascending order."""

    method: str
    runs: Sequence[FinishedRun]

    @property
    def algo(self) -> str:
        """The algorithm behind the method; empty where there is none."""
        return getattr(self.runs[0].result, "algo", "")

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers; none where there are none."""
        return tuple(getattr(self.runs[0].result, "weights", {}))

    @property
    def results(self) -> dict[Seeds, RunResult]:
        """What the runs came to, by their seeds."""
        return {run.result.seeds: run.result for run in self.runs}

    @property
    def one_pool(self) -> "Group":
        """The runs with the first pool; in another, teachers of these names know other things."""
        pool = self.runs[0].result.pool
        return Group(self.method, [run for run in self.runs if run.result.pool == pool])


@dataclass(frozen=True)
class Setting:
    """What several methods were compared in.

    Attributes:
        letter: What it is called for short; empty where there is but one.
        name: What it is called; empty where there is but one that has no name.
        groups: Its methods.
        baseline: What the others are compared with, if it was run.
        differences: Keys that are not the same in all settings, and their values in this one.
        summaries: What each method came to.
    """

    letter: str
    name: str
    groups: Sequence[Group]
    baseline: Group | None
    differences: Mapping[str, str]
    summaries: Sequence[Summary]

    @property
    def heading(self) -> str:
        """Letter and name."""
        return " · ".join(filter(None, (self.letter, self.name)))


@dataclass(frozen=True)
class Grouping:
    """All runs, in the order of the page, and the names of those that a later one replaces."""

    settings: Sequence[Setting]
    repeated: Sequence[str]

    @property
    def groups(self) -> list[Group]:
        """All groups."""
        return [group for setting in self.settings for group in setting.groups]

    @property
    def methods(self) -> list[str]:
        """Labels of all methods, each once."""
        return list(dict.fromkeys(group.method for group in self.groups))

    @property
    def teachers(self) -> list[str]:
        """Names of all teachers, each once."""
        return list(dict.fromkeys(name for group in self.groups for name in group.teachers))


def group_runs(runs: Sequence[FinishedRun]) -> Grouping:
    """Sorts runs by setting, method, pool and seed."""
    plans = {origin: _plan(origin) for origin in {run.folder.parent for run in runs}}
    labels = _labels(runs, several=len(plans) > 1)
    named: dict[str, dict[str, dict[Seeds, FinishedRun]]] = {}
    repeated: list[str] = []
    # Of repeated runs the last counts, which has the greatest name.
    for run in sorted(runs, key=lambda run: (_rank(run, plans[run.folder.parent]), run.name)):
        setting, method = labels[run.name]
        found = named.setdefault(setting, {}).setdefault(method, {})
        repeated += [found[run.result.seeds].name] if run.result.seeds in found else []
        found[run.result.seeds] = run
    groups = {
        setting: [Group(method, [own[n] for n in sorted(own)]) for method, own in methods.items()]
        for setting, methods in named.items()
    }
    return Grouping(_settings(groups, plans), repeated)


# The baseline by setting and method, in the order of a comparison's table.
Plan = Mapping[tuple[str, str], str]


def _plan(origin: Path) -> Plan:
    """The table of the comparison that the runs of a folder are of; empty if they are of none."""
    try:
        with (origin.parent / "comparison.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if {"setting", "method"} <= row.keys()]
    except (OSError, ValueError):
        return {}
    return {(row["setting"], row["method"]): row.get("baseline", "") for row in rows}


def _rank(run: FinishedRun, plan: Plan) -> tuple[int, str, int, str]:
    """Where a run belongs among others: as in the comparison's table, or else by its labels."""
    setting, method = run.result.setting, run.result.method
    place = [*plan, (setting, method)].index((setting, method))
    return place, setting, FIRST.index(method) if method in FIRST else len(FIRST), method


def _settings(named: Mapping[str, Sequence[Group]], plans: Mapping[Path, Plan]) -> list[Setting]:
    """The settings; p is corrected for all differences of the page."""
    common = [_common([run for group in groups for run in group.runs]) for groups in named.values()]
    keys = differing_keys(common)
    baselines = {
        name: baseline_of(groups, next(iter(plans[groups[0].runs[0].folder.parent].values()), ""))
        for name, groups in named.items()
    }
    summaries = summarize(
        {(group.method, name): group.results for name, own in named.items() for group in own},
        {name: baseline.method for name, baseline in baselines.items() if baseline},
    )
    settings = []
    for number, ((name, groups), values) in enumerate(zip(named.items(), common, strict=True)):
        letter = chr(ord("A") + number % 26) * (1 + number // 26) if len(named) > 1 else ""
        told = {key: describe(values[key]) for key in keys if key in values}
        own = [summaries[group.method, name] for group in groups]
        settings.append(Setting(letter, name, groups, baselines[name], told, own))
    return settings


def _common(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """What is the same in all configurations of a setting."""
    first = runs[0].config
    return {k: first[k] for k in first if all(run.config.get(k) == first[k] for run in runs)}


def baseline_of(groups: Iterable[Group], named: str = "") -> Group | None:
    """What the methods of a setting are compared with: by default equal weights, if they were run.

    Args:
        groups: The methods.
        named: What the comparison says; empty if it does not.
    """
    chosen = {group.method: group for group in groups if named or group.algo == BASELINE}
    alone = next(iter(chosen.values())) if len(chosen) == 1 and not named else None
    return chosen.get(named or BASELINE, alone)


def differing_keys(configs: Iterable[Mapping[str, Any]]) -> list[str]:
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


def _labels(runs: Sequence[FinishedRun], *, several: bool) -> dict[str, tuple[str, str]]:
    """Setting and method of every run by its name, with what tells runs of the same labels apart.

    Args:
        runs: The runs.
        several: Whether they stand in several folders, which are then part of the setting.
    """
    metrics = {run.result.metric for run in runs}
    given = {run.name: ": ".join(filter(None, _given(run, several, metrics))) for run in runs}
    alike = {
        n.name: given[n.name] if _is_plain(n) else (given[n.name], n.result.method) for n in runs
    }
    more = _details(runs, alike, _of_setting)
    settings = {name: ", ".join(filter(None, (given[name], more[name]))) for name in given}
    pairs = {run.name: (settings[run.name], run.result.method) for run in runs}
    of_method = _details(
        runs, pairs, lambda run: {k: v for k, v in run.config.items() if k.startswith(OF_METHOD)}
    )
    return {
        name: (setting, f"{method} ({of_method[name]})" if of_method[name] else method)
        for name, (setting, method) in pairs.items()
    }


def _given(run: FinishedRun, several: bool, metrics: Collection[str]) -> tuple[str, str, str]:
    folder = Path(run.name).parent
    folder = folder.parent if folder.name == "runs" else folder
    origin = folder.as_posix() if folder.name else run.folder.parent.name
    metric = run.result.metric if len(metrics) > 1 else ""
    return origin if several else "", metric, run.result.setting


def _is_plain(run: FinishedRun) -> bool:
    """Whether nobody has said what a run's method and setting are called."""
    return "algo" in run.config and run.config.get("method") is None


def _of_setting(run: FinishedRun) -> dict[str, Any]:
    """The keys that are not the method's, nor set by its own file."""
    layers = algo_layers(run.result.method) if _is_plain(run) else []
    own = {key for layer in layers for key in flat(layer.values)}
    return {k: v for k, v in run.config.items() if k not in own and not k.startswith(OF_METHOD)}


def _details(
    runs: Sequence[FinishedRun],
    alike: Mapping[str, Any],
    values: Callable[[FinishedRun], Mapping[str, Any]],
) -> dict[str, str]:
    """The keys that differ between runs that are called alike, with the values of each run."""
    found: dict[str, str] = {}
    for name in set(alike.values()):
        configs = {run.name: values(run) for run in runs if alike[run.name] == name}
        keys = differing_keys(configs.values())
        found |= {
            own: ", ".join(f"{k.rpartition('.')[2]}={describe(c[k])}" for k in keys if k in c)
            for own, c in configs.items()
        }
    return found
