"""The command line: which layers it asks for, and the configuration that they give together."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from experiments.config.choices import describe
from experiments.config.experiment import TEXTS, ExperimentConfig
from experiments.config.layers import (
    YAML,
    Layer,
    algo_layers,
    file_layer,
    for_parser,
    read_yaml,
    recipe_layers,
    whole_pool,
    yaml_value,
)
from experiments.verbs import as_called
from mtkd_env.errors import ConfigError, check_arguments, did_you_mean, errors_of
from mtkd_env.files import user_path
from mtkd_env.imports import PROJECT, TRUST, Trust, check_trusted, trust_of, whole_name
from mtkd_env.options import build, field_names
from mtkd_env.teachers.pool import TeacherSpec, read_pool_spec

T = TypeVar("T")

# A value may name a class of an option; the parser would import it from wherever it is.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(PROJECT))

# How the parser's messages name a flag or a key that it does not know.
UNKNOWN_FLAG = re.compile(r"unrecognized arguments: --([\w.-]+)")
UNKNOWN_KEY = re.compile(r"Option '([\w.]+)'|Group '([\w.]+)' does not accept option '([\w.]+)'")

# Flags that stand for a longer one.
SHORT = {"epochs": "optimizer.epochs", "on-nan": "env.on_nan"}

# Flags that are not the parser's, because programs see to them.
OTHERS = ("resume", "debug", TRUST.lstrip("-"))

# How near a flag must be to what was typed to be what was meant.
NEAR = 0.6

# Where the parser notes the file that a part was read from.
FILE = "__path__"

# What texts begin with that the parser would otherwise take for something else.
QUOTES = ("'", '"')


# The wording of jsonargparse, and that of all other messages.
READABLE = (
    (r'Parser key "([\w.]+)":\s*', r"\1: "),
    (
        r"Unable to load config ['\"]([^'\"]*)['\"] - .*",
        r"expected a YAML file or keys and values, got '\1'",
    ),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .*"
        r"Given value type: \S+ \S+ Given value: ",
        r"expected one of \1, got ",
    ),
    (r"Importing '([\w.]+)' is not allowed.*", r"expected keys and values, got '\1'"),
    (r"Problem with given class_path '[\w.]+':\s*", ""),
    (r"Expected an? (<class '\w+'>)\. Got value: ", r"expected \1, got "),
    (r"<class 'NoneType'>", "null"),
    (r"<class '(\w+)'>", r"\1"),
)


def plain_message(message: str) -> str:
    """A message of jsonargparse in one line and in the form of others: `key: expected X, got Y`."""
    message = " ".join(message.split())
    for pattern, replacement in READABLE:
        message = re.sub(pattern, replacement, message)
    return message


class ConfigurationParser(ArgumentParser):
    """Reports what is wrong as a `ConfigError` of one line, with the nearest valid key.

    Attributes:
        short: Flags that stand for a longer one.
    """

    short: Collection[str] = ()

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """All default values, for which the shipped files are read once."""
        read: dict[bool, Namespace] = self.__dict__.setdefault("_read", {})
        if skip_validation not in read:
            read[skip_validation] = super().get_defaults(skip_validation, **kwargs)
        return deepcopy(read[skip_validation])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Does not end the program itself."""
        text = " ".join(message.split()).removeprefix('Parser key "config": ')
        raise ConfigError(plain_message(text) + self._hint(text)) from ex

    def build(self, kind: type[T], argv: Sequence[str]) -> T:
        """The object of a class whose fields the arguments are.

        Raises:
            ConfigError: A value that cannot be, or that names what is not to be trusted.
        """
        try:
            parsed = self.parse_args(argv)
        except ImportError as error:  # What a value names, and is not to be imported.
            self.error(str(error), error)
        values = {name: plain_values(parsed[name]) for name in field_names(kind)}
        check_trusted({name: value for name, value in values.items() if name not in TEXTS})
        return build(kind, values)

    def _hint(self, message: str) -> str:
        keys = [*self.get_defaults(skip_validation=True).keys()]
        if flag := UNKNOWN_FLAG.search(message):
            sections = {key.partition(".")[0] for key in keys}
            nearest = nearest_flag(flag[1], {*keys, *sections, *self.short, *OTHERS})
            return f"; did you mean '--{nearest}'?" if nearest else ""
        unknown = UNKNOWN_KEY.search(message)
        if unknown is None or "did you mean" in message:
            return ""
        return did_you_mean(".".join(part for part in unknown.groups() if part), keys)


