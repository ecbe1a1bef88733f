"""Codecs of an update: fewer bytes for one float32 vector, and a decoder that refuses what no encoder writes.

=================  ================================================================  ==================================================
codec              bytes of ``n`` values                                             error of a value ``x``
=================  ================================================================  ==================================================
:class:`BFloat16`  2 n: the upper half of each                                       at most ``2**-8 |x|``
:class:`Int8`      n (1 + 4 / b): a byte each, and a float32 scale a block of b      at most half a step of ``max |x| / 127`` of its block;
                                                                                     a whole one where rounding is stochastic
:class:`TopK`      about 3 s n for a share s down to 1 %: bfloat16, a byte a gap     kept: ``2**-8 |x|``; others ``|x|``, no more than the
                                                                                     smallest kept
=================  ================================================================  ==================================================

Error feedback (Seide et al., 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) is the caller's: it adds what the last codes left out
to the next vector, so that sums of what was decoded stay within the error of one step of the true sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from fedcast.errors import ScreenError

Codes = dict[str, Tensor]
"""The codes of a vector, by name."""
CodeLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each code; of ``"gaps"`` the longest shape, of all others the only one."""
_FAR = 255  # a gap byte of this value goes on without a value
_LEAST = 128 * torch.finfo(torch.float32).tiny
_HINT = "the reply is dropped and the round goes on without it"


class Codec(Protocol):
    """Turns float32 vectors into codes and back."""

    def layout(self, size: int) -> CodeLayout:
        """Return what the codes of a vector ``[size]`` are."""
        ...

    def encode(self, vector: Tensor, rng: np.random.Generator) -> Codes:
        """Return the codes of a finite vector, float32 ``[size]``; ``rng`` is for codecs that draw."""
        ...

    def decode(self, codes: Mapping[str, Tensor], size: int) -> Tensor:
        """Return the vector of codes that came from anywhere, float32 ``[size]``.

        Raises
        ------
        ScreenError
            When no encoder writes such codes.
        """
        ...


@dataclass(frozen=True)
class BFloat16:
    """Each value rounded to the nearest bfloat16."""

    def layout(self, size: int) -> CodeLayout:
        """Return what the codes are; see :meth:`Codec.layout`."""
        return {"bfloat16": ((size,), torch.bfloat16)}

    def encode(self, vector: Tensor, rng: np.random.Generator) -> Codes:
        """Return the codes; see :meth:`Codec.encode`."""
        return {"bfloat16": vector.to(torch.bfloat16)}

    def decode(self, codes: Mapping[str, Tensor], size: int) -> Tensor:
        """Return the vector; see :meth:`Codec.decode`."""
        check_codes(codes, self.layout(size))
        return _finite(codes["bfloat16"].float(), "bfloat16")


