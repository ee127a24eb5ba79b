"""Networks as a user might have them, which the tests name as `users_networks:Class`."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from mtkd_env.networks.base import Network


class Plain(nn.Module):
    """A classifier that knows nothing of this package; its map takes negative values."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 8) -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, int(width), 3, 2, padding=1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(int(width)), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(int(width), 12, 3, padding=1), nn.BatchNorm2d(12))
        self.unused = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(12, num_classes)

    def forward(self, inputs: Tensor) -> Any:
        maps = self.body(self.stem(inputs))
        return self.classifier(self.dropout(maps.mean(dim=(2, 3))))


class Own(Network):
    """A network of this package."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.feature_dim, self.map_channels = num_classes, 5, 5
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3, 2, padding=1), nn.ReLU())
        self.classifier = nn.Linear(5, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


class Deciding(Own):
    """Its forward depends on the numbers, which torch.fx cannot follow."""

    def features(self, inputs: Tensor) -> Tensor:
        return self.body(inputs if inputs.sum() > 0 else -inputs)


class SmallTransformer(VisionTransformer):  # 16 patches and a class token
    def __init__(self, num_classes: int) -> None:
        super().__init__(16, 4, 2, 2, hidden_dim=8, mlp_dim=16, num_classes=num_classes)
        nn.init.normal_(self.heads[-1].weight)
        nn.init.normal_(self.class_token)


class TenClasses(Plain):
    def __init__(self) -> None:
        super().__init__(num_classes=10, in_channels=1)


class ControlFlow(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


class InTraining(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs + 1 if self.training else inputs)


class Pair(nn.Sequential):
    """A stage that also gives what came before its last activation."""

    def forward(self, inputs: Tensor) -> Any:
        before = super().forward(inputs)
        return functional.relu(before), before


class Flags(Plain):
    """Flags that say what to give, layers with two outputs, dropout as a function."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels)
        self.body = Pair(*self.body)

    def forward(self, inputs: Tensor, is_feat: bool = False, preact: bool = False) -> Any:
        maps, before = self.body(self.stem(inputs))
        feature = functional.dropout(maps.mean(dim=(2, 3)), 0.5, training=self.training)
        logits = self.classifier(feature)
        if is_feat:
            return [before if preact else maps, feature], logits
        return logits


class Attribute(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return SimpleNamespace(loss=None, logits=super().forward(inputs))


class Dictionary(Plain):
    def forward(self, inputs: Tensor) -> Any:
        maps = self.body(self.stem(inputs))
        feature = maps.mean(dim=(2, 3))
        return {"embedding": feature, "out": self.classifier(feature)}


class Tuple(Flags):
    def forward(self, inputs: Tensor, is_feat: bool = True, preact: bool = True) -> Any:
        return super().forward(inputs, is_feat, preact)


class TwoLogits(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), super().forward(inputs)


class PastTheMap(Plain):
    def forward(self, inputs: Tensor) -> Any:
        maps = self.body(self.stem(inputs))
        return self.classifier(maps.mean(dim=(2, 3)) + inputs.mean())


class NoLinearEnd(Plain):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs).log_softmax(1)


def number(num_classes: int) -> int:
    return num_classes


CONSTANT = 3
