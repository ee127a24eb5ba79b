"""Adapters of the environment to other libraries: `sb3.py` to Stable-Baselines3."""

import importlib
import os
import sys
from contextlib import suppress


def import_matplotlib() -> None:
    """Imports matplotlib, as Stable-Baselines3 does, whatever backend the surroundings name.

    It refuses to be imported where `$MPLBACKEND` names what is not installed here: a notebook sets
    the variable for all that it starts, in other environments as well. Such a name is forgotten.
    """
    if "matplotlib" in sys.modules:
        return
    named = os.environ.pop("MPLBACKEND", None)
    matplotlib = importlib.import_module("matplotlib")
    if named is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named
            os.environ["MPLBACKEND"] = named


import_matplotlib()
