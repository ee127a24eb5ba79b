import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from mtkd_env import SB3VecEnv
from mtkd_env.rendering import COLUMNS, FEATURE, LINE, LOGIT, SIDE, WIDTH, draw_batch
from mtkd_env.types import UNKNOWN, TeacherWeights
from tiny import NUM_ENVS, TEACHERS, make_tiny_env

NAMES = ("first", "a teacher with a long name", "Учитель")


def count(frame: np.ndarray, color: tuple[int, int, int]) -> int:
    """Number of pixels of a colour."""
    return int((frame == np.array(color)).all(-1).sum())


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (20, 10), (224, 300)])
def test_frames_are_of_one_size_whatever_the_images_are(
    channels: int, size: tuple[int, int]
) -> None:
    images = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(0))
    frames = draw_batch(images, torch.tensor([0, 12, UNKNOWN]), NAMES)
    height = SIDE + WIDTH - SIDE + (len(NAMES) + 1) * LINE
    assert [(frame.shape, frame.dtype) for frame in frames] == [((height, WIDTH, 3), np.uint8)] * 3


def test_bars_are_as_long_as_weights_are_large() -> None:
    weights = TeacherWeights(
        logit=torch.tensor([[1.0, 0.0], [0.5, 0.5]]), feature=torch.tensor([[0.0, 0.0], [0.2, 0.8]])
    )
    images, targets = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    right = torch.tensor([[True, False], [True, True]])
    first, second = draw_batch(images, targets, NAMES[:2], weights, right)
    assert (count(first, FEATURE), count(first, LOGIT) > 0) == (0, True)
    lines = [second[-LINE * (2 - number) :][:LINE, COLUMNS[2] :] for number in range(2)]
    assert count(lines[1], FEATURE) > 2 * count(lines[0], FEATURE) > 0


def test_nobody_is_right_or_wrong_of_an_image_without_a_label() -> None:
    frames = [
        draw_batch(torch.zeros(1, 1, 8, 8), torch.tensor([label]), NAMES, None, right)[0]
        for label, right in (
            (UNKNOWN, torch.zeros(1, len(NAMES), dtype=torch.bool)),
            (UNKNOWN, None),
        )
    ]
    assert (frames[0] == frames[1]).all()


def test_an_image_is_drawn_with_its_own_brightness() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, :, 4:] = 1.0
    dark, half = draw_batch(images, torch.zeros(2, dtype=torch.int64), NAMES)
    middle = WIDTH // 2
    assert dark[50, middle - 20].tolist() == dark[50, middle + 20].tolist() == [0, 0, 0]
    assert half[50, middle - 20].tolist() == [0, 0, 0]
    assert half[50, middle + 20].tolist() == [255, 255, 255]


def test_an_environment_shows_the_batch_that_waits_then_the_one_that_was_acted_on() -> None:
    env = make_tiny_env()
    assert env.render() is None
    env.render_mode = "rgb_array"
    with pytest.raises(ResetNeeded):
        env.render()
    env.reset(seed=0)
    waiting = env.render()
    assert waiting is not None
    assert len(waiting) == NUM_ENVS
    assert count(waiting[0], LOGIT) == 0
    env.step(np.zeros((NUM_ENVS, 2 * len(TEACHERS)), dtype=np.float32))
    acted = env.render()
    assert acted is not None
    for before, after in zip(waiting, acted, strict=True):
        assert (before[:SIDE] == after[:SIDE]).all()
        assert count(after, LOGIT) > 0


def test_stable_baselines_tiles_the_frames() -> None:
    env = make_tiny_env()
    env.render_mode = "rgb_array"
    adapter = SB3VecEnv(env)
    adapter.reset()
    tiled = adapter.render()
    assert tiled is not None
    frames = env.render()
    assert frames is not None
    assert tiled.shape == (2 * frames[0].shape[0], 2 * frames[0].shape[1], 3)
    assert SB3VecEnv(make_tiny_env()).get_images() == [None] * NUM_ENVS
