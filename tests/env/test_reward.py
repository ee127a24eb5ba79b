from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtkd_env.losses import cross_entropy, kd_divergence
from mtkd_env.reward import (
    NORMALIZATIONS,
    REWARDS,
    RewardFunction,
    aggregate,
    alignment_credit,
    center,
    expected_advantage,
    loss_improvement,
    minmax,
    minmax_center,
    paper_credit,
    raw_mean,
    zscore,
    zscore_clamp,
)
from mtkd_env.terms import Distillation
from mtkd_env.types import TeacherWeights
from tiny import generator, make_state, random_state, random_weights, reorder_teachers

LOSS = Distillation(alpha=2.0, beta=3.0, temperature=4.0)
ORDER = [2, 0, 1]
# Per teacher: what its evidence ranks, whatever the other rows of the batch are.
PER_TEACHER = ["paper", "alignment"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def test_paper_credit_is_equation_6() -> None:
    state = make_state(
        teacher_cross_entropy=torch.zeros(2, 2),
        cross_entropy=torch.tensor([0.5, 1.0]),
        divergence=torch.tensor([[1.0, 2.0], [0.0, 0.25]]),
        distance=torch.tensor([[0.1, 0.0], [1.0, 2.0]]),
    )
    expected = torch.tensor([[-0.5 - 2.0 - 0.3, -0.5 - 4.0], [-1.0 - 3.0, -1.0 - 0.5 - 6.0]])
    torch.testing.assert_close(paper_credit(state, LOSS), expected)


def test_alignment_credit_is_the_inner_product_of_the_logit_gradients() -> None:
    state = random_state()
    logits = state.student.logits.clone().requires_grad_()
    (of_truth,) = torch.autograd.grad(
        cross_entropy(logits, state.batch.targets).sum(), logits, retain_graph=True
    )
    divergence = kd_divergence(logits, state.teachers.logits, LOSS.temperature)
    columns = []
    for m in range(divergence.shape[1]):
        (of_teacher,) = torch.autograd.grad(divergence[:, m].sum(), logits, retain_graph=True)
        columns.append((of_truth * of_teacher).sum(1))
    expected = torch.stack(columns, dim=1)
    torch.testing.assert_close(alignment_credit(state, LOSS), expected, rtol=1e-4, atol=1e-6)


def test_aggregate_is_minus_the_training_loss() -> None:
    state = make_state(
        teacher_cross_entropy=torch.zeros(1, 2),
        cross_entropy=torch.tensor([0.5]),
        divergence=torch.tensor([[1.0, 2.0]]),
        distance=torch.tensor([[0.1, 0.3]]),
    )
    weights = TeacherWeights(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]]))
    expected = -0.5 - 2.0 * (0.25 + 1.5) - 3.0 * 0.2
    assert aggregate(state, weights, LOSS).item() == pytest.approx(expected)


def test_minmax_center_is_equation_8_as_its_text_reads() -> None:
    rewards = torch.tensor([[-4.0, -2.0, 0.0], [1.0, 1.0, 9.0]])
    expected = torch.tensor([[-0.5, 0.0, 0.5], [-1 / 3, -1 / 3, 2 / 3]])
    torch.testing.assert_close(minmax_center(rewards), expected)


def test_minmax_spans_zero_to_one() -> None:
    scaled = minmax(10 * rand(6, 4) - 50)
    torch.testing.assert_close(scaled.amax(1), torch.ones(6))
    assert scaled.amin(1).eq(0).all()


def test_raw_mean_is_equation_8_as_printed() -> None:
    rewards = torch.tensor([[-4.0, -2.0, 0.0]])
    torch.testing.assert_close(raw_mean(rewards), torch.tensor([[2.0, 2.5, 3.0]]))


def test_center_keeps_the_scale() -> None:
    torch.testing.assert_close(center(torch.tensor([[-4.0, 2.0]])), torch.tensor([[-3.0, 3.0]]))


def test_zscore_clamp_standardises_over_the_batch() -> None:
    rewards = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [6.0, 5.0]])
    # Column 0: mean 3, sample variance 20/3, as the released code has it; column 1 does not vary.
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.15**0.5, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(zscore_clamp(rewards), expected)


