import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

import mtkd_env
from env_contract import equal, rollout
from mtkd_env import (
    ConfigError,
    MTKDVectorEnv,
    PoolSpec,
    Recipe,
    TeacherSpec,
    assemble,
    registration,
)
from mtkd_env.registration import DEFAULT_TEACHER_EPOCHS, make_env, pool_spec
from mtkd_env.teachers import class_means
from tiny import data

# Teachers that need no training.
RANDOM = [
    {"network": "resnet8", "kind": "random", "width": 0.25},
    {"network": "wrn_16_1", "kind": "random", "width": 0.25},
]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of images in the format of `MTKD/Npz-v0`."""
    images = data()
    path = tmp_path_factory.mktemp("npz") / "tiny.npz"
    arrays = {
        "x_train": images.x_train[:, 0],
        "y_train": images.y_train,
        "x_test": images.x_test[:, 0],
        "y_test": images.y_test,
    }
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    return str(path)


def npz_kwargs(path: str, **changes: Any) -> dict[str, Any]:
    defaults = {
        "dataset_kwargs": {"path": path},
        "num_envs": 4,
        "teachers": RANDOM,
        "student_width": 0.125,
    }
    return defaults | changes


def npz_env(path: str, **changes: Any) -> VectorEnv[Any, Any, Any]:
    return gymnasium.make_vec("MTKD/Npz-v0", **npz_kwargs(path, **changes))


# The registered ids.


def test_digits_are_one_call_away() -> None:
    env = gymnasium.make_vec("MTKD/Digits-v0", num_envs=8, teachers=RANDOM, student_width=0.125)
    assert isinstance(env, MTKDVectorEnv)
    assert env.num_envs == 8
    assert env.teacher_names == ("resnet8-random", "wrn_16_1-random")
    env.reset(seed=0)
    rollout(env, 2)
    assert set(env.splits) == {"train", "test"}
    assert 0 <= env.evaluate("test").accuracy <= 1
    assert not env.spec.nondeterministic or torch.cuda.is_available()


def test_a_users_own_images_are_one_call_away(npz: str) -> None:
    env = npz_env(npz)
    env.reset(seed=0)
    (first,) = rollout(env, 1)
    assert first[1].shape == (4,)


def test_the_package_need_not_be_imported_by_the_user(npz: str) -> None:
    env = gymnasium.make_vec("mtkd_env:MTKD/Npz-v0", **npz_kwargs(npz))
    assert isinstance(env, MTKDVectorEnv)


def test_all_ids_are_versioned_and_vectorised_only(npz: str) -> None:
    ids = [name for name in gymnasium.registry if name.startswith("MTKD/")]
    assert sorted(ids) == sorted(f"MTKD/{name}-v0" for name in registration.ENV_NAMES)
    assert set(registration.ENV_NAMES.values()) == set(mtkd_env.DATASETS)
    for name in ids:
        with pytest.raises(gymnasium.error.Error):
            gymnasium.make(name)
    with pytest.raises(gymnasium.error.Error):
        gymnasium.make_vec("MTKD/Npz-v0", vectorization_mode="sync", **npz_kwargs(npz))


def test_registering_again_changes_nothing() -> None:
    before = gymnasium.spec("MTKD/Digits-v0")
    mtkd_env.register_envs()
    assert gymnasium.spec("MTKD/Digits-v0") is before


def test_an_environment_can_be_made_again_from_its_spec(npz: str) -> None:
    env = npz_env(npz, reward="alignment", episode="epoch")
    assert env.spec is not None
    copies = [
        gymnasium.make_vec(env.spec),
        gymnasium.make_vec(EnvSpec.from_json(env.spec.to_json())),
    ]
    json.loads(env.spec.to_json())
    env.reset(seed=1)
    expected = rollout(env, 3)
    for copy in copies:
        copy.reset(seed=1)
        assert equal(rollout(copy, 3), expected)


def test_max_episode_steps_is_refused_with_the_alternative(npz: str) -> None:
    with pytest.raises(ConfigError, match="max_episode_steps: not supported; use episode="):
        npz_env(npz, max_episode_steps=5)


def test_the_seed_argument_is_the_seed_of_a_first_reset(npz: str) -> None:
    by_argument, by_reset = npz_env(npz, seed=3), npz_env(npz)
    first, _ = by_argument.reset()
    assert equal(first, by_reset.reset(seed=3)[0])
    assert equal(rollout(by_argument, 2), rollout(by_reset, 2))


def test_teachers_do_not_depend_on_the_seed(npz: str) -> None:
    first, second = (assemble(dataset="npz", **npz_kwargs(npz, seed=seed)) for seed in (0, 1))
    assert first.pool.digests == second.pool.digests
    assert first.pool.evaluations == second.pool.evaluations
    assert set(first.pool.evaluations) == set(first.env.teacher_names)


# Arguments.


def test_student_recipe_and_loss_are_as_asked_for(npz: str) -> None:
    env = make_env(
        dataset="npz",
        **npz_kwargs(
            npz,
            student="resnet14",
            recipe={"epochs": 7, "lr": 0.3},
            alpha=0.5,
            beta=0.0,
            temperature=2.0,
        ),
    )
    expected = mtkd_env.NETWORKS["resnet14"](num_classes=4, in_channels=1, width=0.125)
    student = env.distiller.student
    assert str(student) == str(expected)
    assert env.distiller.recipe == Recipe(epochs=7, lr=0.3)
    assert (env.distiller.alpha, env.distiller.beta, env.distiller.temperature) == (0.5, 0.0, 2.0)


def test_networks_are_made_with_arguments_of_their_own(npz: str) -> None:
    teacher = {"network": "resnet8", "kind": "random", "arguments": {"channels": (3, 4, 5, 6)}}
    arguments = {"channels": (2, 3, 4, 5)}
    kwargs = npz_kwargs(npz, teachers=[teacher], student_width=1.0, student_arguments=arguments)
    distiller = make_env(dataset="npz", **kwargs).distiller
    assert distiller.student.feature_dim == 5
    assert distiller.teachers.feature_dims == (6,)


def test_a_student_that_cannot_be_made_is_known_before_teachers_are_trained(
    npz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mtkd_env.registration.prepare_teachers", lambda *_, **__: pytest.fail("asked")
    )
    with pytest.raises(ConfigError, match="unexpected keyword argument 'drop'"):
        make_env(
            dataset="npz",
            **npz_kwargs(
                npz,
                student="torchvision:resnet18",
                student_width=1.0,
                student_arguments={"drop": 1},
            ),
        )


def test_loss_terms_are_as_asked_for(npz: str) -> None:
    env = make_env(dataset="npz", **npz_kwargs(npz, logit="dist", feature={"mse": 0.5, "nd": 2.0}))
    assert env.distiller.logit_terms == {"dist": 1.0}
    assert env.distiller.feature_terms == {"mse": 0.5, "nd": 2.0}
    plain = make_env(dataset="npz", **npz_kwargs(npz))
    assert plain.distiller.logit_terms == {"kd": 1.0}
    assert plain.distiller.feature_terms == {"mse": 1.0}
    assert plain.distiller.directions == ()


def test_directions_are_the_class_means_of_the_training_images(npz: str) -> None:
    env = make_env(dataset="npz", **npz_kwargs(npz, feature="nd", val_fraction=0.4))
    teachers, batches = env.distiller.teachers, list(env.splits["train"]())
    assert sum(len(images.targets) for images in batches) == 5  # of 9
    expected = class_means(teachers, batches)
    assert len(env.distiller.directions) == 2
    for found, means in zip(env.distiller.directions, expected, strict=True):
        torch.testing.assert_close(found, means)
        assert found.shape[0] == 4
    env.reset(seed=0)
    for *_, info in rollout(env, 2):
        assert np.isfinite(info["feature"]).all()


def test_held_out_images_make_a_split_and_are_not_trained_on(npz: str) -> None:
    assembly = assemble(dataset="npz", **npz_kwargs(npz, val_fraction=0.4))
    env = assembly.env
    assert set(env.splits) == {"train", "val", "test"}
    assert env.evaluate("val").cross_entropy > 0
    assert env.stream.samples == 5  # of 9
    sizes = {name: sum(len(b.targets) for b in make()) for name, make in env.splits.items()}
    assert sizes == {"train": 5, "val": 4, "test": 40}


def test_fewer_training_images_can_be_asked_for(npz: str) -> None:
    assert make_env(dataset="npz", **npz_kwargs(npz, train_size=4)).steps_per_epoch == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
    "dataset argument": ({"dataset_kwargs": {"paths": "x"}}, "'?path'?"),
    "student": ({"student": "resnet9"}, "unknown student 'resnet9'; did you mean"),
    "env argument": ({"rewrad": "paper"}, r"env\.rewrad: unknown key; did you mean 'reward'"),
    "env value": ({"reward": "papr"}, "unknown reward 'papr'"),
    "recipe": ({"recipe": {"lrr": 1.0}}, r"recipe\.lrr: unknown key; did you mean 'lr'"),
    "recipe value": ({"recipe": {"epochs": 0}}, r"recipe\.epochs: expected at least 1, got 0"),
    "student argument": (
        {"student_arguments": {"chanels": 3}},
        r"student\.arguments\.chanels: unknown key; did you mean 'channels'",
    ),
    "student's width twice": (
        {"student_arguments": {"width": 2}},
        r"student\.arguments\.width: cannot be given here",
    ),
    "teacher argument": (
        {"teachers": [{"network": "resnet8", "arguments": {"chanels": 3}}]},
        r"teachers\.resnet8\.arguments\.chanels: unknown key; did you mean 'channels'",
    ),
    "precision": ({"precision": "half"}, r"unknown precision 'half'"),
    "logit": ({"logit": "dits"}, "unknown logit 'dits'; did you mean 'dist'"),
    "feature": ({"feature": {"msee": 1.0}}, "unknown feature 'msee'; did you mean 'mse'"),
    "coefficient": ({"logit": {"kd": -1.0}}, r"logit\.kd: expected a finite number >= 0, got -1.0"),
    "num_envs": ({"num_envs": 1000}, "expected 1 to 9, the number of images, found 1000"),
    "teacher": ({"teachers": ["resnet9"]}, "unknown network 'resnet9'"),
    "teacher key": (
        {"teachers": [{"network": "resnet8", "kid": "random"}]},
        r"teachers\.0\.kid: unknown key; did you mean 'kind'",
    ),
    "teacher without network": (
        {"teachers": [{"kind": "random"}]},
        r"teachers\.0: .*'network'",
    ),
    "no teachers": ({"teachers": []}, "teachers: expected at least one, got none"),
    "pool file": ({"teachers": "gone.yaml"}, r"gone\.yaml: no such file"),
    "epochs said twice": (
        {"teachers": PoolSpec((TeacherSpec("resnet8"),)), "teacher_epochs": 3},
        "teacher_epochs: the pool's own recipe says",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_used_are_named(case: str, npz: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        make_env(**({"dataset": "npz"} | npz_kwargs(npz, **changes)))


def test_teachers_can_be_given_in_every_form(tmp_path: Path) -> None:
    yaml = tmp_path / "pool.yaml"
    yaml.write_text("teachers: [{network: resnet8, seed: 1}]\nrecipe: {epochs: 2}\n")
    spec = TeacherSpec("resnet8", seed=1)
    assert pool_spec([{"network": "resnet8", "seed": 1}, "resnet14"]).teachers == (
        spec,
        TeacherSpec("resnet14"),
    )
    assert pool_spec(["resnet8"]).recipe.epochs == DEFAULT_TEACHER_EPOCHS
    assert pool_spec(["resnet8"], epochs=2).recipe.epochs == 2
    for path in (yaml, str(yaml)):
        assert pool_spec(path).teachers == (spec,)
        assert pool_spec(path).recipe.epochs == 2
    assert pool_spec(PoolSpec((spec,))) == PoolSpec((spec,))
