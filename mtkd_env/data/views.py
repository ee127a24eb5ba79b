"""Where the batches of a stream come from; and those of images in memory, made on the device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from mtkd_env.data.augment import Crops, normalize
from mtkd_env.data.split import Split
from mtkd_env.errors import ConfigError, check_at_least_1, check_not_negative
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import Batch

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ViewSet:
    """Which of its views an image is seen in: `views` and `view_seed` of `DataSpec`.

    Raises:
        ConfigError: A count below 1, or a negative seed.
    """

    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None:
            check_at_least_1(views=self.count)
        check_not_negative(view_seed=self.seed)


FRESH = ViewSet()


class Views(ABC):
    """Makes batches of normalised views of the images of a split.

    Args:
        targets: Class of each image, where the batches are made.
        view_set: Which of the views are seen.

    Attributes:
        count: Number of views that an image has, 0 to count - 1; None where they have no numbers.
        targets: Class of each image.
        device: Where the batches are made.
        view_set: Which of the views are seen.
        chosen: Of a few views only, those of each image in their turn: numbers, or seeds that make
            them; on the host.
    """

    count: int | None = None

    def __init__(self, targets: Int64[Tensor, " N"], view_set: ViewSet) -> None:
        self.device = targets.device
        self.view_set = view_set
        self.chosen: Int64[Tensor, "N V"] | None = None
        self.targets = targets

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def draw(
        self, order: Int64[Tensor, " N"], generator: torch.Generator, epoch: int
    ) -> Int64[Tensor, " N"]:
        """The view of every place in an epoch's order: its number, or the seed that makes it."""
        if self.chosen is not None:
            return self.chosen[order, epoch % self.chosen.shape[1]]
        return self._draw_new(order, generator)

    def batches(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Batch]:
        """Some batches of an epoch.

        Args:
            order: Positions in the split, in the order of the whole epoch.
            drawn: What `draw` gave for it.
            rows: The part of the order that each batch holds.
        """
        # Not blocking spares the host a wait for the device; pageable memory is safe to free.
        index = order.to(self.device, non_blocking=True)
        targets = self.targets[index]
        for part, inputs in zip(rows, self.inputs(order, drawn, rows), strict=True):
            yield Batch(inputs, targets[part], index[part])

    @abstractmethod
    def inputs(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Float32[Tensor, "B K H W"]]:
        """The images of some batches alone; see `batches`."""

    @abstractmethod
    def _draw_new(
        self, order: Int64[Tensor, " N"], generator: torch.Generator
    ) -> Int64[Tensor, " N"]:
        """A view at random for every place in an order."""


class SeededViews(Views):
    """Views that are each made from a seed; see `Views`.

    Args:
        targets: Class of each image, where the batches are made.
        view_set: Which of the views are seen. A view depends on the image's place among all of its
            dataset, on its number and on the seed of the set.
        index: That place, on the CPU.
        alike: Whether all views of an image are the same one.
    """

    def __init__(
        self,
        targets: Int64[Tensor, " N"],
        view_set: ViewSet,
        index: Int64[Tensor, " N"],
        *,
        alike: bool,
    ) -> None:
        super().__init__(targets, view_set)
        if alike:
            self.chosen = torch.zeros(len(index), 1, dtype=torch.int64)
        elif view_set.count is not None:
            self.chosen = _seeds(index, view_set.count, view_set.seed)

    def draw(
        self, order: Int64[Tensor, " N"], generator: torch.Generator, epoch: int
    ) -> Int64[Tensor, " N"]:
        """The seed of every place in an epoch's order."""
        # Drawn in any case, so that the order of later epochs is the same whatever is seen.
        new = self._draw_new(order, generator)
        return new if self.chosen is None else super().draw(order, generator, epoch)

    def _draw_new(
        self, order: Int64[Tensor, " N"], generator: torch.Generator
    ) -> Int64[Tensor, " N"]:
        """A seed for every place in the order."""
        return torch.randint(LARGEST_SEED, order.shape, generator=generator)


def _seeds(index: Int64[Tensor, " N"], count: int, seed: int) -> Int64[Tensor, "N V"]:
    """Seeds of so many views; more views begin with the fewer ones."""
    shape = (int(index.max()) + 1,)
    columns = []
    for number in range(count):
        generator = torch.Generator().manual_seed(derive_seed(seed, f"view {number}"))
        columns.append(torch.randint(LARGEST_SEED, shape, generator=generator)[index])
    return torch.stack(columns, dim=1)


