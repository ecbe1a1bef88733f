"""The native forecaster: a channel-independent patch transformer with encoder, decoder and heads as separate modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import QUANTILES, Forecast, ModelConfig, Output
from fedcast.models.contract import Config, Model
from fedcast.models.files import Document, check_tensors, read_config, read_model, write_model
from fedcast.models.layers import DecoderBlock, EncoderBlock, InstanceNorm, Linear, PatchEmbedding, key_bias, rotary_table
from fedcast.models.packing import Packing, arrange
from fedcast.spec import ModelSpec

FORMAT = "fedcast.patch_transformer"
GAUSSIAN = (-1.2815516, -0.8416212, -0.5244005, -0.2533471, 0.0, 0.2533471, 0.5244005, 0.8416212, 1.2815516)


class _Document(Document):
    format: Literal["fedcast.patch_transformer"]
    model: dict[str, int | str | list[list[int | float | str]]]


class Tokens(NamedTuple):
    """Patches of a batch: ``patches`` [B, N, 2 * patch] (values, then mask), ``mask`` bool [B, N], ``loc`` and ``scale`` [B, 1]."""

    patches: Tensor
    mask: Tensor
    loc: Tensor
    scale: Tensor


class Encoded(NamedTuple):
    """Encoded windows, in the parameters' type.

    Attributes
    ----------
    tokens
        Their patches.
    features
        [B, N, d]; what stands at a patch without observed points has no meaning.
    memory
        What the decoder reads: the features of the last W patches [B, W, d], or of packed rows [R, W, d].
    bias
        Additive attention bias of each window over its keys, [B, 1, 1, W].
    packing
        How the rows of ``memory`` are packed; ``None`` when each window has its own.
    """

    tokens: Tokens
    features: Tensor
    memory: Tensor
    bias: Tensor
    packing: Packing | None


class Encoder(nn.Module):
    """Patch embedding and self-attention blocks; the part that FedTRL federates."""

    positions: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.patch, config.d_model)
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(config.context_patches, config.d_model))
        else:
            self.register_parameter("positions", None)
        self.blocks = nn.ModuleList(EncoderBlock(config.d_model, config.n_heads) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, patches: Tensor, bias: Tensor, table: tuple[Tensor, Tensor] | None, places: Tensor | None = None) -> Tensor:
        """Map patches [B, N, 2 * patch] to features [B, N, d]; see :class:`~fedcast.models.layers.EncoderBlock`.

        ``places``, int64 [B, N], are the positions of the patches; by default they are the last N.
        """
        x = self.embedding(patches)
        if self.positions is not None:
            # counted from the end: the newest patch always has the last position
            x = x + (self.positions[-x.shape[1] :] if places is None else nn.functional.embedding(places, self.positions))
        for block in self.blocks:
            x = block(x, bias, table)
        return cast(Tensor, self.norm(x))


class Decoder(nn.Module):
    """One learned query a horizon patch, cross-attending to the encoder's features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.horizon_patches, config.d_model))
        self.blocks = nn.ModuleList(DecoderBlock(config.d_model, config.n_heads) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        features: Tensor,
        bias: Tensor,
        patches: int,
        tables: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map features to the first ``patches`` horizon tokens [B, patches, d]; see :class:`~fedcast.models.layers.DecoderBlock`."""
        x = self.queries[:patches].expand(bias.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, features, bias, tables, rows)
        return cast(Tensor, self.norm(x))


class Heads(nn.Module):
    """Linear heads: a point and nine quantiles a step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.point = Linear(config.d_model, config.patch)
        self.quantiles = Linear(config.d_model, config.patch * len(QUANTILES))

    def forward(self, tokens: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Map horizon tokens [B, M, d] to points [B, horizon] and quantiles [B, horizon, 9]."""
        batch = tokens.shape[0]
        point = self.point(tokens).view(batch, -1)
        quantiles = self.quantiles(tokens).view(batch, -1, len(QUANTILES))
        return point[:, :horizon], quantiles[:, :horizon]


class PatchTransformer(Model):
    """Channel-independent patch transformer for forecasting.

    Each window is standardised over its observed points (:class:`~fedcast.models.layers.InstanceNorm`, in float32 whatever the
    parameters' type), cut into patches from its end, embedded together with its mask and encoded; patches without observed points
    are no attention keys. The decoder's learned queries, one a horizon patch, read the features; linear heads give the point and
    the quantiles. Shorter horizons compute only the patches they need, longer ones are rolled. There is no dropout: the same
    input gives the same output in training and evaluation mode.

    Parameters
    ----------
    config
        The shape.
    seed
        Seed of the initial weights. The global random state is neither read nor changed.

    Attributes
    ----------
    packs
        Whether patches without observed points are left out of the encoder's batch; False keeps shapes fixed, for compiled code.
    architecture
        The name of the class in a configuration; subclasses in :mod:`fedcast.models.architectures` have their own.
    """

    architecture: ClassVar[str] = "patch"
    lora_targets: ClassVar[tuple[str, ...]] = ("qkv", "query", "kv")
    config: ModelConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a subclass under its architecture's name."""
        super().__init_subclass__(**kwargs)
        ARCHITECTURES[cls.architecture] = cls

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.packs = True
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.heads = Heads(config)
        _initialise(self, seed)

    @classmethod
    def from_spec(cls, spec: ModelSpec, seed: int) -> Self:
        """Build the model of a spec's ``[model]`` section, with initial weights drawn from ``seed``."""
        return cls(ModelConfig.of(spec), seed)

    def fresh(self, seed: int) -> Self:
        """Return a model of the same shape with initial weights drawn from ``seed``, on the CPU."""
        return type(self)(self.config, seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.decoder.queries.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.decoder.queries.dtype

    def use_native(self, on: bool) -> None:
        """Compute blocks with the native kernels (:mod:`fedcast.kernels`) where they fit, or stop doing so; they must be compiled."""
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            cast(EncoderBlock | DecoderBlock, block).native = on

    def normalised(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Forecast in normalised units, in one pass, for training.

        Parameters
        ----------
        context
            Values in data units, [B, L], any L; only the last ``config.context`` are read. What is not finite counts as missing.
        mask
            [B, L], True where observed; values elsewhere are ignored.
        horizon
            Steps H, from 1 to ``config.horizon``.

        Raises
        ------
        ModelError
            When the horizon or a shape does not fit.
        """
        if not 1 <= horizon <= self.config.horizon:
            raise ModelError(
                f"one pass gives 1 to {self.config.horizon} steps, not {horizon}", hint="call the model itself, which rolls longer horizons"
            )
        return self.decode(self.encode(context, mask), horizon)

    def encode(self, context: Tensor, mask: Tensor) -> Encoded:
        """Return what a decoder reads; parameters as in :meth:`normalised`."""
        tokens = self.tokens(context, mask)
        count = tokens.mask.shape[1]
        width, packing = arrange(tokens.mask) if self.packs else (count, None)
        if packing is not None:
            places = self._places(packing, count)
            memory = self.encoder(packing.gather(tokens.patches), packing.own_bias(self.dtype), self._table(places), places)
            return Encoded(tokens, packing.restore(memory, count), memory, packing.window_bias(self.dtype), packing)
        bias = key_bias(tokens.mask[:, count - width :], self.dtype)
        memory = self.encoder(tokens.patches[:, count - width :], bias, self._table(self._last(width)))
        features = memory if width == count else nn.functional.pad(memory, (0, 0, count - width, 0))
        return Encoded(tokens, features, memory, bias, None)

    def decode(self, encoded: Encoded, horizon: int) -> Output:
        """Forecast from encoded windows, in normalised units; ``horizon`` is from 1 to ``config.horizon``."""
        tokens, features, memory, bias, packing = encoded
        needed = -(-horizon // self.config.patch)
        now = self.config.context_patches
        keys = self._last(memory.shape[1]) if packing is None else self._places(packing, tokens.mask.shape[1])
        asking, asked = self._table(slice(now, now + needed)), self._table(keys)
        tables = None if asking is None or asked is None else (asking, asked)
        decoded = self.decoder(memory, bias, needed, tables, None if packing is None else packing.rows)
        point, quantiles = self.heads(decoded, horizon)
        return Output(point.float(), quantiles.float(), features.float(), tokens.mask, tokens.loc, tokens.scale)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the encoder's features [B, N, d] in float32, zeros for patches without observed points; see :meth:`normalised`.

        A window without any observed point has features throughout.
        """
        encoded = self.encode(context, mask)
        seen = encoded.tokens.mask
        unused = seen.logical_not() & seen.any(dim=1, keepdim=True)
        return encoded.features.float().masked_fill(unused.unsqueeze(-1), 0.0)

    def window_errors(self, context: Tensor, mask: Tensor) -> Tensor | None:
        """Return how badly the model knows each window [B], judged by the window alone, or ``None`` where its architecture cannot say.

        Of several models the one with the smallest error then forecasts a window (:class:`fedcast.models.mixture.DomainMixture`);
        parameters as in :meth:`normalised`.
        """
        return None

    def forward(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units, for any horizon.

        Past ``config.horizon`` the point forecast is appended to the context and the model is asked again; quantiles further out
        then describe the spread around that path and are too narrow.

        Parameters
        ----------
        context, mask
            As in :meth:`normalised`.
        horizon
            Steps H, at least 1.

        Returns
        -------
        Forecast
            Finite; float32, or float64 when the context is float64.
        """
        return roll(self.normalised, self.config, context, mask, horizon)

    def tokens(self, context: Tensor, mask: Tensor) -> Tokens:
        """Return windows standardised and cut into patches; parameters as in :meth:`normalised`."""
        if context.dim() != 2 or context.shape != mask.shape:
            raise ModelError(
                f"context {tuple(context.shape)} and mask {tuple(mask.shape)} do not fit",
                hint="give both as [windows, steps], of the same shape",
            )
        patch = self.config.patch
        context, mask = context[:, -self.config.context :], mask[:, -self.config.context :]
        batch, length = context.shape
        count = max(1, -(-length // patch))
        if length < count * patch:
            context, mask = (nn.functional.pad(x, (count * patch - length, 0)) for x in (context, mask))
        values = context if context.dtype == torch.float64 else context.float()
        mask = mask.bool() & values.isfinite()
        normal, loc, scale = InstanceNorm.forward(torch.where(mask, values, 0.0), mask)
        channels = torch.stack((normal.float(), mask.float()), dim=1).view(batch, 2, count, patch)
        patches = channels.transpose(1, 2).reshape(batch, count, 2 * patch)
        seen = patches[..., patch:].amax(dim=-1) > 0  # [B, N]
        return Tokens(patches.to(self.dtype), seen, loc, scale)

    def _last(self, count: int) -> slice:
        """Return the positions of the last ``count`` patches of the context."""
        return slice(self.config.context_patches - count, self.config.context_patches)

    def _places(self, packing: Packing, count: int) -> Tensor:
        """Return the positions [R, W] of packed patches out of windows of ``count``."""
        return packing.source % count + (self.config.context_patches - count)

    def _table(self, places: slice | Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the rotary table of positions (a range, or [R, W]), or ``None`` with learned positions."""
        if self.config.position != "rope":
            return None
        length, width = self.config.context_patches + self.config.horizon_patches, self.config.d_model // self.config.n_heads
        cosines, sines = rotary_table(length, width, self.dtype, self.device)
        if isinstance(places, slice):
            return cosines[places], sines[places]
        return cosines[places].unsqueeze(1), sines[places].unsqueeze(1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; see :func:`fedcast.models.files.write_model`.

        Parameters
        ----------
        folder
            Where to; made with its parents when it does not exist.
        """
        write_model(Path(folder), FORMAT, {"model": self.config.to_dict()}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a model that :meth:`save_pretrained` wrote; its forecasts are the same to the bit.

        Parameters
        ----------
        folder
            The folder with ``model.safetensors`` and ``config.json``.

        Raises
        ------
        CheckpointError
            When a file is missing or damaged, an unknown key stands in the configuration, or a tensor is missing, surplus, of
            another shape or not finite.
        """
        document, state = read_model(Path(folder), _Document)
        config = read_config(Path(folder), document.model)
        if config.architecture != cls.architecture:
            raise CheckpointError(
                f"{folder} holds a model of architecture {config.architecture!r}, not {cls.architecture!r}",
                hint="read it with fedcast.Forecaster.from_pretrained, which knows all of them",
            )
        with torch.device("meta"):
            model = cls(config)
        check_tensors(Path(folder), model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True)


ARCHITECTURES: dict[str, type[PatchTransformer]] = {PatchTransformer.architecture: PatchTransformer}
"""Model classes by the name in a configuration."""


def model_class(folder: str | Path) -> type[PatchTransformer]:
    """Return the class of the model in a folder; :class:`CheckpointError` when none has its architecture's name."""
    document, _ = read_model(Path(folder), _Document)
    name = read_config(Path(folder), document.model).architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{folder} holds a model of an unknown architecture, {name!r}", hint="use the version of fedcast that wrote it"
        )
    return ARCHITECTURES[name]


def roll(one_pass: Callable[[Tensor, Tensor, int], Output], config: Config, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
    """Forecast any horizon with a model that forecasts ``config.horizon`` steps a pass; see :meth:`PatchTransformer.forward`."""
    if horizon < 1:
        raise ModelError(f"a horizon of {horizon} steps is none", hint="ask for at least 1 step")
    points, quantiles = [], []
    while horizon > 0:
        steps = min(horizon, config.horizon)
        output = one_pass(context, mask, steps)
        points.append(InstanceNorm.inverse(output.point, output.loc, output.scale))
        quantiles.append(InstanceNorm.inverse(output.quantiles.sort(dim=-1).values, output.loc, output.scale))
        horizon -= steps
        if horizon > 0:
            context = torch.cat((context, points[-1]), dim=1)[:, -config.context :]
            mask = torch.cat((mask, torch.ones_like(points[-1], dtype=torch.bool)), dim=1)[:, -config.context :]
    return Forecast(torch.cat(points, dim=1), torch.cat(quantiles, dim=1))


def _initialise(model: PatchTransformer, seed: int) -> None:
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    depth = {"encoder": model.config.encoder_layers, "decoder": model.config.decoder_layers}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, *_, leaf = name.split(".")
            if leaf == "bias":
                parameter.zero_()
            elif leaf == "positions":  # as large as the tokens they mark; at 0.02 they were not learnt within 500 steps
                parameter.normal_(0.0, 0.5, generator=generator)
            elif leaf == "queries":
                parameter.normal_(0.0, 0.05, generator=generator)
            elif part == "heads":
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.dim() == 2:
                residual = ".blocks." in name and ".out." in name
                spread = parameter.shape[1] ** -0.5 * ((2 * depth[part]) ** -0.5 if residual else 1.0)
                parameter.normal_(0.0, spread, generator=generator)
        # an untrained model says "Gaussian around the context's mean"
        model.heads.quantiles.bias.copy_(torch.tensor(GAUSSIAN).repeat(model.config.patch))
