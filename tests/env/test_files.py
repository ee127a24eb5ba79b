import hashlib
import io
import math
import os
import pickle
import pwd
import re
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mtkd_env.errors import ConfigError
from mtkd_env.files import (
    cache_folder,
    file_digest,
    has_own_digest,
    load_checkpoint,
    name_in_path,
    parse_yaml,
    remove_unfinished,
    save_checkpoint,
    save_with_digest,
    to_yaml,
    user_path,
    whole_path,
    write_atomically,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content() -> dict[str, Any]:
    return {
        "tensors": {"a": torch.arange(3.0), "b": torch.tensor(True)},
        "numbers": [1, 2.5, None, 2**100],
        "text": "x",
    }


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state.pt"
    save_checkpoint(path, content())
    found = load_checkpoint(path)
    assert found["numbers"] == content()["numbers"]
    assert found["text"] == "x"
    for name, tensor in content()["tensors"].items():
        assert found["tensors"][name].equal(tensor)


def test_text_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "α = 1\n")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "α = 1\n"


def test_writing_replaces_the_whole_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "a long first version")
    write_text(path, "short")
    assert path.read_text() == "short"
    assert names(tmp_path) == ["note.txt"]


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "x")
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_failing_write_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, existing: str | None
) -> None:
    path = tmp_path / "note.txt"
    if existing is not None:
        path.write_text(existing)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert names(tmp_path) == ([] if existing is None else ["note.txt"])
    assert existing is None or path.read_text() == existing


def test_a_half_written_file_is_never_seen_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path  # or the rename would not be atomic
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"


def test_a_file_in_the_place_of_a_folder_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deeper" / "a.txt"):
        with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{path}'"):
            write_text(path, "")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "gone.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_checkpoint_is_named_as_damaged(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint(path, content())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConfigError, match=r"state\.pt: (damaged checkpoint|.* an empty file)"):
        load_checkpoint(path)


