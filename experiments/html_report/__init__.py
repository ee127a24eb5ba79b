"""One HTML page about all finished runs of a folder.

- `runs.py` finds them; `naming.py` groups them by what their results say that they are.
- `page.py`: the page; `sections.py`: its sections, which are made by
- `curves.py` (and cost), `breakdown.py` (weights by class), `exhibits.py` (images), `table.py`
  (tables of texts: the paper's results beside ours, configurations).
- `style.py`: how pictures look and become part of the page; `templates`: its HTML.
"""
