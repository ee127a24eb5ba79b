"""The help: options by their docstrings, and the names and arguments that they may have."""

import inspect
import re
from argparse import Action
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from agents import AGENTS
from agents.base import WARMUP_WEIGHTS
from experiments.config.experiment import ExperimentConfig
from experiments.config.layers import Layer, merged, shipped_methods, shipped_recipes
from mtkd_env.compilation import MODES
from mtkd_env.data import DATASETS
from mtkd_env.env import CHOICES
from mtkd_env.networks import NETWORKS
from mtkd_env.observation import OBSERVATIONS
from mtkd_env.optimization import OPTIMIZERS, SCHEDULES
from mtkd_env.precision import PRECISIONS, TEACHER_PRECISIONS
from mtkd_env.reward import REWARDS
from mtkd_env.teachers.store import DTYPES, PLACES
from mtkd_env.terms import FEATURE_TERMS, LOGIT_TERMS
from mtkd_env.weighting import WEIGHTINGS

# The names that each option of a run may have, where a table says them.
NAMES: Mapping[str, Collection[str]] = {
    "algo": {**AGENTS, **WEIGHTINGS, **shipped_methods()},
    "recipe": shipped_recipes(),
    "precision": PRECISIONS,
    "teacher_precision": TEACHER_PRECISIONS,
    "compile": MODES,
    "data.dataset": DATASETS,
    "student.network": NETWORKS,
    "teachers.store.place": PLACES,
    "teachers.store.dtype": DTYPES,
    "distillation.logit": LOGIT_TERMS,
    "distillation.feature": FEATURE_TERMS,
    "env.reward": REWARDS,
    "env.observation": OBSERVATIONS,
    "env.prior": WEIGHTINGS,
    "warmup.weights": WARMUP_WEIGHTS,
    **{f"env.{name}": names for name, names in CHOICES.items()},
    **{f"{part}.optimizer": OPTIMIZERS for part in ("optimizer", "teachers.recipe")},
    **{f"{part}.schedule": SCHEDULES for part in ("optimizer", "teachers.recipe")},
}


def show_help(kind: type, layers: Iterable[Layer], program: str, about: str) -> None:
    """Prints the flags for the fields of a class, with the values that layers give them.

    Args:
        kind: The class.
        layers: The layers.
        program: The program's name.
        about: What is said of it.
    """
    # Nothing else needs it, and it takes a while to import.
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=program,
        description=f"{about} --debug shows where an error came from.",
        default_env=False,
    )
    parser.add_argument("--config", help="YAML file; may be given several times")
    parser.add_argument("--print_config", action="store_true", help="print all values, and exit")
    parser.add_class_arguments(kind)
    if kind is ExperimentConfig:
        describe(parser._actions)
    parser.set_defaults(dict(_leaves(kind, merged(kind, layers))))
    parser.print_help()


def _leaves(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their keys, those of parts behind dots."""
    for entry in fields(kind):
        if entry.name in values and is_dataclass(entry.type):
            yield from _leaves(entry.type, values[entry.name], f"{prefix}{entry.name}.")
        elif entry.name in values:
            yield f"{prefix}{entry.name}", values[entry.name]


def describe(actions: Iterable[Action]) -> None:
    """Adds to the help of options what they may be, where their own words do not say it all."""
    for action in actions:
        if names := NAMES.get(action.dest):
            action.help = with_names(action.help or "", names)
        elif action.dest == "data.arguments":
            action.help = f"{action.help} {'; '.join(map(_arguments, DATASETS))}."


def with_names(text: str, names: Collection[str]) -> str:
    """A help text, with all names of a table if it leaves one out."""
    named = set(re.findall(r"[\w+-]+", text))
    return text if named >= {*names} else f"{text} Known: {', '.join(sorted(names))}."


def _arguments(dataset: str) -> str:
    return f"{dataset}: {', '.join(inspect.signature(DATASETS[dataset]).parameters) or 'none'}"
