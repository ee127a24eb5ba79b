"""What a distilled backbone is good for: detectors and segmenters that begin with it.

- `detection.py` and `segmentation.py`: the two programs, each a configuration, a `VisionTask`
  and its run; `experiments/comparison` compares backbones.
- `program.py`: configuration and flags of both; `training.py`: a task, its kept run and main
  program, with `schedule.py` and `progress.py`.
- `backbones.py`: an export in another network; `detectors.py`, `cascade.py`.
- `coco.py`, `coco_batches.py`, `average_precision.py`, `box_pictures.py`: images with boxes.
- `label_maps.py`, `label_views.py`: images with a class for every pixel.
"""
