"""The masked reconstructor of FFTS (arXiv 2412.08906): an encoder-only transformer with an adaptive trend-awareness module (ATM).

Found in its released code (ffts.md B2): windows standardised; patches of P points every P / 2, embedded linearly without bias and
given fixed sinusoidal positions; post-norm blocks with full attention; a closing LayerNorm; a head from all tokens to the whole
window. Masked points enter as 0, without a mask beside them.

Reconstructed: (1) The paper's forecasts "emit the next patches" with a head fitted to the task. Here context and horizon are one
window and the horizon is masked, so that filling it in is the forecast and needs no further head. (2) A patch without any visible
point is no attention key, as in :class:`~fedcast.models.patch.PatchTransformer`; mean and standard deviation are those of visible
points. (3) Nine quantiles: offsets from the detached point forecast, read from detached features, so that the paper's weights are
trained by the paper's loss alone. (4) No dropout (released: 0.1): worker threads share the random stream it draws from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedcast.errors import ModelError
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.layers import FeedForward, InstanceNorm, Linear, key_bias, self_attention, sinusoids
from fedcast.models.masking import spread
from fedcast.models.patch import GAUSSIAN, Encoded, PatchTransformer, Tokens
from fedcast.models.settings import Settings

SCALES: Mapping[str, float] = {"second": 0.1, "minute": 0.3, "hour": 0.5, "day": 1.0}
"""The experts' names and the values their learnable scales start from, where they have one."""


class TrendSettings(Settings):
    """What a configuration's ``settings`` hold for this architecture.

    Attributes
    ----------
    experts
        ``"linear"``: experts of one layer on the output of the feed-forward part, inside its residual (the released code of the paper's
        time, inferred from the bytes that FeDaL reports); ``"mlp"``: experts of two layers in a residual of their own (the code of
        today); ``"none"``: no trend-awareness module.
    scaled
        Whether an expert's output is multiplied by a learnable scalar, which starts at 0.1, 0.3, 0.5 and 1.
    top_k
        Experts a token uses.
    kernel
        Tokens in the moving average of the gate.
    head
        ``"window"``: linear from all tokens to all points of the window (released); ``"patch"``: linear from each token to the points of
        its own patch, the mean where patches overlap (far smaller).
    """

    method: ClassVar[str] = "FFTS"

    experts: Literal["linear", "mlp", "none"] = "linear"
    scaled: int = Field(0, ge=0, le=1)
    top_k: int = Field(1, ge=1, le=len(SCALES))
    kernel: int = Field(25, ge=1)
    head: Literal["window", "patch"] = "window"

    @classmethod
    def of(cls, config: ModelConfig) -> TrendSettings:
        """Read the settings of a configuration.

        Raises
        ------
        ModelError
            When a setting is unknown, or its value is refused or does not fit.
        """
        settings = cls.read(config)
        if settings.kernel % 2 == 0:
            raise ModelError(f"a moving average over {settings.kernel} tokens has no middle", hint="make kernel odd")
        return settings