def bytes_of(write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Writes without the warnings of formats that are going out of use."""

    def silently(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(path)

    return silently


def zip_of(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photograph.jpg", b"")


def numpy_of(path: Path, save: Callable[..., None]) -> None:
    with path.open("wb") as file:
        save(file, np.zeros(2))


# Writers of files that are mistaken for checkpoints, and what the message calls them.
MISTAKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (
        lambda path: path.write_text("total 12\n"),
        "a text file, which begins with 'total 12'",
    ),
    "accents": (lambda path: path.write_text("é" * 999), "a text file, which begins with 'éé"),
    "json": (lambda path: path.write_text('{"a": 1}'), "a text file, which begins with '{"),
    "empty": (Path.touch, "an empty file"),
    "folder": (Path.mkdir, "a folder"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        "a pickle that torch.save did not write",
    ),
    "array": (lambda path: numpy_of(path, np.save), "a NumPy array"),
    "arrays": (lambda path: numpy_of(path, np.savez), "an archive of NumPy arrays"),
    "archive": (zip_of, "a zip archive that torch.save did not write"),
    "TorchScript": (
        bytes_of(lambda path: torch.jit.script(nn.Linear(1, 1)).save(str(path))),
        r"a TorchScript archive; save its weights: torch\.save\(torch\.jit\.load",
    ),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_what_is_mistaken_for_a_checkpoint_is_called_what_it_is(tmp_path: Path, case: str) -> None:
    write, kind = MISTAKEN[case]
    path = tmp_path / "state.pt"
    write(path)
    with pytest.raises(ConfigError, match=rf"state\.pt: not a checkpoint but {kind}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(1, 1), r"torch.nn.*Linear"),
        ({"opt": SimpleNamespace(lr=0.1), "model": {}}, "types.SimpleNamespace"),
        ({"best_acc": np.float64(1), "model": {}}, r"numpy.*\.scalar"),
    ],
)
def test_what_holds_more_than_tensors_is_refused_with_how_to_save_them(
    tmp_path: Path, content: object, named: str
) -> None:
    torch.save(content, tmp_path / "state.pt")
    expected = (
        rf"\(it names {named}\); save its weights alone.*load\('state\.pt', weights_only=False"
    )
    with pytest.raises(ConfigError, match=expected):
        load_checkpoint(tmp_path / "state.pt")


def test_flags_beside_the_weights_are_read(tmp_path: Path) -> None:
    content = {"args": Namespace(lr=0.1, data=Path("images")), "state_dict": {}}
    torch.save(content, tmp_path / "state.pt")
    assert load_checkpoint(tmp_path / "state.pt") == content


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(content=st.binary(max_size=64), begin=st.sampled_from([b"", b"PK", b"\x80\x02", b"t"]))
def test_any_bytes_are_refused_in_one_line_that_names_the_file(
    content: bytes, begin: bytes
) -> None:
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(begin + content)
        with pytest.raises(ConfigError, match=re.escape(f"{path}: ")) as caught:
            load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state.safetensors", "state.pt"])
def test_safetensors_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / name)
    assert load_checkpoint(tmp_path / name)["a"].equal(torch.arange(3.0))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{name}: damaged checkpoint"):
        load_checkpoint(tmp_path / name)


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="expected a dictionary, found Tensor"):
        load_checkpoint(tmp_path / "state.pt")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.target,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_pickle_bomb_is_refused_and_not_executed(tmp_path: Path, container: str) -> None:
    exploded, path = tmp_path / "exploded", tmp_path / "bomb.pt"
    bomb = {"network": Bomb(exploded)}
    if container == "torch":
        torch.save(bomb, path)
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(ConfigError, match=r"bomb\.pt: not a checkpoint of tensors only"):
        load_checkpoint(path)
    assert not exploded.exists()
    pickle.load(io.BytesIO(pickle.dumps(bomb)))  # the bomb does work
    assert exploded.exists()


def test_cache_folder_is_the_users_choice_before_the_systems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("MTKD_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")
    monkeypatch.delenv("MTKD_CACHE")
    assert cache_folder() == Path("/somewhere/mtkd_env")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mtkd_env"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in containers that run as an arbitrary user."""

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "MTKD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory_the_cache_is_a_matter_of_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"cache: no home directory .* MTKD_CACHE .* --cache"):
        cache_folder()
    with pytest.raises(ConfigError, match="~/runs: no home directory"):
        user_path("~/runs")
    assert cache_folder("chosen") == Path("chosen")
    monkeypatch.setenv("MTKD_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")


def test_the_home_directory_takes_the_place_of_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MTKD_CACHE", "~/kept")
    assert cache_folder() == cache_folder("~/kept") == tmp_path / "kept"
    assert whole_path("~/a/~") == str(tmp_path / "a" / "~")
    monkeypatch.chdir(tmp_path)
    assert whole_path("a") == str(tmp_path / "a")
    for impossible, reason in (("~nobody-of-that-name/a", "no home"), ("a\0b", "null character")):
        with pytest.raises(ConfigError, match=reason):
            user_path(impossible)


@pytest.mark.parametrize(
    ("name", "part"),
    {
        "wrn_16_1-permuted": "wrn_16_1-permuted",
        "T=4 (ours)": "T=4_ours_",
        "../../escaped": "_.._escaped",
        "..": "_",
        "": "_",
        ".hidden": "hidden",
        "/etc/passwd": "_etc_passwd",
        "a\0\n\udcff": "a_",
        "größe": "größe",
    }.items(),
)
def test_a_name_in_a_path_stays_in_its_folder_and_is_seen(name: str, part: str) -> None:
    assert name_in_path(name) == part


def test_long_names_are_cut_and_told_apart() -> None:
    first, second = (name_in_path("ä" * 300 + end) for end in "ab")
    assert first != second
    assert len(first.encode()) <= len(second.encode()) < 90


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_a_checkpoint_may_have_its_digest_in_its_name(tmp_path: Path) -> None:
    path = save_with_digest(tmp_path / "new" / "step-7.pt", content())
    assert path.name == f"step-7-{file_digest(path)}.pt"
    assert names(path.parent) == [path.name]
    assert load_checkpoint(path)["numbers"] == content()["numbers"]
    assert has_own_digest(path)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    assert not has_own_digest(path)


def test_what_is_written_is_on_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append("folder" if path.is_dir() else "file")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_text(tmp_path / "note.txt", "x")
    assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    ("record", "place", "byte"), [(b"PK\x06\x07", 16, 9), (b"PK\x01\x02", 46, 0xE9)]
)
def test_an_archive_that_is_damaged_in_its_list_is_named(
    record: bytes, place: int, byte: int, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "a.pt", content())
    damaged = bytearray((tmp_path / "a.pt").read_bytes())
    damaged[damaged.index(record) + place] = byte
    (tmp_path / "a.pt").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"a\.pt: "):
        load_checkpoint(tmp_path / "a.pt")


