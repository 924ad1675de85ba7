"""Small classifiers for digits (1, 8, 8) and MNIST (1, 28, 28)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advgame.classifiers.first_layer import FirstConv2d


class SmallCNN(nn.Module):
    """Two convolutions, the second with stride 2, and one hidden layer.

    No batch norm: the network is the same function in training and evaluation mode. From 16
    pixels on the first convolution is 5x5 with stride 2, which keeps the cost near that of the
    8x8 network.

    Args:
        shape: (C, H, W) of the images.
        classes: number of classes K.
        width: channels of the first convolution, 32 (16 for the larger images) when None; the
            second has twice as many.
        hidden: units of the hidden layer.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, width: int | None = None, hidden: int = 128
    ) -> None:
        super().__init__()
        channels, height, side = shape
        large = min(height, side) >= 16
        width = width or (16 if large else 32)
        self.features = nn.Sequential(
            FirstConv2d(channels, width, 5, stride=2, padding=2)
            if large
            else nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        shrink = 4 if large else 2
        self.hidden = nn.Linear(2 * width * -(-height // shrink) * -(-side // shrink), hidden)
        self.head = nn.Linear(hidden, classes)
        self.width = hidden

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, hidden), the last hidden layer."""
        return F.relu(self.hidden(self.features(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.head(self.embed(x))
        return logits


class MinimaxCNN(nn.Module):
    """The MNIST network of the minimax paper (Hamm & Mehra 2018, appendix A): 1.66 M parameters.

    Two 5x5 convolutions (32, 64 channels), each with 2x2 max pooling, a hidden layer of 512 with
    dropout 0.5. ReLU and maximum commute: taking the maximum first is the same to the bit, with
    a quarter of the work. The paper's pixels lie in [-1, 1]; here the first layer makes them so
    from [0, 1].
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        channels, height, side = shape
        self.features = nn.Sequential(
            FirstConv2d(channels, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * (height // 4) * (side // 4), 512)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, classes)
        self.width = 512

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 512), the hidden layer before dropout."""
        return F.relu(self.hidden(self.features(2 * x - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.head(self.dropout(self.embed(x)))
        return logits