def test_zscore_has_mean_zero_and_variance_one_over_the_batch() -> None:
    standardised = zscore(3 * rand(7, 2) - 20)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(standardised.var(0), torch.ones(2))


def test_zscore_of_a_single_sample_is_zero() -> None:
    assert zscore(rand(1, 3)).eq(0).all()


def test_improvement_is_by_how_much_the_loss_has_fallen_at_the_same_weights() -> None:
    before, after, weights = random_state(0), random_state(1), random_weights(size=5)
    expected = aggregate(after, weights, LOSS) - aggregate(before, weights, LOSS)
    assert loss_improvement(before, after, weights, LOSS).equal(expected)
    rewards = RewardFunction(REWARDS["improvement"], LOSS, "none")(before, weights, after)
    torch.testing.assert_close(rewards.scalar, expected)
    assert expected.abs().min() > 0.01


def test_the_reward_of_a_step_that_changes_nothing_is_no_improvement() -> None:
    state = random_state()
    rewards = RewardFunction(REWARDS["improvement"], LOSS)(state, random_weights(size=5), state)
    assert rewards.scalar.eq(0).all()


def test_cross_entropy_pays_minus_that_of_the_updated_student() -> None:
    before, after = random_state(0), random_state(1)
    rewards = RewardFunction(REWARDS["cross_entropy"], LOSS, "none")(
        before, random_weights(size=5), after
    )
    torch.testing.assert_close(rewards.scalar, -after.cross_entropy)


@pytest.mark.parametrize("name", ["improvement", "cross_entropy"])
def test_rewards_of_a_step_ask_for_the_updated_student_and_credit_teachers_before_it(
    name: str,
) -> None:
    function = RewardFunction(REWARDS[name], LOSS)
    assert function.needs_update
    before, after = random_state(0), random_state(1)
    rewards = function(before, random_weights(size=5), after)
    assert rewards.teacher.equal(paper_credit(before, LOSS))
    assert rewards.advantages.std(1).eq(0).all()


@pytest.mark.parametrize("name", PER_TEACHER)
def test_teachers_get_credit_for_the_updated_student_if_asked(name: str) -> None:
    function = RewardFunction(REWARDS[name], LOSS, timing="after")
    assert function.needs_update
    rewards = function(random_state(0), random_weights(size=5), random_state(1))
    assert rewards.teacher.equal(function.teacher_rewards(random_state(1)))


def test_normalization_none_changes_nothing() -> None:
    rewards = rand(3, 4)
    assert NORMALIZATIONS["none"](rewards).equal(rewards)


@pytest.mark.parametrize("normalize", [minmax, minmax_center, center])
def test_advantages_vanish_where_all_teachers_are_equal(
    normalize: Callable[[Tensor], Tensor],
) -> None:
    for equal in (torch.full((1, 4), -7.25), rand(5, 1)):
        assert normalize(equal).eq(0).all()


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations_are_finite_for_constant_and_huge_rewards(name: str) -> None:
    for rewards in (torch.zeros(3, 2), torch.full((3, 1), -1e6), 1e6 * rand(3, 4)):
        assert NORMALIZATIONS[name](rewards).isfinite().all()


@pytest.mark.parametrize("name", ["minmax_center", "center"])
def test_a_constant_per_sample_changes_no_advantage(name: str) -> None:
    rewards, constant = rand(5, 3), 3 * rand(5, 1, seed=1)
    moved = NORMALIZATIONS[name](rewards + constant)
    torch.testing.assert_close(moved, NORMALIZATIONS[name](rewards), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PER_TEACHER)
def test_uniform_weights_earn_nothing(name: str) -> None:
    state = random_state()
    rewards = RewardFunction(REWARDS[name], LOSS)(state, TeacherWeights.uniform(state.divergence))
    torch.testing.assert_close(rewards.scalar, torch.zeros(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PER_TEACHER)
def test_all_weight_on_the_best_teacher_earns_its_advantage_which_is_the_most(name: str) -> None:
    function, state = RewardFunction(REWARDS[name], LOSS), random_state()
    best = torch.nn.functional.one_hot(function.teacher_rewards(state).argmax(1), 3).float()
    rewards = function(state, TeacherWeights(best, best))
    torch.testing.assert_close(rewards.scalar, rewards.advantages.amax(1))
    others = function(state, random_weights(size=5))
    assert others.scalar.lt(rewards.scalar).all()


def test_expected_advantage_is_the_mean_over_the_heads() -> None:
    weights = TeacherWeights(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]]))
    value = expected_advantage(weights, torch.tensor([[0.4, -0.4]]))
    torch.testing.assert_close(value, torch.tensor([0.5 * (0.4 - 0.2)]))


