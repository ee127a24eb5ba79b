import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import check_outputs, evaluate
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.keeping import Stopped
from mtkd_env.networks import NETWORKS, Network, build_network
from mtkd_env.optimization import Recipe
from mtkd_env.precision import autocast
from mtkd_env.seeding import seeded
from mtkd_env.teachers import (
    PoolSpec,
    TeacherEnsemble,
    TeacherSpec,
    build_pool,
    class_means,
    load_pool_spec,
)
from mtkd_env.teachers.pool import own_images
from mtkd_env.teachers.training import TeacherTraining, TrainingSet, class_cycle, train_teacher
from mtkd_env.types import Batch
from tiny import (
    CLASSES,
    IMAGE_SHAPE,
    TEACHERS,
    TinyNetwork,
    batch,
    perturb,
    states_equal,
    teacher_networks,
    training_set,
)

NAMES = tuple(TEACHERS)
RECIPE = Recipe(epochs=3, lr=0.1, weight_decay=5e-4, nesterov=False, milestones=(0.8,))
LEARNABLE = 96


def network(width: float = 0.25, seed: int = 0) -> Network:
    """The network that `pool_spec` describes."""
    return build_network(
        "resnet8", num_classes=CLASSES, in_channels=IMAGE_SHAPE[0], width=width, seed=seed
    )


def batch_norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def accuracy(module: Network, images: TrainingSet) -> float:
    return evaluate(module, images.evaluation_batches(images.splits.test, "cpu")).accuracy


# The ensemble.


def outputs(known: Any) -> list[Tensor]:
    return [known.logits, *known.features, *known.feature_maps]


def test_maps_have_their_channels_last_in_memory() -> None:
    known = TeacherEnsemble(teacher_networks(), NAMES)(batch().inputs)
    for feature_map in known.feature_maps:
        assert feature_map.is_contiguous(memory_format=torch.channels_last)


def test_outputs_can_be_kept_for_a_backward_pass() -> None:
    known = TeacherEnsemble(teacher_networks(), NAMES)(batch().inputs)
    for output in outputs(known):
        student = torch.ones_like(output, requires_grad=True)
        (student * output).sum().backward()
        assert student.grad is not None
        assert student.grad.equal(output)