@dataclass(frozen=True)
class Int8:
    """Blocks of values in steps of ``max |x| / 127`` of the block (block-wise absmax: Dettmers et al., ICLR 2022, arXiv 2110.02861).

    Attributes
    ----------
    block
        Values a block.
    stochastic
        Whether a value goes up with the probability of what it has above the step below, and is then right on average; else it goes to
        the nearest step.
    """

    block: int = 256
    stochastic: bool = False

    def layout(self, size: int) -> CodeLayout:
        """Return what the codes are; see :meth:`Codec.layout`."""
        return {"int8": ((size,), torch.int8), "scales": ((-(-size // self.block),), torch.float32)}

    def encode(self, vector: Tensor, rng: np.random.Generator) -> Codes:
        """Return the codes; see :meth:`Codec.encode`."""
        blocks = torch.nn.functional.pad(vector, (0, -len(vector) % self.block)).view(-1, self.block)
        largest = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_zeros(0)
        # A block of numbers so small that its step would lose digits is all zeros.
        scales = torch.where(largest < _LEAST, 0.0, largest / 127)
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
        exact = torch.where(scales.unsqueeze(1) > 0, blocks / steps, 0.0)
        if self.stochastic:
            exact = exact.add_(torch.from_numpy(rng.random(tuple(exact.shape), dtype=np.float32))).floor_()
        else:
            exact = exact.round_()
        return {"int8": exact.clamp_(-127, 127).to(torch.int8).flatten()[: len(vector)].contiguous(), "scales": scales}

    def decode(self, codes: Mapping[str, Tensor], size: int) -> Tensor:
        """Return the vector; see :meth:`Codec.decode`."""
        check_codes(codes, self.layout(size))
        scales = _finite(codes["scales"], "scales")
        if size and (bool((scales < 0).any()) or bool((codes["int8"] == -128).any())):
            raise ScreenError("its int8 codes are out of range", hint=_HINT)
        whole = torch.nn.functional.pad(codes["int8"].float(), (0, -size % self.block)).view(-1, self.block)
        return _finite(whole.mul_(scales.unsqueeze(1)).flatten()[:size].contiguous(), "int8")


@dataclass(frozen=True)
class TopK:
    """The values of largest magnitude (Aji and Heafield, 2017; Stich et al., NeurIPS 2018, arXiv 1809.07599), in bfloat16; others are 0.

    Of equal magnitudes the first are kept. Their places are gaps of a byte: the zeros before a value, and 255 where 255 zeros
    go by without one; places are thus in order and none stands twice, whatever the bytes say.

    Attributes
    ----------
    share
        Share of the values that are kept, at least one.
    """

    share: float = 0.05

    def layout(self, size: int) -> CodeLayout:
        """Return what the codes are; see :meth:`Codec.layout`."""
        kept = self.kept(size)
        return {"values": ((kept,), torch.bfloat16), "gaps": ((kept + size // _FAR,), torch.uint8)}

    def kept(self, size: int) -> int:
        """Return how many of ``size`` values are kept."""
        # Rounded first: 0.28 * 25 is a little more than 7 in floating point.
        return min(size, max(1, ceil(round(self.share * size, 9))))

    def encode(self, vector: Tensor, rng: np.random.Generator) -> Codes:
        """Return the codes; see :meth:`Codec.encode`."""
        kept = self.kept(len(vector))
        if not kept:
            return {"values": vector.to(torch.bfloat16), "gaps": torch.zeros(0, dtype=torch.uint8)}
        magnitude = vector.abs()
        least = torch.topk(magnitude, kept, sorted=False).values.min()
        above = torch.nonzero(magnitude > least).flatten()
        equal = torch.nonzero(magnitude == least).flatten()[: kept - len(above)]
        places = torch.cat([above, equal]).sort().values
        zeros = torch.diff(places, prepend=places.new_tensor([-1])).sub_(1).numpy()
        far = zeros // _FAR
        gaps = np.full(kept + int(far.sum()), _FAR, dtype=np.uint8)
        gaps[np.cumsum(far + 1) - 1] = zeros % _FAR
        return {"values": vector[places].to(torch.bfloat16), "gaps": torch.from_numpy(gaps)}

    def decode(self, codes: Mapping[str, Tensor], size: int) -> Tensor:
        """Return the vector; see :meth:`Codec.decode`."""
        check_codes(codes, self.layout(size))
        vector = torch.zeros(size)
        gaps, values = codes["gaps"].numpy(), codes["values"].float()
        ends = gaps != _FAR
        places = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(np.count_nonzero(ends))
        if len(places) != len(values) or (len(gaps) and (gaps[-1] == _FAR or places[-1] >= size)):
            raise ScreenError("its top-k places are out of range", hint=_HINT)
        vector[torch.from_numpy(places)] = _finite(values, "values")
        return vector


@dataclass(frozen=True)
class BitDifference:
    """How far each float32 lies from one that both sides have, in steps of the last place: lossless, and small numbers for zstd.

    Not a :class:`Codec`: it needs the vector the other side has.
    """

    def layout(self, size: int) -> CodeLayout:
        """Return what the codes are; see :meth:`Codec.layout`."""
        return {"bits": ((size,), torch.int32)}

    def encode(self, vector: Tensor, known: Tensor) -> Codes:
        """Return the difference of ``vector`` to ``known``, both float32 ``[size]``."""
        # Integers wrap, so nothing can be lost; zigzag: 0, -1, 1, -2 become 0, 1, 2, 3, whose upper bytes are all zero.
        steps = vector.contiguous().view(torch.int32) - known.contiguous().view(torch.int32)
        return {"bits": (steps << 1) ^ (steps >> 31)}

    def decode(self, codes: Mapping[str, Tensor], known: Tensor) -> Tensor:
        """Return the vector; :class:`~fedcast.errors.ScreenError` when no encoder writes such codes."""
        check_codes(codes, self.layout(len(known)))
        zigzag = codes["bits"]
        steps = ((zigzag >> 1) & 0x7FFFFFFF) ^ -(zigzag & 1)
        return (known.contiguous().view(torch.int32) + steps).view(torch.float32)


def deflate(codes: Mapping[str, Tensor], level: int) -> Tensor:
    """Return codes as one zstd frame, uint8 ``[m]``, at a level from 1 to 22.

    Bytes of equal weight lie together (first all lowest bytes of a tensor, and so on): the upper ones of floats are much alike.
    """
    raw = b"".join(_bytes_of(codes[name]).T.tobytes() for name in sorted(codes))
    frame = zstandard.ZstdCompressor(level=level).compress(raw)
    return torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy())


def inflate(frame: Tensor, layout: CodeLayout) -> Codes:
    """Return the codes of a frame that came from anywhere; never takes more memory than the layout's longest codes.

    Raises
    ------
    ScreenError
        When the frame is none, or its length is not that of the layout.
    """
    most = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    raw = _decompress(frame, sum(most.values()))
    # At most one code is of varying length: it has what the others leave.
    lengths = {name: most[name] for name in most if name != "gaps"}
    rest = len(raw) - sum(lengths.values())
    if rest < 0 or rest > most.get("gaps", 0):
        raise ScreenError("its zstd frame has another length than declared", hint=_HINT)
    codes, start = {}, 0
    for name in sorted(layout):
        dtype, length = layout[name][1], lengths.get(name, rest)
        planes = np.frombuffer(raw, dtype=np.uint8, count=length, offset=start).reshape(dtype.itemsize, -1)
        codes[name] = torch.from_numpy(np.array(planes.T, order="C")).flatten().view(dtype)
        start += length
    return codes


def _decompress(frame: Tensor, most: int) -> bytes:
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise ScreenError(f"its zstd frame is {frame.dtype} {tuple(frame.shape)}", hint=_HINT)
    data = frame.numpy().tobytes()
    try:
        # The library allocates what the frame's header claims, so the claim is checked first.
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed > most:
            raise ScreenError("its zstd frame claims no length, or more bytes than declared", hint=_HINT)
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ScreenError("its zstd frame cannot be read", hint=_HINT) from error
    return raw


def check_codes(codes: Mapping[str, Tensor], layout: CodeLayout) -> None:
    """Check names, types and shapes of codes; :class:`~fedcast.errors.ScreenError` names the first that does not fit."""
    if codes.keys() != layout.keys():
        raise ScreenError(f"codes missing or not declared: {', '.join(sorted(codes.keys() ^ layout.keys()))}", hint=_HINT)
    for name, (shape, dtype) in layout.items():
        code = codes[name]
        fits = code.dim() == 1 and (len(code) <= shape[0] if name == "gaps" else tuple(code.shape) == shape)
        if code.dtype != dtype or not fits:
            raise ScreenError(f"its {name} are {code.dtype} {tuple(code.shape)}, declared is {dtype} {shape}", hint=_HINT)


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ScreenError(f"its {name} are not finite", hint=_HINT)
    return values


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, [numel, bytes an element]."""
    return tensor.reshape(-1, 1).contiguous().view(torch.uint8).numpy()
