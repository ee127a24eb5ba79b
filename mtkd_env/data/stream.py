"""Batches on one device: an endless, seeded, resumable stream to train on.

A stream decides which images come when; how a view of an image is made is the business of its
`Views`. All random numbers of an epoch are drawn on the CPU, so that they are the same on every
device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from mtkd_env.data.augment import Mixer
from mtkd_env.data.split import WHOLE, Shard, shard_rows
from mtkd_env.data.views import LARGEST_SEED, Views
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed
from mtkd_env.types import Batch


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What is left of an epoch, known on the host before any of it is made.

    Attributes:
        order: Positions in the split, in the order of the whole epoch.
        views: The view of each; see `Views.draw`.
        rows: This process's part of that order, batch by batch, for the batches to come.
    """

    order: Int64[Tensor, " N"]
    views: Int64[Tensor, " N"]
    rows: Sequence[slice]


# Gives the batches of an epoch what the teachers say of them, and may look some batches ahead.
Teaching = Callable[[Iterator[Batch], EpochPlan], Iterator[Batch]]


class BatchStream(Iterator[Batch]):
    """Endless batches of shuffled, augmented, normalised images on one device.

    Every epoch visits the images in a new order and leaves out the last ones if they do not fill
    a batch. The order depends on the seed alone, not on the augmentation. Of several processes,
    each gets its rows of the batches that a single one would get.

    Args:
        views: What the batches are made of.
        batch_size: Number of images in every batch, over all processes.
        seed: Seed of order and augmentation.
        shard: Which process this is, and of how many.
        mixer: Mixes the images of a batch; of several processes, each mixes its own rows.
        repeats: How often an image occurs in an epoch, each time in another view; the epoch
            keeps its length, so that others do not occur.

    Attributes:
        teaching: What lets batches bring the teachers' outputs along; nothing by default. It does
            not change where the stream is.
        local_batch_size: Number of images in a batch that this process gets.
        samples: Number of images in the split.
        steps_per_epoch: Number of batches in an epoch.
        epoch: Number of completed epochs.
        step: Number of batches given out since the epoch began.

    Raises:
        ConfigError: A batch size that is not between 1 and the number of images, or that the
            processes cannot share evenly.
    """

    def __init__(
        self,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        shard: Shard = WHOLE,
        mixer: Mixer | None = None,
        repeats: int = 1,
    ) -> None:
        if not 1 <= batch_size <= len(views):
            raise ConfigError(
                f"batch_size: expected 1 to {len(views)}, the number of images, found {batch_size}"
            )
        _, processes = self._shard = shard
        if batch_size % processes:
            raise ConfigError(
                f"batch_size: expected a multiple of {processes}, the number of processes, "
                f"found {batch_size}"
            )
        self.batch_size = batch_size
        self.local_batch_size = batch_size // processes
        self.samples = len(views)
        self.steps_per_epoch = len(views) // batch_size
        self.epoch = 0
        self.step = 0
        self.views = views
        self.teaching: Teaching | None = None
        self._mixer = mixer
        self._repeats = repeats
        self._batches: Iterator[Batch] | None = None
        self._generator = torch.Generator()
        self.reseed(seed)

    def __next__(self) -> Batch:
        """The next batch; `index` is the position in the split."""
        # Forgotten until it has given a batch: one that failed cannot go on.
        batches, self._batches = self._batches or self._epoch_batches(), None
        batch = next(batches)
        self._batches = batches
        self.step += 1
        if self.step == self.steps_per_epoch:
            self._begin(self.epoch + 1, step=0)
        return batch

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed."""
        return self._mixer is not None

    def reseed(self, seed: int) -> None:
        """Starts all over, from the first epoch of another seed."""
        self._generator.manual_seed(derive_seed(seed, "stream"))
        self._begin(epoch=0, step=0)

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, the same in each of several processes.

        `samples` and `batch_size` guard against another stream's state.
        """
        return {
            "generator": self._start,  # Made anew for every epoch, and never written into.
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another stream over the same split was.

        Raises:
            ConfigError: The state is of a stream with other numbers of images.
        """
        found, own = (state["samples"], state["batch_size"]), (self.samples, self.batch_size)
        if found != own:
            raise ConfigError(
                f"stream state: expected {own[0]} images in batches of {own[1]}, "
                f"found {found[0]} in batches of {found[1]}"
            )
        # A checkpoint may have been read onto the device of the images.
        self._generator.set_state(state["generator"].to("cpu"))
        self._begin(state["epoch"], state["step"])

    def _begin(self, epoch: int, step: int) -> None:
        """Stands at a step of an epoch whose numbers the generator is about to draw."""
        self.epoch, self.step = epoch, step
        self._start = self._generator.get_state()
        self._batches = None

    def _epoch_batches(self) -> Iterator[Batch]:
        """This process's rows of the batches that the epoch still holds."""
        self._generator.set_state(self._start)
        own = shard_rows(self.batch_size, self._shard)
        begins = range(self.step * self.batch_size, self.samples, self.batch_size)
        rows = [slice(begin + own.start, begin + own.stop) for begin in begins]
        rows = rows[: self.steps_per_epoch - self.step]
        order = self._order()
        drawn = self.views.draw(order, self._generator, self.epoch)
        batches = self.views.batches(order, drawn, rows)
        if self._mixer is not None:
            batches = self._mixed(self._mixer, batches)
        if self.teaching is not None:
            batches = self.teaching(batches, EpochPlan(order, drawn, rows))
        return batches

    def _mixed(self, mixer: Mixer, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of mixed images, under seeds that depend on seed, epoch and step."""
        # Drawn from a copy, so that the order is as without.
        generator = torch.Generator()
        generator.set_state(self._start)
        drawn = int(torch.randint(LARGEST_SEED, (), generator=generator))
        for step, batch in enumerate(batches, start=self.step):
            yield mixer(batch, derive_seed(drawn, f"mixing {step}"))

    def _order(self) -> Int64[Tensor, " N"]:
        order = torch.randperm(self.samples, generator=self._generator)
        if self._repeats == 1:
            return order
        places = torch.arange(self.samples)
        repeated = order[places // self._repeats]
        # Within a batch the views of an image lie apart, where mixing does not pair them.
        batch, copy = places // self.batch_size, places % self._repeats
        return repeated[torch.argsort(batch * self._repeats + copy, stable=True)]
