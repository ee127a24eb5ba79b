"""What a network is trained for: a subclass of `VisionTask` for each kind of task."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class VisionTask(ABC):
    """A network, the images that it is trained and judged on, and its loss.

    Attributes:
        model: The network; made by the constructor.
        steps_per_epoch: Number of batches that `batches` gives.
    """

    model: nn.Module
    steps_per_epoch: int

    @abstractmethod
    def batches(self, epoch: int, begin: int = 0) -> Iterator[Any]:
        """This process's batches of an epoch, on the device.

        They depend on the seed and the epoch alone, and draw from generators of their own.

        Args:
            epoch: The epoch, counted from 0.
            begin: Number of the first batch to give, from 0: where an interrupted run goes on.
        """

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Terms of the loss of a batch, scalars; always of the same names. Their sum is trained."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the network, the main one first; every process is told the same.

        All processes call it together, with the network in evaluation mode and without gradients.
        """

    @abstractmethod
    def pictures(self, count: int) -> Tensor:
        """Predictions beside the truth, uint8 (N, 3, H, W) with N <= count.

        Process 0 alone calls it, with the network in evaluation mode and without gradients.
        """
