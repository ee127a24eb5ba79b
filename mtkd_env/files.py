"""Files that are either whole or not there: atomic writes, and checkpoints that hold no code."""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import Any

import safetensors.torch
import torch
import yaml

from mtkd_env.errors import ConfigError
from mtkd_env.file_kinds import kind_of

# What a YAML text may hold: values, those that aliases stand for each time, and levels of them.
MOST_VALUES, MOST_LEVELS = 10_000, 50

TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
PLAIN_TAGS = {TEXT, MERGE} | {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "seq", "map")
}

# What timm and Lightning keep of their flags beside the weights; it holds values only.
FLAGS = (argparse.Namespace, PosixPath)

# What torch says of a class or function in a checkpoint, which it does not run.
REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")


# How a file of tensors ends, and the one beside it that says what they are of.
TENSORS, DESCRIPTION = ".safetensors", ".json"

# What the names of files begin with that are not whole yet.
UNFINISHED = ".new-"

# What a name cannot keep in a path, and the bytes that are left of a long one: a file's name has
# 255 at most, and may consist of two such names, a digest and a number.
UNSAFE = re.compile(r"[^\w.+=-]+")
LONGEST_NAME = 80


def user_path(text: str | Path) -> Path:
    """A path that a user gave, with the home directory in place of `~`.

    Raises:
        ConfigError: There is no home directory, or no file can have such a name.
    """
    if "\0" in str(text):
        raise ConfigError(f"{str(text)!r}: a path cannot hold a null character")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: no home directory to put there; give the whole path") from None


def whole_path(text: str | Path) -> str:
    """What a user's path names, wherever it is read: as `user_path`, and absolute."""
    return str(user_path(text).absolute())


def path_or_name(text: str) -> Path | None:
    """The path that a text is; none if it is the short name of something that is shipped."""
    path = user_path(text)
    return path if path.suffix or len(path.parts) > 1 else None


def name_in_path(name: str) -> str:
    """A name as a part of a path: visible, not too long, and not leading out of its folder.

    What other names have lost is replaced by `_`, what is cut off by its digest.
    """
    clean = UNSAFE.sub("_", name).lstrip(".") or "_"
    if len(clean.encode()) <= LONGEST_NAME:
        return clean
    digest = hashlib.sha256(clean.encode()).hexdigest()[:8]
    return clean.encode()[: LONGEST_NAME - len(digest)].decode(errors="ignore") + digest


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where trained teachers are kept.

    The chosen folder, else `$MTKD_CACHE`, else `mtkd_env` in `$XDG_CACHE_HOME` or in `~/.cache`.

    Raises:
        ConfigError: None is chosen, and there is no home directory.
    """
    if chosen := chosen or os.environ.get("MTKD_CACHE"):
        return user_path(chosen)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mtkd_env"
    except ConfigError:
        raise ConfigError(
            "cache: no home directory to keep trained teachers in; set MTKD_CACHE or give --cache"
        ) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then flushes it to disk and renames it.

    A file of that name is replaced as a whole; if `write` fails, nothing is left behind.

    Raises:
        OSError: The file cannot be written; names it, whatever a library makes of that.
    """
    with _temporary(path) as temporary:
        write(temporary)
        _publish(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new hidden file beside `path`, which is gone afterwards unless it was renamed.

    What killed processes have left in the folder goes with it.
    """
    with named_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            # It says so as if `path` were there; a file is where a folder would be.
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        remove_unfinished(path.parent)
        handle, temporary = _new_file(path)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def _new_file(path: Path) -> tuple[int, Path]:
    """A new file, and what keeps it locked until it is closed, or the process is dead."""
    while True:
        prefix = f"{UNFINISHED}{path.stem}-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have taken it for left before it was locked.
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def refuse_links(folder: Path) -> None:
    """Checks that nothing in a folder is a symbolic link, through which one would write elsewhere.

    Raises:
        ConfigError: Something is; names it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink():
            raise ConfigError(
                f"{path}: a symbolic link to {path.readlink()}; what is written into this folder "
                "would be written there"
            )


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed amid `write_atomically` have left in a folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):  # Another process removes it too, or still has it locked.
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(handle)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Makes an error of the system in a block one that names a file or folder.

    A library may have made another error of it: torch's writer one of its own position.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that an error was raised by or amid; none if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def _publish(temporary: Path, path: Path) -> None:
    """Renames a file once it is on disk, and sees to it that the new name is as well."""
    sync(temporary)
    temporary.chmod(0o644)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of parts, one behind the other, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers and containers of them atomically."""
    write_atomically(path, lambda temporary: _save(content, temporary))


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors, wherever they are, as safetensors, atomically."""
    # Copies, since safetensors refuses tensors that share memory.
    layout, about = torch.contiguous_format, {"format": "pt"}
    own = {name: one.detach().cpu().clone(memory_format=layout) for name, one in tensors.items()}
    write_atomically(path, lambda to: safetensors.torch.save_file(own, to, about))


def save_described(
    path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]
) -> None:
    """Writes tensors, and JSON beside them that says what they are of.

    Args:
        path: The file of the tensors.
        tensors: By their names, wherever they are.
        about: What the JSON says beside their `sha256`.

    Raises:
        OSError: A file cannot be written; names it.
    """
    save_tensors(path, tensors)
    text = json.dumps({**about, "sha256": file_digest(path)}, indent=2)
    write_text(path.with_suffix(DESCRIPTION), f"{text}\n")


