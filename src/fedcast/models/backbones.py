"""What FeDPM's encoder and decoder are made of: transformers, or, for its ablation, convolutions, dense layers, LSTM or GRU.

Found in its released code (fedpm.md B.2): the transformers; a CNN in the manner of a VQ-VAE (a stride a factor of the patch, two
residual layers, transposed strides in the decoder); dense layers patch by patch, and in the decoder on all tokens at once; a
recurrent encoder that reads both ways, a recurrent decoder that reads forwards. At the paper's width of 64 an encoder is 128 wide
inside, a decoder 256, a residual layer 64. Left out: dropout.

Encoders map patches [B, N, P] and decoders prototypes [B, N, d], 0 where nothing was observed, to tokens [B, N, d] (the convolutional
decoder: [B, N P, d]); both get the additive attention bias over the N patches, which only the transformers read.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.errors import ModelError
from fedcast.models.base import ModelConfig
from fedcast.models.layers import Linear, self_attention, sinusoids

Backbone = Literal["transformer", "cnn", "fc", "lstm", "gru"]

_STRIDES = {4: (2, 2), 8: (2, 2, 2), 12: (2, 2, 3), 16: (2, 2, 2, 2)}
_RESIDUALS = 2


def build_encoder(kind: Backbone, config: ModelConfig) -> nn.Module:
    """Return an encoder, its weights empty."""
    width = config.d_model
    if kind == "transformer":
        return PatchEncoder(config)
    if kind == "cnn":
        return ConvEncoder(config)
    if kind == "fc":
        return DenseEncoder(config.patch, width)
    return Recurrent(kind, (config.patch, width, 2 * width, width), config.encoder_layers, both_ways=True)


def build_decoder(kind: Backbone, config: ModelConfig, heads: int) -> nn.Module:
    """Return a decoder without its last layer, its weights empty."""
    width = config.d_model
    if kind == "transformer":
        return PositionedBlocks(config, heads)
    if kind == "cnn":
        return ConvDecoder(config)
    if kind == "fc":
        return DenseDecoder(config)
    return Recurrent(kind, (width, 4 * width, 4 * width, width), config.decoder_layers, both_ways=False)


class PostNormBlock(nn.Module):
    """``H = LN(x + Attention(x))``, then ``LN(H + W2 ReLU(W1 H))``: torch's ``TransformerEncoderLayer`` without dropout."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.n_heads = heads
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.widen, self.narrow = Linear(width, hidden), Linear(hidden, width)
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens [B, N, d] to [B, N, d]; ``bias`` is as in :func:`fedcast.models.layers.key_bias`."""
        x = self.attention_norm(x + self.out(self_attention(self.qkv(x), self.n_heads, bias)))
        return cast(Tensor, self.forward_norm(x + self.narrow(F.relu(self.widen(x)))))


class PatchEncoder(nn.Module):
    """Linear embedding, learnt positions and blocks whose feed-forward part is twice as wide."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.embedding = Linear(config.patch, width)
        self.positions = nn.Parameter(torch.empty(config.context_patches, width))
        self.blocks = nn.ModuleList(PostNormBlock(width, config.n_heads, 2 * width) for _ in range(config.encoder_layers))

    def forward(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Map patches [B, N, P] to features [B, N, d]."""
        x: Tensor = self.embedding(patches) + self.positions
        for block in self.blocks:
            x = block(x, bias)
        return x


class PositionedBlocks(nn.Module):
    """Fixed positions and blocks whose feed-forward part is four times as wide."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        width = config.d_model
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, 4 * width) for _ in range(config.decoder_layers))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map prototypes [B, N, d] to tokens [B, N, d]."""
        x = x + sinusoids(*x.shape[1:], x.dtype, x.device)
        for block in self.blocks:
            x = block(x, bias)
        return x


class Conv(nn.Conv1d):
    """A convolution that leaves its weights empty, as :class:`fedcast.models.layers.Linear` does."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class ConvTranspose(nn.ConvTranspose1d):
    """A transposed convolution that leaves its weights empty."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Residuals(nn.Module):
    """``x + W2 ReLU(W1 ReLU(x))`` twice, with kernels of 3 and 1 and without biases, then ReLU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Conv(channels, hidden, 3, padding=1, bias=False) for _ in range(_RESIDUALS))
        self.outer = nn.ModuleList(Conv(hidden, channels, 1, bias=False) for _ in range(_RESIDUALS))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, N] to [B, C, N]."""
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(F.relu(inner(F.relu(x))))
        return F.relu(x)


class ConvEncoder(nn.Module):
    """Strided convolutions over the whole window, one token a patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden, strides = config.d_model, 2 * config.d_model, _strides(config.patch)
        channels = (1, hidden // 2, *(hidden for _ in strides[1:]))
        pairs = zip(pairwise(channels), strides, strict=True)
        self.embedding = nn.ModuleList(Conv(a, b, 4, stride=stride, padding=1) for (a, b), stride in pairs)
        self.mix, self.residuals = Conv(hidden, hidden, 3, padding=1), Residuals(hidden, width)
        self.out = Conv(hidden, width, 1)

    def forward(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Map patches [B, N, P] to features [B, N, d]."""
        x = patches.flatten(1).unsqueeze(1)
        for layer in self.embedding:
            x = F.relu(layer(x))
        return cast(Tensor, self.out(self.residuals(self.mix(x))).transpose(1, 2))


class ConvDecoder(nn.Module):
    """Transposed strides from one token a patch to one a time step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden, strides = config.d_model, 4 * config.d_model, _strides(config.patch)[::-1]
        channels = (*(hidden for _ in strides[1:]), hidden // 2, width)
        self.mix, self.residuals = Conv(width, hidden, 3, padding=1), Residuals(hidden, width)
        pairs = zip(pairwise(channels), strides, strict=True)
        self.stretch = nn.ModuleList(ConvTranspose(a, b, stride + 2, stride=stride, padding=1) for (a, b), stride in pairs)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map prototypes [B, N, d] to tokens [B, N P, d]."""
        x = self.residuals(self.mix(x.transpose(1, 2)))
        for layer in self.stretch:
            x = F.relu(layer(x))
        return x.transpose(1, 2)


class DenseEncoder(nn.Module):
    """``ReLU(W3 ReLU(W2 W1 x))``, each patch for itself."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.embedding, self.widen, self.narrow = Linear(patch, width), Linear(width, 2 * width), Linear(2 * width, width)

    def forward(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Map patches [B, N, P] to features [B, N, d]."""
        return F.relu(self.narrow(F.relu(self.widen(self.embedding(patches)))))


class DenseDecoder(nn.Module):
    """Dense layers with ReLU between them, on all tokens at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        ends, hidden = config.context_patches * config.d_model, 4 * config.d_model
        sizes = (ends, *(hidden for _ in range(config.decoder_layers - 1)), ends)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map prototypes [B, N, d] to tokens [B, N, d]."""
        *inner, last = self.layers
        flat = x.flatten(1)
        for layer in inner:
            flat = F.relu(layer(flat))
        return cast(Tensor, last(flat).view_as(x))


class Lstm(nn.LSTM):
    """An LSTM that leaves its weights empty."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Gru(nn.GRU):
    """A GRU that leaves its weights empty."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Recurrent(nn.Module):
    """A linear layer, recurrent layers and a linear layer; ``sizes`` are inputs, their embedding, the recurrent width and outputs."""

    def __init__(self, kind: Literal["lstm", "gru"], sizes: tuple[int, int, int, int], layers: int, *, both_ways: bool) -> None:
        super().__init__()
        inputs, embedded, hidden, outputs = sizes
        self.embedding = Linear(inputs, embedded)
        self.recurrent = (Lstm if kind == "lstm" else Gru)(embedded, hidden, layers, batch_first=True, bidirectional=both_ways)
        self.out = Linear(hidden * (2 if both_ways else 1), outputs)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map [B, N, inputs] to [B, N, outputs]."""
        return cast(Tensor, self.out(self.recurrent(self.embedding(x))[0]))


def _strides(patch: int) -> tuple[int, ...]:
    if patch not in _STRIDES:
        raise ModelError(
            f"the convolutional backbone has no strides for patches of {patch} steps",
            hint=f"use a patch of {', '.join(map(str, _STRIDES))}, or another backbone",
        )
    return _STRIDES[patch]
