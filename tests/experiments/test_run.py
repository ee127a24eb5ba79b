import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import stable_baselines3
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from experiments import experiment, run
from experiments.config import parse_arguments
from experiments.experiment import make_folder, prepare_device
from experiments.gallery import read_gallery
from experiments.running.log import read_rows
from experiments.training import BestStudent
from mtkd_env import load_student
from mtkd_env.agent_file import load_agent
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import evaluate
from mtkd_env.files import load_checkpoint
from mtkd_env.networks import build_network
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.teachers import TrainingSet
from run_folders import comparable
from sketches import pictures
from tiny import load_dataset, seldom

EPOCHS, STEPS = 3, 4
TEACHERS = ("resnet8", "wrn_16_1")

LIBRARY = ("ppo", "a2c", "ddpg", "td3", "sac", "trpo")
ALGOS = (
    "pg",
    "reinforce",
    "dpg",
    *LIBRARY,
    "aver",
    "mmkd",
    "none",
    "oracle",
    "uniform",
    "reference",
)
OWN = ("pg", "reinforce", "dpg", "reference")
LEARNED = {"agent.safetensors", "agent.json"}

Run = SimpleNamespace
Start = Callable[..., int]


@pytest.fixture
def start(small: str, tmp_path: Path) -> Start:
    """Starts the main program with a small configuration and runs in `tmp_path`."""
    return lambda *flags: run.main(["--config", small, "--output", str(tmp_path), *flags])


def folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


# Every method.


@pytest.fixture(
    scope="module", params=seldom(ALGOS, {"pg", "ppo", "none", "aver", "mmkd", "oracle"})
)
def done(request: pytest.FixtureRequest, small: str, tmp_path_factory: Any) -> Run:
    """A run that has ended, one of every method."""
    algo = request.param
    if algo == "trpo":
        pytest.importorskip("sb3_contrib")
    parent = tmp_path_factory.mktemp(algo)
    flags = ["--config", small, "--algo", algo, "--output", str(parent)]
    with pictures() if algo == "pg" else nullcontext():
        code = run.main(flags)
    (folder,) = folders(parent)
    return Run(algo=algo, code=code, folder=folder, rows=read_rows(folder), flags=flags)


