import math
import warnings
from copy import deepcopy
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.optimization import OPTIMIZERS, SCHEDULES, Recipe
from mtkd_env.options import build
from mtkd_env.teachers.training import TeacherTraining
from tiny import TinyNetwork, generator, label, stream

STEPS = 5


def module(seed: int = 0) -> nn.Module:
    layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    draw = generator(seed)
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return layers


def learn(net: nn.Module, optimizer: Optimizer, schedule: LRScheduler, steps: int) -> list[float]:
    """The learning rate of each of so many steps on inputs that depend on the step alone."""
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        inputs = torch.randn(6, 3, generator=generator(schedule.last_epoch))
        optimizer.zero_grad()
        net(inputs.to(next(net.parameters()))).square().mean().backward()
        optimizer.step()
        schedule.step()
    return rates


def rates(recipe: Recipe, extra: int = 0) -> list[float]:
    net = module()
    return learn(net, *recipe.build(net, STEPS), recipe.epochs * STEPS + extra)


# The learning rate over a training.


@pytest.mark.parametrize("milestones", [(0.5, 0.75), (), (0.1, 0.1, 1.0)])
@pytest.mark.parametrize("decay", [0.1, 0.3])
def test_steps_are_those_of_torch(milestones: tuple[float, ...], decay: float) -> None:
    found = rates(Recipe(epochs=8, lr=0.05, milestones=milestones, decay=decay))
    net = module()
    optimizer = SGD(net.parameters(), lr=0.05)
    ends = [max(1, round(8 * fraction)) * STEPS for fraction in milestones]
    expected = learn(net, optimizer, MultiStepLR(optimizer, ends, gamma=decay), 8 * STEPS)
    assert found == pytest.approx(expected, rel=1e-12)


def test_cosine_goes_from_the_end_of_the_warm_up_to_its_minimum() -> None:
    recipe = Recipe(
        epochs=10, lr=1e-3, schedule="cosine", min_lr=1e-5, warmup_epochs=2.5, warmup_lr=1e-6
    )
    found = rates(recipe, extra=1)
    for step, rate in enumerate(found):
        epoch = step / STEPS
        if epoch < 2.5:
            expected = 1e-6 + (1e-3 - 1e-6) * epoch / 2.5
        else:
            expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (epoch - 2.5) / 7.5)) / 2
        assert rate == pytest.approx(expected, rel=1e-9)
    assert found[0] == pytest.approx(1e-6)
    assert found[-1] == pytest.approx(1e-5)


