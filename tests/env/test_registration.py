import json
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs import registration as registered
from gymnasium.vector import VectorEnv

import mtkd_env
from experiments.config import parse_arguments
from mtkd_env import (
    ConfigError,
    DataSpec,
    Distillation,
    EnvSpec,
    MTKDVectorEnv,
    PoolSpec,
    Recipe,
    StoreSpec,
    StudentSpec,
    TeacherSpec,
    assemble,
    registration,
)
from mtkd_env.options import build, field_names
from mtkd_env.registration import PARTS, make_env, sorted_keywords
from mtkd_env.teachers import class_means
from mtkd_env.testing import equal, rollout
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
        "data": {"arguments": {"path": path}},
        "num_envs": 4,
        "teachers": RANDOM,
        "width": 0.125,
    }
    return defaults | changes


def npz_env(path: str, **changes: Any) -> VectorEnv[Any, Any, Any]:
    return gymnasium.make_vec("MTKD/Npz-v0", **npz_kwargs(path, **changes))


# The registered ids.


def test_digits_are_one_call_away() -> None:
    env = gymnasium.make_vec("MTKD/Digits-v0", num_envs=8, teachers=RANDOM, width=0.125)
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
    assert sorted(ids) == sorted(f"MTKD/{name}-v0" for name in (*registration.ENV_NAMES, "Tasks"))
    assert set(registration.ENV_NAMES.values()) == set(mtkd_env.DATASETS)
    for name in ids:
        with pytest.raises(ConfigError, match=r"expected gymnasium\.make_vec\(id, num_envs=64\)"):
            gymnasium.make(name)
    with pytest.raises(ConfigError, match=r"expected gymnasium\.make_vec"):
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
        gymnasium.make_vec(registered.EnvSpec.from_json(env.spec.to_json())),
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


def test_the_first_student_is_that_of_seed_0(npz: str) -> None:
    unseeded, seeded = npz_env(npz), npz_env(npz)
    assert equal(unseeded.reset()[0], seeded.reset(seed=0)[0])
    assert equal(rollout(unseeded, 2), rollout(seeded, 2))


def test_an_assembly_knows_its_teachers_and_images(npz: str) -> None:
    data = {"dataset": "npz", "arguments": {"path": npz}, "batch_size": 4}
    assembly = assemble(data=data, teachers=RANDOM, student={"width": 0.125})
    assert set(assembly.pool.evaluations) == set(assembly.env.teacher_names)
    assert len(assembly.images.splits.train) == 9


# Arguments.


def test_student_recipe_and_loss_are_as_asked_for(npz: str) -> None:
    env = make_env(
        dataset="npz",
        **npz_kwargs(
            npz,
            network="resnet14",
            optimizer={"epochs": 7, "lr": 0.3},
            alpha=0.5,
            beta=0.0,
            temperature=2.0,
        ),
    )
    expected = mtkd_env.NETWORKS["resnet14"](num_classes=4, in_channels=1, width=0.125)
    student = env.distiller.student
    assert str(student) == str(expected)
    assert env.distiller.recipe == Recipe(epochs=7, lr=0.3)
    assert env.distiller.distillation == Distillation(alpha=0.5, beta=0.0, temperature=2.0)
    assert env.reward.distillation is env.distiller.distillation


def test_networks_are_made_with_arguments_of_their_own(npz: str) -> None:
    teacher = {"network": "resnet8", "kind": "random", "arguments": {"channels": (3, 4, 5, 6)}}
    arguments = {"channels": (2, 3, 4, 5)}
    student = {"arguments": arguments}
    kwargs = npz_kwargs(npz, teachers=[teacher], width=1.0, student=student)
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
                student={"network": "torchvision:resnet18", "arguments": {"drop": 1}},
                width=1.0,
            ),
        )


def test_loss_terms_are_as_asked_for(npz: str) -> None:
    env = make_env(dataset="npz", **npz_kwargs(npz, logit="dist", feature={"mse": 0.5, "nd": 2.0}))
    assert env.distiller.distillation.logit_terms == {"dist": 1.0}
    assert env.distiller.distillation.feature_terms == {"mse": 0.5, "nd": 2.0}
    plain = make_env(dataset="npz", **npz_kwargs(npz))
    assert plain.distiller.distillation == Distillation()
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
    env = make_env(dataset="npz", **npz_kwargs(npz, val_fraction=0.4))
    assert set(env.splits) == {"train", "val", "test"}
    assert env.evaluate("val").cross_entropy > 0
    assert env.stream.samples == 5  # of 9
    sizes = {name: sum(len(b.targets) for b in make()) for name, make in env.splits.items()}
    assert sizes == {"train": 5, "val": 4, "test": 40}


