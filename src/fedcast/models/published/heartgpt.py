"""HeartGPT (Davies et al., arXiv 2407.20775): small GPTs on tokenised ECG and PPG, computed here in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES, Forecast
from fedcast.models.contract import Encoding
from fedcast.models.files import CONFIG, WEIGHTS, check_tensors, read_weights
from fedcast.models.layers import observed_mean
from fedcast.models.published.base import Library, Published, PublishedConfig, read_json, write_json
from fedcast.models.published.pretrained import save_weights
from fedcast.models.seeding import seeded
from fedcast.safe import UnsafeError
from fedcast.tensors import check_file

_LEVELS = 100  # the range of the context is cut into as many steps
_PATHS = 20
_ROWS = 8  # windows whose paths are drawn at a time: what attention needs of more does not fit in a processor's cache
_SEED = 0
_MASKED = -1e9
_VOCABULARY = {"ecg": 101, "ppg": 102}


class Shape(NamedTuple):
    """What ``config.json`` says of a HeartGPT; the published models have the defaults.

    ``vocab_size`` tokens, ``block_size`` positions for context and horizon together, ``n_layer`` blocks of width ``n_embd`` with
    ``n_head`` heads, and ``horizon`` of the positions kept free for the forecast.
    """

    vocab_size: int
    block_size: int = 500
    n_embd: int = 64
    n_head: int = 8
    n_layer: int = 8
    horizon: int = 64


class _Head(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, size, bias=False)
        self.query = nn.Linear(width, size, bias=False)
        self.value = nn.Linear(width, size, bias=False)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(width, width // heads) for _ in range(heads))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """Map [B, T, d] to queries, keys and values, [3, B, h, T, e]."""
        maps = [getattr(head, name) for name in ("query", "key", "value") for head in self.heads]
        if all(type(one) is nn.Linear for one in maps):
            packed = F.linear(x, torch.cat([one.weight for one in maps]))
        else:  # an adapter stands in the place of some
            packed = torch.cat([one(x) for one in maps], dim=-1)
        return packed.view(*x.shape[:2], 3, len(self.heads), -1).permute(2, 0, 3, 1, 4)

    def merge(self, mixed: Tensor) -> Tensor:
        """Map [B, h, T, e] to [B, T, d]."""
        return cast(Tensor, self.proj(mixed.transpose(1, 2).flatten(2)))


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sa = _Attention(width, heads)
        self.ffwd = _FeedForward(width)
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)


class _Memory(NamedTuple):
    """Keys and values [B, h, T, e] of one block."""

    keys: Tensor
    values: Tensor


class GPT(nn.Module):
    """The network: learned positions, pre-norm blocks, attention scaled by the width of the model and not of a head, no dropout.

    Names of parameters are those of the published files.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.position_embedding_table = nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(_Block(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size)
        self.scale = shape.n_embd**-0.5

    def forward(self, tokens: Tensor, first: Tensor) -> tuple[Tensor, list[_Memory]]:
        """Return features [B, T, d], and what each block keeps.

        Parameters
        ----------
        tokens
            int64 [B, T].
        first
            int64 [B]: where each row begins; what stands before is not read, and the first token read has position 0.
        """
        length = tokens.shape[1]
        steps = torch.arange(length, device=tokens.device)
        places = (steps - first[:, None]).clamp_min(0)
        x = self.token_embedding_table(tokens) + self.position_embedding_table(places)
        bias = None
        if bool(first.any()):
            read = (steps[:, None] >= steps) & (steps >= first[:, None, None])
            bias = torch.where(read, 0.0, _MASKED).to(x.dtype).unsqueeze(1)  # [B, 1, T, T]
        memories = []
        for block in self.blocks:
            block = cast(_Block, block)
            query, key, value = block.sa.project(block.ln1(x))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None, scale=self.scale)
            x = x + block.sa.merge(mixed)
            x = x + block.ffwd.net(block.ln2(x))
            memories.append(_Memory(key, value))
        return cast(Tensor, self.ln_f(x)), memories

    def next(self, tokens: Tensor, places: Tensor, context: list[_Memory], path: list[_Memory], bias: Tensor | None) -> Tensor:
        """Read one more token of each path, and return the logits of the one after it, [B, S, V].

        Parameters
        ----------
        tokens
            int64 [B, S], the last one of each of S paths from the same context.
        places
            int64 [B]: their position.
        context
            What each block keeps of the context, [B, h, T, e], once for all paths.
        path
            What each block keeps of the paths up to and with this token, [B, h, S, t, e]: the last of t is filled in here.
        bias
            [B, 1, 1, T], additive, or ``None`` when all of the context is read.
        """
        x = self.token_embedding_table(tokens) + self.position_embedding_table(places).unsqueeze(1)
        for block, memory, own in zip(self.blocks, context, path, strict=True):
            block = cast(_Block, block)
            query, key, value = block.sa.project(block.ln1(x))  # [B, h, S, e]
            own.keys[..., -1, :], own.values[..., -1, :] = key, value
            query = query * self.scale
            length = memory.keys.shape[2]
            scores = query @ memory.keys.transpose(2, 3)  # [B, h, S, T]
            if bias is not None:
                scores = scores + bias
            weights = torch.cat((scores, (own.keys @ query.unsqueeze(4)).squeeze(4)), dim=3).softmax(dim=3)
            mixed = weights[..., :length] @ memory.values + (weights[..., None, length:] @ own.values).squeeze(3)
            x = x + block.sa.merge(mixed)
            x = x + block.ffwd.net(block.ln2(x))
        return cast(Tensor, self.lm_head(self.ln_f(x)))


