"""A comparison: methods × settings × seeds, as one YAML file describes them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.comparison.statistics import Spread
from experiments.config import (
    CONFIGS,
    ExperimentConfig,
    Flags,
    Layer,
    algo_layers,
    build_config,
    default_layer,
    mapping_layer,
    read_yaml,
    recipe_layers,
)
from experiments.experiment import check_names
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.files import name_in_path, path_or_name, user_path
from mtkd_env.registration import load_images

BENCHMARKS = CONFIGS / "benchmark"

KEYS = (
    *("title", "baseline", "recipe", "base", "settings", "methods", "seeds"),
    *("paper", "paper_title"),
)

# Keys of a configuration that a comparison says elsewhere.
SAID_ELSEWHERE = {
    "seed": "seeds",
    "output": "--output",
    "algo": "methods",
    "recipe": "recipe of the file or of a setting",
}

# Of a comparison that has but one.
UNNAMED = ""


@dataclass(frozen=True)
class Selection:
    """What the command line leaves of a comparison; none keeps all.

    Attributes:
        methods: Labels of methods.
        settings: Names of settings.
        seeds: Seeds, which need not be those of the file.
    """

    methods: Sequence[str] | None = None
    settings: Sequence[str] | None = None
    seeds: Sequence[int] | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        method: Label of its method.
        setting: Name of its setting.
        config: Its configuration.
        folder: Where it is kept; the same for the same configuration.
    """

    method: str
    setting: str
    config: ExperimentConfig
    folder: Path

    @property
    def name(self) -> str:
        """Method, setting and seed."""
        return " ".join(filter(None, (self.method, self.setting, f"seed {self.config.seed}")))


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        title: Heading of the tables.
        baseline: Label of the method that differences are taken against.
        methods: Labels of the methods, in the order of the tables' rows.
        settings: Names of the settings.
        runs: All runs, in the order they are done in: every method once, then the next seed.
        paper: Published accuracies in %, by method and setting.
        paper_title: Heading of their column; says what they were measured on.
    """

    title: str
    baseline: str | None
    methods: Sequence[str]
    settings: Sequence[str]
    runs: Sequence[PlannedRun]
    paper: Mapping[tuple[str, str], Spread] = field(default_factory=dict)
    paper_title: str = "paper"


def find_file(name: str) -> Path:
    """The file of a comparison: a path, or the short name of one in configs/benchmark.

    Raises:
        ConfigError: Neither.
    """
    path = user_path(name)
    if path_or_name(name) or path.is_file():
        return path
    shipped = {path.stem: path for path in BENCHMARKS.glob("*.yaml")}
    check_name(shipped, name, "comparison")
    return shipped[name]


def load_comparison(path: Path, flags: Flags, selection: Selection, output: Path) -> Comparison:
    """Reads a comparison and checks all its configurations; the images are left to `check_data`.

    Layers of a run, later ones win: configs/default.yaml, configs/recipe/<recipe>.yaml, `base`, its
    setting, configs/algo/<algo>.yaml, its method, `--config` files, flags. The recipe is that of
    `--recipe`, of the setting or of the file; students are settings.

    Args:
        path: The YAML file.
        flags: Flags for every run.
        selection: What to leave out.
        output: Folder of the comparison.

    Raises:
        ConfigError: Anything that cannot be used; names file and key.
    """
    return _Reader(path, flags).read(selection, output)


class _Reader:
    """The file of a comparison, entry by entry."""

    def __init__(self, path: Path, flags: Flags) -> None:
        self._path = path
        self._flags = flags
        self._content = read_yaml(path, "comparison")
        if what := self._content.get("benchmark"):
            raise self._error(
                f"a benchmark, not a comparison: python experiments/benchmark.py --what {what}"
            )
        for key in self._content:
            self._check(KEYS, str(key), "key")
        if flags.algos:
            raise ConfigError("--algo: a comparison's methods stand in its file; see --methods")

    def read(self, selection: Selection, output: Path) -> Comparison:
        methods = self._sections("methods")
        settings = self._sections("settings") or {UNNAMED: {}}
        if not methods:
            raise self._error("methods: expected at least one")
        labels = self._chosen(methods, selection.methods, "methods")
        names = self._chosen(settings, selection.settings, "settings")
        seeds = self._seeds(selection.seeds)
        pairs = [(label, name) for name in names for label in labels]
        configs = {pair: self._config(pair, methods[pair[0]], settings[pair[1]]) for pair in pairs}
        return Comparison(
            title=str(self._content.get("title", self._path.stem)),
            baseline=self._baseline(methods),
            methods=labels,
            settings=names,
            runs=[_plan(*pair, configs[pair], seed, output) for seed in seeds for pair in pairs],
            paper=self._paper(methods, settings),
            paper_title=str(self._content.get("paper_title", Comparison.paper_title)),
        )

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._path}: {message}")

    def _check(self, known: Iterable[str], name: str, kind: str) -> None:
        try:
            check_name(list(known), name, kind)
        except ConfigError as error:
            raise self._error(str(error)) from error

    def _mapping(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise self._error(f"{key}: expected keys and values, found {value!r}")
        return value or {}

    def _sections(self, key: str) -> dict[str, dict[str, Any]]:
        """Names and their overrides."""
        entries = self._mapping(key, self._content.get(key))
        return {str(name): self._mapping(f"{key}.{name}", entry) for name, entry in entries.items()}

    def _chosen(self, known: Iterable[str], chosen: Sequence[str] | None, key: str) -> list[str]:
        for name in chosen or ():
            self._check(known, name, key.removesuffix("s"))
        return [name for name in known if chosen is None or name in chosen]

    def _seeds(self, chosen: Sequence[int] | None) -> list[int]:
        seeds = self._content.get("seeds", [0]) if chosen is None else chosen
        proper = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
        if not proper or not seeds or len(set(seeds)) < len(seeds):
            raise self._error(f"seeds: expected different numbers >= 0, got {seeds!r}")
        return list(seeds)

    def _baseline(self, methods: Iterable[str]) -> str | None:
        baseline = self._content.get("baseline")
        if baseline is not None:
            self._check(methods, str(baseline), "baseline")
        return None if baseline is None else str(baseline)

    def _config(
        self, pair: tuple[str, str], method: dict[str, Any], setting: dict[str, Any]
    ) -> ExperimentConfig:
        label, name = pair
        overrides = {key: value for key, value in method.items() if key != "algo"}
        algo = str(method.get("algo", label))
        recipe = self._recipe(setting)
        layers = [
            default_layer(),
            *self._recipe_layers(recipe),
            self._layer("base", self._mapping("base", self._content.get("base"))),
            self._layer(
                f"settings.{name}", {key: setting[key] for key in setting if key != "recipe"}
            ),
            *algo_layers(algo),
            self._layer(f"methods.{label}", overrides),
        ]
        config = build_config(algo, layers, self._flags, recipe=recipe, program="compare.py")
        try:
            check_names(config)
        except ConfigError as error:
            raise self._error(f"methods.{label}: {error}") from error
        return config

    def _recipe(self, setting: dict[str, Any]) -> str | None:
        """The flag's recipe, the setting's or the file's; one of a path stands beside the file."""
        named = setting.get("recipe", self._content.get("recipe"))
        if self._flags.recipe is not None or named is None:
            return self._flags.recipe
        path = path_or_name(str(named))
        return str(self._path.parent / path) if path else str(named)

    def _recipe_layers(self, recipe: str | None) -> list[Layer]:
        try:
            return recipe_layers(recipe)
        except ConfigError as error:
            raise self._error(f"recipe: {error}") from error

    def _layer(self, key: str, values: dict[str, Any]) -> Layer:
        for reserved, instead in SAID_ELSEWHERE.items():
            if reserved in values:
                raise self._error(f"{key}.{reserved}: cannot be given here; see {instead}")
        if isinstance(pool := values.get("teachers"), str):
            values = {**values, "teachers": str(self._path.parent / user_path(pool))}
        return mapping_layer(f"{self._path}: {key}", values)

    def _paper(
        self, methods: Iterable[str], settings: Iterable[str]
    ) -> dict[tuple[str, str], Spread]:
        figures: dict[tuple[str, str], Spread] = {}
        entries = self._mapping("paper", self._content.get("paper"))
        for label, entry in entries.items():
            self._check(methods, str(label), "method of the paper")
            by_setting = entry if isinstance(entry, dict) else dict.fromkeys(settings, entry)
            for name, figure in by_setting.items():
                self._check(settings, str(name), "setting of the paper")
                figures[str(label), str(name)] = self._figure(f"paper.{label}", figure)
        return figures

    def _figure(self, key: str, value: Any) -> Spread:
        """Mean and standard deviation from `78.39`, `78.39 ± 0.14` or `[78.39, 0.14]`."""
        parts = value if isinstance(value, list) else str(value).split("±")
        try:
            mean, std = [*map(float, parts), None][:2] if len(parts) < 3 else [None, None]
        except (TypeError, ValueError):
            mean = None
        if mean is None:
            raise self._error(f"{key}: expected '78.39 ± 0.14' or a number, got {value!r}")
        return Spread(mean, std)


def check_data(comparison: Comparison) -> None:
    """Loads every distinct set of images once, so that mistakes show before the first run.

    Raises:
        ConfigError: Images that cannot be loaded.
    """
    for data in {repr(run.config.data): run.config.data for run in comparison.runs}.values():
        load_images(
            data.dataset,
            data.arguments,
            val_fraction=data.val_fraction,
            train_size=data.train_size,
        )


def _plan(
    method: str, setting: str, config: ExperimentConfig, seed: int, output: Path
) -> PlannedRun:
    config = replace(config, seed=seed, output=str(output / "runs"))
    parts = [*filter(None, (method, setting)), f"seed{seed}", config.digest[:8]]
    name = "-".join(map(name_in_path, parts))
    return PlannedRun(method, setting, config, output / "runs" / name)
