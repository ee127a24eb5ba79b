"""What a name stands for, such as `module:Name`; and which ones a file may say.

Whatever a table names may also be given as an object, by one rule, which `Kind` is.
A file of a run or a configuration is data, maybe somebody else's, and to import a module runs it.
So a file may name what belongs to this project or to a package that it declares to depend on;
everything else has to be said by the user: on the command line, in Python, or by `--trust`.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar

from mtkd_env.errors import ConfigError, did_you_mean

T = TypeVar("T")

# The optional part of this project that brings a package along.
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "pycocotools": "detection",
    "ray": "ray",
    "sb3_contrib": "contrib",
    "segmentation_models_pytorch": "segmentation",
    "timm": "timm",
    "torchmetrics": "detection",
    "torchrl": "torchrl",
}

# A name in a table, `module:Name`, or the object itself.
Named: TypeAlias = str | Any

# Lets files name anything of the expected kind.
TRUST = "--trust"

# Its packages, and what the names of libraries' networks begin with.
PROJECT = frozenset({"agents", "experiments", "mtkd_env", "timm", "torchvision"})

# What a misspelt package was meant to be.
PACKAGES = PROJECT | {"sb3_contrib", "stable_baselines3"}

# Of a requirement: it is for work on the project itself.
DEVELOPERS = re.compile(r"extra == .(dev|docs)\b")

# `module:Name`, or `file.py:Name`; what stands behind an @ says something about it.
SUFFIX = ".py"
MODULE, ATTRIBUTE = rf"[^\s:,'\"\[\]{{}}=]+\{SUFFIX}|[^\W\d][\w.]*", r"[^\W\d]\w*"
NAME = re.compile(rf"({MODULE}):({ATTRIBUTE})((?:@.*)?)", re.DOTALL)
NAME_IN_TEXT = re.compile(rf"({MODULE}):({ATTRIBUTE})")

# What records call an object that its name alone does not bring back.
IN_MEMORY = "object of "


def optional(module: str) -> Any:
    """A module of a package that need not be there.

    Raises:
        ConfigError: It is not; says what installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        how = f"install it with pip install 'mtkd-env[{EXTRAS[package]}]'"
        raise ConfigError(f"needs {package}; {how}") from error


def import_name(name: str, fits: Callable[[Any], bool], expected: str) -> Any:
    """What `module:Name` or `file.py:Name` stands for; it is not called.

    Args:
        name: The name, with or without something behind an @.
        fits: Whether an object is of the expected kind.
        expected: That kind, for errors.

    Raises:
        ConfigError: There is no such object, one of another kind, or one that is not to be trusted
            (see `Trust.applied`).
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"cannot load '{name}': expected module:Name or file.py:Name")
    if (applied := _APPLIED.get()) is not None:
        applied.check(match)
    path = f"{match[1]}:{match[2]}"
    try:
        module = _module(match[1])
    # A user's module raises whatever it happens upon.
    except Exception as error:
        raise ConfigError(f"cannot load '{path}': {_why_not(match[1], error)}") from error
    try:
        found = getattr(module, match[2])
    except AttributeError as error:
        raise ConfigError(
            f"cannot load '{path}': {error}{did_you_mean(match[2], vars(module))}"
        ) from error
    if not fits(found):
        raise ConfigError(f"'{path}' is not {expected} but {found!r}")
    return found


def _module(named: str) -> ModuleType:
    """The module of a name, or of a file; if not installed, it may be in the working folder."""
    package = package_of(named)
    if not named.endswith(SUFFIX):
        if importlib.util.find_spec(package) is None:
            _look_into(Path.cwd())
        return importlib.import_module(named)
    path = Path(named).expanduser().absolute()
    if not path.is_file():
        raise ConfigError("no such file")
    _look_into(path.parent)
    module = importlib.import_module(path.stem)
    if not path.samefile(module.__file__ or ""):
        raise ConfigError(f"the module {path.stem} is another file, {module.__file__}; rename one")
    return module


def _look_into(folder: Path) -> None:
    """Lets modules be found in a folder, behind all other places."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _why_not(named: str, error: Exception) -> str:
    """Why a module cannot be imported."""
    if isinstance(error, ConfigError):
        return str(error)
    if not isinstance(error, ImportError | ValueError):
        return f"{type(error).__name__}: {error}"
    nearest = did_you_mean(package_of(named), PACKAGES)
    return f"{error}{nearest or '; is its folder in PYTHONPATH?'}"


def whole_name(text: str) -> str:
    """A name as it is from any working folder: `file.py:Name` with the whole path."""
    match = NAME.fullmatch(text)
    return text if match is None else f"{_place(match[1])}:{match[2]}{match[3]}"


def _place(module: str) -> str:
    """A module's name, or the whole path of a file."""
    if not module.endswith(SUFFIX):
        return module
    return str(Path(module).expanduser().absolute())


@dataclass(frozen=True)
class Kind(Generic[T]):
    """Things that a table names, of which anybody may give others.

    Attributes:
        table: Those that have a name.
        what: What one is called in errors, such as `reward`.
        fits: Whether an object that is not of the table is of the kind; told without calling it.
        expected: What such an object is, for errors.
        adapted: Makes it what the table has; it is so by default.
    """

    table: Mapping[str, T]
    what: str
    fits: Callable[[Any], bool]
    expected: str
    adapted: Callable[[Any], T] = lambda found: found

    def find(self, given: Named) -> T:
        """What a name or an object stands for.

        Args:
            given: A name in the table, `module:Name`, or an object.

        Raises:
            ConfigError: An unknown name, or something of another kind.
        """
        if not isinstance(given, str):
            if not self.fits(given):
                expected = f"a name or {self.expected}"
                raise ConfigError(f"{self.what}: expected {expected}, got {given!r}")
            return self.adapted(given)
        if given in self.table:
            return self.table[given]
        check_is_there(given, self.what)
        if NAME.fullmatch(given):
            try:
                return self.adapted(import_name(given, self.fits, self.expected))
            except ConfigError as error:
                raise ConfigError(f"{self.what}: {error}") from error
        names = ", ".join(sorted(self.table))
        raise ConfigError(
            f"unknown {self.what} {given!r}{did_you_mean(given, self.table)} "
            f"(known: {names}, or module:Name)"
        )


