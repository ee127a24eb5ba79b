"""Trains the network of a `Task` from its beginning, or from a checkpoint, to its end."""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.amp import GradScaler
from torchvision.utils import make_grid

import mtkd_env
from agents.isolation import Isolation
from experiments.config import CheckpointConfig
from experiments.console import console
from experiments.running.checkpoint import Checkpoints, Timetable
from experiments.running.finite import check_module
from experiments.running.lock import RunLock
from experiments.running.log import MetricsLog, RowsAlone
from experiments.running.signals import Stopped, StopRequest
from experiments.training import AGREEMENT
from experiments.transfer.progress import EVALUATED, LOSS, TaskProgress, metrics_of
from experiments.transfer.schedule import Schedule
from experiments.transfer.task import Task
from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import save_checkpoint, write_atomically, write_text
from mtkd_env.optimization import Recipe
from mtkd_env.precision import FULL, autocast, check_precision, widen
from mtkd_env.seeding import derive_seed

__all__ = ["ROWS", "Schedule", "Task", "read_metrics", "run_task"]

ROWS = "metrics.jsonl"

# Steps between two rows within an epoch, for which the host has to wait for the device.
WINDOW = 100

# Images of which predictions are shown, and how many of them side by side.
PICTURES, PICTURES_A_ROW = 8, 2

HINT = "a lower schedule.lr, a longer warm-up or schedule.clip may help"


def run_task(
    task: Task,
    schedule: Schedule,
    folder: Path,
    *,
    resume: bool = False,
    evaluate_every: int = 1,
    device: torch.device,
    precision: str = FULL,
    seed: int = 0,
    out: Console | None = None,
) -> dict[str, float]:
    """Trains a task's network to the end and writes everything into the run's folder.

    The folder gets `metrics.jsonl`, TensorBoard events, `predictions.png`, `model.pt` and
    `result.json`, which is written last, and while it lasts `checkpoints`. Of several processes
    only process 0 writes.

    Args:
        task: The task; its network is moved to the device.
        schedule: How it is trained.
        folder: The run's folder, which may be there but hold no other run.
        resume: Whether it may hold this run: a finished one is not done again, an unfinished one
            goes on from its last checkpoint, on a CPU with the numbers that it would have had
            without the interruption.
        evaluate_every: Epochs between two evaluations; there is one at the end in any case, and no
            other with 0.
        device: Where to compute.
        precision: fp32, bf16 or fp16.
        seed: Seed of whatever in a training step draws from torch's global generator.
        out: Where the progress is shown; by default the program's console.

    Returns:
        The metrics at the end.

    Raises:
        ConfigError: A folder that holds another run or is in use, or a value that cannot be used.
        FloatingPointError: A loss or a tensor of the network became NaN or infinite.
        Stopped: A signal came; there is a checkpoint to go on from.
        OSError: Something cannot be written; as after a crash, the run can be gone on with.
    """
    check_precision(precision, device)
    recipe = schedule.recipe(task.steps_per_epoch)
    identity = {
        "schedule": asdict(schedule),
        "seed": seed,
        "number of steps in an epoch": task.steps_per_epoch,
        "number of processes": distributed.processes(),
        "device": device.type,
        "precision": precision,
    }
    with ExitStack() as held:
        found = _found(folder, held, resume=resume) if distributed.rank() == 0 else None
        metrics, state = distributed.agree(found) or (None, None)
        if metrics is not None:
            return metrics
        if state is not None:
            _check_same(identity, state["identity"])
        held.enter_context(Isolation()())
        held.enter_context(_way_back(task.program, folder))
        training = _Training(
            task,
            recipe,
            held.enter_context(_opened_log(folder, state)),
            TaskProgress(out or console(quiet=distributed.rank() != 0)),
            device=device,
            precision=precision,
            seed=seed,
            evaluate_every=evaluate_every,
            identity=identity,
        )
        if state is not None:
            training.load_state_dict(state["training"])
        return training.run()


def _found(
    folder: Path, held: ExitStack, *, resume: bool
) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
    """The metrics of a finished run, or the checkpoint of an unfinished one; locks the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(RunLock(folder))
    if not resume and (folder / ROWS).exists():
        raise ConfigError(f"output: {folder} holds a run already; --resume goes on with it")
    checkpoints = Checkpoints(folder)
    if (metrics := read_metrics(folder)) is not None:
        checkpoints.clear()
        return metrics, None
    state = checkpoints.load()
    if state is None:
        (folder / ROWS).unlink(missing_ok=True)
    return None, state


def read_metrics(folder: Path) -> dict[str, float] | None:
    """The metrics at the end of a finished run; none of an unfinished one."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        metrics: dict[str, float] = result["metrics"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
        return None
    return metrics