def test_fewer_training_images_can_be_asked_for(npz: str) -> None:
    assert make_env(dataset="npz", **npz_kwargs(npz, train_size=4)).steps_per_epoch == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dataset": ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
    "dataset argument": (
        {"data": {"arguments": {"paths": "x"}}},
        r"data\.arguments\.paths: unknown key; did you mean 'path'?",
    ),
    "student": ({"student": "resnet9"}, "unknown student 'resnet9'; did you mean"),
    "keyword": ({"rewrad": "paper"}, "unknown keyword 'rewrad'; did you mean 'reward'"),
    "keyword of two": ({"arguments": {}}, r"arguments: several.* data=.* or student="),
    "field twice": ({"student": {"width": 1.0}}, "width: given twice, by itself and in student"),
    "other dataset": ({"data": "digits"}, "dataset: given twice, by itself and in data"),
    "list": ({"teachers": {"teachers": "resnet8"}}, "expected list, got 'resnet8'"),
    "seed": ({"seed": 3}, "unknown keyword 'seed'"),
    "part": (
        {"student": 3},
        r"student.network: expected a name, or a class of nn.Module .*, got 3",
    ),
    "env key": ({"env": {"rewrad": "x"}}, r"env\.rewrad: unknown key; did you mean 'reward'"),
    "env value": ({"reward": "papr"}, "env: unknown reward 'papr'; did you mean 'paper'"),
    "type": ({"alpha": "much"}, r"distillation\.alpha: expected float, got 'much'"),
    "optimizer": ({"optimizer": {"lrr": 1.0}}, r"optimizer\.lrr: unknown key; did you mean 'lr'"),
    "epochs": ({"epochs": 0}, r"optimizer\.epochs: expected at least 1, got 0"),
    "student argument": (
        {"student": {"arguments": {"chanels": 3}}},
        r"student\.arguments\.chanels: unknown key; did you mean 'channels'",
    ),
    "student's width twice": (
        {"student": {"arguments": {"width": 2}}},
        r"student\.arguments\.width: cannot be given here",
    ),
    "teacher argument": (
        {"teachers": [{"network": "resnet8", "arguments": {"chanels": 3}}]},
        r"teachers\.teachers\.0\.arguments\.chanels: unknown key; did you mean 'channels'",
    ),
    "precision": ({"precision": "half"}, "computing: unknown precision 'half'"),
    "coefficient": (
        {"logit": {"kd": -1.0}},
        r"distillation\.logit\.kd: expected a finite number >= 0, got -1.0",
    ),
    "device": ({"device": "cudda"}, "device: cannot use 'cudda'"),
    "device without numbers": ({"device": "meta"}, "device: .*'meta'"),
    "width": ({"width": -1.0}, "width: expected a finite number > 0, got -1.0"),
    "num_envs": ({"num_envs": 1000}, "expected 1 to 9, the number of images, found 1000"),
    "teacher key": (
        {"teachers": [{"network": "resnet8", "kid": "random"}]},
        r"teachers\.teachers\.0\.kid: unknown key; did you mean 'kind'",
    ),
    "no teachers": ({"teachers": []}, r"teachers\.teachers: expected at least one, got none"),
    "pool file": ({"teachers": "gone.yaml"}, r"gone\.yaml: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_used_are_named(case: str, npz: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        make_env(**({"dataset": "npz"} | npz_kwargs(npz, **changes)))


def options(**keywords: Any) -> dict[str, Any]:
    """The options that `make_env` makes of keywords."""
    given = sorted_keywords(keywords)
    return {part: build(kind, given.get(part), part) for part, kind in PARTS.items()}


def test_teachers_can_be_given_in_every_form() -> None:
    first, second = TeacherSpec("resnet8", seed=1), TeacherSpec("resnet14")

    def pool(**keywords: Any) -> Any:
        return options(**keywords)["teachers"]

    assert pool(teachers=["resnet14"]) == PoolSpec((second,))
    mixed = [{"network": "resnet8", "seed": 1}, "resnet14", TeacherSpec("resnet20")]
    assert pool(teachers=mixed).teachers == (first, second, TeacherSpec("resnet20"))
    whole: dict[str, Any] = {"teachers": ["resnet14"], "recipe": {"epochs": 2}}
    assert pool(teachers=whole).recipe == replace(PoolSpec().recipe, epochs=2)
    whole["store"] = {"place": "host"}
    assert pool(teachers=whole).store == StoreSpec("host")
    assert pool(teachers=PoolSpec((first,))) == PoolSpec((first,))
    assert pool() == PoolSpec()


def test_parts_can_be_objects_fields_or_names() -> None:
    expected = {
        "data": DataSpec("digits", batch_size=8, train_size=100),
        "student": StudentSpec("resnet14", width=0.5),
        "env": EnvSpec("alignment", episode="epoch"),
        "distillation": Distillation(alpha=2.0),
    }
    forms: list[dict[str, Any]] = [
        expected,
        {
            "data": {"train_size": 100, "batch_size": 8},
            "student": {"network": "resnet14", "width": 0.5},
            "env": {"reward": "alignment", "episode": "epoch"},
            "distillation": {"alpha": 2},
        },
        {
            "data": {"batch_size": 8},
            "train_size": 100,
            "student": "resnet14",
            "width": 0.5,
            "env": "alignment",
            "episode": "epoch",
            "alpha": 2.0,
        },
    ]
    for form in forms:
        found = options(**form)
        assert {part: found[part] for part in expected} == expected


def test_nothing_said_is_the_defaults_of_a_run() -> None:
    (config,) = parse_arguments([])
    found = options()
    assert {part: getattr(config, part) for part in PARTS if part != "computing"} == {
        part: found[part] for part in PARTS if part != "computing"
    }
    for name in field_names(PARTS["computing"]):
        assert getattr(config, name) == getattr(found["computing"], name)


def test_a_batch_of_one_image_is_warned_of_and_yields_to_a_batch_size(npz: str) -> None:
    given = {key: value for key, value in npz_kwargs(npz).items() if key != "num_envs"}
    with pytest.warns(UserWarning, match="num_envs: 1, which is what gymnasium.make_vec takes"):
        assert gymnasium.make_vec("MTKD/Npz-v0", **given).num_envs == 1
    assert gymnasium.make_vec("MTKD/Npz-v0", batch_size=5, **given).num_envs == 5


def test_render_modes_are_gymnasiums(npz: str) -> None:
    env = gymnasium.make_vec("MTKD/Npz-v0", render_mode="rgb_array", **npz_kwargs(npz))
    assert env.render_mode in env.metadata["render_modes"]
    with pytest.raises(ConfigError, match=r"unknown render mode 'human' \(known: rgb_array\)"):
        gymnasium.make_vec("MTKD/Npz-v0", render_mode="human", **npz_kwargs(npz))