class TestEveryMethod:
    def test_ends_well(self, done: Run) -> None:
        assert done.code == 0
        assert re.fullmatch(rf"digits_{done.algo}_seed0_\d{{8}}-\d{{6}}", done.folder.name)

    def test_leaves_a_complete_folder(self, done: Run) -> None:
        agent = {"agent.pt" if done.algo == "mmkd" else "agent.txt"}
        if done.algo in (*OWN, *LIBRARY):
            agent = LEARNED | ({"agent.zip"} if done.algo in LIBRARY else set())
        expected = {"config.yaml", "metrics.jsonl", "result.json", "curves.png"}
        expected |= {"student.safetensors", "student.json", "breakdown.jsonl", "gallery.npz"}
        expected |= {"classes.png"}
        assert {path.name for path in done.folder.iterdir()} == expected | agent | {"tensorboard"}
        assert all(path.stat().st_size > 0 for path in done.folder.iterdir())

    def test_draws_all_its_epochs(self, done: Run) -> None:
        path = done.folder / "curves.png"
        if done.algo == "pg":
            assert matplotlib.image.imread(path).ndim == 3
        else:
            title = f"{done.algo} on digits: resnet8, seed 0"
            assert path.read_bytes().endswith(f"{title}: {EPOCHS}".encode())

    def test_has_a_row_for_every_epoch(self, done: Run) -> None:
        assert [row["epoch"] for row in done.rows] == [1, 2, 3]
        assert all(0 <= row["test/accuracy"] <= 1 for row in done.rows)
        assert not any(name.startswith("train/") for name in done.rows[0])
        for row in done.rows:
            for head in ("logit", "feature"):
                shares = [row[f"weights/{head}/{name}"] for name in TEACHERS]
                in_warmup = done.algo == "reference" and row["epoch"] == 1
                assert sum(shares) == pytest.approx(2 if in_warmup else 1, abs=1e-4)

    def test_breaks_its_mean_weights_down(self, done: Run) -> None:
        breakdowns = read_rows(done.folder, "breakdown.jsonl")
        assert [each["epoch"] for each in breakdowns] == [1, 2, 3]
        for row, each in zip(done.rows, breakdowns, strict=True):
            assert each["teachers"] == list(TEACHERS)
            images = sum(each["class"]["count"])
            assert images == STEPS * 16
            for m, name in enumerate(TEACHERS):
                assert each["right"]["count"][m] + each["wrong"]["count"][m] == images
                parts = [
                    (n, w[m])
                    for n, w in zip(each["class"]["count"], each["class"]["logit"], strict=True)
                ]
                mean = sum(n * weight for n, weight in parts if n) / images
                assert mean == pytest.approx(row[f"weights/logit/{name}"], abs=1e-5)

    def test_keeps_images_with_their_weights(self, done: Run) -> None:
        found = read_gallery(done.folder)
        assert found is not None
        assert found.images.shape == (16, 1, 8, 8)
        data = load_dataset("digits")
        assert found.images.tolist() == data.x_train[found.index].tolist()
        assert found.targets.tolist() == data.y_train[found.index].tolist()
        assert found.logit.shape == found.correct.shape == (16, len(TEACHERS))

    def test_gives_a_result_that_agrees_with_its_rows(self, done: Run) -> None:
        result, last = result_of(done.folder), done.rows[-1]
        assert (result["algo"], result["dataset"], result["student"], result["seed"]) == (
            done.algo,
            "digits",
            "resnet8",
            0,
        )
        assert result["epochs"] == EPOCHS
        assert result["last"] == last["test/accuracy"]
        accuracies = [row["test/accuracy"] for row in done.rows]
        assert result["best"] == max(accuracies)
        assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
        assert result["score"] == last["score"]
        assert result["score_logit"] == last["score/logit"]
        assert result["score_feature"] == last["score/feature"]
        for name in TEACHERS:
            shares = [last[f"weights/{head}/{name}"] for head in ("logit", "feature")]
            assert result["weights"][name] == pytest.approx(sum(shares) / 2)
            assert 0 <= result["teachers"][name] <= 1
            assert len(result["digests"][name]) == 64
        assert result["folder"] == str(done.folder)
        assert result["seconds"] >= sum(row["seconds"] for row in done.rows)
        assert result["versions"]["torch"] == torch.__version__

    def test_writes_the_configuration_that_was_in_force(self, done: Run) -> None:
        text = (done.folder / "config.yaml").read_text(encoding="utf-8")
        (config,) = parse_arguments(done.flags)
        assert text == config.to_yaml()

    def test_keeps_the_student_that_was_evaluated(self, done: Run) -> None:
        student = small_student()
        student.load_state_dict(load_checkpoint(done.folder / "student.safetensors"))
        data = load_dataset("digits")
        found = evaluate(student, data.evaluation_batches(data.split().test, 64, device="cpu"))
        assert found.accuracy == result_of(done.folder)["last"]

    def test_keeps_an_agent_that_can_be_read(self, done: Run) -> None:
        if done.algo in (*OWN, *LIBRARY):
            found = load_agent(done.folder)
            assert found.part("policy")
            standardised = set() if done.algo == "reference" else {"count", "mean", "squares"}
            assert found.part("normalizer").keys() == standardised
            assert found.notes["dataset"] == "digits"
        if done.algo == "mmkd":
            found = load_checkpoint(done.folder / "agent.pt")
            assert found.keys() >= {"optimizer", "meta", "buffer"}
        elif done.algo in LIBRARY and done.algo != "trpo":
            algorithm = getattr(stable_baselines3, done.algo.upper())
            model = algorithm.load(done.folder / "agent.zip", device="cpu")
            assert model.num_timesteps == (EPOCHS - 1) * STEPS * 16
        elif done.algo not in (*OWN, *LIBRARY):
            assert "nothing was learned" in (done.folder / "agent.txt").read_text()

    def test_logs_to_tensorboard(self, done: Run) -> None:
        events = EventAccumulator(str(done.folder / "tensorboard")).Reload()
        assert set(done.rows[-1]) <= set(events.Tags()["scalars"])
        found = [event.value for event in events.Scalars("test/accuracy")]
        assert found == pytest.approx([row["test/accuracy"] for row in done.rows])
        agents = list((done.folder / "tensorboard").glob("agent/*"))
        assert bool(agents) == (done.algo in LIBRARY)

    def test_without_distillation_is_training_by_cross_entropy_alone(self, done: Run) -> None:
        if done.algo == "none":
            assert all(row["loss/total"] == row["loss/cross_entropy"] for row in done.rows)
            found = load_checkpoint(done.folder / "student.safetensors")
            for name, tensor in by_cross_entropy_alone(EPOCHS).items():
                torch.testing.assert_close(found[name], tensor, msg=name)

    def test_starts_with_the_same_warm_up(self, done: Run) -> None:
        # Where the loss is the same; so every method continues with the same student.
        first = done.rows[0]
        if done.algo == "none":
            assert first["loss/total"] == first["loss/cross_entropy"]
        elif done.algo == "reference":
            assert first["weights/logit/resnet8"] == pytest.approx(1)
        else:
            assert first["weights/logit/resnet8"] == pytest.approx(1 / 2)
            assert first["test/cross_entropy"] == pytest.approx(
                WARMED_UP.setdefault("cross_entropy", first["test/cross_entropy"]), abs=0
            )


