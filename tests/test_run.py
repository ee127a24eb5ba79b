import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from experiments import run
from experiments.config import parse_arguments
from experiments.experiment import choose_device, make_folder
from experiments.metrics import read_rows
from experiments.run import main
from mtkd_env.data import load_dataset
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import evaluate
from mtkd_env.files import load_checkpoint
from mtkd_env.losses import cross_entropy
from mtkd_env.networks import build_network
from mtkd_env.registration import assemble
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.teachers import TrainingSet

SMOKE = """
teachers:
  teachers:
    - {network: resnet8, width: 0.25}
    - {network: wrn_16_1, width: 0.25}
  recipe: {epochs: 1}
data: {train_size: 128, batch_size: 16}
student: {network: resnet8, width: 0.125}
optimizer: {epochs: 3}
device: cpu
"""
EPOCHS, STEPS = 3, 8
TEACHERS = ("resnet8", "wrn_16_1")
ALGOS = (
    "pg",
    "ppo",
    "a2c",
    "ddpg",
    "td3",
    "sac",
    "aver",
    "none",
    "oracle",
    "uniform",
    "reference",
    pytest.param("trpo", marks=pytest.mark.contrib),
)
LIBRARY = {"ppo", "a2c", "ddpg", "td3", "sac", "trpo"}
