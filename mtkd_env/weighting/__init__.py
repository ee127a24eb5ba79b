"""Classical weightings: from what is known of a batch to teacher weights, without an agent.

To add one: a file with the formula, and a line in `WEIGHTINGS`.

- `base.py`: what a method is. `aver.py`, `fixed.py`: the same weights for all samples.
- `ebkd.py`, `camkd.py`, `entropy.py`, `evidence.py`, `coverage.py`: by what teachers say of it;
  `consensus.py`: by what all of them say together.
- `aekd.py`: by their gradients; `amtmlkd.py`, `mmkd.py`, `gate.py`: by what is learned meanwhile;
  `pretrained.py`: by an agent that has learned elsewhere; `heldout_constant.py`: the teacher that
  is best on the labelled images.
"""

from collections.abc import Callable, Mapping
from functools import partial

from mtkd_env.imports import Kind, is_a, takes
from mtkd_env.weighting.aekd import AEKD
from mtkd_env.weighting.amtmlkd import AMTMLKD
from mtkd_env.weighting.aver import Aver
from mtkd_env.weighting.base import Weighting
from mtkd_env.weighting.camkd import CAMKD
from mtkd_env.weighting.consensus import CONSENSUS, Consensus
from mtkd_env.weighting.coverage import Coverage
from mtkd_env.weighting.ebkd import EBKD
from mtkd_env.weighting.entropy import Entropy
from mtkd_env.weighting.evidence import Evidence
from mtkd_env.weighting.fixed import Fixed
from mtkd_env.weighting.gate import Gate
from mtkd_env.weighting.heldout_constant import HeldOutConstant
from mtkd_env.weighting.mmkd import MMKD
from mtkd_env.weighting.pretrained import Pretrained

__all__ = ["WEIGHTING", "WEIGHTINGS", "Weighting"]

# Called with the distiller, a seed, and hyperparameters of their own.
WEIGHTINGS: Mapping[str, Callable[..., Weighting]] = {
    "aekd": AEKD,
    "amtmlkd": AMTMLKD,
    "aver": Aver,
    "camkd": CAMKD,
    "confidence": partial(Evidence, fusion="confidence"),
    CONSENSUS: Consensus,
    "coverage": Coverage,
    "divergence": partial(Evidence, fusion="divergence"),
    "ebkd": EBKD,
    "entropy": Entropy,
    "evidence": partial(Evidence, fusion="confidence+divergence"),
    "fixed": Fixed,
    "gate": Gate,
    "heldout_constant": HeldOutConstant,
    "mmkd": MMKD,
    "pretrained": Pretrained,
}

WEIGHTING: Kind[Callable[..., Weighting]] = Kind(
    WEIGHTINGS,
    "weighting",
    lambda found: is_a(found, Weighting) or takes(1)(found),
    "a class of Weighting, or a function of a distiller that makes one",
)