# The first method's, for all others to compare with.
WARMED_UP: dict[str, float] = {}


# What particular methods are.


def small_student(seed: int = 0) -> Network:
    with seeded(seed):
        return build_network("resnet8", num_classes=10, in_channels=1, width=0.125)


def by_cross_entropy_alone(epochs: int) -> dict[str, Tensor]:
    """A student that has never heard of teachers, trained by a loop of its own."""
    data = load_dataset("digits")
    images = TrainingSet(data, data.split(train_size=64))
    stream = images.stream(16, torch.device("cpu"), derive_seed(0, "data"))
    student = small_student(derive_seed(0, "student")).train()
    # The run's reset(seed=0) draws the same seeds anew.
    optimizer, schedule = Recipe(epochs=epochs).build(student, STEPS)
    for _ in range(epochs * STEPS):
        batch = next(stream)
        loss = torch.nn.functional.cross_entropy(student(batch.inputs).logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.state_dict()


# Repetition.


@pytest.mark.parametrize("algo", seldom(["pg", "ppo", "sac"], {"pg"}))
def test_a_run_is_repeated_by_its_own_configuration(
    algo: str, start: Start, tmp_path: Path
) -> None:
    assert start("--algo", algo, "--seed", "3", "--optimizer.epochs", "2") == 0
    (first,) = folders(tmp_path)
    # Whatever other runs have drawn in the meantime.
    torch.rand(7)
    assert run.main(["--config", str(first / "config.yaml")]) == 0
    second = next(folder for folder in folders(tmp_path) if folder != first)
    assert comparable(first) == comparable(second)
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()
    students = [load_checkpoint(folder / "student.safetensors") for folder in (first, second)]
    assert all(tensor.equal(students[1][name]) for name, tensor in students[0].items())


def test_another_seed_is_another_run(start: Start, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert start("--algo", "aver", "--seed", seed, "--optimizer.epochs", "1") == 0
    first, second = (comparable(folder) for folder in folders(tmp_path))
    assert first[0]["test/cross_entropy"] != second[0]["test/cross_entropy"]


def test_the_seed_is_the_agents_too(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    seeds: list[int] = []
    build = experiment.build_agent

    def spy(*args: Any, seed: int, **kwargs: Any) -> Any:
        seeds.append(seed)
        return build(*args, seed=seed, **kwargs)

    monkeypatch.setattr(experiment, "build_agent", spy)
    assert start("--algo", "uniform", "--seed", "5", "--optimizer.epochs", "1") == 0
    assert seeds == [5]


def test_several_methods_run_side_by_side(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--algo", "uniform,aver", "--optimizer.epochs", "1") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    # One table of both, in the order of the flag.
    (table,) = shown.out.split("Students")[1:]
    methods = [line.split()[0] for line in table.splitlines() if "%" in line]
    assert methods == ["uniform", "aver"]
    assert len(folders(tmp_path)) == 2
    for folder in folders(tmp_path):
        assert str(folder) in shown.out


@pytest.mark.parametrize("flags", [["--warmup.epochs", "0"], ["--warmup.epochs", "2"]], ids=str)
def test_warm_ups_of_any_length(flags: list[str], start: Start, tmp_path: Path) -> None:
    assert start("--algo", "pg", "--optimizer.epochs", "2", *flags) == 0
    (folder,) = folders(tmp_path)
    rows = read_rows(folder)
    warm = int(flags[1])
    # Fused weights have parts.
    assert ["entropy/generator/logit" in row for row in rows] == [False] * warm + [True] * (
        2 - warm
    )


# Mistakes.


def test_numbers_that_explode_are_told_in_one_line(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--algo", "aver", "--optimizer.lr", "1e9") == 2
    shown = capsys.readouterr().err
    assert re.match(
        r"error: loss/.*total.* became NaN or infinite in step \d \(of steps 1 to 4,", shown
    )
    assert re.search(r"the first\) for sample \d+, .* of 16 samples; ", shown)
    assert "optimizer.lr" in shown
    assert shown.count("\n") == 1
    (folder,) = folders(tmp_path)
    # Unfinished, and to be seen as such.
    assert not (folder / "result.json").exists()


def test_an_interrupted_run_says_so(
    monkeypatch: pytest.MonkeyPatch, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_experiment", interrupted)
    assert start("--algo", "pg") == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


def test_flags_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--algo", "nope"])
    assert run.main() == 2
    assert "nope" in capsys.readouterr().err


# Folders and devices.


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    (config,) = parse_arguments(["--algo", "stable_baselines3:PPO", "--output", str(tmp_path)])
    made = {make_folder(config) for _ in range(3)}
    assert len(made) == 3
    assert all("digits_stable_baselines3_PPO_seed0_" in folder.name for folder in made)


def test_run_of_objects_in_files_is_called_by_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from sklearn.datasets import load_digits\n"
        "from mtkd_env import TeacherWeights\n"
        "def images():\n    return list(load_digits().images)\n"
        "def rule(state):\n    return TeacherWeights.uniform(state.divergence)\n"
    )
    file = tmp_path / "mine.py"
    flags = ["--data.dataset", f"{file}:images", "--algo", f"{file}:rule"]
    (config,) = parse_arguments([*flags, "--output", str(tmp_path)])
    assert make_folder(config).name.startswith("mine_images_mine_rule_seed0_")


def test_a_gpu_is_taken_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert prepare_device(*parse_arguments(["--device", "auto"])).type == expected
    assert prepare_device(*parse_arguments(["--device", "cpu"])).type == "cpu"


@pytest.fixture
def any_algorithm() -> Iterator[None]:
    """Afterwards operations need not be deterministic again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("any_algorithm")
@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_a_gpu_computes_deterministically_if_told(device: str, expected: bool) -> None:
    prepare_device(*parse_arguments(["--device", device, "--deterministic", "true"]))
    assert torch.are_deterministic_algorithms_enabled() == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("any_algorithm")
@pytest.mark.parametrize("algo", seldom(ALGOS, {"pg", "ppo", "mmkd"}))
def test_a_run_on_a_gpu_is_repeated_to_the_bit(algo: str, start: Start, tmp_path: Path) -> None:
    for _ in range(2):
        assert start("--algo", algo, "--device", "cuda", "--deterministic", "true") == 0
    first, second = ((one / "student.safetensors").read_bytes() for one in folders(tmp_path))
    assert first == second


def test_the_digits_take_one_thread_unless_told_otherwise() -> None:
    try:
        prepare_device(*parse_arguments(["--threads", "2"]))
        assert torch.get_num_threads() == 2
        prepare_device(*parse_arguments([]))
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        prepare_device(*parse_arguments(["--data.dataset", "cifar10"]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", ""])
def test_devices_that_do_not_exist_are_named(name: str) -> None:
    (config,) = parse_arguments([])
    with pytest.raises(ConfigError, match=f"device: cannot use '{name}'") as error:
        prepare_device(replace(config, device=name))
    assert "\n" not in str(error.value)


# Validation images.


def test_validation_images_choose_the_best_epoch_and_its_student_is_kept(
    start: Start, tmp_path: Path
) -> None:
    assert start("--algo", "aver", "--data.val_fraction", "0.2", "--optimizer.epochs", "5") == 0
    (folder,) = folders(tmp_path)
    rows, result = read_rows(folder), result_of(folder)
    best = max(rows, key=lambda row: row["val/accuracy"])
    assert (result["best"], result["best_epoch"]) == (best["test/accuracy"], best["epoch"])
    assert result["last"] == rows[-1]["test/accuracy"]
    assert result["validation"] == {
        "last": rows[-1]["val/accuracy"],
        "best": best["val/accuracy"],
    }
    data = load_dataset("digits")
    splits = data.split(0.2)
    for which, row in (("last", rows[-1]), ("best", best), (None, best)):
        student = load_student(folder, which)
        assert student.about.metrics["epoch"] == row["epoch"]
        for name, split in (("val", splits.val), ("test", splits.test)):
            assert split is not None
            batches = data.evaluation_batches(split, 64, device="cpu")
            found = evaluate(student.network, batches).accuracy
            assert found == row[f"{name}/accuracy"] == student.about.metrics[f"{name}/accuracy"]


def test_the_first_of_several_best_students_is_kept_through_a_checkpoint() -> None:
    module = torch.nn.Linear(1, 1)
    best = BestStudent()
    for epoch, accuracy in enumerate([0.25, 0.5, 0.5, 0.25], start=1):
        torch.nn.init.constant_(module.weight, epoch)
        best.see({"epoch": epoch, "val/accuracy": accuracy}, module)
    again = BestStudent()
    again.load_state_dict(best.state_dict())
    assert again.row is not None
    assert (again.row["epoch"], float(again.tensors["weight"])) == (2, 2)
    again.see({"epoch": 5, "test/accuracy": 1.0}, module)
    assert again.row["epoch"] == 2
