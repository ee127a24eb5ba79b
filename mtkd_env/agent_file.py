"""What an agent has learned, in two files: safetensors, and JSON that says what they are of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.files import file_digest, load_checkpoint, save_tensors, user_path, write_text

# The name in a run's folder, and how both files end.
STEM, TENSORS, DESCRIPTION = "agent", ".safetensors", ".json"

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
        found, expected = self.part(name), module.state_dict()
        for key in dict.fromkeys([*expected, *found]):
            shapes = [list(one[key].shape) if key in one else "none" for one in (expected, found)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"{self.path}: {name}.{key}: expected {shapes[0]}, found {shapes[1]}"
                )
        module.load_state_dict(found)


def save_agent(
    path: Path,
    spaces: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files.

    Args:
        path: That of the tensors; the JSON stands beside it.
        spaces: See `AgentFile`.
        tensors: See `AgentFile`; on any device.
        notes: See `AgentFile`.

    Raises:
        OSError: A file cannot be written; names it.
    """
    # Copies, since safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, plain)
    about = {
        "format": FORMAT,
        "spaces": dict(spaces),
        "sha256": file_digest(path),
        "notes": dict(notes or {}),
    }
    write_text(path.with_suffix(DESCRIPTION), json.dumps(about, indent=2) + "\n")


def load_agent(named: str | Path) -> AgentFile:
    """Reads both files; never runs code from them.

    Args:
        named: Folder of a run, file of tensors, or `pretrained` for the agent that is shipped.

    Raises:
        ConfigError: No agent is there, or its files are damaged or do not belong together.
    """
    path = agent_path(named)
    about = _description(path.with_suffix(DESCRIPTION))
    tensors = load_checkpoint(path)
    if about["sha256"] != file_digest(path):
        raise ConfigError(
            f"{path}: holds other tensors than {path.with_suffix(DESCRIPTION).name} was written for"
        )
    return AgentFile(path, about["spaces"], tensors, about.get("notes", {}))


def agent_path(named: str | Path) -> Path:
    """The file of tensors that a user means; see `load_agent`.

    Raises:
        ConfigError: There is none.
    """
    path = SHIPPED if named == PRETRAINED else user_path(named)
    if path.is_dir():
        path /= f"{STEM}{TENSORS}"
    if not path.is_file():
        raise ConfigError(
            f"{path}: no agent is there; expected a run's folder or an agent's {TENSORS}, or "
            f"'{PRETRAINED}'"
        )
    return path


def _description(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a description of an agent, but no JSON at all") from error
    fine = isinstance(about, dict) and isinstance(about.get("spaces"), dict) and "sha256" in about
    if not fine:
        raise ConfigError(f"{path}: not a description of an agent; expected spaces and sha256")
    if about.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected format {FORMAT}, found {about.get('format')!r}")
    return about
