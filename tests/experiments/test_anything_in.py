"""Whatever stands in a file, a name or a path: it is read, or refused by one line that names it.

A reader or writer of another kind of file is a line in a table here.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from experiments.comparison.plan import Selection, load_comparison
from experiments.config import ExperimentConfig, parse_arguments
from experiments.experiment import make_folder
from experiments.gallery import read_gallery
from experiments.running.failures import described
from experiments.running.log import read_rows
from experiments.running.result import RunResult, read_result
from experiments.transfer import program
from experiments.transfer.backbones import load_backbone
from experiments.transfer.coco import read_coco
from experiments.transfer.label_maps import load_label_maps
from experiments.transfer.segmentation import SegmentationConfig
from mtkd_env.data.reading import read_image
from mtkd_env.errors import ConfigError
from mtkd_env.files import (
    load_checkpoint,
    name_in_path,
    save_checkpoint,
    save_with_digest,
    user_path,
    whole_path,
    write_text,
)
from mtkd_env.teachers.pool import load_pool_spec
from tiny import load_dataset

few = settings(max_examples=12, derandomize=True, database=None, deadline=None)
many = settings(max_examples=60, derandomize=True, database=None, deadline=None)

TEACHERS = [{"network": "resnet8", "name": "a", "width": 0.5}, {"network": "wrn_16_1"}]

# Files that are written by hand, as what they hold.
TEXTS: dict[str, Any] = {
    "config": {"algo": "aver", "seed": 3, "student": {"network": "resnet8"}}
    | {"data": {"dataset": "digits", "arguments": {}, "batch_size": 32, "views": 2}}
    | {"teachers": {"teachers": TEACHERS, "recipe": {"epochs": 2}}, "env": {"fusion": [1, 0, 0]}}
    | {"agent": {"arguments": {}}, "distillation": {"logit": {"kd": 1.0, "dist": 2}}},
    "pool": {"teachers": TEACHERS, "recipe": {"epochs": 3, "lr": 0.1}, "store": {"place": "disk"}},
    "comparison": {"title": "t", "baseline": "aver", "seeds": [0, 1], "methods": {"aver": None}}
    | {"settings": {"small": {"student": {"width": 0.5}}}, "paper": {"aver": "78.3 ± 0.1"}},
    "transfer": {"batch_size": 2, "schedule": {"iterations": 2}, "crop": [64, 64], "workers": 0},
    "transfer comparison": {"title": "t", "kind": "segmentation", "baseline": "one", "seeds": [0]}
    | {
        "settings": {"s": {"dataset": "ade20k", "backbone": "resnet18"}},
        "methods": {"one": {"resnet18": "random"}},
    },
    "coco": {"images": [{"id": 1, "file_name": "a.png", "height": 9, "width": 8}]}
    | {"categories": [{"id": 2, "name": "c"}]}
    | {"annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}]},
}


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        name: The file's name.
        read: Reads it, given its path.
        content: What a proper one holds.
    """

    name: str
    read: Callable[[Path], Any]
    content: bytes


def written(name: str, write: Callable[[Path], Any]) -> bytes:
    with TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def images() -> dict[str, Any]:
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y}


def read_config(path: Path) -> ExperimentConfig:
    (config,) = parse_arguments(["--config", str(path)])
    assert parse_arguments(["--config", str(rewritten(path, config.to_yaml()))]) == [config]
    return config


def rewritten(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read_split(path: Path) -> Any:
    (path.parent / "annotations").mkdir()
    (path.parent / "val").mkdir()
    path.rename(path.parent / "annotations" / path.name)
    split = read_coco(path.parent, "val")
    return [split.truth(position, masks=False) for position in range(len(split.images))]


def read_label_map(path: Path) -> Any:
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (path.parent / kind / part).mkdir(parents=True)
        Image.new("RGB", (9, 8)).save(path.parent / "images" / part / path.name)
        (path.parent / "labels" / part / path.name).write_bytes(path.read_bytes())
    return load_label_maps("folder", path.parent, 2).whole(0)


def plain(kind: str) -> bytes:
    return json.dumps(TEXTS[kind]).encode()


PNG = written("a.png", lambda path: Image.new("L", (9, 8)).save(path))
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}

READERS = {
    "config": Reader("a.yaml", read_config, plain("config")),
    "recipe": Reader("a.yaml", lambda path: parse_arguments(["--recipe", str(path)]), b"seed: 1"),
    "pool": Reader("a.yaml", load_pool_spec, plain("pool")),
    "comparison": Reader(
        "a.yaml",
        lambda path: load_comparison(path, [], Selection(), path.parent),
        plain("comparison"),
    ),
    "transfer": Reader(
        "a.yaml",
        lambda path: program.parse(
            SegmentationConfig,
            [*("--config", str(path)), *("--data", "a", "--output", "b", "--dataset", "ade20k")],
            "a.py",
        ),
        plain("transfer"),
    ),
    "transfer comparison": Reader(
        "a.yaml",
        lambda path: load_comparison(path, ["--data", "a"], Selection(), path.parent),
        plain("transfer comparison"),
    ),
    "coco": Reader("instances_val.json", read_split, plain("coco")),
    "npz": Reader(
        "a.npz",
        lambda path: load_dataset("npz", path=str(path)),
        written("a.npz", lambda path: np.savez(path, **images())),
    ),
    "image": Reader("a.png", read_image, PNG),
    "label map": Reader("a.png", read_label_map, PNG),
    "checkpoint": Reader(
        "a.pt", load_checkpoint, written("a.pt", lambda path: save_checkpoint(path, STATE))
    ),
    "safetensors": Reader("a.safetensors", load_backbone, save(STATE)),
    "rows": Reader("metrics.jsonl", lambda path: read_rows(path.parent), b'{"epoch": 1}\n' * 2),
    "result": Reader(
        "result.json",
        lambda path: read_result(RunResult, path.parent),
        json.dumps(dict.fromkeys(RunResult.__dataclass_fields__)).encode(),
    ),
    # A damaged one counts as not there.
    "gallery": Reader(
        "gallery.npz",
        lambda path: read_gallery(path.parent),
        written("gallery.npz", lambda path: np.savez(path, **images())),
    ),
}