def test_a_warm_up_rises_linearly_and_moves_no_milestone() -> None:
    recipe = Recipe(epochs=4, lr=0.1, milestones=(0.5, 0.75), warmup_epochs=1.0, warmup_lr=0.02)
    rising = [0.02 + 0.08 * step / STEPS for step in range(STEPS)]
    expected = [*rising, *[0.1] * STEPS, *[0.01] * STEPS, *[0.001] * STEPS]
    assert rates(recipe) == pytest.approx(expected)


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    recipe = Recipe(epochs=3, lr=0.2, schedule="constant", warmup_epochs=0.4)
    assert rates(recipe) == pytest.approx([0.0, 0.1, *[0.2] * (3 * STEPS - 2)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_end_the_rate_stays_as_it_is_there(schedule: str) -> None:
    found = rates(Recipe(epochs=4, lr=0.1, schedule=schedule, min_lr=0.03), extra=3 * STEPS)
    last = {"step": 1e-4, "cosine": 0.03, "poly": 0.03, "constant": 0.1}[schedule]
    assert found[4 * STEPS :] == pytest.approx([last] * (3 * STEPS))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_rates_scale_with_the_number_of_epochs(schedule: str, lr: float) -> None:
    long = Recipe(epochs=240, lr=lr, schedule=schedule)
    short = Recipe(epochs=24, lr=lr, schedule=schedule)
    for epoch in range(25):
        assert short.share(float(epoch)) == pytest.approx(long.share(10.0 * epoch))


def test_a_warm_up_may_be_all_there_is() -> None:
    recipe = Recipe(epochs=2, lr=0.1, schedule="cosine", warmup_epochs=2.0)
    assert rates(recipe) == pytest.approx([0.1 * step / 10 for step in range(10)])
    assert recipe.share(2.0) == 0


# The optimiser.


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_that_of_torch(momentum: float) -> None:
    recipe = Recipe(epochs=2, lr=0.05, momentum=momentum, weight_decay=0.01, schedule="constant")
    found, expected = module().double(), module().double()
    nesterov = momentum > 0
    optimizer = SGD(
        expected.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01, nesterov=nesterov
    )
    learn(found, *recipe.build(found, STEPS), 7)
    learn(expected, optimizer, MultiStepLR(optimizer, []), 7)
    assert_close(found, expected)


def test_adamw_is_that_of_torch() -> None:
    recipe = Recipe(
        epochs=2, optimizer="adamw", lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, milestones=()
    )
    found, expected = module().double(), module().double()
    optimizer = AdamW(expected.parameters(), lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    learn(found, *recipe.build(found, STEPS), 7)
    learn(expected, optimizer, MultiStepLR(optimizer, []), 7)
    assert_close(found, expected)


def assert_close(found: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_may_get_its_first_gradient_later(optimizer: str) -> None:
    """It then moves as one that is alone."""
    both = nn.ParameterList([torch.ones(3), torch.ones(3)])
    alone = nn.ParameterList([torch.ones(3)])
    recipe = Recipe(optimizer=optimizer, schedule="constant")
    first, second = recipe.build(both, STEPS)[0], recipe.build(alone, STEPS)[0]
    both[0].grad = torch.ones(3)
    first.step()
    assert both[1].eq(1).all()
    for _ in range(2):
        for parameter in (*both, *alone):
            parameter.grad = torch.arange(3.0)
        first.step()
        second.step()
    assert both[1].equal(alone[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_step_that_is_rejected_leaves_no_trace(optimizer: str) -> None:
    """As fp16's scaler does it, which begins with a scale that is too large."""
    found, expected = module(), module()
    recipe = Recipe(optimizer=optimizer, schedule="constant", clip_norm=1.0)
    first, second = recipe.build(found, STEPS)[0], recipe.build(expected, STEPS)[0]
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    scaler.scale(4 * found(torch.ones(6, 3)).square().sum()).backward()
    scaler.unscale_(first)
    scaler.step(first)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    for net, one in ((found, first), (expected, second)):
        one.zero_grad()
        net(torch.ones(6, 3)).square().mean().backward()
        one.step()
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saved_state_fits_parameters_of_another_layout(optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, schedule="constant")
    nets = [nn.Conv2d(2, 3, (2, 4)).double() for _ in range(2)]
    parts = [recipe.build(net, STEPS)[0] for net in nets]

    def step(net: nn.Module, one: Optimizer) -> None:
        one.zero_grad()
        images = torch.randn(2, 2, 5, 5, generator=generator(1), dtype=torch.float64)
        net(images).square().mean().backward()
        one.step()

    step(nets[0], parts[0])
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].to(memory_format=torch.channels_last)
    parts[1].load_state_dict(deepcopy(parts[0].state_dict()))
    for net, one in zip(nets, parts, strict=True):
        step(net, one)
    assert_close(nets[1], nets[0], 1e-8)  # NAdam keeps a product in float32.


class Transformer(nn.Module):
    """Tokens as timm's transformers name them; a part that names one itself."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 2, 3))
        self.patches = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def no_weight_decay(self) -> set[str]:
        return {"position"}


@pytest.mark.parametrize(
    ("optimizer", "inside"), [*((name, True) for name in OPTIMIZERS), ("sgd", False)]
)
def test_weight_decay_spares_single_axes_and_what_a_network_names(
    optimizer: str, inside: bool
) -> None:
    """Without gradients, decay alone moves a parameter."""
    net: nn.Module = nn.Sequential(Transformer(), nn.Linear(3, 2)) if inside else Transformer()
    for parameter in net.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    recipe = Recipe(
        optimizer=optimizer, lr=0.1, momentum=0.0, weight_decay=0.5, decay_norm_and_bias=False
    )
    # Whether it moves with the very first step is up to the optimiser; here it has been built.
    built, _ = recipe.build(net, STEPS)
    built.step()
    moved = {name for name, one in net.named_parameters() if not one.eq(1).all()}
    assert moved == ({"0.patches.weight", "1.weight"} if inside else {"patches.weight"})
    held = [one for group in built.param_groups for one in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, net.parameters()))


def test_weight_decay_acts_on_all_parameters_by_default() -> None:
    (group,) = Recipe().build(Transformer(), STEPS)[0].param_groups
    assert len(group["params"]) == 5
    assert group["weight_decay"] == 1e-4


@pytest.mark.parametrize("limit", [0.5, 1e6, None])
def test_gradients_are_clipped_to_their_norm_together(limit: float | None) -> None:
    net = module()
    before = [one.detach().clone() for one in net.parameters()]
    optimizer, _ = Recipe(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=limit).build(net, STEPS)
    net(torch.ones(1, 3)).square().sum().backward()
    norm = torch.stack([one.grad.norm() for one in net.parameters()]).norm()
    assert norm > 1
    optimizer.step()
    moved = [(one - old).flatten() for one, old in zip(net.parameters(), before, strict=True)]
    expected = min(norm.item(), limit or math.inf)
    assert torch.cat(moved).norm().item() == pytest.approx(expected, rel=1e-4)


def test_building_changes_nothing() -> None:
    net = module()
    before = [one.detach().clone() for one in net.parameters()]
    optimizer, _ = Recipe(optimizer="adamw", clip_norm=1.0).build(net, STEPS)
    assert optimizer.state_dict()["state"] == {}
    assert all(one.equal(old) for one, old in zip(net.parameters(), before, strict=True))


def test_the_schedule_may_be_ahead_of_its_optimiser() -> None:
    """As with a first batch that fp16's scaler leaves out; warnings are errors here."""
    _, schedule = Recipe(epochs=2, schedule="cosine").build(module(), STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    assert schedule.last_epoch == 1


@pytest.mark.parametrize(("optimizer", "schedule"), [*zip(OPTIMIZERS, cycle(SCHEDULES))])
def test_saved_states_go_on_bit_for_bit(optimizer: str, schedule: str, tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=4,
        optimizer=optimizer,
        schedule=schedule,
        warmup_epochs=1.0,
        decay_norm_and_bias=False,
        clip_norm=1.0,
    )
    uninterrupted, resumed = module(1), module(2)
    parts = uninterrupted, *recipe.build(uninterrupted, STEPS)
    others = resumed, *recipe.build(resumed, STEPS)
    learn(*parts, 8)
    save_checkpoint(tmp_path / "x.pt", {str(i): part.state_dict() for i, part in enumerate(parts)})
    content = load_checkpoint(tmp_path / "x.pt")
    for i, other in enumerate(others):
        other.load_state_dict(content[str(i)])
    assert learn(*parts, 7) == learn(*others, 7)
    for ours, theirs in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert ours.equal(theirs)


# Teachers.


def test_teachers_learn_by_the_recipes_smoothed_labels() -> None:
    def first_loss(smoothing: float) -> float:
        losses: list[float] = []
        torch.manual_seed(0)
        recipe = Recipe(epochs=1, lr=0.0, label_smoothing=smoothing)
        TeacherTraining(
            TinyNetwork(), stream(), recipe, progress=lambda _, __, loss: losses.append(loss)
        ).train(lambda: None)
        return losses[0]

    torch.manual_seed(0)
    network, batches = TinyNetwork().train(), stream()
    expected = torch.stack(
        [
            functional.cross_entropy(
                network(batch.inputs).logits, batch.targets, label_smoothing=0.4
            )
            for batch in (next(batches), next(batches))
        ]
    )
    assert first_loss(0.4) == pytest.approx(expected.mean().item(), rel=1e-5)
    assert first_loss(0.4) != pytest.approx(first_loss(0.0), rel=1e-3)


# Mistakes.

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 0}, "at least 1, got 0"),
    "lr": ({"lr": -0.1}, "a finite number >= 0, got -0.1"),
    "lr that is none": ({"lr": math.nan}, "a finite number >= 0, got nan"),
    "momentum": ({"momentum": -1.0}, "a finite number >= 0, got -1.0"),
    "weight_decay": ({"weight_decay": math.inf}, "a finite number >= 0, got inf"),
    "decay": ({"decay": -1.0}, "a finite number >= 0, got -1.0"),
    "milestones": ({"milestones": (150.0,)}, "fractions of the training in (0, 1], got (150.0,)"),
    "milestones that are none": (
        {"milestones": (math.nan,)},
        "fractions of the training in (0, 1], got (nan,)",
    ),
    "betas": ({"betas": (0.9, 1.0)}, "two numbers in [0, 1), got (0.9, 1.0)"),
    "min_lr": ({"min_lr": 0.1}, "0 to lr = 0.05, got 0.1"),
    "warmup_lr": ({"warmup_lr": 0.1}, "0 to lr = 0.05, got 0.1"),
    "warmup_epochs": ({"epochs": 2, "warmup_epochs": 5.0}, "0 to epochs = 2, got 5.0"),
    "label_smoothing": ({"label_smoothing": 1.0}, "a share in [0, 1), got 1.0"),
    "clip_norm": ({"clip_norm": 0.0}, "a finite number > 0, got 0.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_out_of_range_are_refused_by_name(case: str) -> None:
    values, expected = WRONG[case]
    message = f"{case.partition(' ')[0]}: expected {expected}"
    with pytest.raises(ConfigError) as error:
        Recipe(**values)
    assert str(error.value) == message
    with pytest.raises(ConfigError) as error:
        build(Recipe, values, "some.where")
    assert str(error.value) == f"some.where.{message}"


def adam_of(recipe: Recipe, groups: Any) -> Adam:
    return Adam(groups, lr=recipe.lr, betas=recipe.betas, eps=1e-3)


EPS = {"eps": 1e-3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adm"}, r"unknown optimizer 'adm'; did you mean 'adam'\?"),
        ({"schedule": "linear"}, "unknown schedule 'linear'.*, or module:Name"),
        ({"optimizer": "math:pi"}, r"'math:pi' is not a class of torch\.optim\.Optimizer"),
        ({"optimizer": SGD([torch.ones(1)])}, "optimizer: expected a name or a class"),
        ({"schedule": 3}, r"schedule: expected a name or a function of \(recipe, epoch\)"),
        ({"arguments": {"lr": 1.0}}, r"arguments\.lr: cannot be given here"),
        ({"arguments": {"esp": 1.0}, "optimizer": "adam"}, "arguments.esp: .* did you mean 'eps'"),
        ({"arguments": {"eps": "x"}, "optimizer": "adam"}, "arguments.eps: expected float, got"),
        ({"arguments": EPS, "optimizer": adam_of}, "arguments: expected none, because a function"),
    ],
)
def test_optimisers_and_schedules_that_cannot_be_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**values)


def half(recipe: Recipe, epoch: float) -> float:
    return 0.5 if epoch <= recipe.epochs else 0.0


ADAM: list[tuple[Any, dict[str, Any]]] = [
    *(("adam", EPS), ("torch.optim:Adam", EPS), (Adam, EPS)),
    *((partial(Adam, eps=1e-3), {}), (adam_of, {}), (f"{__name__}:adam_of", {})),
]


@pytest.mark.parametrize(
    ("optimizer", "arguments", "schedule"),
    [(*one, named) for one, named in zip(ADAM, cycle([half, f"{__name__}:half"]))],
    ids=label,
)
def test_optimiser_and_schedule_may_be_a_name_or_an_object(
    optimizer: Any, arguments: dict[str, Any], schedule: Any
) -> None:
    recipe = Recipe(optimizer=optimizer, arguments=arguments, schedule=schedule, betas=(0.5, 0.9))
    built, _ = recipe.build(module(), STEPS)
    assert type(built) is Adam
    (group,) = built.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.025, (0.5, 0.9), 1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "torch.optim:SGD"])
def test_momentum_is_for_sgd_by_any_name(optimizer: str) -> None:
    (group,) = Recipe(optimizer=optimizer).build(module(), STEPS)[0].param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    (other,) = Recipe(optimizer="rmsprop").build(module(), STEPS)[0].param_groups
    assert other["momentum"] == 0


def test_unknown_keys_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.lrr: unknown key; did you mean 'lr'\?"):
        build(Recipe, {"lrr": 1.0}, "recipe")
    assert build(Recipe, {"lr": 1}, "recipe") == Recipe(lr=1.0)
