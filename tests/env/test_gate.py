"""Weightings for specialists: what a gate learns from few labels, and rules that need none."""

import pytest
import torch
from torch import Tensor, nn

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.losses import mixture_log_likelihood, teacher_cross_entropy
from mtkd_env.reference import ReferenceImages
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import Batch, DistillState, TeacherOutputs, TeacherWeights
from mtkd_env.weighting import WEIGHTINGS
from mtkd_env.weighting.consensus import pooled_opinion
from mtkd_env.weighting.coverage import coverage_weights
from mtkd_env.weighting.gate import Gate, gate_inputs
from tiny import CLASSES, IMAGE_SHAPE, generator, make_state, make_tiny_distiller, teachers

M = 2


def specialists(targets: Tensor, seed: int) -> Tensor:
    """Logits (2, N, C): the first knows classes 0 and 1, the other the rest; both always sure.

    Each names one of its own classes, whatever the image.
    """
    draw = generator(seed)
    logits = 0.3 * torch.randn(M, len(targets), CLASSES, generator=draw)
    half = CLASSES // 2
    for m in range(M):
        own = (targets // half) == m
        guess = m * half + torch.randint(half, targets.shape, generator=draw)
        named = torch.where(own, targets, guess)
        # Of what it does not know it is a little less sure.
        sure = torch.where(own, 4.0, 3.0)
        logits[m, torch.arange(len(targets)), named] += sure
    return logits


def distiller_of(logits: Tensor, targets: Tensor) -> Distiller:
    count = len(targets)
    reference = ReferenceImages(teachers(M), labelled=list, student=list)
    vars(reference)["labelled"] = Batch(
        inputs=torch.zeros(count, *IMAGE_SHAPE),
        targets=targets,
        index=torch.arange(count),
        teachers=TeacherOutputs(logits, (torch.zeros(count, 1),) * M, ()),
    )
    return make_tiny_distiller(count=M, reference=reference)


def state_of(logits: Tensor) -> DistillState:
    size = logits.shape[1]
    none = torch.zeros(size, M)
    maps = (torch.zeros(size, 2, 1, 1),) * M
    features = (torch.zeros(size, 2),) * M
    return make_state(
        teacher_cross_entropy=none,
        divergence=none,
        teachers=TeacherOutputs(logits, features, maps),
    )


def known(count: int, seed: int) -> tuple[Tensor, Tensor]:
    targets = torch.randint(CLASSES, (count,), generator=generator(seed))
    return specialists(targets, seed), targets


def test_a_gate_learns_from_few_labels_whom_to_ask() -> None:
    gate = Gate(distiller_of(*known(100, seed=1)))
    logits, targets = known(400, seed=2)
    weights = gate(state_of(logits)).logit
    asked = weights.gather(1, (targets // (CLASSES // 2)).unsqueeze(1)).mean()
    assert asked > 0.7
    equal = torch.full_like(weights, 1 / M)
    own = teacher_cross_entropy(logits, targets)
    gained = mixture_log_likelihood(weights, own).mean()
    assert gained > mixture_log_likelihood(equal, own).mean() + 0.1


def test_a_gate_is_the_network_that_learns_from_all_labelled_images_alone() -> None:
    logits, targets = known(40, seed=1)
    gate = Gate(distiller_of(logits, targets), hidden=[8], folds=2, weight_decay=0.1)
    inputs, own = gate_inputs(logits), teacher_cross_entropy(logits, targets)
    with seeded(derive_seed(0, "weighting")):
        first, second = nn.Linear(inputs.shape[1], 8), nn.Linear(8, M)
    network = nn.Sequential(first, nn.ReLU(), second)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(gate.fit.steps):
        optimizer.zero_grad()
        (-mixture_log_likelihood(network(inputs).softmax(1), own).mean()).backward()
        optimizer.step()
    expected = network(gate_inputs(logits)).softmax(1)
    torch.testing.assert_close(gate(state_of(logits)).logit, expected, rtol=1e-4, atol=1e-5)


def test_cross_validation_stops_a_gate_early_where_there_is_nothing_to_learn() -> None:
    noise = torch.randn(M, 100, CLASSES, generator=generator(3))
    targets = torch.randint(CLASSES, (100,), generator=generator(4))
    learned = Gate(distiller_of(*known(100, seed=1)))
    assert Gate(distiller_of(noise, targets)).fit.steps < learned.fit.steps


def test_too_few_labels_for_the_folds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data.labelled: expected at least 5 .* got 3"):
        Gate(distiller_of(*known(3, seed=1)))


def test_entropy_weights_are_a_softmax_of_minus_the_entropies() -> None:
    sure, unsure = torch.tensor([8.0, 0, 0, 0]).log_softmax(0), torch.zeros(4)
    logits = torch.stack([sure, unsure]).unsqueeze(1)
    entropies = torch.special.entr(logits.softmax(-1)).sum(-1).squeeze(1)
    for sharpness in (1.0, 5.0):
        weighting = WEIGHTINGS["entropy"](make_tiny_distiller(count=M), sharpness=sharpness)
        found = weighting(state_of(logits)).logit[0]
        torch.testing.assert_close(found, (-sharpness * entropies).softmax(0))


def test_a_teacher_is_asked_about_the_classes_that_it_names_more_often() -> None:
    raised = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.3, 0.3, 0.3]])
    logits = torch.zeros(M, 1, CLASSES)
    logits[:, 0, 0] = 20.0  # Both say class 0.
    torch.testing.assert_close(coverage_weights(logits, raised), torch.tensor([[0.875, 0.125]]))


