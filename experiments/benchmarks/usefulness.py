"""What a teacher is truly worth for a sample, to first order, and who ranks teachers like that.

The usefulness of teacher m for sample i is the inner product of two gradients with respect to the
student's parameters, ⟨∇CE, ∇L_i^m⟩: after a step of size ε on L_i^m, the cross-entropy CE has
fallen by ε times as much, up to terms in ε². L is the KL term or the feature term of Equ. 2.

Batch norms use the statistics of their batch as constants (`frozen`): the student computes what it
computes in training, but no sample's loss depends on other samples.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from mtkd_env import losses
from mtkd_env.distiller import Distiller, StudentModule
from mtkd_env.types import Batch, DistillState, TeacherOutputs

# Whose cross-entropy is to fall: that of the sample itself, of its batch, of images held out.
TRUTHS = ("sample", "batch", "held-out")

# The two heads of Equ. 2.
TERMS = ("logit", "feature")

# Samples that have a gradient of their own in memory at a time.
CHUNK = 16

Parameters = dict[str, Tensor]


@torch.no_grad()
def frozen(module: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy in evaluation mode whose batch norms know exactly this batch.

    On `inputs` it computes what `module` computes in training mode.
    """
    copy = deepcopy(module).train()
    if isinstance(copy, StudentModule):  # Whatever it is trained by.
        copy.projects = True
    norms = [layer for layer in copy.modules() if isinstance(layer, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    hooks = [norm.register_forward_hook(_divide_by_count) for norm in norms]
    copy(inputs)
    for hook in hooks:
        hook.remove()
    return copy.eval()


def _divide_by_count(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    """Batch norm keeps the variance with n − 1 in the denominator, but divides by n in training."""
    del output
    count = inputs[0].numel() / inputs[0].shape[1]
    assert isinstance(norm.running_var, Tensor)
    norm.running_var.mul_((count - 1) / count)


def parameters_of(module: nn.Module) -> Parameters:
    """The parameters by name, without a graph."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def cross_entropy_gradient(module: nn.Module, inputs: Tensor, targets: Tensor) -> Parameters:
    """Gradient of the mean cross-entropy of some images."""

    def objective(parameters: Parameters) -> Tensor:
        view = functional_call(module, parameters, (inputs,))
        return losses.cross_entropy(view.output.logits, targets).mean()

    gradient: Parameters = grad(objective)(parameters_of(module))
    return gradient


def distillation_terms(
    module: nn.Module,
    parameters: Parameters,
    inputs: Tensor,
    teachers: TeacherOutputs,
    temperature: float,
) -> Tensor:
    """KL of every teacher, then the feature term of every teacher: (B, 2·M)."""
    view = functional_call(module, parameters, (inputs,))
    kd = losses.kd_divergence(view.output.logits, teachers.logits, temperature, teachers.known)
    return torch.cat([kd, losses.feature_mse(view.projected, teachers.feature_maps)], dim=1)


def usefulness(distiller: Distiller, state: DistillState, held_out: Batch) -> dict[str, Tensor]:
    """How useful every teacher is for every sample of a batch: truth → (B, 2·M).

    Exact, without a gradient for each of the 2·M·B terms: see `inner_products`.

    Args:
        distiller: The student.
        state: The batch, before the student learns from it.
        held_out: Images that the student does not learn from.
    """
    batch, teachers = state.batch, state.teachers
    module = frozen(distiller.module, batch.inputs)
    elsewhere = frozen(distiller.module, held_out.inputs)
    directions = {
        "batch": cross_entropy_gradient(module, batch.inputs, batch.targets),
        "held-out": cross_entropy_gradient(elsewhere, held_out.inputs, held_out.targets),
    }
    temperature = distiller.distillation.temperature
    terms = partial(
        distillation_terms,
        module,
        inputs=batch.inputs,
        teachers=teachers,
        temperature=temperature,
    )
    known = {"sample": _with_own_gradients(module, state, temperature)}
    for truth, gradient in directions.items():
        known[truth] = inner_products(terms, parameters_of(module), gradient).detach()
    return known


def inner_products(
    terms: Callable[[Parameters], Tensor], parameters: Parameters, direction: Parameters
) -> Tensor:
    """Inner product of every term's gradient with one direction in the parameters.

    The gradient of Σ u_k L_k is linear in u, so that the derivative of its inner product with the
    direction with respect to u_k is that of the gradient of L_k: two backwards in all.
    """
    pulled: Any = vjp(terms, parameters)
    values, pull_back = pulled

    def along(weights: Tensor) -> Tensor:
        (gradient,) = pull_back(weights)
        return torch.stack([(gradient[name] * direction[name]).sum() for name in direction]).sum()

    products: Tensor = grad(along)(torch.zeros_like(values))
    return products


def _with_own_gradients(module: nn.Module, state: DistillState, temperature: float) -> Tensor:
    """Derivatives of every sample's terms along the gradient of its own cross-entropy."""

    def of_one(image: Tensor, target: Tensor, logits: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        inputs = image.unsqueeze(0)
        features = tuple(one.mean((1, 2)).unsqueeze(0) for one in maps)
        last_maps = tuple(one.unsqueeze(0) for one in maps)
        own = TeacherOutputs(logits.unsqueeze(1), features, last_maps, state.teachers.known)

        def terms(values: Parameters) -> Tensor:
            return distillation_terms(module, values, inputs, own, temperature).squeeze(0)

        direction = cross_entropy_gradient(module, inputs, target.unsqueeze(0))
        return inner_products(terms, parameters_of(module), direction)

    per_sample: Any = vmap(of_one, in_dims=(0, 0, 1, 0), chunk_size=CHUNK)
    teachers, batch = state.teachers, state.batch
    products: Tensor = per_sample(
        batch.inputs, batch.targets, teachers.logits, teachers.feature_maps
    )
    return products.detach()


def by_term(values: Tensor) -> Mapping[str, Tensor]:
    """The two halves (B, M) of (B, 2·M), by the term that they belong to."""
    return dict(zip(TERMS, values.chunk(2, dim=1), strict=True))


def kendall(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's τ-b over the columns of every row (B,); 0 where all of a row is equal.

    Share of the pairs of teachers that both put in the same order, minus the share of those that
    they put in opposite orders; ties count as by Kendall (1945).
    """
    signs = [(one.unsqueeze(2) - one.unsqueeze(1)).sign() for one in (first, second)]
    untied = [sign.square().sum((1, 2)) for sign in signs]
    agreement = (signs[0] * signs[1]).sum((1, 2))
    return agreement / (untied[0] * untied[1]).sqrt().clamp(min=1)


def finds_best(credit: Tensor, truth: Tensor) -> Tensor:
    """Whether the teacher with the highest credit is truly the best one (B,).

    1/k where it is one of k with the same credit: as often as by drawing one of them.
    """
    leaders = credit == credit.amax(1, keepdim=True)
    best = truth.argmax(1, keepdim=True)
    return leaders.gather(1, best).squeeze(1) / leaders.sum(1)


def most_frequent_share(truth: Tensor) -> float:
    """Share of the samples whose best teacher is the one that is best most often."""
    return float(truth.argmax(1).bincount(minlength=truth.shape[1]).max()) / len(truth)
