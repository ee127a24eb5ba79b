"""Students as runs leave them, without runs."""

from typing import Any

from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.networks import Network
from mtkd_env.student import StudentDescription

CLASSES = 7


def describe(
    name: str,
    network: Network | None = None,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    **changes: Any,
) -> StudentDescription:
    """What a network is, as a student of that name, with all that is not said of it made up."""
    channels = shape[0]
    fields: dict[str, Any] = {
        "width": 1.0,
        "arguments": {},
        "num_classes": CLASSES if network is None else network.num_classes,
        "preprocessing": Preprocessing(shape, (0.5,) * channels, (0.25,) * channels),
        "metrics": {"epoch": 2, "test/accuracy": 0.5},
    }
    return StudentDescription(name, **(fields | changes))