def read_description(path: Path) -> dict[str, Any]:
    """What `save_described` has said of a file of tensors.

    Args:
        path: The file of the tensors, which are not read.

    Raises:
        ConfigError: One of the two files cannot be read, or they do not belong together.
    """
    beside = path.with_suffix(DESCRIPTION)
    try:
        about = json.loads(beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{beside}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{beside}: not valid JSON ({error})") from error
    if not isinstance(about, dict) or "sha256" not in about:
        raise ConfigError(f"{beside}: expected keys and values, and among them sha256")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, of which {beside.name} tells")
    if about["sha256"] != file_digest(path):
        raise ConfigError(f"{path}: holds other tensors than {beside.name} was written for")
    return about


def _save(content: dict[str, Any], path: Path) -> None:
    # Into a file of Python's, because torch does not say why it could not write into its own.
    with path.open("wb") as file:
        torch.save(content, file)


def save_with_digest(path: Path, content: dict[str, Any]) -> Path:
    """Writes a checkpoint atomically under a name that says what it holds.

    Args:
        path: The file, to whose stem `-` and the SHA-256 of its content are added.
        content: As for `save_checkpoint`.

    Returns:
        The file that was written.
    """
    with _temporary(path) as temporary:
        _save(content, temporary)
        named = path.with_stem(f"{path.stem}-{file_digest(temporary)}")
        _publish(temporary, named)
    return named


def has_own_digest(path: Path) -> bool:
    """Whether a file of `save_with_digest` still holds what was written into it."""
    return path.stem.rpartition("-")[2] == file_digest(path)


def load_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, or safetensors; never runs code from the file.

    Args:
        path: The file.
        mapped: Whether the tensors are to stay in the file, from which they are read when used.

    Raises:
        ConfigError: No such file, a damaged one, or one that holds more than tensors; says what it
            is.
    """
    try:
        if _holds_safetensors(path):
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([*FLAGS]):
            # Of files that are not torch's own, which are refused below.
            warnings.filterwarnings("ignore", "Detected pickle protocol|.*TorchScript archive")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except torch.OutOfMemoryError:
        raise
    # Bytes that are no checkpoint lead torch's readers into errors of any class.
    except Exception as error:
        raise ConfigError(f"{path}: {_why_unread(path, error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


def _holds_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: with a length, then JSON."""
    with path.open("rb") as file:
        head = file.read(10)
    return head[8:] == b'{"' and int.from_bytes(head[:8], "little") < path.stat().st_size


def _why_unread(path: Path, error: Exception) -> str:
    if not path.exists():
        return "no such checkpoint"
    if path.is_dir():
        return "not a checkpoint but a folder"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if named := REFUSED.search(str(error)):
        return (
            f"not a checkpoint of tensors only (it names {named[1]}); save its weights alone, if "
            f"you trust it: torch.save(torch.load('{path.name}', weights_only=False)[KEY], "
            "'weights.pt'), KEY being state_dict, model, …; or .state_dict() in place of [KEY] if "
            "it is a whole module"
        )
    kind = kind_of(path)
    return f"not a checkpoint but {kind}" if kind else "damaged checkpoint"


class _PlainLoader(yaml.SafeLoader):
    """Takes keys as the texts that they are, and dates too; a key must not stand there twice.

    Of a key that does, YAML would take the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _wrong(f"the key '{key.value}' is given twice", key)
            seen.add(key.value)
            if key.tag != MERGE:
                key.tag = TEXT
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 takes 5e-4, without a point, for a text.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


class _PlainDumper(yaml.SafeDumper):
    """Quotes every text that `_PlainLoader` would take for something else."""


_PlainDumper.yaml_implicit_resolvers = _PlainLoader.yaml_implicit_resolvers


def to_yaml(values: Any) -> str:
    """A YAML text that `parse_yaml` reads as the same values; of tuples, as lists."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: texts, numbers, truth values, and lists and mappings by text of them.

    Raises:
        yaml.YAMLError: It is not valid, holds something else, gives a key twice, or is too deep or
            too large once its aliases are what they stand for.
    """
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node, {})
        return loader.construct_document(node)
    # The latter two for what is said to be, or looks like, a number and is none.
    except (RecursionError, ValueError, LookupError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error
    finally:
        loader.dispose()


def load_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: It is not one; names it.
        OSError: It cannot be read.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML ({reason})") from error


def _check_extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node holds with those that its aliases stand for, and on how many levels.

    Args:
        node: The node.
        known: What was found for other nodes; of one that is being looked into, nothing.
    """
    if node.tag not in PLAIN_TAGS:
        raise _wrong(f"expected a plain value, found one of the kind {node.tag}", node)
    if id(node) not in known:
        known[id(node)] = 0, 0
        inner = [_check_extent(part, known) for part in _parts(node)]
        count = 1 + sum(count for count, _ in inner)
        levels = 1 + max((levels for _, levels in inner), default=0)
        if count > MOST_VALUES or levels > MOST_LEVELS:
            most = f"{MOST_VALUES} values on {MOST_LEVELS} levels"
            raise _wrong(f"more than {most}, aliases included", node)
        known[id(node)] = count, levels
    if known[id(node)] == (0, 0):
        raise _wrong("an alias of what it is a part of", node)
    return known[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The entries of a list, the values of a mapping; none of anything else."""
    if not isinstance(node, yaml.MappingNode):
        return node.value if isinstance(node, yaml.SequenceNode) else []
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _wrong("expected a text as key, found a list or a mapping", key)
    return [value for _, value in node.value]


def _wrong(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
