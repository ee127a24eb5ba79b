"""Mixup and cutmix of whole batches, by torchvision, under a seed of their own."""

from dataclasses import dataclass, replace

import torch

from mtkd_env.errors import check_not_negative
from mtkd_env.seeding import seeded
from mtkd_env.types import Batch


@dataclass(frozen=True, slots=True)
class Mixing:
    """How strongly images are mixed; of two ways, every batch takes either with equal chances.

    Attributes:
        mixup: α of mixup (Zhang et al., 2018): shares are drawn from Beta(α, α); 0 is none.
        cutmix: α of cutmix (Yun et al., 2019), likewise.

    Raises:
        ConfigError: A negative or infinite α.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(mixup=self.mixup, cutmix=self.cutmix)

    def __bool__(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


UNMIXED = Mixing()


class Mixer:
    """Mixes every image of a batch with the one before it, the first with the last."""

    def __init__(self, mixing: Mixing, num_classes: int) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixing.mixup), (v2.CutMix, mixing.cutmix))
        self._mix = v2.RandomChoice(
            [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        )

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """The mixed batch; its `mixture` says the shares, `targets` the class of the largest."""
        with seeded(seed), torch.no_grad():
            inputs, mixture = self._mix(batch.inputs, batch.targets)
        return replace(batch, inputs=inputs, targets=mixture.argmax(dim=1), mixture=mixture)
