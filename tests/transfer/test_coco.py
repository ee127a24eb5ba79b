import sys
from collections.abc import Callable
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from experiments.transfer.coco import CocoSplit, read_coco
from experiments.transfer.coco_batches import (
    Example,
    evaluation_requests,
    examples,
    flip,
    training_requests,
)
from mtkd_env.data.decoding import made
from mtkd_env.errors import ConfigError
from shapes_detection import CLASSES, TRAIN, edited, write_shapes, write_split

SIDE = 64


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=6, val=1, size=SIDE)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A dataset of two images."""
    write_split(tmp_path, TRAIN, 2, size=SIDE, seed=3)
    return tmp_path


def test_classes_are_numbered_from_one_in_the_order_of_their_ids(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    assert split.class_names == ("background", *CLASSES)
    assert split.labels == {3: 1, 7: 2, 18: 3}


def test_boxes_enclose_their_masks_and_the_bright_pixels(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    for position in range(len(split.images)):
        image, target = split.image(position), split.target(position, masks=True)
        for box, mask in zip(target["boxes"], target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero().T
            edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (edges - box).abs().max() <= 1
            assert image[:, mask].float().mean() > 130
        assert image[:, ~target["masks"].any(0).bool()].float().mean() < 110


def test_crowds_and_slivers_are_not_learned_from_but_judged_by(two: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        width = content["images"][0]["width"]
        counts = rle.encode(np.asfortranarray(np.ones((SIDE, width), np.uint8)))
        shared = {"image_id": 100, "category_id": 7, "area": 9.0}
        content["annotations"] = [
            first,
            shared
            | {"id": 91, "bbox": [0, 0, 9, 9], "iscrowd": 1}
            | {"segmentation": {"size": counts["size"], "counts": counts["counts"].decode()}},
            shared | {"id": 92, "bbox": [5, 5, 0, 9], "segmentation": [[5, 5, 5, 14, 5, 9]]},
            shared
            | {"id": 93, "bbox": [width - 0.5, 5, 9, 9], "segmentation": [[5, 5, 9, 9, 5, 9]]},
        ]

    split = edited(two, edit)
    target, truth = split.target(0, masks=False), split.truth(0, masks=False)
    assert len(target["boxes"]) == 1
    assert truth["iscrowd"].tolist() == [0, 1, 0, 0]
    assert truth["area"][1:].tolist() == [9, 9, 9]
    assert split.truth(0, masks=True)["masks"][1].all()


def test_boxes_are_cut_off_at_the_border(two: Path) -> None:
    split = edited(two, lambda content: content["annotations"][0].update(bbox=[-9, -9, 999, 20]))
    width = split.images[0]["width"]
    assert split.target(0, masks=False)["boxes"][0].tolist() == [0, 0, width, 11]
    assert split.truth(0, masks=False)["boxes"][0].tolist() == [-9, -9, 990, 11]


def test_images_without_objects_are_judged_by_but_not_learned_from(two: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 100]

    split = edited(two, edit)
    assert split.learnable == (1,)
    (batch,) = training_requests(split, batch_size=1, seed=0, epoch=0)
    assert len(batch) == 1
    (asked,) = evaluation_requests(split, batch_size=4)
    judged = examples(asked, split, masks=True, truth=True)
    assert [len(truth["boxes"]) > 0 for _, truth in judged] == [False, True]
    assert judged[0][1]["masks"].shape == (0, SIDE, split.images[0]["width"])


def test_mirrored_boxes_enclose_mirrored_masks(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    image, target = split.image(0), split.target(0, masks=True)
    mirrored, other = flip(image, target)
    assert mirrored.equal(image.flip(2))
    width = image.shape[2]
    assert other["boxes"][:, 0].equal(width - target["boxes"][:, 2])
    for box, mask in zip(other["boxes"], other["masks"], strict=True):
        columns = mask.any(0).nonzero()
        assert abs(columns.min() - box[0]) <= 1
        assert abs(columns.max() + 1 - box[2]) <= 1
    again, back = flip(mirrored, other)
    assert again.equal(image)
    torch.testing.assert_close(back["boxes"], target["boxes"])


def epoch_of(split: CocoSplit, **options: Any) -> list[list[Example]]:
    workers = options.pop("workers", 0)
    requests = training_requests(split, **{"batch_size": 2, "seed": 0, "epoch": 0} | options)
    make = partial(examples, split=split, masks=True)
    return list(made(make, requests, workers=workers, pin=False))


def same(one: list[list[Example]], other: list[list[Example]]) -> bool:
    pairs = [
        (first, second)
        for batch, counterpart in zip(one, other, strict=True)
        for first, second in zip(batch, counterpart, strict=True)
    ]
    return all(
        a.shape == b.shape and a.equal(b) and all(t[key].equal(u[key]) for key in t)
        for (a, t), (b, u) in pairs
    )


def test_batches_depend_on_seed_and_epoch_alone(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    first = epoch_of(split)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert same(first, epoch_of(split))
    assert torch.get_rng_state().equal(before)
    assert not same(first, epoch_of(split, epoch=1))
    assert not same(first, epoch_of(split, seed=1))


def test_workers_give_the_same_batches(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    assert same(epoch_of(split), epoch_of(split, workers=2))


def test_processes_share_the_batches_of_a_single_one(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    parts = [epoch_of(split, shard=(number, 2)) for number in range(2)]
    assert same(epoch_of(split), [one + other for one, other in zip(*parts, strict=True)])


def test_an_epoch_leaves_out_what_does_not_fill_a_batch(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    assert [len(batch) for batch in epoch_of(split, batch_size=4)] == [4]
    assert [len(batch) for batch in epoch_of(split, batch_size=3)] == [3, 3]


def test_some_images_are_mirrored_and_some_are_not(shapes: Path) -> None:
    split = read_coco(shapes, TRAIN)
    plain = [split.image(position) for position in range(6)]
    seen = {True: 0, False: 0}
    for epoch in range(4):
        for batch in epoch_of(split, epoch=epoch):
            for image, _ in batch:
                seen[any(one.shape == image.shape and one.equal(image) for one in plain)] += 1
    assert min(seen.values()) >= 6


@pytest.mark.parametrize(
    "missing", [f"annotations/instances_{TRAIN}.json", TRAIN], ids=["file", "folder"]
)
def test_missing_data_are_named_with_what_must_lie_there(tmp_path: Path, missing: str) -> None:
    write_split(tmp_path, TRAIN, 1, size=SIDE, seed=0)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        read_coco(tmp_path, TRAIN)
    message = str(caught.value)
    assert message.startswith(f"data: no {tmp_path / missing}; looked in {tmp_path}: expected ")
    assert f"annotations/instances_{TRAIN}.json" in message
    assert "annotations_trainval2017.zip" in message


def _drop(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(part) and None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop("images"), "expected a list of images, as COCO's format has it"),
        (_drop("categories"), "expected a list of categories"),
        (
            lambda c: c["images"][1].pop("height") and None,
            r"images\[1\]: expected the key 'height'",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=5),
            "annotation 1: image_id: no entry of images has the id 5",
        ),
        (
            lambda c: c["annotations"][0].update(category_id=5),
            "no entry of categories has the id 5",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2]),
            r"bbox: expected four finite numbers, .* got \[1, 2\]",
        ),
        *(
            (
                lambda c, box=box: c["annotations"][0].update(bbox=box),
                "bbox: expected four finite",
            )
            for box in (
                [nan, 1, 2, 3],
                [1, 2, 3, nan],
                [1, inf, 2, 3],
                [1, 2, -3, 3],
                [10**400, 1, 2, 3],
                ["1", 2, 3, 4],
            )
        ),
        (lambda c: c["annotations"][0].update(area=nan), "area: expected a finite number, got nan"),
        (
            lambda c: c["annotations"][0].update(image_id=[1]),
            r"image_id: expected a whole number, got \[1\]",
        ),
        (
            lambda c: c["images"][1].update(id=c["images"][0]["id"]),
            "images: expected one entry with the id .*, got several",
        ),
        (lambda c: c["categories"][0].update(id={}), "id: expected a whole number"),
        (lambda c: c["images"][0].update(height="64"), "height: expected 1 or more, got '64'"),
        (lambda c: c["images"][0].update(width=0), "width: expected 1 or more, got 0"),
        (lambda c: c["images"][0].update(file_name=None), "file_name: expected a name, got None"),
    ],
)
def test_what_is_not_in_the_format_is_named(
    two: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"instances_{TRAIN}\.json: .*{message}"):
        edited(two, edit)


def test_a_missing_package_is_named(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"needs pycocotools; .*'mtkd-env\[detection\]'"):
        read_coco(two, TRAIN)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff", "[" * 10**5])
def test_a_damaged_annotation_file_is_named(two: Path, text: str) -> None:
    file = two / "annotations" / f"instances_{TRAIN}.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"{file}: (not valid JSON|expected a list)"):
        read_coco(two, TRAIN)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_named(two: Path, workers: int) -> None:
    (two / TRAIN / "0001.png").unlink()
    with pytest.raises(ConfigError, match=r"0001\.png: no such image, but .*json names it"):
        epoch_of(read_coco(two, TRAIN), workers=workers)


def test_a_damaged_image_is_named(two: Path) -> None:
    path = two / TRAIN / "0001.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"0001\.png: cannot be read as an image"):
        epoch_of(read_coco(two, TRAIN))


def test_an_image_of_another_size_than_annotated_is_named(two: Path) -> None:
    Image.new("RGB", (10, 20)).save(two / TRAIN / "0001.png")
    with pytest.raises(ConfigError, match=r"expected height and width \(64, \d+\), .*\(20, 10\)"):
        epoch_of(read_coco(two, TRAIN))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no mask"),
        ([], "no mask"),
        (7, "no mask"),
        ({"size": [9, 9]}, "no mask"),
        (
            {"size": [9, 9], "counts": [81]},
            r"expected height and width \(64, \d+\), found \(9, 9\)",
        ),
    ],
)
def test_a_segmentation_without_a_mask_is_named(two: Path, segmentation: Any, message: str) -> None:
    split = edited(two, lambda c: c["annotations"][0].update(segmentation=segmentation))
    assert split.target(0, masks=False)
    with pytest.raises(ConfigError, match=f"the segmentation of annotation 1: {message}"):
        split.target(0, masks=True)
