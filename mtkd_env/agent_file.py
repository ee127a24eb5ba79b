"""What an agent has learned, in two files: safetensors, and JSON that says what they are of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError, check_same_tensors, errors_of
from mtkd_env.files import (
    DESCRIPTION,
    TENSORS,
    load_checkpoint,
    read_description,
    save_described,
    user_path,
)

# The file of tensors in a run's folder.
FILE = f"agent{TENSORS}"

# The agent that comes with this package.
PRETRAINED = "pretrained"
SHIPPED = Path(__file__).parent / "weighting" / f"{PRETRAINED}{TENSORS}"

# Of what the JSON holds; to change with it.
FORMAT = 1


@dataclass(frozen=True)
class AgentFile:
    """What an agent has learned.

    Attributes:
        path: The file of tensors.
        spaces: What it sees and does, and by what network: where it can be used.
        tensors: By `part.name`, the part being what the agent calls it, such as `policy`.
        notes: What else is known of it, such as what it was trained on.
    """

    path: Path
    spaces: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]

    def check(self, spaces: Mapping[str, Any]) -> None:
        """Checks that it fits what it is to be used for.

        Raises:
            ConfigError: It does not; names what differs, on both sides.
        """
        differ = [
            name
            for name in dict.fromkeys([*self.spaces, *spaces])
            if self.spaces.get(name) != spaces.get(name)
        ]
        if differ:
            theirs, ours = (
                ", ".join(f"{name} {one.get(name, 'none')}" for name in differ)
                for one in (self.spaces, spaces)
            )
            raise ConfigError(f"{self.path}: the agent was made for {theirs}; expected {ours}")

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part by their names in it; empty if there is no such part."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def load_into(self, module: nn.Module, name: str) -> None:
        """Loads a part.

        Raises:
            ConfigError: Its tensors are not those of the module; names one.
        """
        found = self.part(name)
        with errors_of(f"{self.path}: {name}"):
            check_same_tensors(found, module.state_dict())
        module.load_state_dict(found)


def save_agent(
    path: Path,
    spaces: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files; see `AgentFile` for the arguments.

    Raises:
        OSError: A file cannot be written; names it.
    """
    about = {"format": FORMAT, "spaces": dict(spaces), "notes": dict(notes or {})}
    save_described(path, tensors, about)


def load_agent(named: str | Path) -> AgentFile:
    """Reads both files; never runs code from them.

    Args:
        named: Folder of a run, file of tensors, or `pretrained` for the agent that is shipped.

    Raises:
        ConfigError: No agent is there, or its files are damaged or do not belong together.
    """
    path = SHIPPED if named == PRETRAINED else user_path(named)
    if path.is_dir():
        path /= FILE
    if not path.is_file():
        raise ConfigError(
            f"{path}: no agent is there; expected a run's folder or an agent's {TENSORS}, or "
            f"'{PRETRAINED}'"
        )
    about = read_description(path)
    if about.get("format") != FORMAT or not isinstance(about.get("spaces"), dict):
        raise ConfigError(
            f"{path.with_suffix(DESCRIPTION)}: expected an agent's spaces in format {FORMAT}, "
            f"found format {about.get('format')!r}"
        )
    return AgentFile(path, about["spaces"], load_checkpoint(path), about.get("notes", {}))
