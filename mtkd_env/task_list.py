"""Tasks: other teachers, images and students for one agent, of which some values are drawn.

A task is what `assemble` makes an environment of. A file lists tasks and what is drawn anew every
time that one of them is asked for (domain randomisation).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from mtkd_env.action import PRIOR
from mtkd_env.computing import Computing
from mtkd_env.env import EnvSpec, MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_name, errors_of
from mtkd_env.files import load_yaml, user_path
from mtkd_env.imports import check_trusted
from mtkd_env.observation import RELATIVE
from mtkd_env.options import as_fields, build
from mtkd_env.registration import PARTS, assemble
from mtkd_env.teachers import PoolSpec
from mtkd_env.teachers.pool import read_pool_spec
from mtkd_env.teachers.preparation import Progress
from mtkd_env.weighting.consensus import CONSENSUS

# Parts that all tasks share, since the spaces and the device are the same for all.
SHARED = ("env", "computing")

# How many of a pool's teachers are asked, or, given names, which ones.
MEMBERS = "teachers.members"

KEYS = ("base", "draw", "tasks", "held_out")
TRAINING, HELD_OUT = "tasks", "held_out"

Values = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of which nothing is left to be drawn.

    Attributes:
        name: What it is called.
        arguments: Those of `assemble`.
    """

    name: str
    arguments: Mapping[str, Any]

    def make(self, progress: Progress | None = None) -> MTKDVectorEnv:
        """Its environment; teachers that were never trained before are trained now and kept.

        Raises:
            ConfigError: It cannot be made; names the task.
        """
        with errors_of(f"task '{self.name}'"):
            return assemble(**self.arguments, progress=progress).env


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that differ in what is drawn.

    Attributes:
        name: Their name.
        arguments: Those of `assemble`.
        draws: What is drawn, by its path in these, such as `student.width`: a list to choose from,
            or `uniform`, `log_uniform` or `integers` with the two ends. A number that is drawn for
            `teachers.members` is that of the pool's teachers that are asked.
    """

    name: str
    arguments: Values
    draws: Mapping[str, Any]

    def draw(self, random: np.random.Generator) -> Task:
        """One of them."""
        arguments = deepcopy(self.arguments)
        for path, form in self.draws.items():
            found = drawn(form, random)
            if path == MEMBERS and isinstance(found, int):
                names = [teacher.label for teacher in self._pool(arguments).teachers]
                found = [names[i] for i in sorted(random.permutation(len(names))[:found])]
            *outer, key = path.split(".")
            reduce(lambda values, name: values.setdefault(name, {}), outer, arguments)[key] = found
        return Task(self.name, arguments)

    def check(self) -> None:
        """Builds all options of one of the tasks, to check them, without loading anything.

        Raises:
            ConfigError: One that cannot be.
        """
        if min(self._asked) < 1:
            found = self.draws[MEMBERS]
            raise ConfigError(f"draw.{MEMBERS}: expected at least one teacher, got {found!r}")
        task = self.draw(np.random.default_rng(0))
        for part, kind in PARTS.items():
            build(kind, task.arguments.get(part), part)

    @property
    def most_teachers(self) -> int:
        """The largest number of teachers that a task may have."""
        return min(self._largest_pool, max(self._asked))

    @property
    def _largest_pool(self) -> int:
        pools = self.draws.get("teachers.teachers", [as_fields(PoolSpec, self._pool())["teachers"]])
        return max(map(len, pools))

    @property
    def _asked(self) -> list[int]:
        """How many teachers may be asked, as far as it is drawn; at least the ends of a range."""
        members = self.draws.get(MEMBERS)
        if isinstance(members, Mapping):
            members = members.get("integers")
        return [
            one if isinstance(one, int) else len(one) for one in members or [self._largest_pool]
        ]

    def _pool(self, arguments: Mapping[str, Any] | None = None) -> PoolSpec:
        given = (self.arguments if arguments is None else arguments).get("teachers", {})
        return build(PoolSpec, {k: v for k, v in given.items() if k != "members"}, "teachers")


RANGES: Mapping[str, Callable[..., Any]] = {
    "integers": lambda low, high, random: int(random.integers(low, high, endpoint=True)),
    "log_uniform": lambda low, high, random: float(np.exp(random.uniform(*np.log([low, high])))),
    "uniform": lambda low, high, random: float(random.uniform(low, high)),
}


def drawn(form: Any, random: np.random.Generator) -> Any:
    """A value: one of a list, or one between two ends; see `TaskFamily`."""
    if isinstance(form, list):
        return form[int(random.integers(len(form)))]
    ((kind, (low, high)),) = form.items()
    if kind != "integers":
        low, high = float(low), float(high)
    return RANGES[kind](low, high, random)


def _check_draw(path: str, form: Any) -> None:
    part, _, key = path.partition(".")
    check_name([name for name in PARTS if name not in SHARED], part, f"draw of '{path}'")
    if not key:
        raise ConfigError(f"draw.{path}: expected a path such as student.width")
    if isinstance(form, list) and form:
        return
    if isinstance(form, Mapping) and len(form) == 1:
        ((kind, ends),) = form.items()
        check_name(RANGES, str(kind), f"range in draw.{path}")
        kinds = (int,) if kind == "integers" else (int, float)
        if isinstance(ends, list) and len(ends) == 2 and all(type(e) in kinds for e in ends):
            low, high = ends
            if low <= high and (kind != "log_uniform" or low > 0):
                return
    raise ConfigError(
        f"draw.{path}: expected a list to choose from, or {', '.join(RANGES)} with two ends, the "
        f"smaller first, got {form!r}"
    )


class TaskList:
    """The tasks of a file.

    Args:
        source: A YAML file, or its content. `base` holds arguments of `assemble` for all tasks,
            `draw` what of them is drawn; `tasks` and `held_out` hold by name what each says
            otherwise, likewise, with a `draw` of its own. Nested keys are merged, but for the
            arguments of another data set. Without a fusion of its own, `base.env` has the prior
            `consensus`.
        num_envs: B, in place of the batch size of the data.
        computing: Where and in what all is computed, over what the file says.

    Attributes:
        training: Tasks to learn from.
        held_out: Tasks to look at while learning.
        options: What the agent sees, does and is paid for, in every task.
        most_teachers: The largest number of teachers of any task.

    Raises:
        ConfigError: Anything that cannot be used; names file and task.
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, Any],
        num_envs: int | None = None,
        computing: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, path = Path(), None
        if not isinstance(source, Mapping):
            path = user_path(source)
            if not path.is_file():
                raise ConfigError(f"tasks: {path}: no such file; expected a YAML file of tasks")
            self._folder, source = path.parent, load_yaml(path)
        with errors_of(path) if path else nullcontext():
            content = self._mapping("", source)
            check_trusted(content)
            for key in content:
                check_name(KEYS, key, "key")
            base = self._base(content.get("base"), num_envs, computing)
            self.options = build(EnvSpec, base["env"], "base.env").resolved(complete=False)
            if self.options.observation != RELATIVE:
                raise ConfigError(f"base.env.observation: expected '{RELATIVE}' for many tasks")
            self.computing = build(Computing, base["computing"], "base.computing")
            self.num_envs = int(base["data"]["batch_size"])
            draws = self._mapping("draw", content.get("draw"))
            self.training = self._families(TRAINING, content.get(TRAINING), base, draws)
            self.held_out = self._families(HELD_OUT, content.get(HELD_OUT), base, draws)
            if not self.training:
                raise ConfigError("tasks: expected at least one")
        families = (*self.training, *self.held_out)
        self.most_teachers = max(family.most_teachers for family in families)

    @property
    def digest(self) -> str:
        """Digest of all that the numbers depend on; not of where they are computed."""
        about = [
            (one.name, {**one.arguments, "computing": None}, one.draws)
            for one in (*self.training, *self.held_out)
        ]
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def _base(
        self,
        given: Any,
        num_envs: int | None,
        computing: Mapping[str, Any] | None,
    ) -> Values:
        base = self._arguments("base", given)
        env = base.get("env", {})
        begun = {} if "fusion" in env else {"fusion": PRIOR, "prior": CONSENSUS}
        base["env"] = {"observation": RELATIVE, **begun, **env}
        base["computing"] = {**base.get("computing", {}), **(computing or {})}
        size = {} if num_envs is None else {"batch_size": num_envs}
        base["data"] = {"batch_size": 64, **base.get("data", {}), **size}
        return base

    def _families(
        self, section: str, given: Any, base: Values, draws: Mapping[str, Any]
    ) -> tuple[TaskFamily, ...]:
        return tuple(
            self._family(name, f"{section}.{name}", entry, base, draws)
            for name, entry in self._mapping(section, given).items()
        )

    def _family(
        self, name: str, key: str, given: Any, base: Values, draws: Mapping[str, Any]
    ) -> TaskFamily:
        entry = self._mapping(key, given)
        own = self._mapping(f"{key}.draw", entry.pop("draw", None))
        arguments = self._arguments(key, entry)
        for part in SHARED:
            if part in arguments:
                raise ConfigError(f"{key}.{part}: is the same for all tasks; see base.{part}")
        if "batch_size" in arguments.get("data", {}):
            raise ConfigError(f"{key}.data.batch_size: is the same for all; see base.data")
        if "dataset" in arguments.get("data", {}):  # Another data set has other arguments.
            base = {**base, "data": {k: v for k, v in base["data"].items() if k != "arguments"}}
        family = TaskFamily(name, _merged(base, arguments), {**draws, **own})
        with errors_of(f"task '{name}'"):
            for path, form in family.draws.items():
                _check_draw(path, form)
            family.check()
        return family

    def _arguments(self, key: str, given: Any) -> Values:
        """Arguments of `assemble`, each as fields by name; a pool's file is read."""
        found: Values = {}
        for part, value in self._mapping(key, given).items():
            check_name([*PARTS, "draw"] if key != "base" else PARTS, part, f"key in {key}")
            if part == "teachers" and isinstance(value, str):
                read_pool_spec(file := self._folder / user_path(value))
                value = load_yaml(file)
            found[part] = as_fields(PARTS[part], value, f"{key}.{part}")
        return found

    def _mapping(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value or {}, Mapping):
            raise ConfigError(f"{key or 'tasks'}: expected keys and values, found {value!r}")
        return {str(name): entry for name, entry in (value or {}).items()}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """Nested keys and values, those of `over` instead of or beside those of `under`."""
    merged = deepcopy(dict(under))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else deepcopy(value)
    return merged
