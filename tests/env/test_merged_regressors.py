"""One convolution for teachers of a kind is exactly one convolution for each of them.

All in float64, because training amplifies rounding.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from mtkd_env.distiller import Distiller
from mtkd_env.networks.regressor import Regressors
from mtkd_env.optimization import Recipe
from mtkd_env.seeding import seeded
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.terms import Distillation
from mtkd_env.types import Batch, TeacherWeights
from tiny import (
    IMAGE_SHAPE,
    STEPS_PER_EPOCH,
    TinyNetwork,
    batch,
    generator,
    perturb,
    random_weights,
)

LR, MOMENTUM, DECAY, ALPHA, BETA, T = 0.05, 0.9, 1e-2, 0.7, 3.0, 2.0

# Channels, side of the map, and whether it is signed, for each teacher; side of the student's map.
Kinds = list[tuple[int, int, bool]]
POOLS: dict[str, tuple[Kinds, int]] = {
    "of equal sizes": ([(4, 4, False), (7, 4, False), (3, 4, False)], 4),
    "of mixed sizes": ([(4, 2, False), (7, 4, False), (3, 2, False), (5, 8, False)], 4),
    "signed and not": ([(4, 4, True), (7, 4, False), (3, 4, True), (5, 4, False)], 4),
    "that are enlarged to": ([(4, 8, False), (7, 8, False), (3, 4, True)], 2),
    "that are pooled to": ([(4, 2, False), (7, 2, False), (3, 4, True)], 8),
    "of one teacher": ([(4, 4, False)], 2),
}
pools = pytest.mark.parametrize("pool", POOLS)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Separate(nn.Module):
    """A regressor of its own for every teacher, which resizes the map before it convolves it."""

    def __init__(self, in_channels: int, kinds: Kinds) -> None:
        super().__init__()
        self.kinds = kinds
        self.convolutions = nn.ModuleList(nn.Conv2d(in_channels, k, 1) for k, _, _ in kinds)
        self.norms = nn.ModuleList(nn.BatchNorm2d(k) for k, _, _ in kinds)

    def forward(self, feature_map: Tensor) -> list[Tensor]:
        maps = []
        for (_, side, signed), *layers in zip(
            self.kinds, self.convolutions, self.norms, strict=True
        ):
            if feature_map.shape[-1] < side:
                resized = functional.interpolate(feature_map, (side, side), mode="bilinear")
            else:
                resized = functional.adaptive_avg_pool2d(feature_map, side)
            mapped = nn.Sequential(*layers)(resized)
            maps.append(mapped if signed else mapped.relu())
        return maps


def distiller(pool: str, recipe: Recipe | None = None) -> Distiller:
    kinds, side = POOLS[pool]
    with seeded(0):
        networks = [perturb(TinyNetwork(k, s, signed=sign), 1) for k, s, sign in kinds]
    found = Distiller(
        lambda: TinyNetwork(side=side),
        TeacherEnsemble(networks, [str(m) for m in range(len(kinds))]),
        image_shape=IMAGE_SHAPE,
        steps_per_epoch=STEPS_PER_EPOCH,
        distillation=Distillation(ALPHA, BETA, T),
        recipe=recipe or Recipe(lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    )
    found.reinitialize(5)
    return found


def reference(pool: str) -> tuple[nn.Module, Separate]:
    """The student and its regressors as they start, drawn one after the other."""
    kinds, side = POOLS[pool]
    with seeded(5):
        student = TinyNetwork(side=side)
        return student, Separate(student.map_channels, kinds)


def apart(merged: Regressors, kinds: Kinds) -> dict[str, Tensor]:
    """The tensors of merged regressors under the names that they have in `Separate`."""
    members: dict[tuple[int, bool], list[int]] = {}
    for teacher, (_, side, signed) in enumerate(kinds):
        members.setdefault((side, signed), []).append(teacher)
    found = {}
    for regressor, group in zip(merged, members.values(), strict=True):
        widths = [kinds[teacher][0] for teacher in group]
        for name, tensor in regressor.state_dict().items():
            layer, _, part = name.partition(".")
            single = tensor.ndim == 0
            parts = [tensor] * len(group) if single else tensor.split(widths)
            for teacher, one in zip(group, parts, strict=True):
                found[f"{layer}s.{teacher}.{part}"] = one
    return found


def loss_by_hand(
    one: Distiller, student: nn.Module, separate: Separate, images: Batch, weights: TeacherWeights
) -> Tensor:
    """Equ. 2, teacher by teacher."""
    output, known = student(images.inputs), one.teachers(images.inputs)
    loss = functional.cross_entropy(output.logits, images.targets, reduction="none")
    log_q = (output.logits / T).log_softmax(1)
    for m, ours in enumerate(separate(output.feature_map)):
        p = (known.logits[m] / T).softmax(1)
        divergence = T**2 * functional.kl_div(log_q, p, reduction="none").sum(1)
        distance = (ours - known.feature_maps[m]).square().mean((1, 2, 3))
        loss = loss + ALPHA * weights.logit[:, m] * divergence
        loss = loss + BETA * weights.feature[:, m] * distance
    return loss.mean()


@pools
def test_students_start_with_the_numbers_of_separate_regressors(pool: str) -> None:
    found, (student, separate) = distiller(pool).module, reference(pool)
    for name, tensor in student.state_dict().items():
        assert tensor.equal(found.student.state_dict()[name]), name
    parts = apart(found.regressors, POOLS[pool][0])
    assert parts.keys() == separate.state_dict().keys()
    for name, tensor in separate.state_dict().items():
        assert tensor.equal(parts[name]), name


@pools
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_are_those_of_separate_regressors(pool: str, clip_norm: float | None) -> None:
    recipe = Recipe(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, clip_norm=clip_norm)
    one, (student, separate) = distiller(pool, recipe), reference(pool)
    parameters = [*student.parameters(), *separate.parameters()]
    optimizer = SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    for step in range(4):
        weights = random_weights(step, count=len(POOLS[pool][0]))
        one.update(one.forward(batch(step)), weights)
        optimizer.zero_grad()
        loss_by_hand(one, student, separate, batch(step), weights).backward()
        if clip_norm is not None:
            assert nn.utils.clip_grad_norm_(parameters, clip_norm) > clip_norm
        optimizer.step()
    expected = {**student.state_dict(), **separate.state_dict()}
    found = {**one.student.state_dict(), **apart(one.module.regressors, POOLS[pool][0])}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pools
def test_maps_and_the_gradients_of_each_are_those_of_separate_regressors(pool: str) -> None:
    one, (student, separate) = distiller(pool), reference(pool)
    feature_map = student(batch().inputs).feature_map.detach().requires_grad_()
    maps = one.module.regressors(feature_map)
    expected = separate(feature_map)
    assert isinstance(maps, tuple)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        along = torch.randn(ours.shape, generator=generator(0))
        gradients = [
            torch.autograd.grad((one * along).sum(), feature_map, retain_graph=True)[0]
            for one in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_teachers_of_one_kind_share_their_layers() -> None:
    sizes = {pool: len(distiller(pool).module.regressors) for pool in POOLS}
    assert sizes == {
        "of equal sizes": 1,
        "of mixed sizes": 3,
        "signed and not": 2,
        "that are enlarged to": 2,
        "that are pooled to": 2,
        "of one teacher": 1,
    }


def test_numbers_drawn_after_the_regressors_do_not_depend_on_merging() -> None:
    kinds, _ = POOLS["of equal sizes"]
    channels, sizes, signed = zip(*[(k, (s, s), sign) for k, s, sign in kinds], strict=True)
    with seeded(1):
        Regressors(6, channels, sizes, signed)
        found = torch.rand(3)
    with seeded(1):
        Separate(6, kinds)
        assert torch.rand(3).equal(found)
