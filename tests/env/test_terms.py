"""Loss terms by name: reading them, summing them, training by them."""

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from mtkd_env import losses
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.imports import Kind
from mtkd_env.terms import (
    FEATURE_TERM,
    FEATURE_TERMS,
    LOGIT_TERM,
    LOGIT_TERMS,
    Distillation,
    Term,
    TermInputs,
    Terms,
    combine,
    parse_terms,
)
from mtkd_env.types import TeacherWeights
from tiny import CLASSES, NUM_ENVS, batch, generator, make_tiny_distiller, random_state, teachers

M = 3


# Reading.


@pytest.mark.parametrize("kind", [LOGIT_TERM, FEATURE_TERM])
def test_a_name_is_one_loss_and_none_is_no_loss(kind: Kind[Term]) -> None:
    for name in kind.table:
        assert parse_terms(name, kind) == {name: 1.0}
    assert parse_terms("none", kind) == parse_terms({}, kind) == {}


def test_coefficients_are_kept_in_their_order() -> None:
    terms = {"dist": 0.5, "kd": 0.0}
    found = parse_terms(terms, LOGIT_TERM)
    assert list(found.items()) == [("dist", 0.5), ("kd", 0.0)]
    assert found is not terms


@pytest.mark.parametrize("terms", ["dits", {"dits": 1.0}, {"kd": 1.0, "dits": 1.0}])
def test_an_unknown_loss_is_named_with_the_nearest(terms: Terms) -> None:
    with pytest.raises(ConfigError, match="unknown logit 'dits'; did you mean 'dist'"):
        parse_terms(terms, LOGIT_TERM)


@pytest.mark.parametrize("coefficient", [-0.1, inf, nan, -inf])
def test_coefficients_that_are_negative_or_not_finite_are_refused(coefficient: float) -> None:
    with pytest.raises(ConfigError, match=rf"logit\.kd: .*finite number >= 0, got {coefficient}"):
        parse_terms({"dist": 1.0, "kd": coefficient}, LOGIT_TERM)


def test_none_is_no_loss_that_could_have_a_coefficient() -> None:
    with pytest.raises(ConfigError, match="unknown logit 'none'"):
        parse_terms({"none": 1.0}, LOGIT_TERM)


def test_nd_alone_needs_directions() -> None:
    needing: list[Terms] = ["nd", {"nd": 2.0}, {"mse": 1.0, "nd": 0.5}]
    others: list[Terms] = ["mse", "none", {}, {"mse": 2.0}]
    assert all(Distillation(feature=terms).needs_directions for terms in needing)
    assert not any(Distillation(feature=terms).needs_directions for terms in others)


# Summing.


def inputs() -> TermInputs:
    state = random_state(size=NUM_ENVS)
    return TermInputs(
        logits=state.student.logits,
        projected=state.projected,
        embedded=state.teachers.features,
        teachers=state.teachers,
        targets=state.batch.targets,
        temperature=2.0,
        directions=tuple(torch.rand(CLASSES, f.shape[1]) for f in state.teachers.features),
    )


TABLE: dict[str, Term] = {
    "ones": lambda c: torch.ones(len(c.targets), M),
    "twos": lambda c: torch.full((len(c.targets), M), 2.0),
}
KIND = replace(LOGIT_TERM, table=TABLE)


def test_losses_are_summed_with_their_coefficients() -> None:
    total = combine({"ones": 0.5, "twos": 3.0}, KIND, inputs(), {})
    assert total.eq(6.5).all()
    assert combine({"twos": 1.0}, KIND, inputs(), {}).eq(2.0).all()
    assert combine({"twos": 0.0}, KIND, inputs(), {}).eq(0.0).all()


def test_a_loss_that_is_known_is_not_computed_again() -> None:
    known = {"ones": torch.full((NUM_ENVS, M), 7.0)}
    assert combine({"ones": 2.0, "twos": 1.0}, KIND, inputs(), known).eq(16.0).all()


def test_no_loss_is_zero_for_every_sample_and_teacher() -> None:
    total = combine({}, KIND, inputs(), {})
    assert total.shape == (NUM_ENVS, M)
    assert total.eq(0).all()


def test_every_loss_has_one_finite_value_per_sample_and_teacher() -> None:
    for term in (*LOGIT_TERMS.values(), *FEATURE_TERMS.values()):
        loss = term(inputs())
        assert loss.shape == (NUM_ENVS, M)
        assert loss.isfinite().all()
        assert loss.ge(0).all()


# Training.

LOGIT_CHOICES: list[Terms] = ["none", *LOGIT_TERMS, dict.fromkeys(LOGIT_TERMS, 0.5)]
FEATURE_CHOICES: list[Terms] = ["none", *FEATURE_TERMS, dict.fromkeys(FEATURE_TERMS, 2.0)]


