"""Which images each teacher was raised on: disjoint parts of a data set, skewed towards classes.

The setting of teams that have each trained a model on their own: site by site, product line by
product line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.seeding import derive_seed

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """What one teacher's images are to be.

    Attributes:
        images: Their number; a share of all training images if it is below 1.
        skew: Concentration of the Dirichlet distribution that the classes' shares are drawn from:
            small is skewed, large is even; as they come by default.
        classes: The classes that they are of; all by default.
    """

    images: float
    skew: float | None = None
    classes: tuple[int, ...] | None = None


def divide_among_teachers(
    targets: Int64[Tensor, " N"], parts: Mapping[str, Part], num_classes: int, seed: int
) -> dict[str, Int64[Tensor, " P"]]:
    """Positions of every teacher's own images, disjoint, each in ascending order.

    A teacher's shares of the classes are drawn from Dirichlet(skew), its counts are images × share.
    Where a class has run out, the missing ones are drawn from its other classes by share.

    Args:
        targets: Class of each training image; images without a label are nobody's.
        parts: What each teacher's images are to be, in the order in which they choose.
        num_classes: C.
        seed: Seed of shares and images.

    Raises:
        ConfigError: Fewer images than the teachers need; names the numbers.
    """
    random = np.random.default_rng(derive_seed(seed, "parts"))
    labels = targets.numpy()
    # The positions of every class in a random order, from whose ends the teachers take.
    piles = [random.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
    found = {}
    for name, part in parts.items():
        wanted = round(part.images * len(targets)) if part.images < 1 else round(part.images)
        left = np.array([len(pile) for pile in piles])
        allowed = np.zeros(num_classes, dtype=bool)
        allowed[list(range(num_classes) if part.classes is None else part.classes)] = True
        left[~allowed] = 0
        if wanted > left.sum():
            of = "" if part.classes is None else f" of classes {list(part.classes)}"
            raise ConfigError(
                f"teachers.{name}.images: expected at most {left.sum()}, the images{of} that the "
                f"teachers before leave of {len(targets)}, got {wanted}"
            )
        counts = _counts(wanted, _shares(part.skew, left, random), left, random)
        taken = [pile[len(pile) - n :] for pile, n in zip(piles, counts, strict=True)]
        piles = [pile[: len(pile) - n] for pile, n in zip(piles, counts, strict=True)]
        found[name] = torch.from_numpy(np.sort(np.concatenate(taken)))
    return found


def _shares(skew: float | None, left: Counts, random: np.random.Generator) -> NDArray[np.float64]:
    """Each class's share of a teacher's images; 0 for a class that has none left."""
    if skew is None:
        return left / left.sum()
    shares = random.dirichlet(np.full(len(left), skew)) * (left > 0)
    # So small a concentration that nothing is left of the classes that there are.
    return shares / shares.sum() if shares.sum() > 0 else (left > 0) / (left > 0).sum()


def _counts(
    wanted: int, shares: NDArray[np.float64], left: Counts, random: np.random.Generator
) -> Counts:
    """So many images in all, by share, none of a class beyond what it has left."""
    exact = wanted * shares
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: wanted - counts.sum()]
    counts[rest] += 1
    counts = np.minimum(counts, left)
    while missing := wanted - int(counts.sum()):
        room = left > counts
        # Classes without a share come in only where the others have run out.
        odds = np.where(room & (shares > 0), shares, 0)
        odds = odds if odds.sum() > 0 else room.astype(np.float64)
        counts += random.multinomial(missing, odds / odds.sum())
        counts = np.minimum(counts, left)
    return counts


def class_positions(
    names: Sequence[str | int], class_names: Sequence[str], num_classes: int, key: str
) -> tuple[int, ...]:
    """The numbers of classes that are given by number or name, none twice.

    Args:
        names: Names or numbers.
        class_names: Name of each class; empty if they have none.
        num_classes: C.
        key: How messages call them.

    Raises:
        ConfigError: A class that does not exist, or one twice.
    """
    known = {name: position for position, name in enumerate(class_names)}
    found = []
    for name in names:
        position = known.get(str(name), name)
        if not isinstance(position, int) or not 0 <= position < num_classes:
            expected = f"one of {', '.join(class_names)}" if class_names else "a number"
            raise ConfigError(
                f"{key}: expected {expected} or 0 to {num_classes - 1}, got {name!r}"
                + did_you_mean(str(name), class_names)
            )
        if position in found:
            raise ConfigError(f"{key}: the class {name!r} is given twice")
        found.append(position)
    return tuple(found)
