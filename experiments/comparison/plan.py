"""A comparison: methods × settings × pools of teachers × seeds, as one YAML file describes them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments.comparison.kinds import DISTILLATION, Entry, Kind, find_kind
from experiments.comparison.statistics import Spread
from experiments.config import CONFIGS, read_yaml
from experiments.executors import Task
from experiments.running.log import ROWS
from experiments.running.result import RunResult, read_result
from mtkd_env.errors import ConfigError, check_name, errors_of
from mtkd_env.files import name_in_path, path_or_name, user_path

FOLDERS = (CONFIGS / "benchmark", CONFIGS / "transfer" / "tables")

KEYS = (
    *("title", "kind", "baseline", "ceiling", "recipe", "base", "settings", "methods"),
    *("pools", "seeds", "paper", "paper_title"),
)

# Keys of every configuration that a comparison says elsewhere.
LABELS = {"method": "methods", "setting": "settings"}

# Of a comparison that has but one.
UNNAMED = ""

# Seed of the pool of teachers, if that varies, and of the student.
Draw = tuple[int | None, int]


@dataclass(frozen=True)
class Selection:
    """What the command line leaves of a comparison; none keeps all.

    Attributes:
        methods: Labels of methods, with * for anything.
        settings: Names of settings, likewise.
        seeds: Seeds, which need not be those of the file.
        pools: Seeds of pools of teachers, likewise.
    """

    methods: Sequence[str] | None = None
    settings: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    pools: Sequence[int] | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        method: Label of its method.
        setting: Name of its setting.
        config: Its configuration.
        folder: Where it is kept; the same for the same configuration.
        kind: What kind of run it is.
        pool: Seed of its pool of teachers; none where the comparison has but the file's.
    """

    method: str
    setting: str
    config: Any
    folder: Path
    kind: Kind
    pool: int | None = None

    @property
    def name(self) -> str:
        """Method, setting, pool and seed."""
        pool = "" if self.pool is None else f"pool {self.pool}"
        parts = (self.method, self.setting, pool, f"seed {self.config.seed}")
        return " ".join(filter(None, parts))

    @property
    def result(self) -> RunResult | None:
        """What it came to, if it is finished."""
        return read_result(self.kind.result_type, self.folder)

    def task(self, threads: int | None = None) -> Task:
        """Does the run in a process of its own.

        Args:
            threads: CPU threads, unless its configuration says how many.
        """
        config = replace(self.config, threads=self.config.threads or threads)
        work = partial(self.kind.train, config, self.folder, self.name)
        return Task(self.name, work, self.folder / ROWS, *self.kind.length(config))


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        title: Heading of the tables.
        kind: What kind of runs it compares.
        baseline: Label of the method that differences are taken against.
        methods: Labels of the methods, in the order of the tables' rows.
        settings: Names of the settings.
        runs: All runs, in the order they are done in: every method once, then the
            next seed or pool.
        paper: Published accuracies in %, by method and setting.
        paper_title: Heading of their column; says what they were measured on.
        ceiling: Label of the method that is worth 1 in normalised scores, if there are to be any.
    """

    title: str
    kind: Kind
    baseline: str | None
    methods: Sequence[str]
    settings: Sequence[str]
    runs: Sequence[PlannedRun]
    paper: Mapping[tuple[str, str], Spread] = field(default_factory=dict)
    paper_title: str = "paper"
    ceiling: str | None = None


def find_file(name: str) -> Path:
    """The file of a comparison: a path, or the short name of one that comes along.

    Raises:
        ConfigError: Neither.
    """
    path = user_path(name)
    if path_or_name(name) or path.is_file():
        return path
    shipped = {path.stem: path for folder in FOLDERS for path in folder.glob("*.yaml")}
    check_name(shipped, name, "comparison")
    return shipped[name]


def load_comparison(
    path: Path,
    flags: Sequence[str],
    selection: Selection,
    output: Path,
    weights: Sequence[str] = (),
) -> Comparison:
    """Reads a comparison and checks all its configurations; the data are left to its kind.

    Its runs are every method in every setting with every seed. `pools: [0, 1]` are seeds of pools
    of teachers (`teachers.seed`): with `seeds`, every pool has students of each of them; without,
    one student, whose seed is the pool's. Which labels are known or wrong varies with the pool as
    well, unless `data.labelled_seed` or `data.label_noise_seed` is set.

    Args:
        path: The YAML file.
        flags: Flags for every run.
        selection: What to leave out.
        output: Folder of the comparison.
        weights: Further files of backbones, as `METHOD:RESNET=PATH`.

    Raises:
        ConfigError: Anything that cannot be used; names file and key.
    """
    return _Reader(path, flags).read(selection, output, weights)


class _Reader:
    """The file of a comparison, entry by entry."""

    def __init__(self, path: Path, flags: Sequence[str]) -> None:
        self._path = path
        self._flags = flags
        self._content = read_yaml(path, "comparison")
        with errors_of(path):
            if what := self._content.get("benchmark"):
                raise ConfigError(f"a benchmark, not a comparison: mtkd benchmark --what {what}")
            for key in self._content:
                check_name(KEYS, str(key), "key")
            self._kind = find_kind(str(self._content.get("kind", DISTILLATION)))

    def read(self, selection: Selection, output: Path, weights: Sequence[str]) -> Comparison:
        with errors_of(self._path):
            methods = self._sections("methods")
            settings = self._sections("settings") or {UNNAMED: {}}
        for text in weights:
            self._add_weights(methods, text)
        with errors_of(self._path):
            if not methods:
                raise ConfigError("methods: expected at least one")
            labels = _chosen(methods, selection.methods, "methods")
            names = _chosen(settings, selection.settings, "settings")
            draws = self._draws(selection)
            baseline, ceiling = (self._method(key, methods) for key in ("baseline", "ceiling"))
            paper = self._paper(methods, settings)
        pairs = [(label, name) for name in names for label in labels]
        configs = {pair: self._config(pair, methods[pair[0]], settings[pair[1]]) for pair in pairs}
        return Comparison(
            title=str(self._content.get("title", self._path.stem)),
            kind=self._kind,
            baseline=baseline,
            ceiling=ceiling,
            methods=list(methods),
            settings=list(settings),
            runs=[
                self._plan(pair, configs[pair], draw, output) for draw in draws for pair in pairs
            ],
            paper=paper,
            paper_title=str(self._content.get("paper_title", Comparison.paper_title)),
        )

    def _add_weights(self, methods: dict[str, dict[str, Any]], text: str) -> None:
        """Adds the file of a backbone to those of a method."""
        where, equals, path = text.partition("=")
        method, colon, resnet = where.partition(":")
        if "weights" not in self._kind.reserved:
            raise ConfigError(f"--weights: means nothing for the runs of {self._path}")
        if not (equals and colon):
            raise ConfigError(f"--weights: expected METHOD:RESNET=PATH, got '{text}'")
        methods[method] = methods.get(method, {}) | {resnet: path}

    def _plan(self, pair: tuple[str, str], config: Any, draw: Draw, output: Path) -> PlannedRun:
        method, setting = pair
        pool, seed = draw
        config = replace(config, seed=seed, method=method, setting=setting)
        if pool is not None:
            with errors_of(self._path):
                config = self._kind.of_pool(config, pool)
        number = "" if pool is None else f"pool{pool}"
        parts = [*filter(None, (*pair, number)), f"seed{seed}", config.digest[:8]]
        folder = output / "runs" / "-".join(map(name_in_path, parts))
        config = self._kind.placed(config, folder)
        return PlannedRun(method, setting, config, folder, self._kind, pool)

    def _sections(self, key: str) -> dict[str, dict[str, Any]]:
        """Names and their overrides."""
        entries = _mapping(key, self._content.get(key))
        return {str(name): _mapping(f"{key}.{name}", entry) for name, entry in entries.items()}

    def _draws(self, selection: Selection) -> list[Draw]:
        """Every pool with every seed; pools alone are their students' seeds, too."""
        pools = self._numbers("pools", selection.pools)
        seeds = self._numbers("seeds", selection.seeds)
        if not pools:
            return [(None, seed) for seed in seeds or [0]]
        return list(product(pools, seeds)) if seeds else [(pool, pool) for pool in pools]

    def _numbers(self, key: str, chosen: Sequence[int] | None) -> list[int]:
        """Seeds; none where nobody has said any."""
        if chosen is None and key not in self._content:
            return []
        seeds = self._content[key] if chosen is None else chosen
        proper = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
        if not proper or not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{key}: expected different numbers >= 0, got {seeds!r}")
        return list(seeds)

    def _method(self, key: str, methods: Collection[str]) -> str | None:
        """The label of a method that a key names."""
        if (label := self._content.get(key)) is None:
            return None
        check_name(methods, str(label), key)
        return str(label)

    def _config(
        self, pair: tuple[str, str], method: dict[str, Any], setting: dict[str, Any]
    ) -> Any:
        label, name = pair
        recipe = setting.get("recipe", self._content.get("recipe"))
        own = {key: value for key, value in setting.items() if key != "recipe"}
        with errors_of(self._path):
            base = _mapping("base", self._content.get("base"))
            sections = {"base": base, f"settings.{name}": own, f"methods.{label}": method}
            for section, values in sections.items():
                for key, instead in {**self._kind.reserved, **LABELS}.items():
                    if key in values and not (section.startswith("methods") and key == "algo"):
                        raise ConfigError(f"{section}.{key}: cannot be given here; see {instead}")
            named = None if recipe is None else str(recipe)
            if named and (path := path_or_name(named)):
                named = str(self._path.parent / path)
        return self._kind.config(Entry(self._path, named, name, label, sections), self._flags)

    def _paper(
        self, methods: Collection[str], settings: Collection[str]
    ) -> dict[tuple[str, str], Spread]:
        figures: dict[tuple[str, str], Spread] = {}
        for label, entry in _mapping("paper", self._content.get("paper")).items():
            check_name(methods, str(label), "method of the paper")
            by_setting = entry if isinstance(entry, dict) else dict.fromkeys(settings, entry)
            for name, figure in by_setting.items():
                check_name(settings, str(name), "setting of the paper")
                figures[str(label), str(name)] = read_figure(f"paper.{label}", figure)
        return figures


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ConfigError(f"{key}: expected keys and values, found {value!r}")
    return value or {}


def _chosen(known: Collection[str], chosen: Sequence[str] | None, key: str) -> list[str]:
    for pattern in chosen or ():
        if not any(fnmatch(name, pattern) for name in known):
            check_name(known, pattern, key.removesuffix("s"))
    return [n for n in known if chosen is None or any(fnmatch(n, p) for p in chosen)]


def read_figure(key: str, value: Any) -> Spread:
    """Mean and standard deviation from `78.39`, `78.39 ± 0.14` or `[78.39, 0.14]`.

    Raises:
        ConfigError: It is none of them; names the key.
    """
    parts = value if isinstance(value, list) else str(value).split("±")
    try:
        mean, std = [*map(float, parts), None][:2] if len(parts) < 3 else [None, None]
    except (TypeError, ValueError):
        mean = None
    if mean is None:
        raise ConfigError(f"{key}: expected '78.39 ± 0.14' or a number, got {value!r}")
    return Spread(mean, std)