@lru_cache(maxsize=64)
def moving_average(count: int, kernel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [count, count] that averages ``kernel`` (odd) neighbours; past an edge the edge counts again."""
    with torch.inference_mode(False), torch.no_grad():
        reach = kernel // 2
        near = torch.arange(count)[:, None] + torch.arange(-reach, reach + 1)
        matrix = torch.zeros(count, count, dtype=torch.float64)
        matrix.scatter_add_(1, near.clamp(0, count - 1), torch.full(near.shape, 1 / kernel, dtype=torch.float64))
        return matrix.to(device, dtype)


def choose_experts(chances: Tensor, top_k: int) -> Tensor:
    """Return the experts' weights [..., E]: their chances [..., E], the ``top_k`` largest kept and made to sum to 1.

    The released code keeps them along the wrong axis, so that only the first patches get anything, and divides by sums over the
    batch (ffts.md B7, 1). Of one expert alone the weight is 1 whatever the gate says, and the gate would learn nothing: there the
    gradient is that of the chance itself (straight-through, a reconstruction).
    """
    values, places = chances.topk(top_k, dim=-1)
    kept = torch.zeros_like(chances).scatter(-1, places, values)
    weights = kept / kept.sum(-1, keepdim=True)
    return weights.detach() + (kept - kept.detach()) if top_k == 1 else weights


class Gate(nn.Module):
    """Chances of the experts: ``softmax(W2 ReLU(LN(Wt T) + LN(Ws (H - T))))``, T the moving average of tokens H; hidden d / 2."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.trend, self.season = Linear(width, width // 2), Linear(width, width // 2)
        self.trend_norm, self.season_norm = nn.LayerNorm(width // 2), nn.LayerNorm(width // 2)
        self.out = Linear(width // 2, len(SCALES))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, d] to chances [B, N, 4], float32."""
        trend = moving_average(x.shape[1], self.kernel, x.dtype, x.device) @ x
        hidden = self.trend_norm(self.trend(trend)) + self.season_norm(self.season(x - trend))
        return cast(Tensor, self.out(F.relu(hidden)).float().softmax(-1))


class Expert(nn.Module):
    """One expert: a linear layer, or ``Linear(d, 2d), GELU, Linear(2d, d)``; times a scalar where it has one."""

    def __init__(self, width: int, settings: TrendSettings) -> None:
        super().__init__()
        self.layers = Linear(width, width) if settings.experts == "linear" else FeedForward(width, 2 * width)
        self.scale = nn.Parameter(torch.empty(1)) if settings.scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, d] to [B, N, d]."""
        y: Tensor = self.layers(x)
        return y if self.scale is None else y * self.scale


class TrendAwareness(nn.Module):
    """The adaptive trend-awareness module: ``ATM(H) = sum_e G_e(H) s_e E_e(H)``."""

    def __init__(self, width: int, settings: TrendSettings) -> None:
        super().__init__()
        self.top_k = settings.top_k
        self.gate = Gate(width, settings.kernel)
        self.experts = nn.ModuleDict({name: Expert(width, settings) for name in SCALES})

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, d] to [B, N, d]."""
        weights = choose_experts(self.gate(x), self.top_k).to(x.dtype)
        # All experts on all tokens: on a CPU, picking tokens apart costs more than four small products.
        mixed = torch.zeros_like(x)
        for expert, weight in zip(self.experts.values(), weights.chunk(len(SCALES), dim=-1), strict=True):
            mixed = torch.addcmul(mixed, expert(x), weight)
        return mixed


class TrendBlock(nn.Module):
    """Post-norm block; with experts of one layer ``LN(H + ATM(FFN(H)))``, of two ``LN(H2 + ATM(H2))`` with ``H2 = LN(H + FFN(H))``."""

    def __init__(self, config: ModelConfig, settings: TrendSettings) -> None:
        super().__init__()
        width = config.d_model
        self.n_heads = config.n_heads
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width)
        self.trend = None if settings.experts == "none" else TrendAwareness(width, settings)
        self.trend_norm = nn.LayerNorm(width) if settings.experts == "mlp" else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens [B, N, d] to [B, N, d]; ``bias`` is as in :func:`fedcast.models.layers.key_bias`."""
        x = self.attention_norm(x + self.out(self_attention(self.qkv(x), self.n_heads, bias)))
        y = self.feed_forward(x)
        if self.trend is not None and self.trend_norm is None:
            y = self.trend(y)
        x = self.forward_norm(x + y)
        return x if self.trend is None or self.trend_norm is None else cast(Tensor, self.trend_norm(x + self.trend(x)))


class TrendEncoder(nn.Module):
    """Embedding, fixed positions and blocks."""

    def __init__(self, config: ModelConfig, settings: TrendSettings) -> None:
        super().__init__()
        self.embedding = Linear(config.patch, config.d_model, bias=False)
        self.blocks = nn.ModuleList(TrendBlock(config, settings) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Map patches [B, N, P] to features [B, N, d]."""
        x = self.embedding(patches)
        x = x + sinusoids(x.shape[1], x.shape[2], x.dtype, x.device)
        for block in self.blocks:
            x = block(x, bias)
        return cast(Tensor, self.norm(x))


class WindowDecoder(nn.Module):
    """Linear from all tokens to all points of the window: ``flatten [N d] -> T``."""

    def __init__(self, tokens: int, points: int, width: int) -> None:
        super().__init__()
        self.out = Linear(tokens * width, points)

    def forward(self, features: Tensor, start: int, stop: int) -> Tensor:
        """Map features [B, N, d] to the window's points from ``start`` to ``stop``, [B, stop - start]."""
        if not isinstance(self.out, Linear):  # an adapter stands in its place, which only a call reaches
            return cast(Tensor, self.out(features.flatten(1))[:, start:stop])
        return F.linear(features.flatten(1), self.out.weight[start:stop], self.out.bias[start:stop])


class PatchDecoder(nn.Module):
    """Linear from each token to the points of its own patch; where two patches overlap, their mean."""

    def __init__(self, patch: int, stride: int, width: int) -> None:
        super().__init__()
        self.stride = stride
        self.out = Linear(width, patch)

    def forward(self, features: Tensor, start: int, stop: int) -> Tensor:
        """Map features [B, N, d] to the window's points from ``start`` to ``stop``, [B, stop - start]."""
        points = self.out(features)  # [B, N, P]
        if points.shape[-1] > self.stride:
            first, second = points.split(self.stride, dim=-1)
            points = torch.cat((first[:, :1], (first[:, 1:] + second[:, :-1]) / 2), dim=1)
        return cast(Tensor, points.flatten(1)[:, start:stop])


class QuantileHead(nn.Module):
    """Linear from a horizon patch's token to the offsets of nine quantiles from the point forecast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.quantiles = Linear(config.d_model, config.patch * len(QUANTILES))

    def forward(self, tokens: Tensor, point: Tensor) -> Tensor:
        """Map horizon tokens [B, M, d] and points [B, H] to quantiles [B, H, 9]; no gradient goes back."""
        offsets = self.quantiles(tokens.detach()).view(len(tokens), -1, len(QUANTILES))
        return cast(Tensor, point.detach().unsqueeze(-1) + offsets[:, : point.shape[1]])


class TrendTransformer(PatchTransformer):
    """Encoder-only masked reconstructor with adaptive trend awareness; its forecast fills in the masked horizon.

    A context shorter than ``config.context`` counts as one whose beginning is missing, so every window has the same tokens and
    forecasts do not depend on what else is in a batch. ``config.decoder_layers`` and ``config.position`` have no meaning here.

    Attributes
    ----------
    stride
        Points from patch to patch: half a patch, as released, or a whole one where its length is odd.
    """

    architecture: ClassVar[str] = "trend"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        nn.Module.__init__(self)
        settings = TrendSettings.of(config)
        self.config = config
        self.packs = False
        self.stride = config.patch // 2 if config.patch % 2 == 0 else config.patch
        self.encoder: Any = TrendEncoder(config, settings)
        self.decoder: Any = (
            WindowDecoder(self._points // self.stride, self._points, config.d_model)
            if settings.head == "window"
            else PatchDecoder(config.patch, self.stride, config.d_model)
        )
        self.heads: Any = QuantileHead(config)
        _initialise(self, seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return cast(torch.device, self.encoder.embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return cast(torch.dtype, self.encoder.embedding.weight.dtype)

    def use_native(self, on: bool) -> None:
        """Do nothing: the native kernels compute other blocks."""

    def encode(self, context: Tensor, mask: Tensor) -> Encoded:
        """Return the features of context and masked horizon; parameters as in :meth:`PatchTransformer.normalised`.

        ``features`` and ``tokens`` are those of the context, ``memory`` [B, N, d] is of all patches.
        """
        short = max(0, self.config.context - context.shape[-1])
        tokens = self.tokens(F.pad(context, (short, 0)), F.pad(mask, (short, 0)))
        values, seen = (half.flatten(1) for half in tokens.patches.chunk(2, dim=-1))
        return self._run(values, seen, tokens.loc, tokens.scale)

    def represent(self, values: Tensor, visible: Tensor) -> Encoded:
        """Return the features of windows with hidden points; as :meth:`encode`, but the horizon may be visible.

        Parameters
        ----------
        values
            [B, T], T whole patches, at most those of context and horizon together; the last one is the last of the horizon.
        visible
            bool [B, T], True where a point is observed and not hidden; values elsewhere are ignored.

        Raises
        ------
        ModelError
            When a shape does not fit.
        """
        short = self._points - values.shape[-1]
        if values.dim() != 2 or values.shape != visible.shape or short < 0 or short % self.config.patch:
            raise ModelError(
                f"windows {tuple(values.shape)} and mask {tuple(visible.shape)} do not fit",
                hint=f"give windows of at most {self._points} steps in whole patches of {self.config.patch}, and a flag for each step",
            )
        values, visible = F.pad(values, (short, 0)), F.pad(visible, (short, 0))
        normal, loc, scale = InstanceNorm.forward(torch.where(visible, values, 0.0), visible)
        return self._run(normal.to(self.dtype), visible.to(self.dtype), loc, scale)

    def decode(self, encoded: Encoded, horizon: int) -> Output:
        """Fill in the horizon, in normalised units; ``horizon`` is from 1 to ``config.horizon``."""
        tokens, features, memory = encoded.tokens, encoded.features, encoded.memory
        start = self.config.context_patches * self.config.patch
        point = self.decoder(memory, start, start + horizon).float()
        quantiles = self.heads(memory[:, features.shape[1] :: self.config.patch // self.stride], point)
        return Output(point, quantiles.float(), features.float(), tokens.mask, tokens.loc, tokens.scale)

    def restore(self, encoded: Encoded, length: int) -> Tensor:
        """Return the last ``length`` points of the window, hidden ones filled in, [B, length] in normalised units, float32."""
        points: Tensor = self.decoder(encoded.memory, self._points - length, self._points).float()
        return points

    def fill(self, values: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruct windows [B, T] (bool [B, T]: observed) from their patches that are not hidden (bool [B, N]), in their own unit."""
        visible = mask & spread(hidden, self.config.patch).logical_not()
        encoded = self.represent(values, visible)
        return InstanceNorm.inverse(self.restore(encoded, values.shape[1]), encoded.tokens.loc, encoded.tokens.scale)

    def _run(self, values: Tensor, seen: Tensor, loc: Tensor, scale: Tensor) -> Encoded:
        """Encode normalised points [B, T], 0 where not seen; what they lack of the window is a masked horizon."""
        patch = self.config.patch
        # The last patch reads half a patch past the window. The released code repeats the last point there; here that is masked, hence 0.
        beyond = self._points - values.shape[1] + patch - self.stride
        patches = F.pad(values, (0, beyond)).unfold(1, patch, self.stride)  # [B, N, P]
        visible = F.pad(seen, (0, beyond)).unfold(1, patch, self.stride).amax(-1) > 0  # [B, N]
        bias = key_bias(visible, self.dtype)
        memory = self.encoder(patches, bias)
        own = self.config.context_patches * patch // self.stride
        return Encoded(Tokens(patches[:, :own], visible[:, :own], loc, scale), memory[:, :own], memory, bias, None)

    @property
    def _points(self) -> int:
        """Points of a window: context and horizon, in whole patches."""
        return (self.config.context_patches + self.config.horizon_patches) * self.config.patch


def _initialise(model: TrendTransformer, seed: int) -> None:
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, *_, leaf = name.split(".")
            if leaf == "bias":
                parameter.zero_()
            elif leaf == "scale":
                parameter.fill_(SCALES[name.split(".")[-2]])
            elif parameter.dim() == 2:
                # An untrained model says "about the context's mean".
                spread = 1.0 if part == "encoder" else 0.2
                parameter.normal_(0.0, spread * parameter.shape[1] ** -0.5, generator=generator)
        model.heads.quantiles.bias.copy_(torch.tensor(GAUSSIAN).repeat(model.config.patch))