def distiller_of(logit: Terms, feature: Terms, **kwargs: Any) -> Distiller:
    arguments = {"alpha": 0.7, "beta": 1.3, "temperature": 2.0}
    return make_tiny_distiller(logit=logit, feature=feature, **(arguments | kwargs))


def weights() -> TeacherWeights:
    draw = generator(0)
    return TeacherWeights(*(torch.randn(NUM_ENVS, M, generator=draw).softmax(1) for _ in range(2)))


def loss_by_hand(distiller: Distiller, logit: Terms, feature: Terms) -> Tensor:
    """The loss of each sample, from the functions of `losses`."""
    images = batch()
    view = distiller.module(images.inputs)
    known = distiller.teachers(images.inputs)
    terms = {
        "kd": lambda: losses.kd_divergence(view.output.logits, known.logits, 2.0),
        "dist": lambda: losses.dist_divergence(view.output.logits, known.logits, 2.0),
        "kd_of_mean": lambda: losses.kd_of_mean(view.output.logits, known.logits, 2.0),
        "mse": lambda: losses.feature_mse(view.projected, known.feature_maps),
        "nd": lambda: losses.norm_direction(
            view.embedded, known.features, distiller.directions, images.targets
        ),
    }
    total = losses.cross_entropy(view.output.logits, images.targets)
    for factor, head, chosen in (
        (0.7, weights().logit, logit),
        (1.3, weights().feature, feature),
    ):
        named = {chosen: 1.0} if isinstance(chosen, str) else chosen
        for name, coefficient in named.items():
            if name != "none":
                total = total + factor * coefficient * (head * terms[name]()).sum(1)
    return total


@pytest.mark.parametrize("feature", FEATURE_CHOICES, ids=str)
@pytest.mark.parametrize("logit", LOGIT_CHOICES, ids=str)
def test_an_update_minimises_the_sum_of_the_chosen_losses(logit: Terms, feature: Terms) -> None:
    distiller, twin = distiller_of(logit, feature), distiller_of(logit, feature)
    terms = distiller.update(distiller.forward(batch()), weights())
    expected = loss_by_hand(twin, logit, feature)
    torch.testing.assert_close(terms.total, expected.detach())
    expected.mean().backward()
    by_hand = dict(twin.module.named_parameters())
    for name, parameter in distiller.module.named_parameters():
        other = by_hand[name].grad
        assert (parameter.grad is None) == (other is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*LOGIT_TERMS, *FEATURE_TERMS])
def test_every_loss_reaches_the_student(name: str) -> None:
    head = "kd" if name in LOGIT_TERMS else "feature"
    other = "feature" if name in LOGIT_TERMS else "kd"
    chosen = {"logit": "none", "feature": "none"}
    chosen["logit" if name in LOGIT_TERMS else "feature"] = name
    distiller = distiller_of(**chosen)
    state = distiller.forward(batch())
    for m in range(M):
        term = getattr(state, head)[:, m].sum()
        first = next(distiller.student.parameters())
        (gradient,) = torch.autograd.grad(term, first, retain_graph=True)
        assert gradient.abs().sum() > 1e-6
    assert getattr(state, other).eq(0).all()


@pytest.mark.parametrize("m", range(M))
def test_nd_reaches_the_projection_of_its_own_teacher(m: int) -> None:
    distiller = distiller_of("none", "nd")
    term = distiller.forward(batch()).feature[:, m].sum()
    maps = [projection[1].weight for projection in distiller.module.projections]
    found = torch.autograd.grad(term, maps)
    assert [bool(gradient.abs().sum() > 1e-6) for gradient in found] == [k == m for k in range(M)]


@pytest.mark.parametrize("feature", FEATURE_CHOICES, ids=str)
@pytest.mark.parametrize("logit", LOGIT_CHOICES, ids=str)
def test_evidence_is_the_same_whatever_the_losses(logit: Terms, feature: Terms) -> None:
    expected = distiller_of("kd", "mse").forward(batch())
    found = distiller_of(logit, feature).forward(batch())
    assert expected.divergence.equal(expected.kd.detach())
    assert expected.distance.equal(expected.feature.detach())
    for name in ("divergence", "distance", "similarity", "teacher_cross_entropy", "cross_entropy"):
        assert getattr(found, name).equal(getattr(expected, name)), name
        assert getattr(found, name).requires_grad is (name == "cross_entropy")


def test_nd_without_images_to_take_class_means_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^reference: expected reference images"):
        distiller_of("kd", "nd", reference=None)


def test_an_unknown_loss_of_a_distiller_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown logit 'mse'"):
        distiller_of("mse", "mse")
    with pytest.raises(ConfigError, match="unknown feature 'kd'"):
        distiller_of("kd", "kd")


def test_only_nd_adds_projections_to_what_is_trained() -> None:
    widths = teachers().feature_dims
    trained = distiller_of("kd", "nd").module.projections
    assert [projection[1].out_features for projection in trained] == list(widths)
    assert len(distiller_of("kd", "mse").module.projections) == 0
