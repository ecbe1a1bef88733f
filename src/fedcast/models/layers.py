"""Building blocks of the patch transformer: instance normalisation, patch embedding, attention, blocks.

Every block runs in float32 and in bfloat16. Shapes: B windows, N tokens, d width, h heads, e = d / h.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.kernels.blocks import DecoderBlockFunction, EncoderBlockFunction, fits

_MASKED = -1e9  # finite, so that a row without any key stays finite; its softmax weight is exactly 0 elsewhere
_ROPE_BASE = 100.0  # contexts are tens of patches: with the usual 10000 most pairs would hardly turn
_SMALLEST_SCALE = 1e-30
TARGET_LIMIT = 50.0
"""Standard deviations of the context to which targets are clamped in training: a series that leaves a near-constant context must not
drown the others in the loss."""


class Linear(nn.Linear):
    """A linear layer that leaves its weights empty: the model fills them from its own generator, not from the global one."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class InstanceNorm:
    """Standardise each window by mean and standard deviation over its observed points.

    A constant window gets a hundredth of its level as scale (0.01 when the level is 0), a window without observed points
    loc 0 and scale 1. Nothing overflows: windows are first divided by their largest magnitude.
    """

    @staticmethod
    def forward(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised values (0 where missing) [B, L], loc [B, 1] and scale [B, 1].

        Parameters
        ----------
        values
            [B, L], float32 or float64, finite, 0 where missing.
        mask
            [B, L], True where observed.
        """
        observed = mask.to(values.dtype)
        count = observed.sum(dim=-1, keepdim=True)
        divisor = count.clamp_min(1.0)
        peak = values.abs().amax(dim=-1, keepdim=True)
        peak = torch.where(peak > 0, peak, 1.0)
        unit = values / peak
        mean = unit.sum(dim=-1, keepdim=True) / divisor
        centred = (unit - mean) * observed
        variance = centred.square().sum(dim=-1, keepdim=True) / divisor
        # whoever learns the values themselves (core-sets) asks for the gradient of the root, which is infinite at 0
        deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
        level = mean.abs()
        noise = 8 * torch.finfo(values.dtype).eps
        constant = 0.01 * torch.where(level > 0, level, 1.0)
        scale = torch.where(deviation > noise * level, deviation, constant)
        scale = torch.where(count > 0, scale, 1.0)
        return centred / scale, mean * peak, (scale * peak).clamp_min(_SMALLEST_SCALE)

    @staticmethod
    def inverse(normalised: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Return data units from normalised ones [B, ...]; ``loc`` and ``scale`` [B, 1]. The result is finite."""
        shape = (-1,) + (1,) * (normalised.dim() - 1)
        limit = torch.finfo(loc.dtype).max
        return torch.addcmul(loc.view(shape), normalised.to(loc.dtype), scale.view(shape)).clamp(-limit, limit)


def scaled_target(target: Tensor, loc: Tensor, scale: Tensor, limit: float = TARGET_LIMIT) -> Tensor:
    """Return targets [B, H] in units of their context, whose ``loc`` and ``scale`` are [B, 1], clamped to ``limit`` of them."""
    return ((target - loc) / scale).clamp(-limit, limit)


def observed_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of errors [B, H] where ``mask`` is True; 0, with zero gradients, where there is none."""
    observed = mask.to(torch.float32)
    return (error * observed).sum() / observed.sum().clamp_min(1.0)


@lru_cache(maxsize=64)
def rotary_table(length: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines [length, width] of rotary positions (Su et al., arXiv 2104.09864).

    ``x * cos + x.roll(width / 2) * sin`` turns each pair (i, i + width / 2). Cached, and never an inference tensor, since training
    may be the next to use it.
    """
    with torch.inference_mode(False), torch.no_grad():
        rates = _ROPE_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * rates  # [length, width / 2]
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat((cosines, cosines), -1).to(device, dtype), torch.cat((-sines, sines), -1).to(device, dtype)


@lru_cache(maxsize=64)
def sinusoids(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return fixed positions [count, width]: sines at even places, cosines at odd ones (Vaswani et al., arXiv 1706.03762)."""
    with torch.inference_mode(False), torch.no_grad():
        rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``x`` [..., h, N, e] by a :func:`rotary_table`, or by one table a row of the batch, [B, 1, N, e] each."""
    cosines, sines = table
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


def key_bias(patch_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask [B, 1, 1, N] that excludes patches without observed points as keys.

    A row without any usable key attends to all of its patches instead.
    """
    excluded = patch_mask.logical_not() & patch_mask.any(dim=-1, keepdim=True)
    return exclude(excluded, dtype)[:, None, None, :]


def exclude(excluded: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive attention mask of the same shape: 0, and where ``excluded`` is True so low that the weight is 0."""
    return excluded.to(dtype) * _MASKED


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, explicit: bool = False) -> Tensor:
    """Scaled dot-product attention of [B, h, N, e] tensors with an additive bias [B, 1, 1 or N, N_keys].

    On the CPU, torch's fused kernel is up to five times slower than plain products in bfloat16, and when float32 products are
    routed to oneDNN (``torch.set_float32_matmul_precision("medium")``); plain products are used there, and in compiled code, which
    cannot ask for that setting. Both give the same result within rounding. ``explicit`` asks for plain products anywhere.
    """
    plain = query.dtype == torch.bfloat16 or torch.compiler.is_compiling() or torch.get_float32_matmul_precision() != "highest"
    if explicit or (query.device.type == "cpu" and plain):
        return _attend_explicitly(query, key, value, bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def self_attention(packed: Tensor, heads: int, bias: Tensor) -> Tensor:
    """Return attention's output [B, N, d] from packed queries, keys and values [B, N, 3 d]; ``bias`` is as in :func:`key_bias`."""
    batch, length, width = packed.shape
    query, key, value = packed.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous().unbind()
    return attend(query, key, value, bias).transpose(1, 2).reshape(batch, length, width // 3)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    batch, heads, length, width = query.shape
    flat = batch * heads
    spread = bias.expand(batch, heads, -1, -1).flatten(0, 1)  # [B h, 1 or N, N_keys]
    keys = key.reshape(flat, -1, width).transpose(1, 2)
    scores = torch.baddbmm(spread, query.reshape(flat, length, width), keys, alpha=width**-0.5)  # [B h, N, N_keys]
    mixed = torch.bmm(scores.softmax(dim=-1), value.reshape(flat, -1, width))
    return mixed.view(batch, heads, length, width)


class FeedForward(nn.Module):
    """``out(GELU(hidden(x)))`` on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = Linear(width, hidden)
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        return cast(Tensor, self.out(F.gelu(self.hidden(x))))


class PatchEmbedding(nn.Module):
    """Residual MLP from a patch's values and mask to one token.

    Parameters
    ----------
    patch
        Time steps a patch.
    width
        Width of the token.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(2 * patch, width)
        self.out = Linear(width, width)
        self.skip = Linear(2 * patch, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Map [B, N, 2 * patch] (values, then mask) to [B, N, d]."""
        return cast(Tensor, self.out(F.gelu(self.hidden(patches))) + self.skip(patches))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, both residual.

    Attributes
    ----------
    native
        Whether to compute with the native kernels (:mod:`fedcast.kernels`) where they fit: bfloat16 on the CPU.
    explicit
        Whether attention is plain products, which can be differentiated twice; torch's fused kernel cannot.
    """

    native: bool = False
    explicit: bool = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, bias: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map [B, N, d] to [B, N, d].

        Parameters
        ----------
        x
            Tokens, [B, N, d].
        bias
            Additive attention bias, [B, 1, 1, N] from :func:`key_bias` or [B, 1, N, N].
        table
            Rotary table of the N positions, see :func:`rotate`, or ``None`` with learned positions.
        """
        batch, length, width = x.shape
        if self.native and fits(x, self.qkv.weight, length, self.heads):
            own = (*_pair(self.attention_norm), *_pair(self.qkv))
            return EncoderBlockFunction.apply(x, bias, table, self.heads, *own, *_rest(self))  # type: ignore[no-any-return, no-untyped-call]
        packed = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        packed = packed.permute(2, 0, 3, 1, 4).contiguous()  # [3, B, h, N, e]
        pair, (value,) = packed.split((2, 1))
        query, key = (pair if table is None else rotate(pair, table)).unbind()
        mixed = attend(query, key, value, bias, explicit=self.explicit)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return cast(Tensor, x + self.feed_forward(self.forward_norm(x)))


class DecoderBlock(nn.Module):
    """Pre-norm cross-attention of horizon queries to encoder features and feed-forward, both residual.

    Queries do not see each other, so a shorter horizon needs only its own queries. The feed-forward part is twice as wide as the
    model, half of the encoder's: what is shared between domains belongs in the encoder. ``native`` is as in
    :class:`EncoderBlock`.
    """

    native: bool = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)
        self.forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2 * width)

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        bias: Tensor,
        tables: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map queries [B, M, d] to [B, M, d].

        Parameters
        ----------
        x
            Horizon tokens, [B, M, d].
        features
            Encoder features, [B, N, d], or [R, N, d] where several windows share a row; already normalised.
        bias
            Additive attention bias, [B, 1, 1, N].
        tables
            Rotary tables of the M horizon and the N context positions, see :func:`rotate`, or ``None`` with learned positions.
        rows
            int64 [B]: the row of each window's features; ``None`` when each has its own.
        """
        batch, length, width = x.shape
        if self.native and fits(x, self.query.weight, features.shape[1], self.heads):
            own = (*_pair(self.attention_norm), *_pair(self.query), *_pair(self.kv))
            return DecoderBlockFunction.apply(x, features, bias, tables, rows, self.heads, *own, *_rest(self))  # type: ignore[no-any-return, no-untyped-call]
        query = self.query(self.attention_norm(x)).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, h, M, e]
        packed = self.kv(features).view(*features.shape[:2], 2, self.heads, width // self.heads)
        key, value = packed.permute(2, 0, 3, 1, 4).contiguous().unbind()  # [B, h, N, e] each
        if tables is not None:
            query, key = rotate(query, tables[0]), rotate(key, tables[1])
        if rows is not None:
            key, value = key.index_select(0, rows), value.index_select(0, rows)
        mixed = attend(query, key, value, bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return cast(Tensor, x + self.feed_forward(self.forward_norm(x)))


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return cast(Tensor, layer.weight), cast(Tensor, layer.bias)


def _rest(block: EncoderBlock | DecoderBlock) -> tuple[Tensor, ...]:
    feed = block.feed_forward
    return (*_pair(block.out), *_pair(block.forward_norm), *_pair(feed.hidden), *_pair(feed.out))
