"""Where and in what number format a student and its teachers are computed."""

import os
from dataclasses import dataclass

import torch

from mtkd_env import distributed
from mtkd_env.compilation import MODES, NONE, check_compile
from mtkd_env.errors import ConfigError, check_at_least_1, check_name
from mtkd_env.files import whole_path
from mtkd_env.options import Options
from mtkd_env.precision import FULL, PRECISIONS, TEACHER_PRECISIONS, check_precision


@dataclass(frozen=True)
class Computing(Options):
    """Where and how student and teachers are computed.

    Attributes:
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: What student and teachers compute in: fp32, bf16 or fp16.
        teacher_precision: What the teachers compute in, if it is something else; on a CPU also
            int8, which is nearly the same several times as fast.
        compile: How student and teachers are compiled: none, or a mode of torch.compile: default,
            reduce-overhead or max-autotune. It takes minutes at first.
        prefetch: Batches that the teachers are asked about together; by default 1 on a CPU and 512
            images on a GPU. The numbers do not depend on it but for rounding.
        deterministic: Whether a GPU computes the same bits every time, in all of this process; an
            operation that cannot is an error. A CPU does anyhow.
        cache: Folder of trained teachers; by default $MTKD_CACHE or ~/.cache/mtkd_env.

    Raises:
        ConfigError: A value that is not among the valid ones.
    """

    device: str = "auto"
    precision: str = FULL
    teacher_precision: str | None = None
    compile: str = NONE
    prefetch: int | None = None
    deterministic: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(PRECISIONS, self.precision, "precision")
        check_name(TEACHER_PRECISIONS, self.for_teachers, "teacher_precision")
        check_name(MODES, self.compile, "compile")
        if self.cache is not None:
            # So that a run's configuration means the same from another working directory.
            object.__setattr__(self, "cache", whole_path(self.cache))
        if self.prefetch is not None:
            check_at_least_1(prefetch=self.prefetch)

    @property
    def for_teachers(self) -> str:
        """What the teachers compute in."""
        return self.teacher_precision or self.precision

    def place(self) -> torch.device:
        """The device, once it is known to be there and to compute as asked for.

        Raises:
            ConfigError: It is not, or does not.
        """
        device = find_device(self.device)
        if self.deterministic and device.type == "cuda":
            compute_deterministically()
        check_precision(self.precision, device)
        check_compile(self.compile, device)
        return device


def compute_deterministically() -> None:
    """Lets all operations of this process give the same bits every time."""
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def find_device(name: str) -> torch.device:
    """A device by its name, which is tried.

    Args:
        name: cpu, cuda, cuda:1, ...; auto takes this process's GPU if there is one.

    Raises:
        ConfigError: A device that does not exist here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", distributed.place_on_machine())
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: cannot use '{name}': {reason}") from error
    return device
