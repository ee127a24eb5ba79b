"""M frozen teachers behind one call."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from mtkd_env import distributed
from mtkd_env.compilation import compiled
from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import Network
from mtkd_env.precision import FULL, PRECISIONS, autocast, widen, widened
from mtkd_env.teachers.inputs import TeacherView
from mtkd_env.types import UNKNOWN, UNKNOWN_LOGIT, Batch, Known, TeacherOutputs


class TeacherEnsemble(nn.Module):
    """M frozen networks in evaluation mode, batch norms folded into the convolutions.

    The given networks are not changed; the folded copies have the same outputs up to rounding.
    Convolutions are fastest with the channels last in memory, and so are the maps they give.

    Args:
        networks: The teachers, in the order of the weights' columns.
        names: A name for each; unique.
        precision: What they compute in; see `mtkd_env.precision`.
        classes: By name, for teachers that do not know all classes, those that their outputs are.
        num_classes: C; by default the number of outputs of the first teacher.
        views: By name, for teachers whose images are not like the student's, what makes them.

    Attributes:
        precision: That, or what it became by `substitute`.
        classes: Those of the teachers that do not know all.
        known: Which classes each teacher knows; None if each knows all.
        inputs: What the images are like of teachers whose are not like the student's, by name.

    Raises:
        ConfigError: No teacher, a number of names that is not M, a name used twice, teachers that
            disagree about the number of classes, or parameters that are NaN or infinite.
    """

    known: Known

    def __init__(
        self,
        networks: Sequence[Network],
        names: Sequence[str],
        precision: str = FULL,
        *,
        classes: Mapping[str, Sequence[int]] | None = None,
        num_classes: int | None = None,
        views: Mapping[str, TeacherView] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        _check_teachers(networks, names)
        self.num_classes = networks[0].num_classes if num_classes is None else num_classes
        self.names = tuple(names)
        self._set_classes(networks, classes or {})
        # Each once, however many teachers share it.
        shared = {view.spec: view for view in views.values()}
        self.views = nn.ModuleDict({str(n): view for n, view in enumerate(shared.values())})
        places = {spec: str(n) for n, spec in enumerate(shared)}
        self.inputs = {name: asdict(view.spec) for name, view in views.items()}
        self._view_of = [places[views[name].spec] if name in views else None for name in names]
        self.precision = self._format = precision
        self._substitutes: set[str] = set()
        self._compiled: dict[int, list[nn.Module]] = {}  # By the number of images.
        self.feature_dims = tuple(network.feature_dim for network in networks)
        self.map_channels = tuple(network.map_channels for network in networks)
        self.signed_maps = tuple(network.signed_map for network in networks)
        self.networks = nn.ModuleList(_folded(network) for network in networks)
        self.heads = nn.ModuleList(_folded(_Head(network)) for network in networks)
        self.to(memory_format=torch.channels_last)
        # Weights in what `autocast` would convert them to again in every forward, which changes no
        # output. Layers of other classes may do more with them.
        for layer in self.modules():
            if type(layer) in (nn.Conv2d, nn.Linear) and layer.weight.dtype == torch.float32:
                layer.to(PRECISIONS[precision])
        self.requires_grad_(requires_grad=False)
        self.eval()

    def _set_classes(
        self, networks: Sequence[Network], classes: Mapping[str, Sequence[int]]
    ) -> None:
        """Where the outputs of each teacher go among those of all classes."""
        known = torch.ones(len(networks), self.num_classes, dtype=torch.bool)
        for m, (name, network) in enumerate(zip(self.names, networks, strict=True)):
            own = classes.get(name, range(self.num_classes))
            if network.num_classes != len(own):
                raise ConfigError(
                    f"teachers: '{name}' has {network.num_classes} outputs, expected {len(own)}, "
                    "one for each class"
                )
            places = torch.tensor(own) if name in classes else None
            self.register_buffer(f"classes_{m}", places, persistent=False)
            if places is not None:
                known[m] = torch.isin(torch.arange(self.num_classes), places)
        self.classes = {name: tuple(own) for name, own in classes.items()}
        self.register_buffer("known", known if classes else None, persistent=False)

    def __len__(self) -> int:
        """M, the number of teachers."""
        return len(self.names)

    def train(self, mode: bool = True) -> "TeacherEnsemble":
        """Stays in evaluation mode: teachers never learn, nor do their batch statistics."""
        del mode
        return super().train(mode=False)

    def substitute(self, networks: Mapping[str, nn.Module], precision: str) -> None:
        """Lets other networks stand in for teachers, except in `classify`.

        Args:
            networks: What stands in, by the teachers' names; nothing may be compiled yet.
            precision: What they compute in; their outputs are float32.
        """
        for name, network in networks.items():
            self.networks[self.names.index(name)] = network
        self._substitutes.update(networks)
        self.precision = precision

    def compile_for(self, count: int, mode: str) -> None:
        """Compiles calls with so many images, and no others; see `mtkd_env.compilation`.

        What stands in for a teacher is not compiled.
        """
        self._compiled[count] = [
            network if name in self._substitutes else compiled(network, mode)
            for name, network in zip(self.names, self.networks, strict=True)
        ]

    def images(self, inputs: Float[Tensor, "B K H W"]) -> list[Tensor]:
        """The images of a batch as each teacher takes them."""
        made = {name: view(inputs) for name, view in self.views.items()}
        return [inputs if name is None else made[name] for name in self._view_of]

    @torch.no_grad()
    def forward(self, inputs: Float[Tensor, "B K H W"]) -> TeacherOutputs:
        """Logits, features and last feature maps of all M teachers."""
        networks = self._compiled.get(len(inputs), self.networks)
        pairs = zip(networks, self.images(inputs), strict=True)
        with autocast(self._format, inputs.device):
            outputs = [widened(network(images)) for network, images in pairs]
        return TeacherOutputs(
            logits=self._stacked([output.logits for output in outputs]),
            features=tuple(output.feature for output in outputs),
            feature_maps=tuple(output.feature_map for output in outputs),
            known=self.known,
        )

    @torch.no_grad()
    def classify(self, maps: Sequence[Tensor]) -> Float[Tensor, "M B C"]:
        """What every teacher's own pooling and classifier make of a map in its space.

        Args:
            maps: One (B, K_m, H_m, W_m) tensor per teacher.
        """
        with autocast(self._format, maps[0].device):
            pairs = zip(self.heads, maps, strict=True)
            logits = [widen(head(widen(one))) for head, one in pairs]
        return self._stacked(logits)

    def _stacked(self, logits: Sequence[Tensor]) -> Float[Tensor, "M B C"]:
        """Logits of all teachers, over all classes."""
        rows = [
            _over_all_classes(one, getattr(self, f"classes_{m}"), self.num_classes)
            for m, one in enumerate(logits)
        ]
        return torch.stack(rows)


@torch.no_grad()
def class_means(ensemble: TeacherEnsemble, batches: Iterable[Batch]) -> tuple[Tensor, ...]:
    """Mean feature of every class, for each teacher: M tensors (C, D_m).

    Zeros for a class that does not occur; images without a label do not count.

    Args:
        ensemble: The teachers.
        batches: One pass over the training images, without augmentation; of several processes,
            each gives its share.
    """
    count = torch.zeros(ensemble.num_classes)
    sums = [torch.zeros(ensemble.num_classes, width) for width in ensemble.feature_dims]
    for batch in batches:
        known = batch.labelled.cpu()
        targets = batch.targets.cpu()[known]
        count += targets.bincount(minlength=ensemble.num_classes)
        for total, feature in zip(sums, ensemble(batch.inputs).features, strict=True):
            total.index_add_(0, targets, feature.cpu().float()[known])
    device = next(ensemble.parameters()).device
    count, *sums = [distributed.total(part.to(device)) for part in (count, *sums)]
    return tuple(total / count.clamp(min=1).unsqueeze(1) for total in sums)


def _over_all_classes(
    logits: Float[Tensor, "B own"], classes: Int64[Tensor, " own"] | None, num_classes: int
) -> Float[Tensor, "B C"]:
    """A teacher's logits, with `UNKNOWN_LOGIT` for the classes that it has no output for."""
    if classes is None:
        return logits
    everywhere = logits.new_full((len(logits), num_classes), UNKNOWN_LOGIT)
    return everywhere.index_copy(1, classes, logits)


