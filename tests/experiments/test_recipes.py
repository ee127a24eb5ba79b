"""The shipped recipes: the paper's experiments and specialists; a layer of the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.config import ExperimentConfig, parse_arguments, shipped_recipes
from mtkd_env.errors import ConfigError
from mtkd_env.networks import build_network
from mtkd_env.networks.libraries import LIBRARIES
from mtkd_env.optimization import Recipe
from tiny import seldom

RECIPES = sorted(shipped_recipes())
CIFAR = [name for name in RECIPES if name.startswith("cifar100_")]
CNN = ["imagenet_resnet18", "imagenet_resnet34"]
# Keys whose defaults are chosen for the digits.
OF_THE_DIGITS = {
    "data": {"dataset", "batch_size"},
    "teachers": {"teachers", "recipe", "batch_size"},
    "student": {"network", "width"},
    "optimizer": {"epochs", "lr"},
}
SPECIALISTS = [name for name in RECIPES if name.startswith("specialists_")]
PAPERS = sorted({*RECIPES} - {*SPECIALISTS})
VIT = ["imagenet_cait_xxs24", "imagenet_deit_tiny"]


def parse(*flags: str) -> ExperimentConfig:
    (config,) = parse_arguments(flags)
    return config


# What is shipped.


def test_the_papers_students_are_shipped() -> None:
    assert {name: parse("--recipe", name).student.network for name in PAPERS} == {
        "cifar100_mobilenetv2": "mobilenetv2",
        "cifar100_regnetx_200mf": "regnetx_200mf",
        "cifar100_resnet56": "resnet56",
        "cifar100_shufflenetv2": "shufflenetv2",
        "imagenet_cait_xxs24": "timm:cait_xxs24_224",
        "imagenet_deit_tiny": "timm:deit_tiny_patch16_224",
        "imagenet_resnet18": "torchvision:resnet18",
        "imagenet_resnet34": "torchvision:resnet34",
    }


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_name_what_exists(name: str) -> None:
    config = parse("--recipe", name, "--algo", "pg")
    for teacher in config.teachers.teachers:
        library, colon, model = teacher.network.partition(":")
        known = LIBRARIES[library].weight_names(model) if colon else [None]
        assert teacher.checkpoint in known
        assert teacher.kind == "trained"
        assert teacher.width == 1
    assert config.student.width == 1
    loss = config.distillation
    assert (loss.alpha, loss.beta, loss.temperature) == (1, 5, 4)
    assert (loss.logit, loss.feature) == ("kd", "mse")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_nothing_that_matters_from_the_digits(name: str) -> None:
    content = yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8"))
    for section, keys in OF_THE_DIGITS.items():
        assert keys <= set(content[section]), section
    # Nesterov's momentum is the only key of the teachers' training that adamw has no use for.
    missing = {"epochs", "lr", "weight_decay", "nesterov"} - set(content["teachers"]["recipe"])
    assert missing <= ({"nesterov"} if name in VIT else set())


@pytest.mark.parametrize("name", SPECIALISTS)
def test_specialists_each_know_a_part_and_labels_are_few(name: str) -> None:
    config = parse("--recipe", name)
    assert all(t.images and (t.skew or t.trained_on) for t in config.teachers.teachers)
    assert config.data.labelled is not None
    assert config.data.train_size is not None
    assert config.data.labelled < config.data.train_size / 8
    # As in the study: no feature term, and no label of a sample is asked for.
    assert (config.distillation.beta, config.distillation.feature) == (0, "none")


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipes_are_the_papers(name: str) -> None:
    config = parse("--recipe", name)
    milestones = (150 / 240, 180 / 240, 210 / 240)
    common: dict[str, Any] = {"epochs": 240, "lr": 0.05, "momentum": 0.9, "decay": 0.1}
    common["milestones"] = milestones
    assert config.optimizer == Recipe(**common, weight_decay=1e-4, nesterov=True)
    assert config.teachers.recipe == Recipe(**common, weight_decay=5e-4, nesterov=False)
    assert (config.data.dataset, config.data.batch_size) == ("cifar100", 64)
    assert config.teachers.batch_size == 64
    assert [teacher.network for teacher in config.teachers.teachers] == [
        "regnety_400mf",
        "regnetx_400mf",
        "resnet32x4",
        "wrn_28_4",
    ]


@pytest.mark.parametrize("name", CNN)
def test_recipes_of_imagenets_convolutional_networks_are_the_papers(name: str) -> None:
    config = parse("--recipe", name)
    assert config.optimizer == config.teachers.recipe
    assert config.optimizer == Recipe(
        epochs=100,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=False,
        milestones=(0.3, 0.6, 0.9),
    )
    assert (config.data.dataset, config.data.batch_size) == ("imagenet", 256)
    assert (config.data.mixup, config.data.cutmix) == (0, 0)
    assert config.data.arguments == {"image_size": 224, "resize": 256}
    assert config.data.augmentation == "standard"
    pool = {teacher.network: teacher.checkpoint for teacher in config.teachers.teachers}
    assert pool == {
        "torchvision:resnet50": "IMAGENET1K_V1",
        "torchvision:resnet101": "IMAGENET1K_V1",
        "torchvision:wide_resnet50_2": "IMAGENET1K_V1",
        "torchvision:resnext50_32x4d": "IMAGENET1K_V1",
    }


@pytest.mark.parametrize("name", VIT)
def test_recipes_of_transformers_are_deits(name: str) -> None:
    config = parse("--recipe", name)
    found = config.optimizer
    assert (found.optimizer, found.lr, found.betas) == ("adamw", 1e-3, (0.9, 0.999))
    assert (found.weight_decay, found.decay_norm_and_bias) == (0.05, False)
    assert (found.epochs, found.schedule, found.min_lr) == (300, "cosine", 1e-5)
    assert (found.warmup_epochs, found.warmup_lr) == (5, 1e-6)
    assert (found.label_smoothing, found.clip_norm) == (0.1, None)
    assert (config.data.dataset, config.data.batch_size) == ("imagenet", 1024)
    assert (config.data.mixup, config.data.cutmix) == (0.8, 1.0)
    assert config.data.arguments == {
        "image_size": 224,
        "resize": 256,
        "interpolation": "bicubic",
        "repeats": 3,
    }
    assert config.data.augmentation == "deit"
    assert config.student.arguments == {"drop_path_rate": 0.1}
    pool = {teacher.network: teacher.checkpoint for teacher in config.teachers.teachers}
    assert pool == {
        "timm:cait_s24_224": "fb_dist_in1k",
        "timm:deit_small_patch16_224": "fb_in1k",
        "timm:deit_base_patch16_224": "fb_in1k",
    }


@pytest.mark.parametrize("name", VIT)
def test_transformers_decay_neither_tokens_nor_norms(name: str) -> None:
    config = parse("--recipe", name)
    with torch.device("meta"):
        network = build_network(config.student.network, num_classes=10, **config.student.arguments)
    optimizer, _ = config.optimizer.build(network, 1)
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    decayed, spared = (
        {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight"} <= spared
    assert {"model.patch_embed.proj.weight", "model.head.weight"} <= decayed
    assert decayed | spared == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_arguments_of_the_student_reach_the_network() -> None:
    def drops(**arguments: float) -> set[float]:
        with torch.device("meta"):
            network = build_network("timm:deit_tiny_patch16_224", num_classes=10, **arguments)
        return {m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"}

    assert max(drops(drop_path_rate=0.1)) == pytest.approx(0.1)
    assert not drops()


# A layer of the configuration.


def test_fewer_epochs_keep_the_shape_of_the_schedule() -> None:
    config = parse("--recipe", "cifar100_resnet56", "--epochs", "24")
    assert config.optimizer.epochs == 24
    falls = [epoch for epoch in range(1, 25) if share(config, epoch) < share(config, epoch - 1)]
    assert falls == [15, 18, 21]
    assert share(config, 24) == pytest.approx(1e-3)
    # The teachers' training is their own.
    assert config.teachers.recipe.epochs == 240


def share(config: ExperimentConfig, epoch: int) -> float:
    return config.optimizer.share(float(epoch))


@pytest.mark.parametrize(
    "flags", [["--epochs", "7"], ["--epochs=7"], ["--optimizer.epochs", "7"]], ids=str
)
def test_epochs_are_those_of_the_student(flags: list[str]) -> None:
    assert parse(*flags) == parse("--optimizer.epochs", "7")
    assert parse(*flags).optimizer.epochs == 7


def test_a_warm_up_has_to_fit_into_fewer_epochs() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.warmup_epochs: expected 0 to epochs = 2"):
        parse("--recipe", "imagenet_deit_tiny", "--epochs", "2")
    flags = ["--epochs", "2", "--optimizer.warmup_epochs", "0.1"]
    assert parse("--recipe", "imagenet_deit_tiny", *flags).optimizer.warmup_epochs == 0.1


def test_recipes_lie_between_the_default_and_the_method(tmp_path: Path) -> None:
    recipe, later = tmp_path / "own.yaml", tmp_path / "later.yaml"
    recipe.write_text("optimizer: {lr: 0.3, epochs: 9}\nwarmup: {weights: uniform, epochs: 2}\n")
    later.write_text("optimizer: {epochs: 8}\n")
    flags = ["--recipe", str(recipe), "--algo", "reference"]
    config = parse(*flags)
    assert parse("--algo", "reference").optimizer.lr == 0.05
    assert (config.optimizer.lr, config.optimizer.epochs) == (0.3, 9)
    assert (config.warmup.weights, config.warmup.epochs) == ("ones", 2)
    assert parse(*flags, "--config", str(later)).optimizer.epochs == 8
    assert parse(*flags, "--config", str(later), "--epochs", "7").optimizer.epochs == 7


def test_flags_change_single_arguments_of_a_recipes_data() -> None:
    config = parse("--recipe", "imagenet_resnet18", "--data.arguments.root", "there")
    assert config.data.arguments["root"] == str(Path("there").absolute())
    assert config.data.arguments["resize"] == 256


@pytest.mark.parametrize("name", seldom(RECIPES, {"cifar100_resnet56", "imagenet_deit_tiny"}))
def test_written_configurations_remember_their_recipe(name: str, tmp_path: Path) -> None:
    config = parse("--recipe", name, "--algo", "pg", "--epochs", "30", "--precision", "bf16")
    assert config.recipe == name
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert parse("--config", str(path)) == config


def test_files_may_name_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("recipe: cifar100_resnet56\nseed: 3\n", encoding="utf-8")
    assert parse("--config", str(path)) == parse("--recipe", "cifar100_resnet56", "--seed", "3")
    other = parse("--config", str(path), "--recipe", "cifar100_mobilenetv2")
    assert other.student.network == "mobilenetv2"


def test_the_digest_does_not_depend_on_what_a_recipe_is_called(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(shipped_recipes()["cifar100_resnet56"].read_bytes())
    named, own = parse("--recipe", "cifar100_resnet56"), parse("--recipe", str(path))
    assert named.recipe != own.recipe
    assert named.digest == own.digest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--recipe cifar100_resnt56",
            "unknown recipe 'cifar100_resnt56'; did you mean 'cifar100",
        ),
        ("--recipe no/such.yaml", "--recipe: no/such.yaml: No such file or directory"),
        ("--recipe", "--recipe: expected a value"),
        ("--epochs", "--epochs: expected a value"),
        ("--teachers.recipe.lr -1", "teachers.recipe.lr: expected a finite number >= 0, got -1.0"),
        ("--optimizer.optimizer adm", "optimizer: unknown optimizer 'adm'; did you mean 'adam'?"),
        ("--precision fp8", "unknown precision 'fp8'; did you mean 'fp32'?"),
    ],
)
def test_mistakes_name_the_flag(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*flags.split())
    assert message in str(error.value)


def test_help_shows_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--recipe", "imagenet_deit_tiny", "--help")
    shown = capsys.readouterr().out
    for text in (*RECIPES, "--recipe", "--epochs", "--precision"):
        assert text in shown
    assert "default: adamw" in shown
