"""Who knows which class, and who was asked about it."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from comparisons import TEACHERS
from experiments.classes import class_table, write_classes
from experiments.metrics import accuracy_by_class
from run_folders import CLASSES, breakdown
from tiny import CLASSES as TINY_CLASSES
from tiny import make_tiny_env


def test_accuracies_by_class_come_to_the_evaluations() -> None:
    env = make_tiny_env()
    env.reset(seed=0)
    found = accuracy_by_class(env, TINY_CLASSES)
    counts = np.array(found["count"])
    assert counts.tolist() == [10] * TINY_CLASSES
    accuracy = (counts * found["student"]).sum() / counts.sum()
    assert accuracy == pytest.approx(env.evaluate("test").accuracy)
    assert np.shape(found["teachers"]) == (len(env.teacher_names), TINY_CLASSES)


def test_a_table_is_the_mean_of_its_runs() -> None:
    first, second = breakdown(list(TEACHERS)), breakdown(list(TEACHERS))
    second["accuracy"]["student"] = [1.0, 0.5, None]
    table = class_table({"pg": [first, second]}, {"pg": np.full((2, CLASSES, 2), 0.5)})
    assert table.students["pg"][:2].tolist() == [0.75, 0.75]
    assert np.isnan(table.students["pg"][2])
    assert list(table.teachers) == list(TEACHERS)
    assert table.names == ["class 0", "class 1", "class 2"]


@pytest.mark.usefixtures("_pictures")
def test_a_line_of_an_older_run_has_weights_alone(tmp_path: Path) -> None:
    line = breakdown(list(TEACHERS))
    del line["accuracy"], line["classes"]
    table = class_table({"pg": [line]}, {"pg": np.full((2, CLASSES, 2), 0.5)})
    assert (table.teachers, table.students, list(table.names)) == ({}, {}, ["0", "1", "2"])
    write_classes(line, tmp_path / "classes.png", "pg")
    assert matplotlib.image.imread(tmp_path / "classes.png").ndim == 3