@pytest.mark.parametrize("name", PER_TEACHER)
def test_the_default_rewards_lie_in_minus_one_to_one(name: str) -> None:
    for seed in range(5):
        rewards = RewardFunction(REWARDS[name], LOSS)(random_state(seed), random_weights(size=5))
        assert rewards.advantages.abs().le(1).all()
        assert rewards.scalar.abs().le(1).all()


def test_reference_rewards_lie_in_zero_to_one_and_credit_no_teacher() -> None:
    function = RewardFunction(REWARDS["reference"], LOSS)
    rewards = function(random_state(size=12), random_weights(size=12))
    assert rewards.scalar.ge(0).all()
    assert rewards.scalar.le(1).all()
    assert rewards.scalar.unique().numel() > 2
    assert rewards.advantages.std(1).eq(0).all()
    torch.testing.assert_close(rewards.scalar, rewards.advantages[:, 0])


def test_aggregate_rewards_are_the_aggregate_and_keep_teacher_rewards_of_equation_6() -> None:
    state, weights = random_state(), random_weights(size=5)
    rewards = RewardFunction(REWARDS["aggregate"], LOSS)(state, weights)
    torch.testing.assert_close(rewards.scalar, aggregate(state, weights, LOSS))
    torch.testing.assert_close(rewards.teacher, paper_credit(state, LOSS))


@pytest.mark.parametrize("name", REWARDS)
def test_reordering_teachers_reorders_advantages_and_keeps_the_reward(name: str) -> None:
    state, weights = random_state(), random_weights(size=5)
    function = RewardFunction(REWARDS[name], LOSS)
    rewards = function(state, weights)
    moved = TeacherWeights(weights.logit[:, ORDER], weights.feature[:, ORDER])
    reordered = function(reorder_teachers(state, ORDER), moved)
    torch.testing.assert_close(reordered.teacher, rewards.teacher[:, ORDER])
    torch.testing.assert_close(reordered.advantages, rewards.advantages[:, ORDER])
    torch.testing.assert_close(reordered.scalar, rewards.scalar)


@pytest.mark.parametrize("name", PER_TEACHER)
def test_rewards_of_a_sample_ignore_the_other_samples(name: str) -> None:
    state, weights = random_state(), random_weights(size=5)
    before = RewardFunction(REWARDS[name], LOSS)(state, weights)
    weights.logit[1] = torch.tensor([1.0, 0.0, 0.0])
    state.divergence[1] += 1
    state.student.logits[1] -= 5
    after = RewardFunction(REWARDS[name], LOSS)(state, weights)
    others = [0, 2, 3, 4]
    assert after.scalar[others].equal(before.scalar[others])
    assert after.advantages[others].equal(before.advantages[others])
    assert after.scalar[1] != before.scalar[1]


@pytest.mark.parametrize("name", REWARDS)
def test_teacher_rewards_do_not_depend_on_weights(name: str) -> None:
    function, state = RewardFunction(REWARDS[name], LOSS), random_state()
    alone = function.teacher_rewards(state)
    assert function(state, random_weights(size=5)).teacher.equal(alone)
    assert function(state, TeacherWeights.uniform(state.divergence)).teacher.equal(alone)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_carry_no_gradient(name: str) -> None:
    state, weights = random_state(), random_weights(size=5)
    for tensor in (state.cross_entropy, state.distance, state.student.logits):
        tensor.requires_grad_()
    weights.logit.requires_grad_()
    rewards = RewardFunction(REWARDS[name], LOSS)(state, weights)
    assert not rewards.teacher.requires_grad
    assert not rewards.advantages.requires_grad
    assert not rewards.scalar.requires_grad


def test_a_normalization_replaces_the_rules_own() -> None:
    function = RewardFunction(REWARDS["paper"], LOSS, "center")
    rewards = function(random_state(), random_weights(size=5))
    torch.testing.assert_close(rewards.advantages, center(rewards.teacher))