def test_who_always_says_the_same_has_no_say_in_the_pooled_opinion() -> None:
    answers = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]])
    usual = torch.tensor([[0.25, 0.25, 0.3, 0.2]])
    same = torch.tensor([0.6, 0.4, 0.0, 0.0])
    alone = pooled_opinion(answers, usual)
    with_other = pooled_opinion(
        torch.cat([answers, same.expand(1, 2, 4)]), torch.cat([usual, same.unsqueeze(0)])
    )
    torch.testing.assert_close(with_other, alone)


def test_the_pooled_opinion_multiplies_what_is_said_more_than_usual() -> None:
    answers = torch.tensor([[[0.6, 0.2, 0.1, 0.1]], [[0.3, 0.3, 0.2, 0.2]]])
    usual = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.4, 0.3, 0.2]])
    said, often = 0.95 * answers[:, 0] + 0.0125, 0.95 * usual + 0.0125
    product = (said / often).prod(0)
    torch.testing.assert_close(pooled_opinion(answers, usual).exp()[0], product / product.sum())


def test_weights_by_consensus_fall_with_the_divergence_from_it() -> None:
    distiller = make_tiny_distiller(count=M)
    logits = 2 * torch.randn(M, 3, CLASSES, generator=generator(0))
    own = torch.distributions.Categorical(logits=logits)
    known = distiller.reference.class_probabilities
    together = torch.distributions.Categorical(logits=pooled_opinion(own.probs, known))
    apart = torch.distributions.kl_divergence(own, together).T
    for sharpness in (1.0, 4.0):
        found = WEIGHTINGS["consensus"](distiller, sharpness=sharpness)(state_of(logits))
        torch.testing.assert_close(found.logit, (-sharpness * apart).softmax(1))
        assert found.feature.equal(found.logit)


def test_the_best_teacher_on_the_labelled_images_gets_all_weight() -> None:
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    right = torch.nn.functional.one_hot(targets, CLASSES).float()
    wrong = torch.nn.functional.one_hot((targets + 1) % CLASSES, CLASSES).float()
    weighting = WEIGHTINGS["heldout_constant"](distiller_of(torch.stack([wrong, right]), targets))
    found: TeacherWeights = weighting(state_of(torch.zeros(M, 3, CLASSES)))
    assert found.logit.tolist() == [[0.0, 1.0]] * 3


def test_a_mixtures_likelihood_is_that_of_the_weighted_probabilities() -> None:
    logits, targets = known(5, seed=1)
    weights = torch.rand(5, M, generator=generator(2))
    weights = weights / weights.sum(1, keepdim=True)
    mixture = torch.einsum("bm,mbc->bc", weights, logits.softmax(-1))
    expected = mixture.gather(1, targets.unsqueeze(1)).squeeze(1).log()
    found = mixture_log_likelihood(weights, teacher_cross_entropy(logits, targets))
    torch.testing.assert_close(found, expected)