# Kinds that are read by way of a whole command line.
DEAR = ("config", "recipe", "comparison", "transfer", "pool", "label map")

# What people and programs write into files, or ought not to.
scalars = st.sampled_from(
    [None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), "", "x", "~", "../..", "a\nb", "é"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file, cut, changed, or others."""
    kind = draw(st.sampled_from(["cut", "changed", "inserted", "other"]))
    if kind == "other" or not content:
        return draw(st.binary(max_size=60))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[:place]
    removed = draw(st.integers(0, 8)) if kind == "changed" else 0
    return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + removed :]


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """What a file holds, with something else in a place of it."""
    content = copy.deepcopy(content)
    place = draw(st.sampled_from(list(places(content))))
    if isinstance(place[0], dict) and draw(st.integers(0, 4)) == 0:
        place = (place[0], draw(scalars))
    place[0][place[1]] = draw(values)
    return content


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Where a value can be: lists and mappings with positions in them."""
    if isinstance(content, dict | list):
        for key, value in list(
            content.items() if isinstance(content, dict) else enumerate(content)
        ):
            yield content, key
            yield from places(value)


def check_read(reader: Reader, content: bytes) -> None:
    """Reads a file; what is wrong with it must be one line that names it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / reader.name
        path.write_bytes(content)
        try:
            reader.read(path)
        except ConfigError as error:
            line = described(error)
        else:
            return
    assert "\n" not in line
    assert reader.name in line


@pytest.mark.parametrize("kind", READERS)
def test_a_proper_file_is_read(kind: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / READERS[kind].name
        path.write_bytes(READERS[kind].content)
        READERS[kind].read(path)


@pytest.mark.parametrize("kind", READERS)
def test_bytes_are_read_or_named(kind: str) -> None:
    reader = READERS[kind]

    @(few if kind in DEAR else many)
    @given(damaged(reader.content))
    def check(content: bytes) -> None:
        check_read(reader, content)

    check()


@pytest.mark.parametrize("kind", TEXTS)
def test_values_are_taken_or_named(kind: str) -> None:
    @(few if kind in DEAR else many)
    @given(changed(TEXTS[kind]))
    def check(content: Any) -> None:
        text = (
            json.dumps(content) if kind == "coco" else yaml.safe_dump(content, allow_unicode=True)
        )
        check_read(READERS[kind], text.encode())

    check()


# Names and paths.

texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    [
        "",
        ".",
        "..",
        "~",
        "/",
        "../../a",
        "a" * 300,
        "é" * 200,
        "a\0b",
        "\udcff",
        "[/]",
        "$x$",
        "CON",
    ]
)

WRITERS: Mapping[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "x"),
    "checkpoint": lambda path: save_checkpoint(path, STATE),
    "digest": lambda path: save_with_digest(path, STATE),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_names_become_one_file_in_their_folder(kind: str) -> None:
    @settings(many, max_examples=30)
    @given(texts)
    def check(name: str) -> None:
        with TemporaryDirectory() as folder:
            WRITERS[kind](Path(folder) / "kept" / f"{name_in_path(name)}.pt")
            (written,) = [path for path in Path(folder).rglob("*") if path.is_file()]
            assert written.parent == Path(folder) / "kept"
            assert not written.name.startswith(".")

    check()


@many
@given(texts)
def test_a_name_in_a_path_is_one_itself(name: str) -> None:
    assert name_in_path(name_in_path(name)) == name_in_path(name)


@many
@given(texts)
def test_a_path_is_understood_or_named(text: str) -> None:
    try:
        path = user_path(text)
    except ConfigError as error:
        message = str(error)
    else:
        message = repr(text)
        assert "~" not in path.parts[:1]
        assert Path(whole_path(text)).is_absolute()
    assert text in message or repr(text) in message


@few
@given(texts)
def test_names_in_a_configuration_come_back_and_stay_in_the_output(name: str) -> None:
    flags = ["--agent.name=aver", "--data.dataset=npz"]
    with TemporaryDirectory() as folder:
        arguments = yaml.safe_dump({"name": name, "path": "~/a.npz"})
        try:
            (config,) = parse_arguments(
                [
                    *flags,
                    f"--algo={name}",
                    f"--data.arguments={arguments}",
                    f"--output={folder}/runs",
                ]
            )
        except ConfigError:
            return
        assert config.data.arguments["name"] == name
        path = rewritten(Path(folder) / "config.yaml", config.to_yaml())
        assert parse_arguments(["--config", str(path)]) == [config]
        assert make_folder(config).parent == Path(folder) / "runs"
