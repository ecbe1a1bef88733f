"""Encoder and decoder blocks with a hand-written backward pass: torch's matrix products, native kernels between them.

Each block is one node of the autograd graph instead of about forty. Activations are bfloat16; sums and everything inside a kernel
are float32. The torch path in :mod:`fedcast.models.layers` is the reference: ``tests/kernels`` holds outputs and gradients of both
against float32.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedcast.kernels.library import kernels

Table = tuple[Tensor, Tensor]
Tables = tuple[Table, Table] | None
_LONGEST = 256  # tokens; the kernels hold one head's scores in the second-level cache
_EPS = 1e-5


class _Heads(ctypes.Structure):
    """What the attention kernels read; the fields and their order are those of ``struct Heads`` in kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_size_t) for name in ("q_stride", "kv_stride")),
        *((name, ctypes.c_void_p) for name in ("q_bias", "k_bias", "v_bias", "q_cos", "q_sin", "k_cos", "k_sin")),
        *((name, ctypes.c_size_t) for name in ("q_table", "k_table")),
        ("mask", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("mask_rows", "windows", "heads", "queries", "keys", "e")),
    )


def fits(x: Tensor, weight: Tensor, keys: int, heads: int) -> bool:
    """Whether the kernels can compute a block with that weight on tokens ``x`` [B, N, d], with that many keys and heads."""
    typed = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return typed and (x.shape[-1] // heads) % 32 == 0 and max(x.shape[1], keys) <= _LONGEST


class _Rest(NamedTuple):
    """Weights of what follows the attention: its output projection, a layer norm, the feed-forward part."""

    out: Tensor
    out_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    last: Tensor
    last_bias: Tensor


class EncoderBlockFunction(torch.autograd.Function):
    """Pre-norm self-attention and feed-forward, both residual; see :class:`fedcast.models.layers.EncoderBlock`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, table: Table | None, heads: int, *weights: Tensor) -> Tensor:
        """Map tokens [B, N, d] to [B, N, d]; ``weights`` in the order of the block's parameters."""
        norm, norm_bias, qkv, qkv_bias = weights[:4]
        rest = _Rest(*weights[4:])
        batch, length, width = x.shape
        flat = x.reshape(-1, width).contiguous()  # [B N, d]
        normal, stats, residual = _layer_norm(flat, norm, norm_bias, rest.out_bias)
        packed, mask = normal @ qkv.t(), _laid_out(mask, batch)  # [B N, 3 d]
        shape = (batch, length, length)
        mixed = _attend(_self_attention(packed, qkv_bias, mask, table, heads, shape), batch * length, width)
        result, saved = _finish(residual, mixed, rest)
        ctx.save_for_backward(flat, normal, stats, packed, mixed, mask, *saved, *weights)
        ctx.table, ctx.heads, ctx.shape = table, heads, shape
        return result.view(batch, length, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x`` and of the weights."""
        flat, normal, stats, packed, mixed, mask, *others = ctx.saved_tensors
        saved, weights = others[:5], others[5:]
        norm, _, qkv, qkv_bias = weights[:4]
        d_out, d_mixed, d_rest = _finish_backward(gradient.reshape(flat.shape).contiguous(), mixed, saved, _Rest(*weights[4:]))
        heads = _self_attention(packed, qkv_bias, mask, ctx.table, ctx.heads, ctx.shape)
        d_packed, d_qkv_bias = torch.empty_like(packed), torch.empty_like(qkv_bias)
        width = flat.shape[1]
        _attend_backward(
            heads, d_mixed, [(d_packed, 0), (d_packed, width), (d_packed, 2 * width)], [(d_qkv_bias, i * width) for i in range(3)]
        )
        d_qkv = d_packed.t() @ normal
        d_x, d_norm, d_norm_bias, _ = _layer_norm_backward(d_packed @ qkv, flat, stats, norm, d_out, sums=False)
        return (d_x.view(gradient.shape), None, None, None, d_norm, d_norm_bias, d_qkv, d_qkv_bias, *d_rest)


class DecoderBlockFunction(torch.autograd.Function):
    """Pre-norm cross-attention and feed-forward, both residual; see :class:`fedcast.models.layers.DecoderBlock`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, features: Tensor, mask: Tensor, tables: Tables, rows: Tensor | None, heads: int, *weights: Tensor
    ) -> Tensor:
        """Map horizon tokens [B, M, d] and features [R, N, d] to [B, M, d]; ``weights`` in the order of the block's parameters."""
        norm, norm_bias, query, query_bias, kv, kv_bias = weights[:6]
        rest = _Rest(*weights[6:])
        batch, length, width = x.shape
        # contiguous: of one query a window, expanded over the batch, reshape gives a view whose rows share their memory
        flat, memory = x.reshape(-1, width).contiguous(), features.reshape(-1, width).contiguous()  # [B M, d], [R N, d]
        normal, stats, residual = _layer_norm(flat, norm, norm_bias, rest.out_bias)
        queries, pairs = normal @ query.t(), memory @ kv.t()  # [B M, d], [R N, 2 d]
        shape, mask = (batch, length, features.shape[1]), _laid_out(mask, batch)
        attention = _cross_attention(queries, pairs, (query_bias, kv_bias), mask, tables, rows, heads, shape)
        mixed = _attend(attention, batch * length, width)
        result, saved = _finish(residual, mixed, rest)
        ctx.save_for_backward(flat, memory, normal, stats, queries, pairs, mixed, mask, *saved, *weights)
        ctx.tables, ctx.rows, ctx.heads, ctx.shape, ctx.memory = tables, rows, heads, shape, features.shape
        return result.view(batch, length, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, of ``features`` and of the weights."""
        flat, memory, normal, stats, queries, pairs, mixed, mask, *others = ctx.saved_tensors
        saved, weights = others[:5], others[5:]
        norm, _, query, query_bias, kv, kv_bias = weights[:6]
        d_out, d_mixed, d_rest = _finish_backward(gradient.reshape(flat.shape).contiguous(), mixed, saved, _Rest(*weights[6:]))
        heads = _cross_attention(queries, pairs, (query_bias, kv_bias), mask, ctx.tables, ctx.rows, ctx.heads, ctx.shape)
        d_queries, d_pairs = torch.empty_like(queries), torch.zeros_like(pairs)
        d_query_bias, d_kv_bias = torch.empty_like(query_bias), torch.empty_like(kv_bias)
        width = flat.shape[1]
        _attend_backward(
            heads, d_mixed, [(d_queries, 0), (d_pairs, 0), (d_pairs, width)], [(d_query_bias, 0), (d_kv_bias, 0), (d_kv_bias, width)]
        )
        d_features = (d_pairs @ kv).view(ctx.memory)
        d_x, d_norm, d_norm_bias, _ = _layer_norm_backward(d_queries @ query, flat, stats, norm, d_out, sums=False)
        first = (d_norm, d_norm_bias, d_queries.t() @ normal, d_query_bias, d_pairs.t() @ memory, d_kv_bias)
        return (d_x.view(gradient.shape), d_features, None, None, None, None, *first, *d_rest)


def _laid_out(mask: Tensor, batch: int) -> Tensor:
    """Return an additive mask [B or 1, 1, N or 1, keys] as the kernels read it: bfloat16, one a window, contiguous."""
    return mask.to(torch.bfloat16).expand(batch, -1, -1, -1).contiguous()


def _at(tensor: Tensor, offset: int = 0) -> int:
    return tensor.data_ptr() + offset * tensor.element_size()


def _self_attention(packed: Tensor, bias: Tensor, mask: Tensor, table: Table | None, heads: int, shape: tuple[int, int, int]) -> _Heads:
    width = packed.shape[1] // 3
    q, k, v = (_at(packed, i * width) for i in range(3))
    biases = [_at(bias, i * width) for i in range(3)]
    tables = None if table is None else (table, table)
    return _heads((q, k, v), (3 * width, 3 * width), biases, (mask, None), tables, heads, shape, width)


def _cross_attention(
    queries: Tensor,
    pairs: Tensor,
    biases: tuple[Tensor, Tensor],
    mask: Tensor,
    tables: Tables,
    rows: Tensor | None,
    heads: int,
    shape: tuple[int, int, int],
) -> _Heads:
    width = queries.shape[1]
    places = (_at(queries), _at(pairs), _at(pairs, width))
    starts = [_at(biases[0]), _at(biases[1]), _at(biases[1], width)]
    return _heads(places, (width, 2 * width), starts, (mask, rows), tables, heads, shape, width)


def _heads(
    places: tuple[int, int, int],
    strides: tuple[int, int],
    biases: list[int],
    seen: tuple[Tensor, Tensor | None],
    tables: Tables,
    heads: int,
    shape: tuple[int, int, int],
    width: int,
) -> _Heads:
    rotary: tuple[int | None, ...] = (None, None, None, None)
    apart = [0, 0]
    if tables is not None:
        rotary = tuple(_at(t) for table in tables for t in table)
        # one table for all windows, or one a window [B, 1, N, e]
        apart = [0 if table[0].dim() == 2 else table[0].shape[-1] * table[0].shape[-2] for table in tables]
    mask, rows = seen
    where = (_at(mask), None if rows is None else _at(rows))
    return _Heads(*places, *strides, *biases, *rotary, *apart, *where, mask.shape[2], shape[0], heads, shape[1], shape[2], width // heads)


def _attend(heads: _Heads, rows: int, width: int) -> Tensor:
    mixed = torch.empty(rows, width, dtype=torch.bfloat16)
    kernels().attention_forward(ctypes.byref(heads), _at(mixed))
    return mixed


def _attend_backward(heads: _Heads, gradient: Tensor, out: list[tuple[Tensor, int]], biases: list[tuple[Tensor, int]]) -> None:
    places = [_at(tensor, offset) for tensor, offset in (*out, *biases)]
    kernels().attention_backward(ctypes.byref(heads), _at(gradient), *places)


def _finish(residual: Tensor, mixed: Tensor, rest: _Rest) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the block's output [M, d] from residual (with the projection's bias) and attention output, and what backward needs."""
    middle = residual.addmm_(mixed, rest.out.t())
    normal, stats, result = _layer_norm(middle, rest.norm, rest.norm_bias, rest.last_bias)
    hidden = normal @ rest.hidden.t()  # [M, f]
    active = torch.empty_like(hidden)
    kernels().gelu_forward(_at(hidden), _at(rest.hidden_bias), _at(active), *hidden.shape)
    return result.addmm_(active, rest.last.t()), (middle, normal, stats, hidden, active)


def _finish_backward(gradient: Tensor, mixed: Tensor, saved: list[Tensor], rest: _Rest) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the gradients [M, d] of the residual stream and of the attention output, and those of the weights."""
    middle, normal, stats, hidden, active = saved
    library = kernels()
    d_last_bias, d_hidden_bias = torch.empty_like(rest.last_bias), torch.empty_like(rest.hidden_bias)
    library.column_sums(_at(gradient), _at(d_last_bias), *gradient.shape)
    d_last = gradient.t() @ active
    d_hidden = gradient @ rest.last  # [M, f]
    library.gelu_backward(_at(d_hidden), _at(hidden), _at(d_hidden), _at(d_hidden_bias), *hidden.shape)
    d_middle, d_norm, d_norm_bias, d_out_bias = _layer_norm_backward(d_hidden @ rest.hidden, middle, stats, rest.norm, gradient, sums=True)
    d_weights = (d_middle.t() @ mixed, d_out_bias, d_norm, d_norm_bias, d_hidden.t() @ normal, d_hidden_bias, d_last, d_last_bias)
    return d_middle, d_middle @ rest.out, d_weights


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows, mean and 1 / deviation [M, 2], and ``x + residual_bias``."""
    normal, residual, stats = torch.empty_like(x), torch.empty_like(x), torch.empty(x.shape[0], 2)
    kernels().layer_norm_forward(_at(x), _at(weight), _at(bias), _at(normal), _at(stats), _at(residual_bias), _at(residual), *x.shape, _EPS)
    return normal, stats, residual


def _layer_norm_backward(
    gradient: Tensor, x: Tensor, stats: Tensor, weight: Tensor, residual: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (with the residual's), of weight and bias, and where asked the column sums of the first."""
    d_x, d_weight, d_bias, total = torch.empty_like(x), *(torch.empty_like(weight) for _ in range(3))
    kernels().layer_norm_backward(
        _at(gradient),
        _at(x),
        _at(stats),
        _at(weight),
        _at(residual),
        _at(d_x),
        _at(d_weight),
        _at(d_bias),
        _at(total) if sums else None,
        *x.shape,
    )
    return d_x, d_weight, d_bias, total