class _Window(NamedTuple):
    """A tokenised context: ``tokens`` int64 [B, T], ``first`` int64 [B] as in :class:`GPT`, ``low`` and ``span`` float64 [B, 1]."""

    tokens: Tensor
    first: Tensor
    low: Tensor
    span: Tensor


class HeartGPT(Published):
    """HeartGPT: a GPT of 443,493 weights on 100 Hz ECG, or of 443,622 on 50 Hz PPG.

    A context becomes tokens as its authors do it: scaled from its smallest to its largest value into 0 to 100, and rounded. A
    missing value is the last one before it, and what lies before the first observed value is not read. A context without two
    different values has no such scale: it is forecast as constant, and gives no loss.

    Forecasts are 20 paths that are drawn token by token. The random numbers are the same for every window and evenly spread over
    the paths of a step, so that a forecast depends on its context alone; the point is the median of the paths. The published model
    has 500 positions, of which context and horizon share; fedcast keeps 64 for the horizon, and reads 436 steps of context, which
    need to be computed once. Longer horizons go on from the last 436 steps of each path, in the same scale.

    Notes
    -----
    The loss is that of pre-training, the cross-entropy of every next token, of context and target, where it was observed. Targets
    are clamped to the range of the context. There is no library for these models; the published files are read with
    :meth:`from_published`. Resample to 100 Hz (ECG) or 50 Hz (PPG) first: the model knows no other rate.
    """

    family: ClassVar[str] = "heartgpt"
    summary: ClassVar[str] = "HeartGPT (Imperial College): GPTs of 0.4 million parameters on 100 Hz ECG and 50 Hz PPG; sampled paths"
    library: ClassVar[Library] = Library("torch", "torch", "pip install torch")
    licence: ClassVar[str] = "code and weights MIT; weights at github.com/harryjdavies/HeartGPT"
    heads: ClassVar[tuple[str, ...]] = ("lm_head.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("sa.proj", "ffwd.net.0", "ffwd.net.2")
    quantiles: ClassVar[str] = "sampled"
    network: GPT
    settings: Shape

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether the model's type is ``heartgpt``: a name of fedcast's, as the published files have no configuration."""
        return config.get("model_type") == cls.family

    @classmethod
    def published(cls, path: Path) -> bool:
        """Return whether a path is a safetensors file with a HeartGPT's tensors."""
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        try:
            return {"token_embedding_table.weight", "position_embedding_table.weight"} <= check_file(path)
        except (UnsafeError, OSError):
            return False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder that fedcast wrote, or, given a file, one that was published (:meth:`from_published`)."""
        if folder.is_file():
            return cls.from_published(folder)
        keys = read_json(folder / CONFIG)
        model = cls.drawn(Shape(**{name: keys[name] for name in Shape._fields}), 0)
        return model._fill(folder, read_weights(folder / WEIGHTS))

    @classmethod
    def from_published(cls, file: str | Path, kind: Literal["ecg", "ppg"] | None = None) -> Self:
        """Read weights that were published, such as ``ECGPT_560k_iters``, once they are in a safetensors file.

        Parameters
        ----------
        file
            A safetensors file with the published names; causal masks (``tril``), which are no weights, may be in it.
        kind
            What the model must be; ``None``: either.

        Raises
        ------
        CheckpointError
            When these are not the weights of a HeartGPT, or of another kind.
        """
        state = {name: tensor for name, tensor in read_weights(Path(file)).items() if not name.endswith(".tril")}
        words = state.get("token_embedding_table.weight")
        size = 0 if words is None else len(words)
        wanted = _VOCABULARY.values() if kind is None else (_VOCABULARY[kind],)
        if size not in wanted:
            raise CheckpointError(
                f"{file} does not hold the weights of a HeartGPT{f' of {kind}' if kind else ''}",
                hint="give ECGPT_560k_iters or PPGPT_500k_iters of github.com/harryjdavies/HeartGPT as a safetensors file",
            )
        return cls.drawn(Shape(size), 0)._fill(Path(file), state)

    def _fill(self, where: Path, state: Mapping[str, Tensor]) -> Self:
        check_tensors(where, self.network.state_dict(), state)
        self.network.load_state_dict(state)
        return self

    @classmethod
    def drawn(cls, settings: Shape, seed: int) -> Self:
        """Return a model with weights as torch draws them."""
        context = settings.block_size - settings.horizon
        with seeded(seed):
            network = GPT(settings)
        return cls(network, PublishedConfig(cls.family, context, settings.horizon, 1, settings.n_embd), settings)

    @classmethod
    def tiny_settings(cls) -> Shape:
        """Return the shape of a model of one block of width 16, with 40 positions."""
        return Shape(_VOCABULARY["ecg"], block_size=40, n_embd=16, n_head=2, n_layer=1, horizon=8)

    def write(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, with the published names."""
        write_json(folder / CONFIG, {"model_type": self.family, **self.settings._asdict()})
        save_weights(self.network.state_dict(), folder)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the mean cross-entropy of the next token, over observed steps of context and target; nothing is drawn."""
        self.check_target(batch)
        context, mask = _read(batch.context[:, -self.config.context :], batch.mask[:, -self.config.context :])
        length = context.shape[1]
        seen = torch.cat((mask, batch.target_mask), dim=1)
        window = _tokenise(torch.cat((context, batch.target), dim=1), seen, length)
        features, _ = self.network(window.tokens[:, :-1], window.first)
        read = torch.arange(1, seen.shape[1], device=seen.device) > window.first[:, None]
        counted = seen[:, 1:] & read & (window.span > 0)
        logits = self.network.lm_head(features).float()
        each = F.cross_entropy(logits.flatten(0, 1), window.tokens[:, 1:].flatten(), reduction="none").view_as(counted)
        return observed_mean(each, counted), Encoding(features[:, :length].float(), mask)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the features before the head, one a step, [B, L, d], float32."""
        context, mask = _read(context[:, -self.config.context :], mask[:, -self.config.context :])
        window = _tokenise(context, mask, context.shape[1])
        return cast(Tensor, self.network(window.tokens, window.first)[0].float())

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units: the paths' median, and their quantiles."""
        context, mask = _read(context, mask)
        window = _tokenise(context, mask, context.shape[1])
        levels = torch.tensor(QUANTILES, device=context.device)
        draws = _draws(horizon).to(context.device)
        parts = []
        with torch.no_grad():
            for start in range(0, len(context), _ROWS):
                rows = slice(start, start + _ROWS)
                paths = self._paths(window.tokens[rows], window.first[rows], draws).float()  # [R, S, H]
                parts.append(paths.quantile(levels, dim=1).permute(1, 2, 0).sort(dim=-1).values)
        share = torch.cat(parts).double() / _LEVELS  # [B, H, 9]
        limit = torch.finfo(torch.float32).max
        quantiles = (window.low.unsqueeze(2) + share * window.span.unsqueeze(2)).clamp(-limit, limit).float()
        return Forecast(quantiles[..., QUANTILES.index(0.5)].clone(), quantiles)

    def _paths(self, tokens: Tensor, first: Tensor, draws: Tensor) -> Tensor:
        """Return tokens [R, S, H] that are drawn with ``draws`` [S, H], after ``tokens`` [R, L] and ``first`` [R] as in :class:`GPT`."""
        rows, (count, horizon) = len(tokens), draws.shape
        steps = self.config.horizon
        paths = self._one_pass(tokens, first, draws[:, :steps].expand(rows, -1, -1))
        for start in range(steps, horizon, steps):
            # every path is now a context of its own
            whole = torch.cat((tokens.repeat_interleave(count, 0), paths.flatten(0, 1)), dim=1)
            cut = max(0, whole.shape[1] - self.config.context)
            begins = (first.repeat_interleave(count) - cut).clamp_min(0)
            later = self._one_pass(whole[:, cut:], begins, draws[:, None, start : start + steps].repeat(rows, 1, 1))
            paths = torch.cat((paths, later.view(rows, count, -1)), dim=2)
        return paths

    def _one_pass(self, tokens: Tensor, first: Tensor, draws: Tensor) -> Tensor:
        """Return tokens [R, S, H] for ``draws`` [R, S, H], where H is at most the horizon of a pass."""
        network, (rows, length) = self.network, tokens.shape
        count = draws.shape[1]
        features, context = network(tokens, first)
        # Contiguous, or every product would copy them; values the other way round, which halves the time of theirs.
        context = [_Memory(one.keys.contiguous(), one.values.mT.contiguous().mT) for one in context]
        logits = network.lm_head(features[:, -1:]).expand(-1, count, -1)
        padding = torch.arange(length, device=tokens.device) < first[:, None]
        bias = torch.where(padding, _MASKED, 0.0).to(features.dtype)[:, None, None] if bool(first.any()) else None
        room = (rows, self.settings.n_head, count, draws.shape[2], self.settings.n_embd // self.settings.n_head)
        path = [_Memory(features.new_empty(room), features.new_empty(room)) for _ in context]
        chosen = [_choose(logits, draws[..., 0])]
        for step in range(1, draws.shape[2]):
            written = [_Memory(own.keys[..., :step, :], own.values[..., :step, :]) for own in path]
            logits = network.next(chosen[-1], length - first + step - 1, context, written, bias)
            chosen.append(_choose(logits, draws[..., step]))
        return torch.stack(chosen, dim=2)


def _choose(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the token at which the cumulative probability of ``logits`` [..., V] reaches ``draws`` [...], each in [0, 1)."""
    reached = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return (reached < draws.unsqueeze(-1) * reached[..., -1:]).sum(dim=-1).clamp_max(logits.shape[-1] - 1)


def _draws(horizon: int) -> Tensor:
    """Return numbers in [0, 1), [S, H]: uniform for each path, and one in each S-th of the range for each step."""
    generator = torch.Generator().manual_seed(_SEED)
    # a step after the other, so that a longer horizon begins like a shorter one
    order, within = torch.rand(horizon, 2, _PATHS, generator=generator).unbind(1)
    return ((order.argsort(dim=1) + within) / _PATHS).T


def _read(context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return context and mask with at least one step, what is not finite marked as missing."""
    short = 0 if context.shape[1] else 1
    return F.pad(context, (short, 0)), F.pad(mask.bool() & context.isfinite(), (short, 0))


def _tokenise(values: Tensor, mask: Tensor, length: int) -> _Window:
    """Tokenise ``values`` [B, T] by the range of the first ``length`` steps, where ``mask`` [B, T] is True."""
    seen = mask[:, :length]
    known = seen.any(dim=1, keepdim=True)
    exact = values.double()
    low = torch.where(known, torch.where(seen, exact[:, :length], torch.inf).amin(dim=1, keepdim=True), 0.0)
    high = torch.where(known, torch.where(seen, exact[:, :length], -torch.inf).amax(dim=1, keepdim=True), 0.0)
    span = high - low
    steps = torch.arange(values.shape[1], device=values.device).expand_as(values)
    last = torch.where(mask, steps, -1).cummax(dim=1).values
    held = exact.gather(1, last.clamp_min(0))
    level = torch.where(span > 0, (held - low) / torch.where(span > 0, span, 1.0), 0.5)
    tokens = (level * _LEVELS).round().clamp(0, _LEVELS).long()
    # a row without any observed step is read as its last one: a token in the middle
    first = torch.where(known.squeeze(1), seen.int().argmax(dim=1), length - 1)
    return _Window(tokens, first, low, span)
