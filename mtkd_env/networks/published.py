"""Names of tensors in published checkpoints of CIFAR networks, and what they are called here.

They are those of RepDistiller (Tian et al., 2020, "Contrastive representation distillation"), which
mdistiller (Zhao et al., 2022) and most programs of distillation on CIFAR-100 have taken over. A
table's keys are regular expressions for the beginnings of names; the first one that fits counts.
"""

import re
from collections.abc import Mapping

Renaming = Mapping[str, str]

STAGES = {rf"layer{n + 1}\.": f"stages.{n}." for n in range(4)}

STEM_AND_CLASSIFIER = {
    r"conv1\.": "stem.0.",
    r"bn1\.": "stem.1.",
    r"(fc|linear)\.": "classifier.",
}

# `resnet8` to `resnet110`, also four times as wide, `ResNet50` and `ShuffleV1`.
RESNET = {
    **{rf"layer{n + 1}\.(\d+)\.shortcut\.": rf"stages.{n}.\1.downsample." for n in range(4)},
    **STEM_AND_CLASSIFIER,
    **STAGES,
}

WIDE_BLOCK = {
    "bn1": "activation.0",
    "conv1": "residual.0",
    "bn2": "residual.1",
    "conv2": "residual.3",
    "convShortcut": "shortcut",
}

# `wrn_16_1` to `wrn_40_2`.
WIDE_RESNET = {
    r"conv1\.": "stem.",
    r"bn1\.": "activation.0.",
    r"fc\.": "classifier.",
    **{
        rf"block{n + 1}\.layer\.(\d+)\.{theirs}\.": rf"groups.{n}.\1.{ours}."
        for n in range(3)
        for theirs, ours in WIDE_BLOCK.items()
    },
}

# `vgg8` to `vgg19`.
VGG = {r"block(\d)\.": r"stages.\1."}

# Of the first unit of a stage, both of its branches; of the others, which have one.
SHUFFLE_DOWN = ("1.0", "1.1", "1.2", "1.3", "2.0", "2.1", "2.3", "2.4", "2.5", "2.6")
SHUFFLE_UNIT = SHUFFLE_DOWN[4:]

# `ShuffleV2`.
SHUFFLENET_V2 = {
    **STEM_AND_CLASSIFIER,
    r"conv2\.": "last.0.",
    r"bn2\.": "last.1.",
    **{
        rf"layer{n + 1}\.{unit}\.{kind}{number + 1}\.": (
            rf"stages.{n}.{group}.branch{places[2 * number + (kind == 'bn')]}."
        )
        for n in range(3)
        for unit, group, places in (
            ("0", "0", SHUFFLE_DOWN),
            (r"([1-9]\d*)", r"\1", SHUFFLE_UNIT),
        )
        for number in range(len(places) // 2)
        for kind in ("conv", "bn")
    },
}

# Where the blocks of each stage begin in torchvision's one sequence, and a block's layers in it.
MOBILE_BEGINS = {0: 1, 1: 2, 2: 4, 3: 7, 4: 11, 5: 14, 6: 17}
MOBILE_BLOCK = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}

# `MobileNetV2`, which is `mobilenetv2` at width 0.5.
MOBILENET_V2 = {
    r"conv1\.": "stages.0.",
    r"conv2\.": "last.",
    r"classifier\.0\.": "classifier.",
    **{
        rf"blocks\.{stage}\.{block}\.conv\.{theirs}\.": f"stages.{begin + block}.conv.{ours}."
        for stage, begin in MOBILE_BEGINS.items()
        for block in range(4)
        for theirs, ours in MOBILE_BLOCK.items()
    },
}


def renamed(name: str, table: Renaming) -> str:
    """A tensor's name here; the name itself if the table does not have it."""
    for beginning, replacement in table.items():
        if match := re.match(beginning, name):
            return match.expand(replacement) + name[match.end() :]
    return name
