"""Methods in several configurations side by side: `--variant NAME=FLAGS`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from experiments.config import ExperimentConfig
from mtkd_env.errors import ConfigError

# What is the whole process's, or decides how many images and steps there are.
FIXED = (
    *("device", "threads", "deterministic"),
    *("data.dataset", "data.arguments"),
    *("data.batch_size", "data.train_size", "data.val_fraction"),
)


@dataclass(frozen=True)
class Variant:
    """Flags that every method is also measured with.

    Attributes:
        name: What it is called; empty for the methods as they are.
        flags: Flags of mtkd run that come last.
    """

    name: str = ""
    flags: tuple[str, ...] = ()

    def subject(self, method: str) -> str:
        """What a method with these flags is called."""
        return f"{method} [{self.name}]" if self.name else method


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Variants from what the command line says.

    Raises:
        ConfigError: A text that is not NAME=FLAGS, or a name that is used twice.
    """
    variants = [_parse(text) for text in texts]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--variant: the name '{name}' is used more than once")
    return variants


def _parse(text: str) -> Variant:
    name, _, rest = (part.strip() for part in text.partition("="))
    expected = f"--variant: expected NAME=FLAGS with flags of mtkd run, got '{text}'"
    if not name or name.startswith("-"):
        raise ConfigError(expected)
    try:
        flags = tuple(shlex.split(rest))
    except ValueError as error:
        raise ConfigError(f"{expected} ({error})") from error
    if not flags or not flags[0].startswith("--"):
        raise ConfigError(expected)
    if any(flag.partition("=")[0] == "--algo" for flag in flags):
        raise ConfigError(f"--variant {name}: --algo cannot be given here; see --methods")
    return Variant(name, flags)


def check_comparable(
    variant: Variant, config: ExperimentConfig, reference: ExperimentConfig
) -> None:
    """Checks that a step of a variant is on as many images as one without, by as many threads.

    Raises:
        ConfigError: It is not; names the key.
    """
    for path in FIXED:
        own, other = (attrgetter(path)(each) for each in (config, reference))
        if own != other:
            raise ConfigError(
                f"--variant {variant.name}: {path} cannot differ within one run, expected {other}, "
                f"got {own}"
            )
