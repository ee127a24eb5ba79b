"""What a teacher is worth for images that it was not asked about.

To first order, a step on teacher m's logit term for sample i lowers the cross-entropy of other,
labelled images by the inner product of the two gradients. In the student's last linear layer that
costs next to nothing: there the gradient of the labelled images is a direction G (C, D+1), and the
inner product is T (p_T(z_i) − p_T(z_i^m))ᵀ G [f_i; 1]. No label of sample i is used. Not in the
paper.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env import distributed, losses
from mtkd_env.distiller import Distiller
from mtkd_env.reference import LabelledDraws
from mtkd_env.types import Batch, DistillState, NetworkOutput


def with_bias(features: Float[Tensor, "B D"]) -> Float[Tensor, "B D1"]:
    """[f; 1]: features with a column of ones, which the bias of a linear layer is multiplied by."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def output_layer_gradient(output: NetworkOutput, batch: Batch) -> Float[Tensor, "C D1"]:
    """G: gradient of the mean cross-entropy of a batch with respect to [W, b] of z = W f + b.

    Mean over the batch of (p_1(z) − onehot(y)) ⊗ [f; 1], 0 for an image without a label.

    Args:
        output: What the student makes of the images; no gradient flows through it.
        batch: The images.
    """
    logits = output.logits.detach().float()
    error = logits.softmax(1) - losses.class_shares(batch.labels, logits.shape[1])
    error = error * batch.labelled.unsqueeze(1) / len(error)
    return error.T @ with_bias(output.feature.detach().float())


def worth(
    state: DistillState, direction: Float[Tensor, "C D1"], temperature: float
) -> Float[Tensor, "B M"]:
    """R_i^m = T (p_T(z_i) − p_T(z_i^m))ᵀ G [f_i; 1]: positive where teacher m helps.

    Both are distributions over the classes that the teacher knows, and 0 at others.

    Args:
        state: The batch.
        direction: G.
        temperature: T of the logit terms.
    """
    student, teachers = state.student.logits.detach().float(), state.teachers
    pull = losses.kd_pull(student, teachers.logits.float(), temperature, teachers.known)
    slope = with_bias(state.student.feature.detach().float()) @ direction.T
    return temperature * torch.einsum("mbc,bc->bm", pull, slope)


class HeldOutDirection(LabelledDraws):
    """G of labelled images drawn anew for every batch, seen by the student in evaluation mode.

    Args:
        distiller: Has the student and the labelled images.
        size: Number of images to draw.
    """

    def __init__(self, distiller: Distiller, size: int) -> None:
        super().__init__(distiller.reference)
        self._distiller = distiller
        self._size = size

    def __call__(self, state: DistillState) -> Float[Tensor, "C D1"]:
        """G, whatever the batch."""
        del state
        batch = self.draw(self._size)
        return output_layer_gradient(self._distiller.predict(batch.inputs), batch)


class RunningMean:
    """An exponential average of tensors that begins with the first one.

    Attributes:
        decay: Share of what was known that is kept at each update.
    """

    decay = 0.9

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, new: Tensor) -> Tensor:
        """The average with a further tensor."""
        if self.value is None:
            self.value = new
        else:
            # A checkpoint is read on the host.
            self.value = torch.lerp(self.value.to(new), new, 1 - self.decay)
        return self.value

    def reseed(self, seed: int) -> None:
        """Forgets everything."""
        del seed
        self.value = None

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"mean": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.value = state["mean"]


class CrossDirection(RunningMean):
    """G as the running mean of the training batches' own gradients; needs no further image.

    Labels of single samples that are wrong average out in it.
    """

    def __call__(self, state: DistillState) -> Float[Tensor, "C D1"]:
        """The mean, with the batch; of several processes, of all of theirs."""
        return self.update(distributed.mean(output_layer_gradient(state.student, state.batch)))


# Finds G for every batch, once, before the student learns from it.
Direction: TypeAlias = HeldOutDirection | CrossDirection


class RunningDeviation(RunningMean):
    """A running mean of the batches' standard deviations, which advantages are divided by."""

    decay = 0.95

    def observe(self, centred: Float[Tensor, "B M"]) -> None:
        """Takes a batch into account; of several processes, each gives its part."""
        self.update(distributed.mean(centred.square().mean()).sqrt())

    def __call__(self, centred: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """Numbers divided by it; as they are before the first batch."""
        return centred if self.value is None else centred / self.value.to(centred).clamp(min=1e-12)
