"""Teachers that know some of the classes: what they are asked, and what they are not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fake_datasets import write_images
from mtkd_env import losses
from mtkd_env.data import ImageData
from mtkd_env.data.split import Split
from mtkd_env.distiller import Distillation, Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.files import save_checkpoint
from mtkd_env.networks import build_network
from mtkd_env.observation import OBSERVATIONS
from mtkd_env.optimization import Recipe
from mtkd_env.reward import REWARDS, alignment_credit
from mtkd_env.teachers import PoolSpec, TeacherEnsemble, TeacherSpec, TrainingSet, build_pool
from mtkd_env.teachers.ensemble import own_targets
from mtkd_env.teachers.store import RowLayout
from mtkd_env.types import UNKNOWN, TeacherWeights
from mtkd_env.weighting import WEIGHTINGS
from mtkd_env.weighting.aekd import logit_gradients
from mtkd_env.worth import worth
from tiny import (
    CLASSES,
    TEACHERS,
    batch,
    data,
    generator,
    load_dataset,
    make_tiny_distiller,
    make_tiny_env,
    perturb,
    random_state,
    teachers,
)

T = 3.0

# Of two teachers; the third knows all.
OWN: dict[str, tuple[int, ...]] = {"narrow": (2, 0), "wide": (3, 1, 0)}
KNOWN = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]]).bool()


def partial_teachers() -> TeacherEnsemble:
    networks = []
    for seed, (name, make) in enumerate(TEACHERS.items()):
        network = make()
        if name in OWN:
            network.num_classes = len(OWN[name])
            network.classifier = nn.Linear(network.feature_dim, network.num_classes)
        networks.append(perturb(network, seed))
    return TeacherEnsemble(networks, list(TEACHERS), classes=OWN, num_classes=CLASSES)


def logits(count: int = 3, size: int = 5) -> tuple[Tensor, Tensor]:
    """The student's (B, C) and the teachers' (M, B, C), all classes known."""
    draw = generator(0)
    return torch.randn(size, CLASSES, generator=draw), torch.randn(
        count, size, CLASSES, generator=draw
    )


def hidden(teachers: Tensor) -> Tensor:
    return teachers.masked_fill(~KNOWN.unsqueeze(1), -30000.0)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": losses.kd_divergence,
    "dist": losses.dist_divergence,
    "kd_of_mean": losses.kd_of_mean,
}


@pytest.mark.parametrize("loss", ["kd", "dist"])
def test_a_loss_is_that_of_a_student_of_the_known_classes_alone(loss: str) -> None:
    student, all_known = logits()
    found = LOSSES[loss](student, hidden(all_known), T, KNOWN)
    for m, known in enumerate(KNOWN):
        alone = LOSSES[loss](student[:, known], all_known[m : m + 1, :, known], T)
        torch.testing.assert_close(found[:, m : m + 1], alone)


def test_the_mean_of_the_logits_of_a_class_is_over_those_that_know_it() -> None:
    student, all_known = logits()
    mean = torch.stack([all_known[KNOWN[:, c], :, c].mean(0) for c in range(CLASSES)], dim=1)
    found = losses.kd_of_mean(student, hidden(all_known), T, KNOWN)
    expected = losses.kd_divergence(student, mean.unsqueeze(0), T).expand(-1, 3)
    torch.testing.assert_close(found, expected)


def test_classes_that_nobody_knows_are_left_out_of_the_mean() -> None:
    student, all_known = logits(count=2)
    known = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    masked = all_known.masked_fill(~known.unsqueeze(1), -30000.0)
    student.requires_grad_()
    losses.kd_of_mean(student, masked, T, known).sum().backward()
    assert student.grad is not None
    assert student.grad[:, 3].eq(0).all()
    assert student.grad[:, :3].ne(0).all()


@pytest.mark.parametrize("loss", ["kd", "dist"])
def test_no_gradient_reaches_a_class_that_a_teacher_does_not_know(loss: str) -> None:
    student, all_known = logits()
    student.requires_grad_()
    found = LOSSES[loss](student, hidden(all_known), T, KNOWN)
    for m, known in enumerate(KNOWN):
        (gradient,) = torch.autograd.grad(found[:, m].sum(), student, retain_graph=True)
        assert gradient[:, ~known].eq(0).all()
        assert gradient[:, known].ne(0).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_of_all_classes_changes_no_bit_of_a_loss(loss: str) -> None:
    student, all_known = logits()
    everything = torch.ones_like(KNOWN)
    with_mask = LOSSES[loss](student, all_known, T, everything)
    if loss == "kd":
        assert with_mask.equal(LOSSES[loss](student, all_known, T))
    torch.testing.assert_close(with_mask, LOSSES[loss](student, all_known, T))


def test_the_pull_is_the_gradient_of_the_divergence() -> None:
    student, all_known = logits()
    student.requires_grad_()
    teachers = hidden(all_known)
    pull = losses.kd_pull(student.detach(), teachers, T, KNOWN)
    divergence = losses.kd_divergence(student, teachers, T, KNOWN)
    for m in range(3):
        (gradient,) = torch.autograd.grad(divergence[:, m].sum(), student, retain_graph=True)
        torch.testing.assert_close(T * pull[m], gradient)


def test_a_class_that_a_teacher_does_not_know_surprises_it_by_twenty_nats() -> None:
    _, all_known = logits()
    targets = torch.tensor([0, 1, 2, 3, UNKNOWN])
    found = losses.teacher_cross_entropy(hidden(all_known), targets, KNOWN)
    for m, known in enumerate(KNOWN):
        for sample, target in enumerate([0, 1, 2, 3]):
            own = all_known[m, sample, known].log_softmax(0)
            place = int(known[:target].sum())
            expected = -own[place] if known[target] else torch.tensor(20.0)
            torch.testing.assert_close(found[sample, m], expected)
    assert found[4].eq(0).all()


def test_nor_is_a_mixed_image_infinitely_surprising() -> None:
    _, all_known = logits(size=1)
    found = losses.teacher_cross_entropy(
        hidden(all_known), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), KNOWN
    )
    own = all_known[0, 0, KNOWN[0]].log_softmax(0)[0]
    torch.testing.assert_close(found[0, 0], 10 - 0.5 * own)


def test_whoever_has_no_idea_has_the_entropy_of_all_classes() -> None:
    found = losses.predictive_entropy(hidden(torch.zeros(3, 1, CLASSES)), KNOWN)
    torch.testing.assert_close(found, torch.full((1, 3), CLASSES).log())


def test_the_entropy_of_those_who_know_all_is_as_without_the_others() -> None:
    _, all_known = logits()
    found = losses.predictive_entropy(hidden(all_known), KNOWN)
    assert found[:, 2].equal(losses.predictive_entropy(all_known)[:, 2])


def test_a_mixture_finds_a_class_as_likely_as_those_find_it_who_know_it() -> None:
    _, all_known = logits()
    targets = torch.full((5,), 1)
    weights = torch.full((5, 3), 1 / 3)
    cross_entropy = losses.teacher_cross_entropy(hidden(all_known), targets, KNOWN)
    found = losses.mixture_log_likelihood(weights, cross_entropy)
    own = torch.stack(
        [all_known[m][:, KNOWN[m]].softmax(1)[:, int(KNOWN[m, :1].sum())] for m in (1, 2)]
    )
    torch.testing.assert_close(found, (own.sum(0) / 3).log(), rtol=1e-5, atol=1e-6)


# The ensemble.


def test_outputs_stand_at_their_classes_and_others_have_no_probability() -> None:
    ensemble = partial_teachers()
    found = ensemble(batch().inputs)
    assert found.known is not None
    assert found.known.equal(KNOWN)
    for m, name in enumerate(ensemble.names):
        own = ensemble.networks[m](batch().inputs).logits
        places = list(OWN.get(name, range(CLASSES)))
        assert found.logits[m][:, places].equal(own)
    for temperature in (1.0, 4.0, 100.0):
        shares = (found.logits / temperature).softmax(-1)
        assert shares[~KNOWN.unsqueeze(1).expand_as(shares)].eq(0).all()
    assert ensemble.classify(found.feature_maps).isfinite().all()


def test_a_permutation_of_all_classes_permutes_the_outputs() -> None:
    order = (2, 0, 3, 1)
    network = perturb(next(iter(TEACHERS.values()))(), 0)
    plain = TeacherEnsemble([network], ["a"])(batch().inputs)
    ensemble = TeacherEnsemble([network], ["a"], classes={"a": order}, num_classes=CLASSES)
    assert ensemble(batch().inputs).logits[:, :, list(order)].equal(plain.logits)


def test_teachers_of_all_classes_have_no_mask() -> None:
    ensemble = teachers()
    found = ensemble(batch().inputs)
    assert found.known is None
    assert found.scores is found.logits
    assert not [name for name, _ in ensemble.named_buffers() if "classes" in name]


def test_scores_of_unknown_classes_are_the_smallest_known_one() -> None:
    found = partial_teachers()(batch().inputs)
    for m, known in enumerate(KNOWN):
        own = found.logits[m][:, known]
        assert found.scores[m][:, known].equal(own)
        assert found.scores[m].amin(1).equal(own.amin(1))


def test_a_store_keeps_which_classes_are_known() -> None:
    outputs = partial_teachers()(batch().inputs)
    layout = RowLayout(outputs)
    kept = layout.unpack(layout.pack(outputs).half().float())
    assert kept.known is outputs.known
    assert kept.logits[~KNOWN.unsqueeze(1).expand_as(kept.logits)].eq(-30000).all()


def test_an_output_is_the_one_of_the_images_class() -> None:
    targets = torch.tensor([3, 0, 1, 2, UNKNOWN])
    assert own_targets(targets, (3, 1, 0), CLASSES).tolist() == [0, 2, 1, UNKNOWN, UNKNOWN]


# Who looks at the teachers.


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_shares_where_classes_are_unknown(name: str) -> None:
    distiller = make_tiny_distiller(ensemble=partial_teachers())
    arguments: dict[str, Any] = {"fusion": "paper"} if name == "evidence" else {}
    weighting = WEIGHTINGS[name](distiller, **arguments)
    state = distiller.forward(batch())
    weights = weighting(state)
    for part in (weights.logit, weights.feature):
        assert part.ge(0).all()
        torch.testing.assert_close(part.sum(1), torch.ones(len(part)))


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_observations_are_of_the_order_of_the_known_logits(observation: str) -> None:
    env = make_tiny_env(
        distiller=make_tiny_distiller(ensemble=partial_teachers()),
        observation=observation,
        normalize_observation=False,
        output="torch",
    )
    found, _ = env.reset(seed=0)
    assert found.abs().max() < 100


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_are_of_the_order_of_the_loss(reward: str) -> None:
    env = make_tiny_env(
        distiller=make_tiny_distiller(ensemble=partial_teachers()), reward=reward, output="torch"
    )
    env.reset(seed=0)
    _, found, _, _, info = env.step(torch.zeros(env.num_envs, 6))
    assert found.abs().max() < 100
    assert info["teacher_rewards"].abs().max() < 1000


def test_a_teacher_gets_no_reward_for_classes_that_it_does_not_know() -> None:
    state = random_state()
    state = replace(
        state, teachers=replace(state.teachers, logits=hidden(state.teachers.logits), known=KNOWN)
    )
    direction = torch.randn(CLASSES, 3, generator=generator(1))
    for m, known in enumerate(KNOWN):
        elsewhere = direction.masked_fill(known.unsqueeze(1), 0)
        torch.testing.assert_close(worth(state, elsewhere, T)[:, m], torch.zeros(5))
    pull = losses.kd_pull(state.student.logits, state.teachers.logits, T, KNOWN)
    error = state.student.logits.softmax(1) - losses.class_shares(state.batch.targets, CLASSES)
    found = alignment_credit(state, Distillation(temperature=T))
    torch.testing.assert_close(found, T * (pull * error).sum(-1).T)
    gradients = logit_gradients(state.student.logits, state.teachers.logits, T, KNOWN)
    assert gradients[~KNOWN].eq(0).all()


# Pools.


IMAGES = 160


def split(classes: Sequence[int], count: int = IMAGES) -> Split:
    """Images of the tiny data set that are of some classes."""
    whole = data(count).parts[0]
    return whole.take(torch.isin(whole.targets, torch.tensor(classes)).nonzero().squeeze(1))


def specialist(own: tuple[int, ...], **changes: Any) -> TeacherSpec:
    fields = {"network": "resnet8", "width": 0.25, "classes": own} | changes
    return TeacherSpec(name="of " + " ".join(map(str, own)), **fields)


def pool_of(*specs: TeacherSpec) -> PoolSpec:
    return PoolSpec(specs, Recipe(epochs=4, lr=0.1, nesterov=False), batch_size=16)


def images(dataset: ImageData | None = None) -> TrainingSet:
    dataset = dataset or data(IMAGES)
    return TrainingSet(dataset, dataset.split())


def saved(path: Path, outputs: int) -> str:
    network = build_network("resnet8", num_classes=outputs, in_channels=1, width=0.25, seed=5)
    save_checkpoint(path, perturb(network, 5).state_dict())
    return str(path)


def test_a_checkpoint_of_some_classes_is_a_teacher(tmp_path: Path) -> None:
    spec = specialist((3, 1, 0), checkpoint=saved(tmp_path / "mine.pt", 3))
    pool = build_pool(pool_of(spec), images(), cache=tmp_path)
    assert pool.ensemble.known is not None
    assert pool.ensemble.known.tolist() == [[True, True, False, True]]
    assert pool.evaluations[spec.label].labelled == 0.75
    assert pool.evaluations[spec.label].accuracy <= 0.75
    assert pool.evaluations[spec.label].cross_entropy < 20


def test_classes_have_names(tmp_path: Path) -> None:
    named = replace(data(IMAGES), class_names=("ant", "bee", "cat", "dog"))
    spec = specialist((0, 1), classes=("dog", "ant"), checkpoint=saved(tmp_path / "mine.pt", 2))
    pool = build_pool(pool_of(spec), images(named), cache=tmp_path)
    assert pool.ensemble.classes == {spec.label: (3, 0)}


def test_a_teacher_of_some_classes_is_trained_on_these(tmp_path: Path) -> None:
    spec = specialist((3, 1))
    pool = build_pool(pool_of(spec), images(), cache=tmp_path)
    found = pool.evaluations[spec.label]
    assert found.labelled == 0.5
    assert found.accuracy > 0.45


@pytest.mark.parametrize(
    ("changes", "outputs", "words"),
    [
        ({}, 4, ("mine.pt", "'classifier.weight'", "4 outputs, not 3", "`classes`")),
        ({"classes": None}, 3, ("mine.pt", "3 outputs, not 4", "`classes`")),
        ({"classes": (3, 1, 3)}, 3, ("classes", "class 3 is given twice")),
        ({"classes": (3, 1, 4)}, 3, ("classes", "0 to 3", "got 4")),
        ({"classes": ("cat", 1, 0)}, 3, ("classes", "'cat'")),
    ],
)
def test_classes_and_outputs_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], outputs: int, words: tuple[str, ...]
) -> None:
    path = saved(tmp_path / "mine.pt", outputs)
    spec = replace(specialist((3, 1, 0), checkpoint=path), **changes)
    with pytest.raises(ConfigError) as error:
        build_pool(pool_of(spec), images(), cache=tmp_path)
    assert str(error.value).startswith(f"teachers.{spec.label}")
    assert all(word in str(error.value) for word in words)


def test_a_single_class_is_nothing_to_tell_apart() -> None:
    with pytest.raises(ConfigError, match=r"classes: expected at least 2, got 1"):
        specialist((1,))


def test_a_teacher_is_trained_on_classes_that_it_has_outputs_for(tmp_path: Path) -> None:
    spec = specialist((1, 0), trained_on=(2,))
    with pytest.raises(ConfigError, match=r"trained_on: expected some of its classes, got 2"):
        build_pool(pool_of(spec), images(), cache=tmp_path)


def test_two_teachers_of_disjoint_classes_teach_all_of_them(tmp_path: Path) -> None:
    pool = build_pool(pool_of(specialist((0, 2)), specialist((3, 1))), images(), cache=tmp_path)
    assert max(one.accuracy for one in pool.evaluations.values()) <= 0.5
    parts = images()
    distiller = Distiller(
        partial(build_network, "resnet8", num_classes=CLASSES, in_channels=1, width=0.25),
        pool.ensemble,
        image_shape=parts.data.image_shape,
        steps_per_epoch=10,
        distillation=Distillation(beta=0.0, feature="none"),
        recipe=Recipe(epochs=8, lr=0.1),
    )
    batches = parts.stream(16, torch.device("cpu"), 0)
    assert parts.splits.train.targets[:16].bincount().tolist() == [4] * CLASSES
    for _ in range(80):
        seen = next(batches)
        # A tenth of the images have a label: what joins the halves, which no teacher knows.
        hide = seen.index >= 16
        state = distiller.forward(replace(seen, targets=seen.targets.masked_fill(hide, UNKNOWN)))
        own = (seen.targets.unsqueeze(1) % 2 == torch.tensor([0, 1])).float()
        distiller.update(state, TeacherWeights(own, own))
    test = parts.evaluation_batches(parts.splits.test, "cpu")
    assert distiller.evaluate(test).accuracy > 0.9


# Images of a teacher's own.


def archive(path: Path, part: Split, **changes: Any) -> str:
    arrays = {
        "x_train": part.images.permute(0, 2, 3, 1).numpy(),
        "y_train": part.targets.numpy(),
    }
    np.savez(path, **(arrays | changes))
    return str(path)


def test_a_teacher_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    path = archive(tmp_path / "mine.npz", split([0, 1], 400))
    spec = TeacherSpec("resnet8", width=0.25, data=path)
    found = build_pool(pool_of(spec), images(data(16)), cache=tmp_path).evaluations["resnet8"]
    assert 0.45 < found.accuracy <= 0.5


def test_what_is_in_the_file_counts_and_not_where_it_is(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def files(path: str) -> int:
        spec = TeacherSpec("resnet8", width=0.25, data=path)
        build_pool(pool_of(spec), images(data(16)), cache=cache)
        return len([*cache.rglob("*.pt")])

    assert files(archive(tmp_path / "a.npz", split([0, 1]))) == 1
    assert files(archive(tmp_path / "b.npz", split([0, 1]))) == 1
    other = split([0, 1])
    other.images[0, 0, 0, 0] += 1
    assert files(archive(tmp_path / "a.npz", other)) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"x_train": np.zeros((80, 8, 9, 1), np.uint8)},
            (".data: ", "x_train", "(1, 8, 8)", "(1, 8, 9)"),
        ),
        ({"y_train": np.arange(80) % 5}, ("y_train", "0 to 3", "found 4")),
        ({"y_train": np.full(80, UNKNOWN)}, ("expected labelled images", "none")),
    ],
)
def test_a_file_of_other_images_or_classes_is_named(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = archive(tmp_path / "mine.npz", split([0, 1]), **changes)
    spec = TeacherSpec("resnet8", width=0.25, data=path)
    with pytest.raises(ConfigError) as error:
        build_pool(pool_of(spec), images(), cache=tmp_path / "cache")
    assert str(error.value).startswith("teachers.resnet8")
    assert all(word in str(error.value) for word in words)


def test_a_teacher_of_a_data_set_in_files_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path / "all", parts=("train", "test"))
    write_images(tmp_path / "mine", parts=("train",), classes=("dog", "fox"))
    (tmp_path / "mine" / "train").rename(tmp_path / "own")
    dataset = load_dataset("folder", root=tmp_path / "all", image_size=16, resize=20, workers=0)
    spec = specialist((2, 1), data=str(tmp_path / "own"))
    pool = build_pool(pool_of(spec), TrainingSet(dataset, dataset.split()), cache=tmp_path / "c")
    assert pool.evaluations[spec.label].labelled == pytest.approx(2 / 3)
    (tmp_path / "own" / "fox").rename(tmp_path / "own" / "foxes")
    with pytest.raises(ConfigError, match=r"\.data: .*own/foxes: no such .*did you mean 'fox'"):
        build_pool(pool_of(spec), TrainingSet(dataset, dataset.split()), cache=tmp_path / "c")


@pytest.mark.parametrize("changes", [{"images": 5.0}, {"checkpoint": "a.pt"}])
def test_data_of_its_own_excludes_other_sources(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="data"):
        TeacherSpec("resnet8", data="mine.npz", **changes)
