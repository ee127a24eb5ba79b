"""What a network is trained for, and its training from its beginning or a checkpoint to its end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from experiments.console import console
from experiments.running.device import together
from experiments.running.failures import run_program
from experiments.running.kept import KeptRun
from experiments.running.log import ROWS
from experiments.running.result import versions
from experiments.transfer.program import PLACE, Config, TaskResult, parse
from experiments.transfer.progress import EVALUATED, LOSS, TaskProgress, metrics_of
from mtkd_env import distributed
from mtkd_env.computing import find_device
from mtkd_env.files import save_checkpoint, write_atomically
from mtkd_env.keeping import AtRest, check_module
from mtkd_env.precision import autocast, check_precision, widen
from mtkd_env.seeding import derive_seed

# Steps between two rows within an epoch, for which the host has to wait for the device.
WINDOW = 100

# Images of which predictions are shown, and how many of them side by side.
PICTURES, PICTURES_A_ROW = 8, 2

HINT = "a lower schedule.lr, a longer warm-up or schedule.clip may help"


class VisionTask(ABC):
    """A network, the images that it is trained and judged on, and its loss.

    Attributes:
        model: The network; made by the constructor.
        steps_per_epoch: Number of batches that `batches` gives.
    """

    model: nn.Module
    steps_per_epoch: int

    @abstractmethod
    def batches(self, epoch: int, begin: int = 0) -> Iterator[Any]:
        """This process's batches of an epoch, on the device.

        They depend on the seed and the epoch alone, and draw from generators of their own.

        Args:
            epoch: The epoch, counted from 0.
            begin: Number of the first batch to give, from 0: where an interrupted run goes on.
        """

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Terms of the loss of a batch, scalars; always of the same names. Their sum is trained."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the network, the main one first; every process is told the same.

        All processes call it together, with the network in evaluation mode and without gradients.
        """

    @abstractmethod
    def pictures(self, count: int) -> Tensor:
        """Predictions beside the truth, uint8 (N, 3, H, W) with N <= count.

        Process 0 alone calls it, with the network in evaluation mode and without gradients.
        """


