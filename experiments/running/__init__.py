"""One kept run, whatever trains: its folder, checkpoints, log and signals.

- `kept.py`: a run found or begun in its folder, gone on with, stopped and finished; what trains is
  a subclass of `KeptRun` (distillation, detectors, segmenters). It has these from the others:
- `folder.py`, `lock.py`: the folder, which is one run's and one process's at a time.
- `checkpoint.py`, `signals.py`: what lets it go on, and what makes it stop.
- `log.py`, `result.py`: its rows, and what it came to.
- `finite.py`: what became NaN or infinite first.
- `device.py`: the processes that share it.
- `failures.py`: how the main programs end when something goes wrong.
"""