def nearest_flag(name: str, known: Iterable[str]) -> str | None:
    """The flag that was meant: the nearest by its whole name or by its last part.

    Of several that are as near, it is the shortest.
    """
    nearness = {
        key: max(
            SequenceMatcher(None, name.replace("-", "_"), part.replace("-", "_")).ratio()
            for part in (key, key.rpartition(".")[2])
        )
        for key in known
    }
    best = max(nearness, key=lambda key: (nearness[key], -len(key), key))
    return best if nearness[best] >= NEAR else None


def make_parser(
    kind: type, program: str, about: str, shipped: Sequence[str] = ()
) -> ConfigurationParser:
    """A parser of `--config` files and of flags for the fields of a class.

    Args:
        kind: The class.
        program: The program's name, for the help.
        about: What the help says of it.
        shipped: YAML files below them all, whose values the help shows.
    """
    parser = ConfigurationParser(
        prog=as_called(program),
        description=f"{about} --debug shows where an error came from.",
        default_config_files=list(shipped),
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(kind)
    return parser


def parse_files(
    kind: type[T],
    files: Sequence[tuple[str, Path]],
    flags: Sequence[str],
    parser: Callable[[], ConfigurationParser],
) -> T:
    """What some YAML files say together, and flags over them.

    Args:
        kind: Class of the configuration.
        files: Each with the flag that named it; later ones win.
        flags: The flags.
        parser: Makes a parser of both.

    Raises:
        ConfigError: An unknown key, or a value that cannot be used; names the file it stands in.
    """
    paths = [str(path) for flag, path in files if _has_values(kind, path, flag)]

    def parse(*files: str) -> T:
        return parser().build(kind, [*(f"--config={path}" for path in files), *flags])

    def problem(*files: str) -> str | None:
        try:
            parse(*files)
        except ConfigError as error:
            return str(error)
        return None

    try:
        return parse(*paths)
    except ConfigError as error:
        if problem() != str(error):
            for path in paths:
                if problem(path) == str(error):
                    raise ConfigError(f"{path}: {error}") from error
        raise


def _has_values(kind: type, path: Path, flag: str) -> bool:
    """Whether a YAML file, which errors say `flag` has named, has any values; checks its keys."""
    known, values = field_names(kind), read_yaml(path, flag)
    for key in values:
        if key not in known:
            raise ConfigError(f"{flag}: {path}: unknown key '{key}'{did_you_mean(key, known)}")
    return bool(values)


@cache
def _parser(shipped: tuple[str, ...], program: str) -> ConfigurationParser:
    about = (
        "Distils a student from its teachers under a method's weights. Layers, later ones "
        "win: configs/recipe/RECIPE.yaml, configs/algo/ALGO.yaml, --config files, flags. "
        "--algo takes several methods with commas between them. "
        f"{' '.join(f'--{short} X is short for --{key} X.' for short, key in SHORT.items())} "
        "However many epochs, the learning rate falls at the same fractions of the training. "
        "--resume RUN_DIR goes on with an unfinished run. "
        f"{TRUST} lets files name a module:Name of any module, whose code then runs; flags "
        "may in any case."
    )
    parser = make_parser(ExperimentConfig, program, about, shipped)
    parser.short = SHORT
    describe(parser._actions)
    # The parser cannot print objects in a list.
    pool = ExperimentConfig().teachers.teachers
    parser.set_defaults({"teachers.teachers": [asdict(teacher) for teacher in pool]})
    return parser


@dataclass(frozen=True)
class Flags:
    """A command line, with what needs care taken out.

    Attributes:
        layers: The `--config` files.
        algos: The methods in the last `--algo`; empty without one.
        recipe: The recipe in the last `--recipe`, or else in the last `--config` file with one.
        agent_arguments: What each `--agent.arguments` says.
        pools: What each `--teachers` says.
        trust: What the files may name.
        others: All other flags.
    """

    layers: list[Layer]
    algos: list[str]
    recipe: str | None
    agent_arguments: list[dict[str, Any]]
    pools: list[str]
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
    short = []
    for name, key in SHORT.items():
        values, flags = take(flags, f"--{name}")
        short += [f"--{key}={value}" for value in values]
    given, flags = take(flags, "--agent.arguments")
    layers = [file_layer(user_path(path)) for path in paths]
    in_files = [str(layer.values["recipe"]) for layer in layers if layer.values.get("recipe")]
    return Flags(
        layers=layers,
        algos=_names(named[-1]) if named else [],
        recipe=[None, *in_files, *recipes][-1],
        agent_arguments=[_load_arguments(text) for text in given],
        pools=take(flags, "--teachers")[0],
        trust=trust_of(argv),
        others=[*_for_parser(flags), *short],
    )


def _for_parser(flags: Sequence[str]) -> Iterator[str]:
    """Some flags, with keys and values where the parser takes nothing else; see `for_parser`."""
    for before, flag in zip(["", *flags], flags, strict=False):
        name, equals, value = flag.partition("=") if flag.startswith("--") else (before, "", flag)
        found = yaml_value(value)
        if name == "--teachers":
            with errors_of("teachers"):
                found = whole_pool(found)
        elif name == "--teachers.teachers":
            found = whole_pool(found).get("teachers") if isinstance(found, list) else found
        text = for_parser(found) if isinstance(found, Mapping | list) else value
        yield f"{name}={text}" if equals else text if name == before else flag


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ConfigError(f"--algo: expected names with commas between them, got '{text}'")
    return names


def parse_arguments(argv: Sequence[str], program: str = "run.py") -> list[ExperimentConfig]:
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
    program: str = "run.py",
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
    layers = [*layers, *flags.layers]
    arguments = [*(layer.agent_arguments for layer in layers), *flags.agent_arguments]
    others = [*flags.others, *(["--recipe", recipe] if recipe else [])]
    # Options import what they name when they are built, if only to be checked.
    with flags.trust.applied():
        for layer in layers:
            _check_pool(layer.values.get("teachers"), f"{layer.name}: ")
        for named in flags.pools:
            _check_pool(yaml_value(named))
        try:
            return _parse(algo, layers, arguments, others, program)
        except ConfigError as error:
            name = _culprit(layers, str(error), program)
            if name is None:
                raise
            raise ConfigError(f"{name}: {error}") from error


def _parse(
    algo: str,
    layers: Sequence[Layer],
    arguments: Sequence[Mapping[str, Any]],
    flags: Sequence[str],
    program: str,
) -> ExperimentConfig:
    shipped = list(takewhile(lambda layer: layer.shipped, layers))
    sources = [layer.source for layer in layers[len(shipped) :] if layer.values]
    configs = [part for source in sources for part in ("--config", source)]
    together = {key: value for layer in arguments for key, value in layer.items()}
    # As YAML, because JSON has no word for NaN or infinity.
    merged = ["--agent.arguments", for_parser(together)] if together else []
    parser = _parser(tuple(layer.source for layer in shipped), as_called(program))
    return parser.build(ExperimentConfig, [*configs, *merged, *flags, "--algo", algo])


def plain_values(value: Any) -> Any:
    """What a parser gave, with dictionaries for its namespaces, and texts without their quotes."""
    if isinstance(value, str):
        unquoted = yaml_value(value) if value[:1] in QUOTES else value
        return whole_name(unquoted if isinstance(unquoted, str) else value)
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {name: plain_values(entry) for name, entry in value.items() if name != FILE}
    return type(value)(map(plain_values, value)) if isinstance(value, tuple | list) else value


def _culprit(layers: Sequence[Layer], message: str, program: str) -> str | None:
    """Name of the first layer that brings the message about; none where a flag does."""
    algo = ExperimentConfig.algo
    for count in range(1, len(layers) + 1):
        try:
            _parse(algo, layers[:count], [], [], program)
        except ConfigError as error:
            if str(error) == message:
                return layers[count - 1].name
    return None


def _check_pool(given: Any, place: str = "") -> None:
    """Checks a pool's file, or its teachers by their keys, of which the parser says too little.

    Raises:
        ConfigError: A file that cannot be read, holds something else, or names what is not to be
            trusted; a key that no teacher has.
    """
    if isinstance(given, str) and given.endswith(YAML):
        with errors_of(f"{place}teachers"):
            read_pool_spec(given)
    elif isinstance(given, Mapping) and isinstance(given.get("teachers"), list):
        for number, teacher in enumerate(given["teachers"]):
            if isinstance(teacher, Mapping):
                check_arguments(TeacherSpec, teacher, f"{place}teachers.teachers.{number}")


def _load_arguments(text: str) -> dict[str, Any]:
    arguments = yaml_value(text)
    if not isinstance(arguments, dict):
        raise ConfigError(f"agent.arguments: expected keys and values, got '{text}'")
    return arguments


def take(flags: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of a flag, given as `--flag value` or `--flag=value`, and all other flags."""
    values: list[str] = []
    others: list[str] = []
    remaining = iter(flags)
    for flag in remaining:
        if flag == name:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name}: expected a value")
            values.append(value)
        elif flag.startswith(f"{name}="):
            values.append(flag.partition("=")[2])
        else:
            others.append(flag)
    return values, others
