"""Crop, flip and normalisation of whole batches, as pure functions of tensors on any device."""

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor


def crop_and_flip(
    padded: UInt8[Tensor, "N K H W"],
    index: Int64[Tensor, " B"],
    offsets: Int64[Tensor, "B 2"],
    flips: Bool[Tensor, " B"],
    size: tuple[int, int],
) -> UInt8[Tensor, "B K H2 W2"]:
    """One crop of each chosen image, mirrored left to right where asked, as a single gather.

    Args:
        padded: All images with their padding, contiguous.
        index: Which of them to take.
        offsets: Top and left corner of each crop in its padded image.
        flips: Which of the crops to mirror.
        size: Height and width of a crop.
    """
    _, channels, height, width = padded.shape
    along_h, along_w, along_k = (torch.arange(n, device=padded.device) for n in (*size, channels))
    rows = offsets[:, :1] + along_h
    columns = offsets[:, 1:] + torch.where(flips[:, None], size[1] - 1 - along_w, along_w)
    planes = index[:, None] * channels + along_k
    # Positions in the flat storage: several times faster than to index the four axes.
    lines = planes[:, :, None] * height + rows[:, None, :]
    positions = lines[:, :, :, None] * width + columns[:, None, None, :]
    return padded.view(-1).index_select(0, positions.view(-1)).view(positions.shape)


def normalize(
    images: UInt8[Tensor, "B K H W"], mean: Float32[Tensor, " K"], std: Float32[Tensor, " K"]
) -> Float32[Tensor, "B K H W"]:
    """Images scaled from 0..255 to [0, 1], less the mean of each channel, in units of its std."""
    return (images / 255 - mean[:, None, None]) / std[:, None, None]