def test_weights_in_half_precision_give_what_autocast_makes_of_whole_ones() -> None:
    networks = teacher_networks()
    whole, half = TeacherEnsemble(networks, NAMES), TeacherEnsemble(networks, NAMES, "bf16")
    with torch.no_grad(), autocast("bf16", torch.device("cpu")):
        expected = [network(batch().inputs) for network in whole.networks]
    found = half(batch().inputs)
    for m, output in enumerate(expected):
        assert found.logits[m].equal(output.logits.float())
        assert found.feature_maps[m].equal(output.feature_map)
    layers = [one for one in half.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


class Standardised(nn.Conv2d):
    """A layer that may do with its weights what half precision is too coarse for."""


def test_layers_of_other_classes_keep_whole_weights() -> None:
    network = TinyNetwork()
    network.body[0] = Standardised(1, 6, 3, 2, padding=1)
    network.body[1] = nn.Identity()
    teacher = TeacherEnsemble([network.eval()], ["a"], "bf16").networks[0]
    assert teacher.get_parameter("body.0.weight").dtype == torch.float32
    assert teacher.get_parameter("body.3.weight").dtype == torch.bfloat16


def test_the_ensemble_gives_the_outputs_of_its_networks() -> None:
    networks = [module.double() for module in teacher_networks()]
    inputs = batch().inputs.double()
    expected = [module.eval()(inputs) for module in networks]
    found = TeacherEnsemble(networks, NAMES)(inputs)
    assert found.logits.shape == (3, 4, CLASSES)
    for m, output in enumerate(expected):
        torch.testing.assert_close(found.logits[m], output.logits)
        torch.testing.assert_close(found.features[m], output.feature)
        torch.testing.assert_close(found.feature_maps[m], output.feature_map)


def test_each_map_is_classified_by_its_own_teacher_and_carries_no_gradient() -> None:
    networks = teacher_networks()
    maps = tuple(torch.randn(2, k, 3, 5).requires_grad_() for k in (4, 8, 5))
    found = TeacherEnsemble(networks, NAMES).classify(maps)
    assert found.shape == (3, 2, CLASSES)
    assert not found.requires_grad
    for m, network in enumerate(networks):
        torch.testing.assert_close(found[m], network.classifier(maps[m].mean((2, 3))).detach())


# The first network of every family.
FAMILIES = {getattr(maker, "func", maker): name for name, maker in reversed(NETWORKS.items())}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_classifiers_of_every_family_reproduce_its_logits(name: str) -> None:
    module = build_network(name, num_classes=3, in_channels=1, width=0.25, seed=0).eval()
    ensemble = TeacherEnsemble([module], ["a"])
    known = ensemble(batch().inputs)
    torch.testing.assert_close(ensemble.classify(known.feature_maps), known.logits)


# Class means.


def test_class_means_are_those_of_a_loop_and_zero_for_a_class_that_does_not_occur() -> None:
    ensemble = TeacherEnsemble(teacher_networks(), NAMES)
    # The last class does not occur.
    batches = [replace(b, targets=b.targets % (CLASSES - 1)) for b in (batch(1, 9), batch(2, 3))]
    found = class_means(ensemble, iter(batches))
    assert [tuple(means.shape) for means in found] == [(CLASSES, width) for width in (4, 8, 5)]
    targets = torch.cat([b.targets for b in batches])
    for m, means in enumerate(found):
        features = torch.cat([ensemble(b.inputs).features[m] for b in batches])
        assert not means.requires_grad
        assert means[CLASSES - 1].eq(0).all()
        for c in range(CLASSES - 1):
            torch.testing.assert_close(means[c], features[targets == c].mean(0))


def test_class_means_do_not_depend_on_the_size_of_the_batches() -> None:
    ensemble, whole = TeacherEnsemble(teacher_networks(), NAMES), batch(size=10)
    parts = [
        Batch(whole.inputs[rows], whole.targets[rows], whole.index[rows])
        for rows in (slice(0, 4), slice(4, 10))
    ]
    for one, other in zip(
        class_means(ensemble, [whole]), class_means(ensemble, parts), strict=True
    ):
        torch.testing.assert_close(one, other)


# Folding.


def test_batch_norms_are_folded_into_the_convolutions() -> None:
    networks = teacher_networks()
    ensemble = TeacherEnsemble(networks, NAMES)
    assert [batch_norms(module) for module in networks] == [2, 2, 1]
    # The last one precedes a convolution instead of following it.
    assert [batch_norms(module) for module in ensemble.networks] == [0, 0, 1]


def test_making_an_ensemble_leaves_the_networks_as_they_were() -> None:
    for training in (True, False):
        networks = [module.train(training) for module in teacher_networks()]
        TeacherEnsemble(networks, NAMES)
        for module, untouched in zip(networks, teacher_networks(), strict=True):
            assert module.training is training
            assert states_equal(module, untouched)
            assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_ensemble_never_trains() -> None:
    ensemble = TeacherEnsemble(teacher_networks(), NAMES)
    for _ in range(2):
        assert not any(module.training for module in ensemble.modules())
        assert not any(parameter.requires_grad for parameter in ensemble.parameters())
        assert ensemble.train() is ensemble
        nn.ModuleList([ensemble]).train()


def test_teacher_outputs_carry_no_gradient() -> None:
    inputs = batch().inputs.requires_grad_()
    known = TeacherEnsemble(teacher_networks(), NAMES)(inputs)
    outputs = [known.logits, *known.features, *known.feature_maps]
    assert not any(output.requires_grad for output in outputs)


def test_the_ensemble_knows_its_teachers() -> None:
    networks = teacher_networks()
    ensemble = TeacherEnsemble(networks, NAMES)
    assert len(ensemble) == 3
    assert ensemble.names == NAMES
    assert ensemble.num_classes == CLASSES
    assert ensemble.feature_dims == tuple(module.feature_dim for module in networks) == (4, 8, 5)
    assert ensemble.map_channels == tuple(module.map_channels for module in networks)
    assert ensemble.signed_maps == (False, False, True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_teachers_whose_parameters_are_no_numbers_are_named(value: float) -> None:
    networks = teacher_networks(2)
    dict(networks[1].named_parameters())["classifier.bias"].data[0] = value
    with pytest.raises(ConfigError, match=r"^teachers: 'classifier\.bias' of 'b' holds NaN"):
        TeacherEnsemble(networks, ["a", "b"])


def test_ensembles_that_cannot_be_are_refused() -> None:
    networks = teacher_networks(2)
    with pytest.raises(ConfigError, match="expected at least one, got none"):
        TeacherEnsemble([], [])
    with pytest.raises(ConfigError, match="2 networks but 1 names"):
        TeacherEnsemble(networks, ["a"])
    with pytest.raises(ConfigError, match="the name 'a' is used more than once"):
        TeacherEnsemble(networks, ["a", "a"])
    networks[1].num_classes = 7
    with pytest.raises(ConfigError, match="'b' has 7 outputs, expected 4"):
        TeacherEnsemble(networks, ["a", "b"])


# Training.


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_class_cycle_is_one_cycle_so_no_class_keeps_its_label(classes: int) -> None:
    for seed in range(5):
        cycle = class_cycle(classes, seed)
        assert cycle.sort().values.equal(torch.arange(classes))
        seen, label = set(), 0
        while label not in seen:
            seen.add(label)
            label = int(cycle[label])
        assert len(seen) == classes


def test_class_cycle_depends_on_the_seed_alone() -> None:
    assert class_cycle(10, 1).equal(class_cycle(10, 1))
    assert not class_cycle(10, 1).equal(class_cycle(10, 2))


def train(
    module: Network,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    relabel: Tensor | None = None,
) -> Network:
    images = training_set(LEARNABLE)
    stream = images.stream(16, torch.device("cpu"), 0)
    TeacherTraining(module, stream, RECIPE, relabel=relabel, progress=progress).train(lambda: None)
    return module


def test_a_teacher_learns_and_ends_in_evaluation_mode() -> None:
    losses: list[float] = []
    module = train(network(), progress=lambda _done, _total, loss: losses.append(loss))
    assert not module.training
    assert losses[-1] < losses[0] / 2
    assert accuracy(module, training_set(LEARNABLE)) > 0.8


def test_progress_counts_the_epochs() -> None:
    calls: list[tuple[int, int]] = []
    train(network(), progress=lambda done, total, _loss: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


class Interrupted(TinyNetwork):
    """Draws random numbers; in the step after so many, Ctrl-C comes."""

    def __init__(self, seed: int, after: int | None = None) -> None:
        with seeded(seed):
            super().__init__()
        self.after = after

    def features(self, inputs: Tensor) -> Tensor:
        if self.after is not None:
            self.after -= 1
            if self.after == 0:
                signal.raise_signal(signal.SIGINT)
        return functional.dropout(super().features(inputs), 0.2, self.training)


def test_a_signal_in_the_last_step_comes_after_the_teacher_is_kept(tmp_path: Path) -> None:
    batches, kept = training_set(LEARNABLE).stream(16, torch.device("cpu"), 0), []
    steps = RECIPE.epochs * batches.steps_per_epoch
    training = TeacherTraining(Interrupted(0, steps), batches, RECIPE)
    with pytest.raises(Stopped):
        train_teacher(training, tmp_path / "kept", 3, lambda: kept.append(True))
    assert kept == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [1, 4, 5, 8])
def test_interrupted_training_goes_on_where_it_stopped(tmp_path: Path, steps: int) -> None:
    def training(network: Network) -> TeacherTraining:
        batches = training_set(LEARNABLE).stream(16, torch.device("cpu"), 0)
        return TeacherTraining(network, batches, RECIPE, progress=lambda *_: means.append(_[2]))

    means: list[float] = []
    uninterrupted = Interrupted(0)
    train_teacher(training(uninterrupted), tmp_path / "other", 3, lambda: None)
    expected, means = means, []
    with pytest.raises(Stopped) as stopped:
        train_teacher(training(Interrupted(0, steps)), tmp_path / "kept", 3, lambda: None)
    assert stopped.value.step == steps
    # Another initialisation, to see that all of it comes from the checkpoint.
    resumed, drawn = Interrupted(9), torch.get_rng_state()
    train_teacher(training(resumed), tmp_path / "kept", 3, lambda: None)
    assert means == expected
    assert states_equal(resumed, uninterrupted)
    assert list(tmp_path.iterdir()) == []
    # What others draw does not depend on it.
    assert torch.get_rng_state().equal(drawn)


# The pool.


def pool_spec(*teachers: TeacherSpec, **changes: Any) -> PoolSpec:
    chosen = teachers or (TeacherSpec("resnet8", width=0.25),)
    return replace(PoolSpec(chosen, RECIPE, batch_size=16), **changes)


class Recorder:
    """Counts the epochs that teachers were trained for."""

    def __init__(self) -> None:
        self.epochs: list[str] = []

    def __call__(self, name: str, done: int, total: int, loss: float) -> None:
        assert 1 <= done <= total
        assert loss > 0
        self.epochs.append(name)


def cached(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the teacher of `pool_spec()`."""
    folder = tmp_path_factory.mktemp("cache")
    build_pool(pool_spec(), training_set(LEARNABLE), cache=folder)
    return folder


def test_a_teacher_is_trained_once_and_then_found(tmp_path: Path) -> None:
    images, recorder = training_set(LEARNABLE), Recorder()
    first = build_pool(pool_spec(), images, cache=tmp_path, progress=recorder)
    assert recorder.epochs == ["resnet8"] * RECIPE.epochs
    files = cached(tmp_path)
    assert [path.suffix for path in files] == [".pt"]
    second = build_pool(pool_spec(), images, cache=tmp_path, progress=recorder)
    assert len(recorder.epochs) == RECIPE.epochs
    assert cached(tmp_path) == files
    assert states_equal(second.ensemble, first.ensemble)
    assert second.evaluations == first.evaluations
    assert second.digests == first.digests


CHANGES: dict[str, tuple[PoolSpec, int]] = {
    "learning rate": (pool_spec(recipe=replace(RECIPE, lr=0.05)), LEARNABLE),
    "epochs": (pool_spec(recipe=replace(RECIPE, epochs=1)), LEARNABLE),
    "batch size": (pool_spec(batch_size=48), LEARNABLE),
    "seed": (pool_spec(TeacherSpec("resnet8", width=0.25, seed=1)), LEARNABLE),
    "seed of the pool": (pool_spec(seed=1), LEARNABLE),
    "width": (pool_spec(TeacherSpec("resnet8", width=0.125)), LEARNABLE),
    "kind": (pool_spec(TeacherSpec("resnet8", width=0.25, kind="permuted")), LEARNABLE),
    "arguments": (
        pool_spec(TeacherSpec("resnet8", width=0.25, arguments={"channels": (8, 8, 8, 8)})),
        LEARNABLE,
    ),
    "schedule": (pool_spec(recipe=replace(RECIPE, schedule="cosine")), LEARNABLE),
    "label smoothing": (pool_spec(recipe=replace(RECIPE, label_smoothing=0.1)), LEARNABLE),
    "images": (pool_spec(), LEARNABLE - 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_teacher_that_depends_on_something_else_is_another_file(
    change: str, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, size = CHANGES[change]
    trained: list[TeacherTraining] = []
    monkeypatch.setattr(
        "mtkd_env.teachers.pool.train_teacher",
        lambda training, _kept, _seed, keep: [trained.append(training), keep()],
    )
    before = cached(warm_cache)
    build_pool(spec, training_set(size), cache=warm_cache)
    assert len(trained) == 1
    (new,) = cached(warm_cache) - before
    assert new.name.startswith(spec.teachers[0].label)


def test_keys_that_came_later_leave_the_names_of_files_as_they_are(warm_cache: Path) -> None:
    """A known value: that of the keys which there were when teachers were first cached."""
    index = torch.arange(LEARNABLE).numpy().tobytes()
    index += training_set(LEARNABLE).splits.train.targets.numpy().tobytes()
    made_from = {
        "version": 3,
        "teacher": {"network": "resnet8", "kind": "trained", "width": 0.25, "seed": 0},
        "recipe": {
            "epochs": 3,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "nesterov": False,
            "milestones": [0.8],
            "decay": 0.1,
        },
        "batch_size": 16,
        "data": training_set(LEARNABLE).data.digest,
        "train_images": hashlib.sha256(index).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    assert f"resnet8-{digest[:16]}.pt" in {path.name for path in cached(warm_cache)}


def test_teachers_are_measured_and_asked_in_a_precision(warm_cache: Path) -> None:
    full, low = (
        build_pool(pool_spec(), training_set(LEARNABLE), cache=warm_cache, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert low.digests == full.digests
    assert low.ensemble.precision == "bf16"
    assert low.evaluations != full.evaluations
    known = low.ensemble(batch().inputs)
    assert known.feature_maps[0].dtype == torch.bfloat16
    torch.testing.assert_close(
        known.logits, full.ensemble(batch().inputs).logits, rtol=0.05, atol=0.05
    )


def test_a_smaller_training_split_of_the_same_images_is_another_file(warm_cache: Path) -> None:
    data = training_set(LEARNABLE).data
    recorder = Recorder()
    images = TrainingSet(data, data.split(train_size=LEARNABLE - 4))
    build_pool(pool_spec(), images, cache=warm_cache, progress=recorder)
    assert recorder.epochs


def test_a_renamed_teacher_is_the_same_teacher(warm_cache: Path) -> None:
    digests = [
        build_pool(
            pool_spec(TeacherSpec("resnet8", name=name, width=0.25)),
            training_set(LEARNABLE),
            cache=warm_cache,
        ).digests
        for name in ("", "renamed")
    ]
    assert digests[0]["resnet8"] == digests[1]["renamed"]


def test_members_are_the_same_teachers_as_in_the_whole_pool(tmp_path: Path) -> None:
    teachers = [TeacherSpec("resnet8", n, width=0.125, images=16.0) for n in "abc"]
    spec, recorder = pool_spec(*teachers), Recorder()
    some = replace(spec, members=("c", "a"))
    images = training_set(LEARNABLE)
    few = build_pool(some, images, cache=tmp_path, progress=recorder)
    assert few.ensemble.names == ("a", "c")
    assert set(recorder.epochs) == {"a", "c"}
    whole = build_pool(spec, images, cache=tmp_path)
    assert few.digests.items() < whole.digests.items()
    assert own_images(some, images.data).keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("members", "words"),
    [((), "members: expected different names"), (("resnet9",), "did you mean 'resnet8'")],
)
def test_members_that_are_none_are_refused(members: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pool_spec(members=members)


def test_kinds_of_teachers_are_what_they_claim(tmp_path: Path) -> None:
    kinds = ("trained", "permuted", "random")
    teachers = tuple(TeacherSpec("resnet8", width=0.25, kind=kind) for kind in kinds)
    recorder = Recorder()
    pool = build_pool(
        pool_spec(*teachers), training_set(LEARNABLE), cache=tmp_path, progress=recorder
    )
    assert pool.ensemble.names == ("resnet8", "resnet8-permuted", "resnet8-random")
    assert pool.evaluations["resnet8"].accuracy > 0.8
    assert pool.evaluations["resnet8-permuted"].accuracy < 0.1
    assert set(recorder.epochs) == {"resnet8", "resnet8-permuted"}
    assert not any("random" in path.name for path in cached(tmp_path))


def test_a_random_teacher_is_as_it_was_initialised(tmp_path: Path) -> None:
    random = TeacherSpec("resnet8", width=0.25, kind="random")
    first, second = (
        build_pool(pool_spec(random), training_set(), cache=tmp_path / name) for name in "ab"
    )
    assert states_equal(first.ensemble, second.ensemble)
    for spec in (pool_spec(replace(random, seed=1)), pool_spec(random, seed=1)):
        other = build_pool(spec, training_set(), cache=tmp_path)
        assert not states_equal(first.ensemble, other.ensemble)
    assert cached(tmp_path) == set()


def test_interrupted_pool_resumes_and_leaves_only_whole_files(tmp_path: Path) -> None:
    images, spec = training_set(LEARNABLE), pool_spec()

    def interrupt(_name: str, done: int, _total: int, _loss: float) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        build_pool(spec, images, cache=tmp_path, progress=interrupt)
    assert {path.parent.suffix for path in cached(tmp_path)} == {".checkpoints"}
    recorder = Recorder()
    resumed = build_pool(spec, images, cache=tmp_path, progress=recorder)
    assert len(recorder.epochs) == 1
    assert [path.suffix for path in cached(tmp_path)] == [".pt"]
    uninterrupted = build_pool(spec, images, cache=tmp_path / "other")
    assert states_equal(resumed.ensemble, uninterrupted.ensemble)


def test_a_teacher_whose_training_goes_wrong_is_named_and_not_kept(tmp_path: Path) -> None:
    spec = pool_spec(recipe=replace(RECIPE, lr=1e30))
    with pytest.raises(FloatingPointError, match=r"^teachers\.resnet8: .* in epoch 1; a lower"):
        build_pool(spec, training_set(LEARNABLE), cache=tmp_path)
    assert cached(tmp_path) == set()


def test_the_default_cache_is_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTKD_CACHE", str(tmp_path))
    monkeypatch.setattr("mtkd_env.teachers.pool.train_teacher", lambda *parts: parts[-1]())
    build_pool(pool_spec(), training_set(LEARNABLE))
    (path,) = cached(tmp_path)
    assert path.parent == tmp_path / "teachers" / "tiny"


# What is in the cache, and comes out of it.


def other_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in state.items()}


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_checkpoint(path, change(load_checkpoint(path)))


# Files that somebody has put in the place of a teacher's.
REPLACED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a state_dict": lambda content: content["network"],
    "other weights": lambda content: content | {"network": other_weights(content["network"])},
    "another teacher": lambda content: content | {"made_from": "{}"},
    "no network": lambda content: content | {"network": 1},
}


@pytest.mark.parametrize("case", REPLACED)
def test_other_weights_in_the_place_of_a_kept_teacher_are_noticed(
    tmp_path: Path, warm_cache: Path, case: str
) -> None:
    shutil.copytree(warm_cache, tmp_path, dirs_exist_ok=True)
    build_pool(pool_spec(), training_set(LEARNABLE), cache=tmp_path)
    for path in cached(tmp_path):
        rewritten(path, REPLACED[case])
    with pytest.raises(ConfigError, match=r"^teachers\.resnet8: .*resnet8-\w+\.pt does not hold"):
        build_pool(pool_spec(), training_set(LEARNABLE), cache=tmp_path)


def test_digests_are_those_of_the_weights_and_of_nothing_else(tmp_path: Path) -> None:
    path, images = tmp_path / "mine.pt", training_set()

    def digest() -> str:
        return build_pool(from_checkpoint(path), images, cache=tmp_path).digests["resnet8"]

    state = network(seed=5).state_dict()
    save_checkpoint(path, state)
    first = digest()
    save_checkpoint(path, {"network": state, "epoch": 3})
    assert digest() == first
    save_checkpoint(path, other_weights(state))
    assert digest() != first


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("classifier.bias", torch.nan, "gives NaN or infinite logits in fp32 for 40 of 40 images"),
        ("stem.0.weight", torch.inf, "gives NaN or infinite logits in fp32 for 40 of 40 images"),
        ("classifier.weight", 0.0, "gives the same logits for 40 different images"),
    ],
)
def test_a_teacher_that_says_nothing_is_named_before_another_is_trained(
    tmp_path: Path, tensor: str, value: float, reason: str
) -> None:
    path, recorder = tmp_path / "mine.pt", Recorder()
    save_checkpoint(path, broken_state(lambda state: state[tensor].fill_(value)))
    good = TeacherSpec("resnet8", width=0.25)
    bad = replace(good, name="bad", checkpoint=str(path))
    with pytest.raises(ConfigError, match=rf"^teachers\.bad: .*mine\.pt {reason}"):
        build_pool(pool_spec(good, bad), training_set(), cache=tmp_path, progress=recorder)
    assert recorder.epochs == []


def test_the_same_logits_for_the_same_images_are_in_order() -> None:
    images = replace(batch(), inputs=torch.ones_like(batch().inputs))
    check_outputs(network(), [images], "fp32", "it")
    check_outputs(network(), [], "fp32", "it")


# Checkpoints.


def from_checkpoint(path: Path, **changes: Any) -> PoolSpec:
    fields = {"network": "resnet8", "width": 0.25, "checkpoint": str(path)} | changes
    return pool_spec(TeacherSpec(**fields))


@pytest.mark.parametrize("key", [None, "network"])
def test_a_checkpoint_is_used_instead_of_training(tmp_path: Path, key: str | None) -> None:
    given = perturb(network(seed=5), seed=5)
    path = tmp_path / "mine.pt"
    save_checkpoint(path, given.state_dict() if key is None else {key: given.state_dict()})
    recorder = Recorder()
    pool = build_pool(from_checkpoint(path), training_set(), cache=tmp_path, progress=recorder)
    assert recorder.epochs == []
    assert states_equal(pool.ensemble, TeacherEnsemble([given], ["resnet8"]))
    assert cached(tmp_path) == {path}


def broken_state(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    state = dict(network().state_dict())
    change(state)
    return state


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: s.pop("classifier.bias"), "lacks the tensor 'classifier.bias'"),
    "shape": (
        lambda s: s.update({"classifier.bias": torch.zeros(7)}),
        r"has 'classifier.bias' of shape \(7,\), the network expects \(4,\)",
    ),
    "unexpected": (
        lambda s: s.update({"extra": torch.zeros(1)}),
        "has the unexpected tensor 'extra'",
    ),
    "no tensor": (
        lambda s: s.update({"classifier.bias": "text"}),
        "has 'classifier.bias', which is not a tensor but a str",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_does_not_fit_names_teacher_file_and_tensor(
    tmp_path: Path, case: str
) -> None:
    change, message = BROKEN[case]
    path = tmp_path / "mine.pt"
    save_checkpoint(path, broken_state(change))
    with pytest.raises(ConfigError, match=r"^teachers\.good: .*mine\.pt " + message):
        build_pool(from_checkpoint(path, name="good"), training_set(), cache=tmp_path)


def test_a_checkpoint_of_another_width_names_the_first_tensor(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    save_checkpoint(path, network(width=0.5).state_dict())
    with pytest.raises(
        ConfigError, match=r"mine\.pt has 'stem\.0\.weight' of shape \(8, 1, 3, 3\)"
    ):
        build_pool(from_checkpoint(path), training_set(), cache=tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.pt: no such checkpoint"):
        build_pool(from_checkpoint(tmp_path / "gone.pt"), training_set(), cache=tmp_path)


# Descriptions in YAML.


def written(folder: Path, text: str) -> Path:
    path = folder / "pool.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_pool_is_read_from_yaml(tmp_path: Path) -> None:
    text = """
    teachers:
      - network: resnet8
        width: 0.5
      - {network: wrn_16_1, kind: permuted, seed: 3, name: wrong}
      - {network: resnet14, checkpoint: file.pt}
    recipe:
      epochs: 12
      weight_decay: 5e-4
      lr: 1e-1
      nesterov: false
      milestones: [0.5, 0.75]
    batch_size: 32
    """
    expected = PoolSpec(
        teachers=(
            TeacherSpec("resnet8", width=0.5),
            TeacherSpec("wrn_16_1", kind="permuted", seed=3, name="wrong"),
            TeacherSpec("resnet14", checkpoint="file.pt"),
        ),
        recipe=Recipe(12, 0.1, weight_decay=5e-4, nesterov=False, milestones=(0.5, 0.75)),
        batch_size=32,
    )
    assert load_pool_spec(written(tmp_path, text)) == expected


def test_a_pool_written_as_yaml_comes_back(tmp_path: Path) -> None:
    spec = pool_spec(TeacherSpec("resnet8", seed=2), TeacherSpec("resnet14", kind="random"))
    path = written(tmp_path, yaml.safe_dump(yaml.safe_load(str_of(spec))))
    assert load_pool_spec(path) == spec


def str_of(spec: PoolSpec) -> str:
    return json.dumps(asdict(spec))


def test_a_pool_without_recipe_has_the_papers(tmp_path: Path) -> None:
    spec = load_pool_spec(written(tmp_path, "teachers: [{network: resnet8}]"))
    assert spec.recipe.weight_decay == 5e-4
    assert spec.recipe.nesterov is False
    assert spec == PoolSpec((TeacherSpec("resnet8"),))


ONE = "teachers: [{network: resnet8}]\n"

UNUSABLE: dict[str, tuple[str, str]] = {
    "empty": ("", "expected keys and values"),
    "text": ("just text", "expected keys and values"),
    "broken": ("teachers: [", "not valid YAML"),
    "key twice": ("batch_size: 1\nbatch_size: 2", "'batch_size' is given twice"),
    "no teacher": ("teachers: []", "teachers: expected at least one, got none"),
    "number": ("teachers: 3", "teachers: expected .*3"),
    "no network": ("teachers: [{name: a}]", "'network'"),
    "key": (ONE + "batchsize: 3", "batchsize"),
    "key of a teacher": (
        "teachers: [{network: resnet8}, {network: resnet14, imges: 1}]",
        r"teachers\.1\.imges: unknown key; did you mean 'images'",
    ),
    "key of the recipe": (ONE + "recipe: {lrr: 0.1}", r"recipe\.lrr"),
    "argument": (
        "teachers: [{network: resnet8, arguments: {channel: 3}}]",
        r"teachers\.0\.arguments\.channel: unknown key; did you mean 'channels'",
    ),
    "word": (
        "teachers: [{network: resnet8, width: wide}]",
        r"0\.width: expected float, got 'wide'",
    ),
    "network": ("teachers: [{network: resnet9}]", "did you mean 'resnet8'"),
    "kind": ("teachers: [{network: resnet8, kind: rndom}]", "did you mean 'random'"),
    "one name": ("teachers: [resnet8, {network: resnet8, width: 0.5}]", "'resnet8' is used more"),
    "name twice": (
        "teachers: [{network: resnet8, name: a}, {network: vgg8, name: a}]",
        "'a' is used more than once",
    ),
    "checkpoint": (
        "teachers: [{network: resnet8, kind: random, checkpoint: a.pt}]",
        r"teachers\.0\.checkpoint: a random teacher cannot have",
    ),
    "batch size": (ONE + "batch_size: 0", "batch_size: expected at least 1, got 0"),
    "seed": (ONE + "seed: -1", "seed: expected a finite number >= 0"),
    "epochs": (ONE + "recipe: {epochs: 0}", r"recipe\.epochs: expected at least 1"),
    "schedule": (ONE + "recipe: {schedule: stp}", "recipe: unknown schedule 'stp'"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_description_that_cannot_be_used_names_file_and_key(tmp_path: Path, case: str) -> None:
    text, named = UNUSABLE[case]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"^{path}: .*{named}") as error:
        load_pool_spec(path)
    assert "\n" not in str(error.value)