class MemoryViews(Views):
    """Crops and mirrors of images that live on the device.

    Args:
        split: The images, where the batches are made.
        mean: Mean of each channel in units of [0, 1].
        std: Standard deviation of each channel.
        padding: Zeros [pixels] that a random crop may reach into on each side.
        flip: Whether images are mirrored at random.
        view_set: Which of the views are seen.

    Raises:
        ConfigError: More views than there are.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Float32[Tensor, " K"],
        std: Float32[Tensor, " K"],
        padding: int,
        flip: bool,
        view_set: ViewSet = FRESH,
    ) -> None:
        super().__init__(split.targets, view_set)
        self._flip = flip
        self._shifts = 2 * padding + 1
        self.count: int = self._shifts**2 * (2 if flip else 1)
        if view_set.count is not None and view_set.count > self.count:
            raise ConfigError(
                f"views: expected 1 to {self.count}, the number of views that an image has, "
                f"found {view_set.count}"
            )
        padded = functional.pad(split.images, (padding,) * 4).contiguous()
        height, width = split.images.shape[2:]
        self._crops = Crops(padded, (height, width), flip=flip)
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        if view_set.count is not None:
            # More views begin with the fewer ones.
            generator = torch.Generator().manual_seed(derive_seed(view_set.seed, "views"))
            order = torch.rand(len(self), self.count, generator=generator).argsort(1)
            self.chosen = order[:, : view_set.count].clone()

    def _draw_new(
        self, order: Int64[Tensor, " N"], generator: torch.Generator
    ) -> Int64[Tensor, " N"]:
        """Numbers of views, whose digits are top, left and, before them, whether it is mirrored."""
        offsets = torch.randint(self._shifts, (len(order), 2), generator=generator)
        flips = (torch.rand(len(order), generator=generator) < 0.5) & self._flip
        return (flips * self._shifts + offsets[:, 0]) * self._shifts + offsets[:, 1]

    def inputs(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Float32[Tensor, "B K H W"]]:
        """The images of some batches alone."""
        yield from map(self.normalized, self.crops(order, drawn, rows))

    def normalized(self, images: UInt8[Tensor, "B K H W"]) -> Float32[Tensor, "B K H W"]:
        """Images as networks take them."""
        return normalize(images, self._mean, self._std)

    def crops(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[UInt8[Tensor, "B K H W"]]:
        """The same as bytes."""
        order, drawn = (part.to(self.device, non_blocking=True) for part in (order, drawn))
        lines, left = drawn.div(self._shifts, rounding_mode="floor"), drawn % self._shifts
        corners = self._crops.corners(order, lines % self._shifts, left)
        mirrored = lines.div(self._shifts, rounding_mode="floor")
        for part in rows:
            yield self._crops(corners[part], mirrored[part])


class DrawnViews(Views):
    """Crops and mirrors to which a transform does something at random, image by image.

    That is many small operations, which can take longer than the student's step.

    Args:
        crops: The crops and mirrors.
        transform: Changes an image of bytes (K, H, W), by torch's global generator of the CPU.

    Raises:
        ConfigError: Some views only, which these images do not have.
    """

    def __init__(self, crops: MemoryViews, transform: Callable[[Tensor], Tensor]) -> None:
        if crops.view_set.count is not None:
            raise ConfigError("views: images that a transform is drawn for have no numbered views")
        super().__init__(crops.targets, crops.view_set)
        self._crops = crops
        self._transform = transform

    def _draw_new(
        self, order: Int64[Tensor, " N"], generator: torch.Generator
    ) -> Int64[Tensor, " N"]:
        """A seed for every place in the order, whose remainder is the number of its crop."""
        crops = self._crops.draw(order, generator, epoch=0)
        count = self._crops.count
        return (
            torch.randint(LARGEST_SEED // count, order.shape, generator=generator) * count + crops
        )

    def inputs(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Float32[Tensor, "B K H W"]]:
        """The images of some batches alone."""
        crops = self._crops
        for part, cropped in zip(rows, crops.crops(order, drawn % crops.count, rows), strict=True):
            seen = [self._see(*one) for one in zip(cropped, drawn[part].tolist(), strict=True)]
            yield crops.normalized(torch.stack(seen))

    def _see(self, image: UInt8[Tensor, "K H W"], seed: int) -> UInt8[Tensor, "K H W"]:
        with seeded(seed):
            return self._transform(image)
