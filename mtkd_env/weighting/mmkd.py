"""MMKD: two small networks weight the teachers, and learn from what their weights lead to."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from mtkd_env import distributed
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, check_at_least_1, check_not_negative
from mtkd_env.reference import LabelledDraws
from mtkd_env.seeding import RandomNumbers, derive_seed, seeded
from mtkd_env.types import Batch, DistillState, TeacherOutputs, TeacherWeights
from mtkd_env.weighting.base import Weighting


def gram_rows(feature_map: Float[Tensor, "B K H W"]) -> Float[Tensor, "B B"]:
    """Inner products of every sample's map with all maps of the batch, rows of unit length."""
    flat = feature_map.float().flatten(1)
    return functional.normalize(flat @ flat.T, dim=1)


class MetaWeights(nn.Module):
    """Weights of both heads from the outputs of all teachers and of the student.

    The logit net reads the logits of all M + 1 networks, the feature net every sample's row of
    their M + 1 Gram matrices. Both: a linear layer to half the width, ReLU, a linear layer to M,
    softmax.

    Args:
        batch_size: B, the length of a row of a Gram matrix; the same for every batch.
        teachers: M.
        classes: C.
    """

    def __init__(self, batch_size: int, teachers: int, classes: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.logit = self._net(classes * (teachers + 1), teachers)
        self.feature = self._net(batch_size * (teachers + 1), teachers)

    @staticmethod
    def _net(width: int, teachers: int) -> nn.Module:
        hidden = max(1, width // 2)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, teachers))

    def forward(self, state: DistillState) -> TeacherWeights:
        """Weights with their graph; none reaches the student."""
        logits = [*state.teachers.scores, state.student.logits.detach()]
        maps = [*state.teachers.whole_maps, state.student.feature_map.detach()]
        rows = torch.cat([gram_rows(one) for one in maps], dim=1)
        return TeacherWeights(
            logit=self.logit(torch.cat(logits, dim=1).float()).softmax(1),
            feature=self.feature(rows).softmax(1),
        )


class HardBuffer(RandomNumbers):
    """Samples that the student got wrong lately.

    Args:
        size: Number of samples.
        seed: Seed of the slots that are replaced and of the samples that are drawn.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(seed)
        self.size = size
        self.samples: dict[str, Tensor] = {}  # By the names that a batch has for them.

    def __len__(self) -> int:
        """Samples that it holds."""
        return len(self.samples.get("targets", ()))

    def add(self, batch: Batch, wrong: Tensor) -> None:
        """Takes whole batches until it is full; then wrong samples replace random ones.

        Args:
            batch: The batch.
            wrong: Whether the student got each of its samples wrong (B,).
        """
        names = ("inputs", "targets", "index", *(["mixture"] if batch.mixture is not None else []))
        new = {name: getattr(batch, name) for name in names}
        if len(self) < self.size:
            known = {name: [self.samples[name]] if len(self) else [] for name in names}
            self.samples = {k: torch.cat([*known[k], new[k]])[: self.size].clone() for k in names}
            return
        # Every sample has a slot of its own to replace, so that nothing waits for the device.
        slots = torch.randperm(self.size, generator=self.generator)[: len(wrong)]
        slots = slots.to(wrong.device, non_blocking=True)
        for name, old in self.samples.items():
            mask = wrong[: self.size].view(-1, *[1] * (old.ndim - 1))
            kept = torch.where(mask, new[name][: self.size], old[slots])
            self.samples[name] = old.index_copy(0, slots, kept)

    def sample(self, size: int) -> Batch:
        """So many different samples at random."""
        chosen = torch.randperm(len(self), generator=self.generator)[:size]
        chosen = chosen.to(self.samples["targets"].device, non_blocking=True)
        found: dict[str, Any] = {name: tensor[chosen] for name, tensor in self.samples.items()}
        return Batch(**found)

    def state_dict(self) -> dict[str, Any]:
        """The samples and the generator."""
        return {"samples": dict(self.samples), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave."""
        self.samples = dict(state["samples"])
        super().load_state_dict(state)


class VirtualStudent:
    """Where steps of its optimiser would lead the student, as functions of the steps' losses.

    Steps of SGD with the momentum that the student has, its Nesterov's and its weight decay; of
    plain gradient descent where the student is trained by another optimiser.

    Args:
        distiller: The student and its optimiser, which stay as they are.

    Attributes:
        parameters: Of the student and of what is trained with it, by name.
    """

    def __init__(self, distiller: Distiller) -> None:
        optimizer, names = distiller.optimizer, dict(distiller.module.named_parameters())
        groups = {part: group for group in optimizer.param_groups for part in group["params"]}
        self._rules = {name: groups[part] for name, part in names.items()}
        self.parameters = {name: part.detach().requires_grad_() for name, part in names.items()}
        self._velocities: dict[str, Tensor | float] = {
            name: optimizer.state.get(part, {}).get("momentum_buffer", 0.0)
            for name, part in names.items()
        }

    def step(self, loss: Tensor) -> None:
        """Lowers a loss."""
        parameters = list(self.parameters.values())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        for name, gradient in zip(list(self.parameters), gradients, strict=True):
            if gradient is None:
                continue
            rule, parameter = self._rules[name], self.parameters[name]
            if "momentum" in rule:
                momentum = rule["momentum"]
                gradient = gradient + rule["weight_decay"] * parameter
                velocity = self._velocities[name] = momentum * self._velocities[name] + gradient
                gradient = gradient + momentum * velocity if rule["nesterov"] else velocity
            self.parameters[name] = parameter - rule["lr"] * gradient


class MMKD(Weighting):
    """Meta-learned weights: those after which a student that follows them classifies best.

    Zhang et al., "Adaptive Multi-Teacher Knowledge Distillation with Meta-Learning" (ICME 2023).
    Every `meta_every` batches, on a batch of samples that the student got wrong lately, or of
    labelled images drawn at random where not all have a label: virtual
    steps of the student on the distillation terms under the weights, one virtual step on the
    cross-entropy, and the cross-entropy of where that leads; its gradient through the virtual
    steps trains the two networks. The student itself is not touched.

    Deviations: the gradient through the virtual steps is exact also under Nesterov's momentum,
    which the official code steps by but reverses as plain momentum; rows of Gram matrices have unit
    length. The published α, β, T are 1, 100, 4.

    Args:
        meta_every: Batches between two meta-updates.
        virtual_steps: Virtual steps on the distillation terms.
        buffer_size: Samples in the buffer of hard samples.
        lr: Learning rate of Adam for the networks.
        weight_decay: L2 coefficient of Adam.

    Raises:
        ConfigError: Several processes, a count below 1, a negative number or, at the first batch,
            a buffer that could not hold it.
    """

    needs_maps = True

    def __init__(
        self,
        distiller: Distiller,
        *,
        seed: int = 0,
        meta_every: int = 5,
        virtual_steps: int = 2,
        buffer_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(distiller, seed=seed)
        if distributed.active():
            raise ConfigError(
                "mmkd: runs in a single process only: it differentiates through the student's "
                "steps on a batch as a whole"
            )
        check_at_least_1(
            meta_every=meta_every, virtual_steps=virtual_steps, buffer_size=buffer_size
        )
        check_not_negative(lr=lr, weight_decay=weight_decay)
        self._meta_every = meta_every
        self._virtual_steps = virtual_steps
        self._lr = lr
        self._weight_decay = weight_decay
        self.buffer = HardBuffer(buffer_size, derive_seed(seed, "buffer"))
        complete = distiller.reference.complete
        draws = LabelledDraws(distiller.reference, derive_seed(seed, "labelled"))
        self._draws = None if complete else draws
        self.steps = 0
        self._nets: tuple[MetaWeights, Adam] | None = None

    def _build(self, batch_size: int) -> tuple[MetaWeights, Adam]:
        """The networks and their optimiser; made when the size of a batch is first known."""
        if self._nets is None:
            if batch_size > self.buffer.size:
                raise ConfigError(
                    f"buffer_size: expected at least {batch_size}, the number of samples in a "
                    f"batch, got {self.buffer.size}"
                )
            teachers = self.distiller.teachers
            with seeded(derive_seed(self.seed, "weighting")):
                meta = MetaWeights(batch_size, len(teachers), teachers.num_classes)
            meta.to(self.distiller.device)
            optimizer = Adam(meta.parameters(), lr=self._lr, weight_decay=self._weight_decay)
            self._nets = meta, optimizer
        return self._nets

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by the networks as they are."""
        meta, _ = self._build(len(state.batch.targets))
        return meta(state)

    def after_update(self, state: DistillState) -> None:
        """Remembers hard samples; every few batches, a meta-update."""
        wrong = state.student.logits.detach().argmax(1) != state.batch.targets
        if self._draws is None:
            self.buffer.add(state.batch, wrong)
        self.steps += 1
        size = len(state.batch.targets)
        if self.steps % self._meta_every == 0:
            batch = self.buffer.sample(size) if self._draws is None else self._drawn(size)
            meta, optimizer = self._build(size)
            optimizer.zero_grad(set_to_none=True)
            loss = self.objective(batch, self.distiller.teachers(batch.inputs))
            loss.backward(inputs=list(meta.parameters()))
            optimizer.step()

    def _drawn(self, size: int) -> Batch:
        """So many labelled images; the networks read rows of that length."""
        assert self._draws is not None
        batch = self._draws.draw(size)
        if len(batch.targets) < size:
            raise ConfigError(
                f"data.labelled: mmkd needs at least {size} labelled images, one for each sample "
                f"of a batch, got {len(batch.targets)}"
            )
        return batch

    @torch.enable_grad()
    def objective(self, batch: Batch, teachers: TeacherOutputs) -> Float[Tensor, ""]:
        """Cross-entropy of the student where following the weights would lead it.

        Differentiable with respect to the two networks, through the virtual steps.
        """
        distiller = self.distiller
        meta, _ = self._build(len(batch.targets))
        student = VirtualStudent(distiller)
        for _ in range(self._virtual_steps):
            state = distiller.imagine(batch, teachers, student.parameters)
            student.step(distiller.teacher_loss(state, meta(state)).mean())
        state = distiller.imagine(batch, teachers, student.parameters)
        student.step(state.cross_entropy.mean())
        return distiller.imagine(batch, teachers, student.parameters).cross_entropy.mean()

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimiser, buffer and number of batches."""
        meta, optimizer = self._nets or (None, None)
        return {
            "batch_size": meta.batch_size if meta else None,
            "meta": meta.state_dict() if meta else None,
            "optimizer": optimizer.state_dict() if optimizer else None,
            "buffer": self.buffer.state_dict(),
            "draws": self._draws.state_dict() if self._draws else None,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.steps = int(state["steps"])
        self.buffer.load_state_dict(state["buffer"])
        if self._draws is not None:
            self._draws.load_state_dict(state["draws"])
        self._nets = None
        if state["batch_size"] is not None:
            meta, optimizer = self._build(int(state["batch_size"]))
            meta.load_state_dict(state["meta"])
            optimizer.load_state_dict(state["optimizer"])