class TaskRun(KeptRun[Config, TaskResult]):
    """The training of a task's network; a subclass is a kind of task, and its main program.

    Beside what every run writes the folder holds `predictions.png` and `model.pt`.

    Args:
        config: The run.
        out: Where the progress is shown; by default the program's console.

    Attributes:
        config_type: Class of the configuration.
        task_type: Makes the task of a configuration, on a device.
        device: Where it is computed.
        model: The network.
    """

    config_type: type[Config]
    task_type: Callable[[Any, torch.device], VisionTask]
    result_type = TaskResult
    lines = (ROWS,)
    clock = "step"
    written = ("predictions.png", "model.pt")
    place = PLACE

    def __init__(self, config: Config, out: Console | None = None) -> None:
        super().__init__(config)
        self._progress = TaskProgress(out or console(quiet=distributed.rank() != 0))
        self._steps = 0
        # Names of the loss's terms, and their values in every step since the last row.
        self._terms: list[str] = []
        self._window: list[Tensor] = []

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Runs the main program; gives its exit code.

        Args:
            argv: Flags, without the program's name; by default those of this process.
        """

        def main(argv: Sequence[str]) -> int:
            config, resume = parse(cls.config_type, argv, cls.program)
            with together(config.device):
                out = console(quiet=distributed.rank() != 0)
                random = f"a random {config.backbone} (--weights would say which to begin with)"
                known = f"the {config.backbone} of {config.weights}"
                out.print(f"begins with {known if config.weights else random}", soft_wrap=True)
                result = cls(config, out).complete(Path(config.output), resume=resume)
                metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
                out.print(f"{metrics}; written to {config.output}", soft_wrap=True)
            return 0

        return run_program(main, argv, "a run folder without result.json is unfinished")

    def prepare(self) -> dict[str, Any]:
        """Loads the images and makes the network."""
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = find_device(config.device)
        check_precision(config.precision, self.device)
        self._task = self.task_type(config, self.device)
        # With steps in place of epochs.
        self._recipe = config.schedule.recipe(self._task.steps_per_epoch)
        return {
            "number of steps in an epoch": self._task.steps_per_epoch,
            "number of processes": distributed.processes(),
            "device": self.device.type,
        }

    def begin(self) -> None:
        """Makes all processes' networks equal, and what trains them."""
        self.model = distributed.synchronize_norms(self._task.model.to(self.device))
        with torch.no_grad():
            for tensor in chain(self.model.parameters(), self.model.buffers()):
                tensor.copy_(distributed.broadcast(tensor))
        self._optimizer, self._rates = self._recipe.build(self.model, steps_per_epoch=1)
        fp16 = self.config.precision == "fp16"
        self._scaler = GradScaler(self.device.type, enabled=fp16)

    def write(self, folder: Path) -> None:
        """Writes the network."""
        save_checkpoint(folder / "model.pt", {"network": self.model.state_dict()})

    def result(self) -> TaskResult:
        """What the training came to; the best step is chosen by the main metric."""
        config = self.config
        judged = [row for row in self.log.rows if metrics_of(row)]
        metrics = metrics_of(judged[-1])
        main = next(iter(metrics))
        best = max(judged, key=lambda row: metrics_of(row)[main])
        return TaskResult(
            method=config.label,
            setting=config.setting,
            seed=config.seed,
            metric=main,
            last=metrics[main],
            best=metrics_of(best)[main],
            best_epoch=best["epoch"],
            epochs=judged[-1]["epoch"],
            seconds=round(self.log.seconds, 2),
            folder=str(self.log.folder),
            versions=versions(torchvision),
            metrics=metrics,
            best_metrics=metrics_of(best),
            steps=self.steps,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
        )

    @property
    def steps(self) -> int:
        """SGD steps so far."""
        return self._steps

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return self.steps // self._task.steps_per_epoch

    def train(self, at_rest: AtRest) -> None:
        """Trains to the end.

        Raises:
            FloatingPointError: A loss or a tensor of the network became NaN or infinite.
        """
        self.model.train()
        with self._progress.training(self.steps, self._recipe.epochs):
            while self.steps < self._recipe.epochs:
                self._train_epoch(at_rest)

    def _train_epoch(self, at_rest: AtRest) -> None:
        """What is left of the epoch, or of the training if that ends before."""
        length = self._task.steps_per_epoch
        end = min((self.epochs + 1) * length, self._recipe.epochs)
        batches = self._task.batches(self.epochs, begin=self.steps % length)
        while self.steps < end:
            at_rest()
            # Every step draws numbers of its own, whatever was drawn before it.
            purpose = f"step {self.steps} of process {distributed.rank()}"
            torch.manual_seed(derive_seed(self.config.seed, purpose))
            self._train_step(next(batches))
            self._progress.step()
            if self.steps % length % WINDOW == 0 or self.steps == self._recipe.epochs:
                self._write_row()

    def _train_step(self, batch: Any) -> None:
        with autocast(self.config.precision, self.device):
            named = self._task.losses(batch)
        terms = torch.stack([widen(term) for term in named.values()])
        total = terms.sum()
        self._optimizer.zero_grad(set_to_none=True)
        # Under any precision but fp16 the scaler does nothing.
        self._scaler.scale(total).backward()
        distributed.average_gradients(self.model.parameters())
        # Not by the optimiser itself, so that what clips gradients sees their true size.
        self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._rates.step()
        self._terms = ["total", *named]
        self._window.append(torch.cat([total.detach()[None], terms.detach()]))
        self._steps += 1

    def _write_row(self) -> None:
        """Means of the loss since the last row, and metrics if they are due.

        Raises:
            FloatingPointError: The loss, or a tensor of what is evaluated, is NaN or infinite.
        """
        terms = self._read_window()
        row: dict[str, Any] = {
            "step": self.steps,
            "epoch": self.steps / self._task.steps_per_epoch,
            "lr": self._recipe.lr * self._recipe.share(float(self.steps - 1)),
            "seconds": self.log.seconds,
            **{f"{LOSS}{name}": value for name, value in terms.items()},
        }
        every = self.config.evaluate_every
        in_epoch = self.steps % self._task.steps_per_epoch
        is_due = in_epoch == 0 and every > 0 and self.epochs % every == 0
        if is_due or self.steps == self._recipe.epochs:
            self.check_finite()
            row |= {f"{EVALUATED}{name}": value for name, value in self._evaluate().items()}
        self.log.write(row)
        self._progress.row(row)

    def _read_window(self) -> dict[str, float]:
        """Means of the loss's terms since the last row; starts over.

        Raises:
            FloatingPointError: One was NaN or infinite; names the first step, and the terms.
        """
        window, self._window = distributed.mean(torch.stack(self._window)), []
        fine = window.isfinite().tolist()
        begin = self.steps - len(fine)
        for number, finite in enumerate(fine, begin + 1):
            if not all(finite):
                pairs = zip(self._terms, finite, strict=True)
                bad = ", ".join(f"{LOSS}{name}" for name, good in pairs if not good)
                raise FloatingPointError(
                    f"{bad} became NaN or infinite in step {number} (of steps {begin + 1} to "
                    f"{self.steps}, the first); {HINT}"
                )
        return dict(zip(self._terms, window.mean(0).tolist(), strict=True))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        with autocast(self.config.precision, self.device):
            metrics = self._task.evaluate()
            if distributed.rank() == 0:
                pictures = self._task.pictures(PICTURES).cpu()
                self.log.write_pictures("predictions", pictures, self.steps)
                grid = make_grid(pictures, nrow=PICTURES_A_ROW, padding=4, pad_value=255)
                image = Image.fromarray(grid.permute(1, 2, 0).numpy())
                write_atomically(self.log.folder / "predictions.png", image.save)
        self.model.train()
        return metrics

    def check_finite(self) -> None:
        """Checks the network.

        Raises:
            FloatingPointError: A tensor of it holds NaN or infinity.
        """
        check_module(self.model, self.steps, HINT)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        return {
            "step": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "scaler": self._scaler.state_dict(),
            "terms": self._terms,
            "window": [distributed.mean(terms) for terms in self._window],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log must have been cut to it before."""
        self._steps = state["step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        self._scaler.load_state_dict(state["scaler"])
        self._terms = state["terms"]
        self._window = [terms.to(self.device) for terms in state["window"]]