def _check_same(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Checks that a checkpoint is of the same training."""
    for name, expected in own.items():
        if (found := theirs[name]) != expected:
            raise ConfigError(
                f"resume: the checkpoint is of another {name}: expected {expected}, found {found}"
            )


@contextmanager
def _way_back(program: str, folder: Path) -> Iterator[None]:
    """Adds to what breaks a run, other than its own numbers, how to go on with it."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except Exception as error:
        error.add_note(f"to go on: {program} --resume {folder}")
        raise


def _opened_log(folder: Path, state: Mapping[str, Any] | None) -> MetricsLog:
    """The log of a run, from its beginning or from a checkpoint."""
    if distributed.rank() != 0:
        return RowsAlone(folder, distributed.agree([]))
    log = MetricsLog(folder, state and state["training"]["log"], lines=(ROWS,), clock="step")
    distributed.agree(log.rows)
    return log


class _Training:
    """The training of a task's network.

    Args:
        task: The task.
        recipe: How its network is trained, with steps in place of epochs.
        log: The run's log, as far as it is written.
        progress: What is told how it goes.
        device: Where to compute.
        precision: fp32, bf16 or fp16.
        seed: Seed of the steps.
        evaluate_every: Epochs between two evaluations, or 0.
        identity: What a checkpoint and the result say of the training.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        log: MetricsLog,
        progress: TaskProgress,
        *,
        device: torch.device,
        precision: str,
        seed: int,
        evaluate_every: int,
        identity: Mapping[str, Any],
    ) -> None:
        self._task = task
        self._recipe = recipe
        self._log = log
        self._progress = progress
        self._device = device
        self._precision = precision
        self._seed = seed
        self._evaluate_every = evaluate_every
        self._identity = dict(identity)
        self._model = distributed.synchronize_norms(task.model.to(device))
        _make_equal(self._model)
        self._optimizer, self._rates = recipe.build(self._model, steps_per_epoch=1)
        self._scaler = GradScaler(device.type, enabled=precision == "fp16")
        self._step = 0
        # Names of the loss's terms, and their values in every step since the last row.
        self._terms: list[str] = []
        self._window: list[Tensor] = []
        self._stop = StopRequest()
        self._checkpoints = Checkpoints(log.folder)
        self._timetable = Timetable(CheckpointConfig(), epochs=0)
        self._saved: int | None = None
        self._agreed = 0
        self._began = time.perf_counter()

    @property
    def _seconds(self) -> float:
        """Seconds of training, without those between an interruption and going on."""
        return time.perf_counter() - self._began

    @property
    def _epoch(self) -> int:
        """Epochs that are over."""
        return self._step // self._task.steps_per_epoch

    def run(self) -> dict[str, float]:
        """Trains to the end, writes what is left of the run, and gives the metrics."""
        self._model.train()
        try:
            with self._stop, self._progress.training(self._step, self._recipe.epochs):
                while self._step < self._recipe.epochs:
                    self._train_epoch()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}{self._checkpoint_before()}") from error
        return self._finish()

    def _checkpoint_before(self) -> str:
        if self._saved is None:
            return ""
        return f"; there is a checkpoint from before it, after step {self._saved}"

    def _train_epoch(self) -> None:
        """What is left of the epoch, or of the training if that ends before."""
        for batch in self._batches():
            self._train_step(batch)
            self._progress.step()
            if self._row_is_due():
                self._write_row()
            self._at_rest()

    def _batches(self) -> Iterator[Any]:
        """The epoch's batches that are still to be trained on."""
        length = self._task.steps_per_epoch
        end = min((self._epoch + 1) * length, self._recipe.epochs)
        batches = self._task.batches(self._epoch, begin=self._step % length)
        for step in range(self._step, end):
            # Every step draws numbers of its own, so that no generator's state has to be kept.
            purpose = f"step {step} of process {distributed.rank()}"
            torch.manual_seed(derive_seed(self._seed, purpose))
            yield next(batches)

    def _train_step(self, batch: Any) -> None:
        with autocast(self._precision, self._device):
            named = self._task.losses(batch)
        terms = torch.stack([widen(term) for term in named.values()])
        total = terms.sum()
        self._optimizer.zero_grad(set_to_none=True)
        # Under any precision but fp16 the scaler does nothing.
        self._scaler.scale(total).backward()
        distributed.average_gradients(self._model.parameters())
        # Not by the optimiser itself, so that what clips gradients sees their true size.
        self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._rates.step()
        self._terms = ["total", *named]
        self._window.append(torch.cat([total.detach()[None], terms.detach()]))
        self._step += 1

    def _row_is_due(self) -> bool:
        in_epoch = self._step % self._task.steps_per_epoch
        return in_epoch % WINDOW == 0 or self._step == self._recipe.epochs

    def _evaluation_is_due(self) -> bool:
        if self._step == self._recipe.epochs:
            return True
        ended = self._step % self._task.steps_per_epoch == 0
        return ended and self._evaluate_every > 0 and self._epoch % self._evaluate_every == 0

    def _write_row(self) -> None:
        """Means of the loss since the last row, and metrics if they are due.

        Raises:
            FloatingPointError: The loss, or a tensor of what is evaluated, is NaN or infinite.
        """
        terms = self._read_window()
        row: dict[str, Any] = {
            "step": self._step,
            "epoch": self._step / self._task.steps_per_epoch,
            "lr": self._recipe.lr * self._recipe.share(float(self._step - 1)),
            "seconds": self._seconds,
            **{f"{LOSS}{name}": value for name, value in terms.items()},
        }
        if self._evaluation_is_due():
            check_module(self._model, self._step, HINT)
            row |= {f"{EVALUATED}{name}": value for name, value in self._evaluate().items()}
        self._log.write(row)
        self._progress.row(row)

    def _read_window(self) -> dict[str, float]:
        """Means of the loss's terms since the last row; starts over.

        Raises:
            FloatingPointError: One was NaN or infinite; names the first step, and the terms.
        """
        window, self._window = distributed.mean(torch.stack(self._window)), []
        fine = window.isfinite().tolist()
        begin = self._step - len(fine)
        for number, finite in enumerate(fine, begin + 1):
            if not all(finite):
                pairs = zip(self._terms, finite, strict=True)
                bad = ", ".join(f"{LOSS}{name}" for name, good in pairs if not good)
                raise FloatingPointError(
                    f"{bad} became NaN or infinite in step {number} (of steps {begin + 1} to "
                    f"{self._step}, the first); {HINT}"
                )
        return dict(zip(self._terms, window.mean(0).tolist(), strict=True))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self._model.eval()
        with autocast(self._precision, self._device):
            metrics = self._task.evaluate()
            if distributed.rank() == 0:
                self._show(self._task.pictures(PICTURES))
        self._model.train()
        return metrics

    def _show(self, pictures: Tensor) -> None:
        """Shows pictures in TensorBoard, and the last ones in a file."""
        pictures = pictures.cpu()
        self._log.write_pictures("predictions", pictures, self._step)
        grid = make_grid(pictures, nrow=PICTURES_A_ROW, padding=4, pad_value=255)
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        write_atomically(self._log.folder / "predictions.png", image.save)

    def _at_rest(self) -> None:
        """Between two steps, where all that the rest depends on is known."""
        if distributed.active() and self._step - self._agreed < AGREEMENT:
            return
        self._agreed = self._step
        due = self._step < self._recipe.epochs and self._timetable.due(self._epoch)
        number, due = distributed.agree((self._stop.number, due))
        if number is not None or due:
            self._save()
        if number is not None:
            raise Stopped(number, str(self._log.folder), self._step, self._task.program)

    def _save(self) -> None:
        """Writes a checkpoint of all processes.

        Raises:
            FloatingPointError: Something is NaN or infinite; the checkpoints are those before it.
        """
        started = time.perf_counter()
        check_module(self._model, self._step, HINT)
        content = {"identity": self._identity, "training": self.state_dict()}
        if distributed.rank() == 0:
            self._checkpoints.save(self._step, content)
        self._saved = self._step
        self._timetable.written(self._epoch, time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        return {
            "step": self._step,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "scaler": self._scaler.state_dict(),
            "terms": self._terms,
            "window": [distributed.mean(terms) for terms in self._window],
            "log": self._log.state_dict(),
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log must have been cut to it before."""
        self._step = self._saved = self._agreed = state["step"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        self._scaler.load_state_dict(state["scaler"])
        self._terms = state["terms"]
        self._window = [terms.to(self._device) for terms in state["window"]]
        self._timetable = Timetable(CheckpointConfig(), epochs=self._epoch)
        self._began = time.perf_counter() - state["seconds"]

    def _finish(self) -> dict[str, float]:
        """Writes the network and the result; gives the metrics at the end."""
        metrics = metrics_of(self._log.rows[-1])
        if distributed.rank() == 0:
            folder = self._log.folder
            save_checkpoint(folder / "model.pt", {"network": self._model.state_dict()})
            write_text(folder / "result.json", json.dumps(self._result(metrics), indent=2) + "\n")
            self._checkpoints.clear()
        return metrics

    def _result(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What the training came to; the best step is chosen by the main metric."""
        main = next(iter(metrics))
        judged = [row for row in self._log.rows if metrics_of(row)]
        best = max(judged, key=lambda row: metrics_of(row)[main])
        return {
            "metrics": dict(metrics),
            "best": {"step": best["step"], **metrics_of(best)},
            "steps": self._step,
            "seconds": round(self._seconds, 2),
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "training": self._identity,
            "versions": {
                "mtkd_env": mtkd_env.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
        }


@torch.no_grad()
def _make_equal(model: nn.Module) -> None:
    """Gives the networks of all processes the tensors of process 0's."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.copy_(distributed.broadcast(tensor))
