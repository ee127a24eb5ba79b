"""CONSENSUS: a teacher counts more the nearer it is to what all of them say together."""

from jaxtyping import Float
from torch import Tensor

from mtkd_env.losses import divergence_from
from mtkd_env.types import DistillState
from mtkd_env.weighting.entropy import Doubt

# Its name in the table of weightings.
CONSENSUS = "consensus"

# ε: the share of every teacher's answer that is taken as a guess, so that none has a veto.
GUESSED = 0.05


def pooled_opinion(
    probabilities: Float[Tensor, "M B C"], class_probabilities: Float[Tensor, "M C"]
) -> Float[Tensor, "B C"]:
    """Log q, q_i(c) ∝ Π_m s_i^m(c) / S^m(c): what the teachers' answers come to, by Bayes' rule.

    A teacher's answer p(c | x) is its evidence p(x | c) times how common it takes the class to be,
    which its mean answer shows (Saerens, Latinne and Decaestecker, Neural Computation 2002). The
    evidence of several is multiplied (Genest and Zidek, Statistical Science 1986), of classes that
    are all as common. s and S are p^m and its mean with ε of a guess mixed in. Who has never seen a
    class, and so never names it, says nothing of it.

    Args:
        probabilities: p^m of the samples.
        class_probabilities: P_m, each teacher's mean probabilities over many images.
    """
    classes = probabilities.shape[-1]
    answers, usual = (
        ((1 - GUESSED) * shares + GUESSED / classes).log()
        for shares in (probabilities, class_probabilities)
    )
    return (answers - usual.unsqueeze(1)).sum(0).log_softmax(-1)


class Consensus(Doubt):
    """softmax over the teachers of −s KL(p^m ‖ q), q their `pooled_opinion`, in both heads.

    Needs no label: P_m is taken over all of the student's images, once. For teachers that know
    different things, alone or as what an agent begins with (`env.prior`). See `Doubt`.
    """

    def doubts(self, state: DistillState) -> Float[Tensor, "B M"]:
        """The divergences."""
        probabilities = state.teachers.logits.float().softmax(-1)
        together = pooled_opinion(probabilities, self.distiller.reference.class_probabilities)
        return divergence_from(probabilities, together)
