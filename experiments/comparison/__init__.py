"""One comparison: its plan, tasks, execution, status, statistics and report.

- `plan.py`: methods × settings × pools × seeds, from a YAML file and flags.
- `kinds.py`: what can be compared: `distillation.py` or `transfer.py`.
- `execution.py`: does what is not finished; `progress.py` shows it, `status.py` asks the folders.
- `statistics.py`: mean, spread, paired differences; `summary.py`: what a method came to, one type
  for console, CSV, Markdown, picture and page; `normalised.py`: one score over all settings.
- `report.py`: the tables and the picture.
"""
