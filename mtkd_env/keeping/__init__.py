"""What lets any training be stopped and gone on with: a student's, a teacher's, a detector's.

- `keeper.py`: lets a `Trainable` train to its end; goes on from checkpoints, and stops on signals.
- `checkpoint.py`: the checkpoints, and when they are due.
- `signals.py`: takes note of Ctrl-C and SIGTERM.
"""

from mtkd_env.keeping.checkpoint import CheckpointConfig, Checkpoints, Timetable
from mtkd_env.keeping.keeper import AtRest, Keeper, Trainable, check_module
from mtkd_env.keeping.signals import Stopped, StopRequest

__all__ = [
    "AtRest",
    "CheckpointConfig",
    "Checkpoints",
    "Keeper",
    "StopRequest",
    "Stopped",
    "Timetable",
    "Trainable",
    "check_module",
]
