"""The command line: which layers it asks for, and the configuration that they give together."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml

from experiments.config.experiment import ExperimentConfig, RunConfig
from experiments.config.help import show_help
from experiments.config.layers import (
    Layer,
    algo_layers,
    configured,
    file_layer,
    keys_of,
    nearest_key,
    recipe_layers,
)
from mtkd_env.errors import ConfigError
from mtkd_env.files import parse_yaml, user_path
from mtkd_env.imports import TRUST, Trust, trust_of

Config = TypeVar("Config", bound=RunConfig)

# Flags that stand for a longer one.
SHORT = {"epochs": "optimizer.epochs", "on-nan": "env.on_nan"}

# Flags that programs see to themselves.
HELP, PRINT = ("-h", "--help"), "--print_config"
OTHERS = ("config", "resume", "debug", TRUST.lstrip("-"), PRINT.lstrip("-"))

ABOUT = (
    "Distils a student from its teachers under a method's weights. Layers, later ones "
    "win: configs/recipe/RECIPE.yaml, configs/algo/ALGO.yaml, --config files, flags. "
    "--algo takes several methods with commas between them. "
    f"{' '.join(f'--{short} X is short for --{key} X.' for short, key in SHORT.items())} "
    "However many epochs, the learning rate falls at the same fractions of the training. "
    "--resume RUN_DIR goes on with an unfinished run. "
    f"{TRUST} lets files name a module:Name of any module, whose code then runs; flags "
    "may in any case."
)


def parse_values(
    kind: type[Config], layers: Sequence[Layer], flags: Sequence[str], program: str, about: str
) -> Config:
    """What some layers say together, and flags over them.

    Args:
        kind: Class of the configuration.
        layers: Later ones win.
        flags: The flags.
        program: The program's name, for its help.
        about: What the help says of it.

    Raises:
        ConfigError: An unknown key or flag, or a value that cannot be used; names its layer.
        SystemExit: After `--help` or `--print_config`.
    """
    if not {*HELP}.isdisjoint(flags):
        show_help(kind, layers, program, about)
        raise SystemExit(0)
    given = list(_values(kind, [flag for flag in flags if flag != PRINT]))
    config = configured(kind, layers, given)
    if PRINT in flags:
        sys.stdout.write(config.to_yaml())
        raise SystemExit(0)
    return config


def _values(kind: type, flags: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values of flags, given as `--key value` or `--key=value`."""
    remaining = iter(flags)
    for flag in remaining:
        name, equals, text = flag.removeprefix("--").partition("=")
        if name == flag.partition("=")[0]:
            raise ConfigError(f"unrecognized arguments: {flag}")
        keys = [key for key in (name, SHORT.get(name, "")) if type_of(kind, key) is not None]
        if not keys:
            known = {*keys_of(kind), *SHORT, *OTHERS}
            raise ConfigError(f"--{name}: unknown flag{nearest_key(name, known, '--')}")
        value = text if equals else _value_of(f"--{name}", remaining)
        yield keys[0], _read(value, type_of(kind, keys[0]))


def type_of(kind: Any, key: str) -> Any:
    """The type of what a key stands for; none for one that there is not."""
    name, _, rest = key.partition(".")
    found = next((entry.type for entry in fields(kind) if entry.name == name), None)
    if not rest or found is None:
        return found
    return type_of(found, rest) if is_dataclass(found) else Any


def _read(text: str, kind: Any) -> Any:
    """What a flag says as YAML; a text as it is typed, unless it stands in quotes."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        return value if text[:1] in ("'", '"') else text
    only_text = {*(get_args(kind) or (kind,))} <= {str, NoneType}
    return text if only_text and (value is not None or kind is str) else value


@dataclass(frozen=True)
class Flags:
    """A command line, with what needs care taken out.

    Attributes:
        layers: The `--config` files.
        algos: The methods in the last `--algo`; empty without one.
        recipe: The recipe in the last `--recipe`, or else in the last `--config` file with one.
        trust: What the files may name.
        others: All other flags.
    """

    layers: list[Layer]
    algos: list[str]
    recipe: str | None
    trust: Trust
    others: list[str]


def read_flags(argv: Sequence[str]) -> Flags:
    """Sorts the flags of a command line.

    Raises:
        ConfigError: A flag without its value, or a file that cannot be read.
    """
    paths, flags = take([flag for flag in argv if flag != TRUST], "--config")
    named, flags = take(flags, "--algo")
    recipes, flags = take(flags, "--recipe")
    layers = [file_layer(user_path(path)) for path in paths]
    in_files = [str(layer.values["recipe"]) for layer in layers if layer.values.get("recipe")]
    return Flags(
        layers=layers,
        algos=_names(named[-1]) if named else [],
        recipe=[None, *in_files, *recipes][-1],
        trust=trust_of(argv),
        others=flags,
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"--algo: expected different names, commas between them, got '{text}'")
    return names


def parse_arguments(argv: Sequence[str], program: str = "mtkd run") -> list[ExperimentConfig]:
    """The configurations that a command line asks for: one for each method in `--algo`.

    Args:
        argv: Flags, without the program's name; `--algo` may hold several names with commas.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a file that cannot be read.
        SystemExit: After `--help` or `--print_config`.
    """
    flags = read_flags(argv)
    in_files = [str(layer.values["algo"]) for layer in flags.layers if "algo" in layer.values]
    algos = flags.algos or [ExperimentConfig.algo, *in_files][-1:]
    first = recipe_layers(flags.recipe)
    return [
        build_config(
            algo, [*first, *algo_layers(algo)], flags, recipe=flags.recipe, program=program
        )
        for algo in algos
    ]


def build_config(
    algo: str,
    layers: Sequence[Layer],
    flags: Flags,
    *,
    recipe: str | None = None,
    program: str = "mtkd run",
) -> ExperimentConfig:
    """The configuration of one method: the layers, then the `--config` files, then the flags.

    Args:
        algo: The method's name.
        layers: Earlier layers first.
        flags: The command line.
        recipe: Name of the recipe that is among the layers, for the record.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key or a value of the wrong type; names the layer it stands in.
        SystemExit: After `--help` or `--print_config`.
    """
    own = [f"--algo={algo}", *([f"--recipe={recipe}"] if recipe else [])]
    # Options import what they name when they are built, if only to be checked.
    with flags.trust.applied():
        return parse_values(
            ExperimentConfig, [*layers, *flags.layers], [*flags.others, *own], program, ABOUT
        )


def take(flags: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of a flag, given as `--flag value` or `--flag=value`, and all other flags."""
    values: list[str] = []
    others: list[str] = []
    remaining = iter(flags)
    for flag in remaining:
        if flag == name:
            values.append(_value_of(name, remaining))
        elif flag.startswith(f"{name}="):
            values.append(flag.partition("=")[2])
        else:
            others.append(flag)
    return values, others


def _value_of(flag: str, remaining: Iterator[str]) -> str:
    value = next(remaining, "--")
    if value.startswith("--"):
        raise ConfigError(f"{flag}: expected a value")
    return value
