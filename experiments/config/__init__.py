"""What an experiment is made of, and where its values come from.

`ExperimentConfig` composes the options of `mtkd_env`, whose defaults hold for every run unless it
is told otherwise, and adds where and how to run. Layers over them, later ones win:
`configs/recipe/<recipe>.yaml`, `configs/algo/<algo>.yaml`, `--config` files, flags; a comparison
has further ones around the method's. Arguments of the agent are merged key by key; everything else
is replaced.

- `experiment.py`: the options; `layers.py`: the files and parts that values come from;
  `parsing.py`: the command line; `help.py`: what its help says.
"""

from experiments.config.experiment import (
    PLACE,
    ExperimentConfig,
    RunConfig,
)
from experiments.config.layers import (
    CONFIGS,
    Layer,
    algo_layers,
    file_layer,
    read_yaml,
    recipe_layers,
    shipped_recipes,
)
from experiments.config.parsing import (
    Flags,
    build_config,
    parse_arguments,
    parse_values,
    read_flags,
    take,
)

__all__ = [
    "CONFIGS",
    "PLACE",
    "ExperimentConfig",
    "Flags",
    "Layer",
    "RunConfig",
    "algo_layers",
    "build_config",
    "file_layer",
    "parse_arguments",
    "parse_values",
    "read_flags",
    "read_yaml",
    "recipe_layers",
    "shipped_recipes",
    "take",
]
