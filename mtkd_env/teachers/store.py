"""Teacher outputs, kept by image and view, so that no teacher is asked the same twice.

A view is one of the crops and mirror images that an image in memory has, or one of a few of an
image in a file; see `mtkd_env.data.views`. What a teacher makes of it depends on nothing else, so
one store serves every student, method and seed.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mtkd_env.data.stream import BatchStream, EpochPlan
from mtkd_env.data.views import Views
from mtkd_env.errors import ConfigError, check_at_least_1, check_name
from mtkd_env.files import has_own_digest, load_checkpoint, save_with_digest, write_text
from mtkd_env.options import Options
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.types import Batch, TeacherOutputs

# Part of every digest: raise it when a row would hold something else.
LAYOUT_VERSION = 1

NOWHERE = "none"
PLACES = (NOWHERE, "host", "device", "disk")
DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}

# Batches whose missing rows are computed together: with few of them missing in each, a call of the
# teachers for every batch would be mostly padding.
GROUP = 8

# Rows that wait in memory to be written into one file take at most so many bytes.
MOST_PENDING = 2**28


@dataclass(frozen=True)
class StoreSpec(Options):
    """Whether teacher outputs are kept, and where.

    An image of 32x32 pixels that is cropped with a padding of 4 and mirrored has 162 views, so a
    store of all is large and slow to fill; one of a few views (data.views) is neither.

    Attributes:
        place: none; host (memory), device (memory), or disk: files in the cache, which all runs
            share.
        dtype: float16, or float32 for exactly what the teachers say.
        maps: Whether feature maps are kept whole, which are most of it: by default where β is not
            0. Else their means over the pixels are, which observations and fusions do with.
        max_bytes: Largest size of the store; one that could outgrow it is refused.

    Raises:
        ConfigError: An unknown name, or a size below 1.
    """

    place: str = NOWHERE
    dtype: str = "float16"
    maps: bool | None = None
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(PLACES, self.place, "store place")
        check_name(DTYPES, self.dtype, "store dtype")
        check_at_least_1(max_bytes=self.max_bytes)

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.place != NOWHERE

    def resolved(self, *, compared: bool) -> "StoreSpec":
        """The same with what was left open chosen.

        Args:
            compared: Whether the student's map is compared with the teachers'.
        """
        return replace(self, maps=compared) if self.maps is None else self


class RowLayout:
    """How the outputs of all teachers on one image lie in one row.

    First the logits of all teachers, then their features, then their maps with the channels last.

    Args:
        outputs: Any outputs of the teachers.

    Attributes:
        shapes: Shape of every part of a row.
        width: Numbers in a row.
        begin_of_maps: Numbers in a row before its maps.
        kinds: Numbers in a row of every kind, by its name.
    """

    def __init__(self, outputs: TeacherOutputs) -> None:
        teachers, _, classes = outputs.logits.shape
        self._teachers, self._known, self._averaged = teachers, outputs.known, outputs.averaged
        self.shapes: list[tuple[int, ...]] = [
            (teachers, classes),
            *((feature.shape[1],) for feature in outputs.features),
            *((*one.shape[2:], one.shape[1]) for one in outputs.feature_maps),
        ]
        self.width = sum(map(prod, self.shapes))
        self.begin_of_maps = sum(map(prod, self.shapes[: 1 + teachers]))
        self.kinds = {
            "logits": prod(self.shapes[0]),
            "features": self.begin_of_maps - prod(self.shapes[0]),
            "means of maps" if outputs.averaged else "maps": self.width - self.begin_of_maps,
        }

    def pack(self, outputs: TeacherOutputs) -> Float[Tensor, "B W"]:
        """One row for each image."""
        maps = [one.permute(0, 2, 3, 1) for one in outputs.feature_maps]
        parts = [outputs.logits.transpose(0, 1), *outputs.features, *maps]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def unpack(self, rows: Float[Tensor, "B W"]) -> TeacherOutputs:
        """The outputs that rows were made of, as views of them; no maps of rows without them."""
        with_maps = rows.shape[1] > self.begin_of_maps
        shapes = self.shapes if with_maps else self.shapes[: 1 + self._teachers]
        split = rows.split([prod(shape) for shape in shapes], dim=1)
        parts = [part.view(-1, *shape) for part, shape in zip(split, shapes, strict=True)]
        logits, others = parts[0], parts[1:]
        maps = others[self._teachers :]
        return TeacherOutputs(
            logits=logits.transpose(0, 1),
            features=tuple(others[: self._teachers]),
            feature_maps=tuple(one.permute(0, 3, 1, 2) for one in maps),
            known=self._known,
            averaged=self._averaged,
        )


class MemoryRows:
    """Rows in memory, each at the place of its key.

    Args:
        count: Number of keys.
        width: Numbers in a row.
        dtype: Their type.
        device: Where they are kept; the host takes memory only for rows that were put.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._known = torch.zeros(count, dtype=torch.bool)
        self._rows = torch.empty(count, width, dtype=dtype, device=device)

    def known(self, keys: Int64[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which rows are there; keys and answer on the host."""
        return self._known[keys]

    def put(self, keys: Int64[Tensor, " N"], rows: Tensor) -> None:
        """Keeps some rows; keys on the host."""
        self._known[keys] = True
        where = keys.to(self._rows.device, non_blocking=True)
        self._rows.index_copy_(0, where, rows.to(self._rows.device))

    def take(self, keys: Int64[Tensor, " N"], width: int) -> Tensor:
        """Copies of some rows that are there, of each so many numbers from the first."""
        where = keys.to(self._rows.device, non_blocking=True)
        return self._rows[:, :width].index_select(0, where)

    def publish(self) -> None:
        """Does nothing: nobody else sees this memory."""


class DiskRows:
    """Rows in the files of a folder, which any number of processes add to and read at once.

    Every file is written once, as a whole, under a name that says what it holds, and mapped into
    memory. Rows that two processes have computed are there twice, which does no harm.
    """

    def __init__(self, count: int, dtype: torch.dtype, folder: Path) -> None:
        self._dtype, self._folder = dtype, folder
        self._parts: list[Tensor] = []
        self._part_of = torch.full((count,), -1, dtype=torch.int32)
        self._row_of = torch.zeros(count, dtype=torch.int32)
        self._pending: list[tuple[int, Tensor]] = []
        self._read: set[str] = set()

    def known(self, keys: Int64[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which rows are there, now that other processes may have added some."""
        if (self._part_of[keys] < 0).any():
            for path in sorted(self._folder.glob("rows-*.pt")):
                if path.name not in self._read:
                    self._read.add(path.name)
                    self._read_file(path)
        return self._part_of[keys] >= 0

    def _read_file(self, path: Path) -> None:
        """Takes those rows of another process that are not here yet."""
        if not has_own_digest(path):
            warnings.warn(f"{path} is damaged, and left alone", stacklevel=2)
            return
        content = load_checkpoint(path, mapped=True)
        self._add(content["keys"], content["rows"], new_only=True)

    def put(self, keys: Int64[Tensor, " N"], rows: Tensor) -> None:
        """Keeps some rows in memory until they are published."""
        self._pending.append((len(self._parts), keys))
        self._add(keys, rows.cpu())
        if sum(self._parts[part].nbytes for part, _ in self._pending) >= MOST_PENDING:
            self.publish()

    def take(self, keys: Int64[Tensor, " N"], width: int) -> Tensor:
        """Copies of some rows that are there, of each so many numbers from the first."""
        part_of, row_of = self._part_of[keys], self._row_of[keys]
        places, taken = [], []
        for part in part_of.unique().tolist():
            places.append((part_of == part).nonzero().squeeze(1))
            rows = self._parts[part][:, :width]
            taken.append(rows.index_select(0, row_of[places[-1]]))
        # Of a single part, as after the first epoch, they are in order.
        if len(taken) == 1:
            return taken[0]
        return torch.cat(taken).index_select(0, torch.cat(places).argsort())

    def publish(self) -> None:
        """Writes what waits into a file."""
        if not self._pending:
            return
        keys = torch.cat([keys for _, keys in self._pending])
        rows = torch.cat([self._parts[part] for part, _ in self._pending])
        path = save_with_digest(self._folder / "rows.pt", {"keys": keys, "rows": rows})
        for part, _ in self._pending:
            self._parts[part] = rows[:0]
        self._pending.clear()
        self._read.add(path.name)
        self._add(keys, load_checkpoint(path, mapped=True)["rows"])

    def _add(self, keys: Int64[Tensor, " N"], rows: Tensor, *, new_only: bool = False) -> None:
        """A part more; its rows are those of their keys, or only of keys that have none."""
        places = torch.arange(len(keys), dtype=torch.int32)
        if new_only:
            # Stores of more views have further keys.
            own = keys < len(self._part_of)
            keys, places = keys[own], places[own]
            new = self._part_of[keys] < 0
            keys, places = keys[new], places[new]
        self._part_of[keys] = len(self._parts)
        self._row_of[keys] = places
        self._parts.append(rows)


class StoredTeachers:
    """What the teachers say of every view of every image, computed when first asked for.

    Called by a stream, it lets the batches bring the outputs along.

    The key of an image's view is view · images + image, where of a few views only their turn
    stands for the view; so more views have the keys of fewer, and some more. Rows are rounded to
    the store's type before their first use too.

    Of a few views only, images are always computed in the same company, so that a row is the same
    to the last bit whichever run has computed it. Of all views that would take too many calls;
    there a row's company, and with it the rounding, is left to chance.

    Args:
        teachers: The teachers.
        views: The images.
        spec: What is kept where.
        batch_size: Images that the teachers are asked about at a time.
        folder: Folder of a store on disk.

    Attributes:
        computed: Rows that this store has computed.
        nbytes: Size of a full store.

    Raises:
        ConfigError: The full store is larger than it may be, or than the disk has room for.
    """

    def __init__(
        self,
        teachers: TeacherEnsemble,
        views: Views,
        spec: StoreSpec,
        *,
        batch_size: int,
        folder: Path | None = None,
    ) -> None:
        self._teachers, self._views, self._batch_size = teachers, views, batch_size
        self._dtype, self._whole = DTYPES[spec.dtype], spec.maps is not False
        self._layout = RowLayout(self._ask(next(self._images([torch.zeros(1, dtype=torch.int64)]))))
        self.computed = 0
        kept = _views_of_an_image(views)
        assert kept is not None
        of_a_view = len(views) * self._layout.width * self._dtype.itemsize
        self.nbytes = kept * of_a_view
        _check_size(spec, self.nbytes, of_a_view)
        count = len(views) * kept
        if folder is not None:
            _check_room(folder, self.nbytes)
            self._rows: MemoryRows | DiskRows = DiskRows(count, self._dtype, folder)
        else:
            device = views.device if spec.place == "device" else torch.device("cpu")
            self._rows = MemoryRows(count, self._layout.width, self._dtype, device)

    def keys(self, index: Int64[Tensor, " N"], views: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
        """Keys of some views of some images; all on the host."""
        if (chosen := self._views.chosen) is not None:
            views = (chosen[index] == views.unsqueeze(1)).int().argmax(1)
        return views * len(self._views) + index

    def _images(self, calls: Sequence[Int64[Tensor, " N"]]) -> Iterator[Float[Tensor, "N K H W"]]:
        """The views that keys stand for, those of each call together."""
        keys = torch.cat([*calls])
        index, views = keys % len(self._views), keys.div(len(self._views), rounding_mode="floor")
        if (chosen := self._views.chosen) is not None:
            views = chosen[index, views]
        ends = [0, *accumulate(map(len, calls))]
        return self._views.inputs(index, views, [slice(*pair) for pair in pairwise(ends)])

    def fill(self, keys: Int64[Tensor, " N"]) -> None:
        """Computes what is missing of some keys, which are on the host.

        Raises:
            ConfigError: An output is too large for the store's type.
        """
        known = self._rows.known(keys)
        if known.all():
            return
        size, calls = self._batch_size, list(self._calls(keys[~known].unique()))
        # As many images as the teachers are asked about at a time.
        images = self._images([torch.cat([k, k[-1:].expand(size - len(k))]) for k in calls])
        for part, inputs in zip(calls, images, strict=True):
            self._rows.put(part, self._compute(inputs, len(part)))
            self.computed += len(part)

    def _calls(self, missing: Int64[Tensor, " N"]) -> Iterator[Int64[Tensor, " B"]]:
        """The keys of each call of the teachers."""
        size, images = self._batch_size, len(self._views)
        if self._views.chosen is None:
            yield from missing.split(size)
            return
        turns, index = missing.div(images, rounding_mode="floor"), missing % images
        blocks = index.div(size, rounding_mode="floor")
        for turn, block in torch.stack([turns, blocks], dim=1).unique(dim=0).tolist():
            yield turn * images + torch.arange(images)[block * size : (block + 1) * size]

    def take(self, keys: Int64[Tensor, " B"], *, maps: bool = True) -> TeacherOutputs:
        """Outputs that are known, in float32 on the device of the images.

        Args:
            keys: On the host.
            maps: Whether with the feature maps, which are most of it.
        """
        width = self._layout.width if maps else self._layout.begin_of_maps
        rows = self._rows.take(keys, width).to(self._views.device, non_blocking=True)
        return self._layout.unpack(rows.float())

    def __call__(self, batches: Iterator[Batch], plan: EpochPlan) -> Iterator[Batch]:
        """The batches, each with the outputs on it; missing ones are computed for several."""
        keys = self.keys(plan.order, plan.views)
        there = keys.to(self._views.device, non_blocking=True)
        for begin in range(0, len(plan.rows), GROUP):
            group = plan.rows[begin : begin + GROUP]
            self.fill(torch.cat([keys[rows] for rows in group]))
            # Before the last batch is given out: after it nobody comes back.
            if begin + GROUP >= len(plan.rows):
                self._rows.publish()
            for rows in group:
                yield replace(next(batches), teachers=self.take(keys[rows]), keys=there[rows])

    def recall(self, keys: Int64[Tensor, " B"]) -> TeacherOutputs:
        """Logits and features that a batch of these keys has brought along, the same numbers again.

        Computed again are only those of batches that another process had, before a checkpoint.
        """
        keys = keys.cpu()
        self.fill(keys)
        return self.take(keys, maps=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of a full store of every kind, by its name."""
        numbers = self.nbytes // self._layout.width
        return {kind: numbers * width for kind, width in self._layout.kinds.items()}

    def _ask(self, inputs: Float[Tensor, "B K H W"]) -> TeacherOutputs:
        outputs = self._teachers(inputs)
        if self._whole:
            return outputs
        means = tuple(one.mean((2, 3), keepdim=True) for one in outputs.feature_maps)
        return replace(outputs, feature_maps=means, averaged=True)

    def _compute(self, inputs: Float[Tensor, "B K H W"], count: int) -> Tensor:
        """Rows of the first so many images."""
        exact = self._layout.pack(self._ask(inputs))[:count]
        rows = exact.to(self._dtype)
        if bool((rows.isinf() & exact.isfinite()).any()):
            raise ConfigError(
                "store.dtype: a teacher's output is too large for float16; choose float32"
            )
        return rows


def _check_size(spec: StoreSpec, size: int, of_a_view: int) -> None:
    if size <= spec.max_bytes:
        return
    fitting = spec.max_bytes // of_a_view
    advice = f"; data.views {fitting} would fit" if fitting else ""
    raise ConfigError(
        f"store.max_bytes: a full store takes {size:,} bytes, more than the {spec.max_bytes:,} "
        f"that it may take{advice}"
    )


def _check_room(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.glob("rows-*.pt"))
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise ConfigError(
            f"store.place: a full store takes {size - there:,} bytes more, but {folder} has room "
            f"for {free:,}"
        )


def store_folder(cache: Path, about: Mapping[str, Any]) -> Path:
    """Folder of a store on disk, which says what the store was made from: plain values."""
    text = json.dumps({"version": LAYOUT_VERSION, **about}, sort_keys=True, indent=2)
    folder = cache / "teacher_outputs" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "about.json").exists():
        write_text(folder / "about.json", text + "\n")
    return folder


def check_store(spec: StoreSpec, stream: BatchStream) -> None:
    """Checks that the images of a stream have views that can be told apart.

    Raises:
        ConfigError: Outputs are to be kept, but no view comes twice.
    """
    if not spec:
        return
    if stream.mixes:
        raise ConfigError("store.place: mixed images never come twice; set mixup and cutmix to 0")
    if _views_of_an_image(stream.views) is None:
        raise ConfigError(
            "store.place: views that are drawn anew never come twice; images in files have "
            "numbered ones where data.views says how many"
        )


def _views_of_an_image(views: Views) -> int | None:
    return views.count if views.chosen is None else views.chosen.shape[1]
