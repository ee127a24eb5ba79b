"""One kept run, whatever trains: its folder, log and result, and how programs end.

- `kept.py`: a run found or begun in its folder, gone on with, stopped and finished; what trains is
  a subclass of `KeptRun` (distillation, agents, detectors, segmenters), and what lets it go on is
  in `mtkd_env.keeping`, as it is for teachers. It has these from the others:
- `folder.py`, `lock.py`: the folder, which is one run's and one process's at a time.
- `signals.py`: what ends a program elsewhere, and how to go on with a run.
- `log.py`, `result.py`: its rows, and what it came to.
- `finite.py`: what became NaN or infinite first.
- `device.py`: the processes that share it.
- `failures.py`: how the main programs end when something goes wrong.
"""