def own_targets(
    targets: Int64[Tensor, " N"], classes: Sequence[int] | None, num_classes: int
) -> Int64[Tensor, " N"]:
    """Which of a teacher's outputs is of each image's class; `UNKNOWN` where none is.

    Args:
        targets: Classes of the images, `UNKNOWN` without a label.
        classes: The class that each output is of; None if they are those of the data set.
        num_classes: C.
    """
    if classes is None:
        return targets
    # One class more, at -1, which is that of images without a label.
    outputs = torch.full((num_classes + 1,), UNKNOWN)
    outputs[list(classes)] = torch.arange(len(classes))
    return outputs.to(targets.device)[targets]


class _Head(nn.Module):
    """The part of a network behind its last feature map, logits only."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.training = network.training  # the mode that folding puts the network back into

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.network.head(feature_map).logits


def _folded(network: nn.Module) -> nn.Module:
    """A copy with every batch norm that follows a convolution folded into it.

    The copy holds only those layers that its forward uses. A network whose forward torch.fx cannot
    follow is copied as it is.
    """
    was_training = network.training
    network.eval()
    try:
        folded: nn.Module = fuse(network)
    except (RuntimeError, TypeError, ValueError):
        folded = copy.deepcopy(network)
    network.train(was_training)
    return folded


def check_teacher_names(names: Sequence[str]) -> None:
    """Checks that there are names, and none twice."""
    if not names:
        raise ConfigError("teachers: expected at least one, got none")
    for name in names:
        if list(names).count(name) > 1:
            raise ConfigError(f"teachers: the name '{name}' is used more than once")


def _check_teachers(networks: Sequence[Network], names: Sequence[str]) -> None:
    if networks and len(names) != len(networks):
        raise ConfigError(f"teachers: {len(networks)} networks but {len(names)} names")
    check_teacher_names(names)
    for name, network in zip(names, networks, strict=True):
        for key, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise ConfigError(f"teachers: '{key}' of '{name}' holds NaN or infinity")