def is_class(found: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether something is a class of a kind."""
    return isinstance(found, type) and issubclass(found, kind)


def is_a(found: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether something is a class of a kind, or a partial call of one."""
    made = found.func if isinstance(found, partial) else found
    return is_class(made, kind)


def takes(count: int) -> Callable[[Any], bool]:
    """Whether something is a user's function of so many positional arguments, and no class."""

    def fits(found: Any) -> bool:
        if not is_users(found) or isinstance(found, type):
            return False
        try:
            # Of a module of torch, all that can be said of `__call__` is that it calls this.
            signature = inspect.signature(getattr(found, "forward", found))
        except ValueError:
            return False
        kinds = [one.kind for one in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return False
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return fits


def is_users(found: Any) -> bool:
    """Whether a function is no library's; those do much that an argument can ask for."""
    made = found.func if isinstance(found, partial) else found
    module = getattr(made, "__module__", None)
    if not callable(made) or module is None:
        return False
    package = package_of(module)
    return package not in sys.stdlib_module_names and not is_dependency(package)


def name_of(given: Named) -> str:
    """What records call something: its name, if that brings it back in another process.

    Returns:
        The name; `module:Name` of an object that is imported by it; for all other objects a text
        that `is_in_memory`, with the name of what they are or are made by.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping):  # Several by their names.
        return name_of(next(iter(given.values()), None))
    named = given if hasattr(given, "__qualname__") else type(given)
    module, name = named.__module__, named.__qualname__
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is given:
        return f"{module}:{name}"
    return f"{IN_MEMORY}{module}:{name}"


def is_in_memory(name: str) -> bool:
    """Whether a name in a record is of an object that it does not bring back."""
    return name.startswith(IN_MEMORY)


def check_is_there(name: str, what: str) -> None:
    """Raises a `ConfigError` if a name, which may come from a record, `is_in_memory`."""
    if is_in_memory(name):
        raise ConfigError(
            f"{what}: {name!r} was in the memory of the program that made the run; only a program "
            "that has it can use it again"
        )


@cache
def is_dependency(package: str) -> bool:
    """Whether a package comes with what the project declares to depend on, if only optionally."""
    return any(
        re.search(rf"^{package}(/|\.py,)", record, re.MULTILINE) for record in _dependency_files()
    )


@cache
def _dependency_files() -> tuple[str, ...]:
    """The list of files of each declared dependency that is installed, but the developers' own."""
    try:
        declared = requires("mtkd-env") or []
    except PackageNotFoundError:
        return ()
    users = [line for line in declared if not DEVELOPERS.search(line)]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in users}
    return tuple(filter(None, map(_files, names)))


def _files(distribution_name: str) -> str | None:
    try:
        return distribution(distribution_name).read_text("RECORD")
    except PackageNotFoundError:
        return None


def package_of(module: str) -> str:
    """The outermost package of a module."""
    return module.partition(".")[0]


@dataclass(frozen=True)
class Trust:
    """What files may name.

    Attributes:
        names: Names beside those of the project and of what it depends on; None for all.
    """

    names: frozenset[str] | None = frozenset()

    def check(self, name: re.Match[str], path: str = "") -> None:
        """Raises a `ConfigError` unless one name, a match of `NAME`, is to be trusted."""
        module = _place(name[1])
        package = "" if module.endswith(SUFFIX) else package_of(module)
        if self.names is None or f"{module}:{name[2]}" in self.names or package in PROJECT:
            return
        if not is_dependency(package):
            raise ConfigError(
                f"{path}'{name[0]}' is not of this project or of what it depends on; a file may "
                f"name it only with {TRUST}, which lets it run the code of {module}"
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it nothing else can be imported by its name."""
        token = _APPLIED.set(self)
        try:
            yield
        finally:
            _APPLIED.reset(token)


# The user's own names, on a command line or in Python, are not limited.
_APPLIED: ContextVar[Trust | None] = ContextVar("trust", default=None)


def check_trusted(values: Any) -> None:
    """Checks all names in some values, wherever they stand, before anything is imported.

    Args:
        values: Mappings, sequences and plain values, maybe from a file, and objects of such.

    Raises:
        ConfigError: A name that is not to be trusted (see `Trust.applied`).
    """
    if (trust := _APPLIED.get()) is None:
        return
    for key, text in texts_in(values):
        if match := NAME.fullmatch(text):
            trust.check(match, f"{key}: ")


def trust_of(argv: Iterable[str]) -> Trust:
    """What a command line trusts: everything with `--trust`, else the names that it says itself."""
    flags = list(argv)
    if TRUST in flags:
        return Trust(None)
    found = (match for flag in flags for match in NAME_IN_TEXT.finditer(flag))
    return Trust(frozenset(f"{_place(match[1])}:{match[2]}" for match in found))


def texts_in(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All texts in some values, keys included, and where they stand."""
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            inside = f"{path}.{key}" if path else str(key)
            yield inside, str(key)
            yield from texts_in(value, inside)
    elif isinstance(values, list | tuple | set | frozenset):
        for position, value in enumerate(values):
            yield from texts_in(value, f"{path}.{position}")
    elif hasattr(values, "__dict__"):
        yield from texts_in(vars(values), path)
