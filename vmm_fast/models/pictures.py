"""Inputs that are pictures: conversion from and to flat values, and random shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Picture", "RandomShifts"]


class Picture(nn.Module):
    """A layer that turns flat values [B, V] into pictures [B, colours, height, width], or back."""

    def __init__(self, shape: tuple[int, ...], back: bool = False) -> None:
        super().__init__()
        if len(shape) == 1:
            shape = (math.isqrt(shape[0]),) * 2 if math.isqrt(shape[0]) ** 2 == shape[0] else ()
        if not 2 <= len(shape) <= 3:
            raise ValueError("shape must be of a picture: a square, [H, W], [C, H, W] or [H, W, C]")
        self.colours_last = len(shape) == 3 and shape[2] < shape[0]
        self.shape, self.back = shape, back
        *_, self.colours, self.height, self.width = (1, *shape)
        if self.colours_last:
            self.height, self.width, self.colours = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return values [B, V] as pictures, or pictures as values."""
        if self.back:
            return (x.movedim(1, -1) if self.colours_last else x).flatten(1)
        pictures: Tensor
        if self.colours_last:
            pictures = x.unflatten(1, self.shape).movedim(-1, 1)
        else:
            pictures = x.unflatten(1, (self.colours, self.height, self.width))
        return pictures


class RandomShifts:
    """Random shifts of every picture in a batch, vertical and horizontal, for ``fit(augment=...)``.

    The content of a picture does not depend on its position; from few pictures a network learns
    this by shifts. Values at the edge are repeated.

    Parameters
    ----------
    shape : int or tuple of int
        Shape of one input, as for :class:`vmm_fast.models.VAE` with ``channels``.
    share : float
        Largest shift as a share of height and of width, rounded down to whole pixels: by default
        a picture of 8 x 8 does not move.

    Examples
    --------
    >>> RandomShifts((28, 28))(torch.rand(5, 28, 28)).shape  # by up to two pixels
    torch.Size([5, 28, 28])
    """

    def __init__(self, shape: int | Sequence[int], share: float = 1 / 14) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f"share must be in [0, 1), but is {share!r}")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.picture, self.back = Picture(shape), Picture(shape, back=True)
        sides = (self.picture.height, self.picture.width)
        self.most = [math.floor(share * side + 1e-9) for side in sides]

    def __call__(self, x: Tensor) -> Tensor:
        """Return inputs [B, *shape], each shifted at random."""
        pictures = self.picture(x.flatten(1))
        places = []
        for size, most in zip(pictures.shape[2:], self.most, strict=True):
            by = torch.randint(-most, most + 1, (len(x), 1), device=x.device)
            places.append((torch.arange(size, device=x.device) + by).clamp(0, size - 1))
        rows, columns = places[0][:, :, None], places[1][:, None, :]
        every = torch.arange(len(x), device=x.device)[:, None, None]
        shifted: Tensor = self.back(pictures[every, :, rows, columns].movedim(-1, 1))
        return shifted.view_as(x)