NESTED = "\n".join(["a: &a0 [1]", *(f"b{i}: &a{i + 1} [*a{i}]" for i in range(60))])

BAD_YAML = {
    "too many values by aliases": (
        "\n".join(["a: &a0 [1, 1]", *(f"b{i}: &a{i + 1} [*a{i}, *a{i}]" for i in range(99))]),
        "more than 10000 values",
    ),
    "too many values by merging": (
        "\n".join(
            ["a: &a0 {x: 1}", *(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}" for i in range(99))]
        ),
        "more than 10000 values",
    ),
    "too deep by aliases": (NESTED, "on 50 levels"),
    "too deep": ("[" * 60 + "]" * 60, "on 50 levels"),
    "much too deep": ("[" * 1000, "RecursionError"),
    "a list in itself": ("&x [*x]", "a part of"),
    "a mapping in itself": ("a: &x {b: [*x]}", "a part of"),
    "a list as key": ("? [a, b]\n: 1", "expected a text as key"),
    "a mapping as key": ("{{a: 1}: 1}", "expected a text as key"),
    "a key twice": ("1: a\n'1': b", "'1' is given twice"),
    "a set": ("!!set {a, b}", "expected a plain value"),
    "no truth value": ("!!bool maybe", "KeyError"),
    "no number": ("!!int ''", "IndexError"),
    "too many digits": ("9" * 5000, "ValueError"),
    "two documents": ("a: 1\n---\na: 2", "a single document"),
    "an object": ("!!python/object/apply:os.getpid []", "expected a plain value"),
    "bytes": ("!!binary aGk=", "expected a plain value"),
    "a tab": ("a:\n\tb: 1", "cannot start any token"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_no_plain_data_is_refused(text: str, reason: str) -> None:
    with pytest.raises(yaml.YAMLError, match=reason):
        parse_yaml(text)


def test_keys_and_dates_are_the_texts_that_they_are() -> None:
    found = parse_yaml("yes: 1\n1: 2\n010: 3\n~: 4\n2026-12-31: 2026-12-31")
    assert found == {"yes": 1, "1": 2, "010": 3, "~": 4, "2026-12-31": "2026-12-31"}


def test_aliases_and_merged_mappings_are_what_they_stand_for() -> None:
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]")
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


# What killed processes leave.


TEXTS_LIKE_NUMBERS = [
    "1e-3",
    "-5E4",
    "0",
    "0.5",
    "true",
    "null",
    "~",
    "[1]",
    "2026-12-31",
    "a: b",
    "",
]


def test_values_come_back_from_yaml_as_they_were() -> None:
    values = {"texts": TEXTS_LIKE_NUMBERS, "numbers": [1e-3, 5e-324, 1e22, 0, True, None, math.inf]}
    assert parse_yaml(to_yaml(values | {"tuple": (1, 2)})) == values | {"tuple": [1, 2]}
    assert parse_yaml(to_yaml(values | {"1": {"true": 1}})) == values | {"1": {"true": 1}}


def test_what_a_killed_process_left_goes_when_the_next_file_is_written(tmp_path: Path) -> None:
    (tmp_path / ".new-curves-abcdefgh.png").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"a user's")
    write_text(tmp_path / "note.txt", "whole")
    assert names(tmp_path) == [".mine", "note.txt"]


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        write_text(tmp_path / "other.txt", "meanwhile")
        remove_unfinished(tmp_path)
        temporary.write_text("whole")

    write_atomically(tmp_path / "note.txt", write)
    assert names(tmp_path) == ["note.txt", "other.txt"]


def test_links_are_not_followed_where_files_were_left(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"a user's")
    (tmp_path / ".new-note-abcdefgh.txt").symlink_to(tmp_path / "target")
    remove_unfinished(tmp_path)
    assert (tmp_path / "target").read_bytes() == b"a user's"
