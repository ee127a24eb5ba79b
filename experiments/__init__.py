"""The only place that knows everything: configuration, device, disk, and the main programs.

- `command.py`: `mtkd`, whose `verbs.py` are `run.py`, `compare.py`, `report.py`, `benchmark.py`,
  `train_teachers.py`, `train_agent.py`, `predict.py`, `export.py` and, in `transfer`, detection and
  segmentation.
- `config`: what a run is made of, from files and flags; `configs`: those that are shipped.
- `experiment.py`: a run of distillation from its configuration to its result; `training.py`: its
  loop; `metrics.py` and `gallery.py`: what it measures and shows; `agent_run.py`: an agent's
  training over many tasks.
- `running`: what keeps a run, whatever trains; `executors`: processes and clusters for many.
- `comparison`, `html_report`, `benchmarks`: what `compare.py`, `report.py`, `benchmark.py` do.
- `classes.py`, `formats.py`: who knows which class; what students are exported to; `gpu_check.py`:
  what only a GPU can show.
- `console.py`, `drawing.py`, `tables.py`: what is shown; `examples`: agents of other libraries.
"""

from mtkd import COMMANDS, OWN, require

require(OWN, COMMANDS)
