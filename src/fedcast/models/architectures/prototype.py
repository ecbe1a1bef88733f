"""The forecaster of FeDPM (arXiv 2604.04475): what its decoder reads are prototypes, looked up in a memory.

Found in its released code (fedpm.md B.2): patches of 4 points embedded linearly, learnt positions, post-norm blocks; each token replaced
by the nearest prototype (squared L2, straight-through); a decoder of post-norm blocks on fixed sinusoidal positions, flattened to the
horizon; an MLP that predicts how mean and standard deviation change from context to horizon. At the paper's sizes the parts have its
numbers of parameters (747,042 for context and horizon of 96); the quantile head, which it lacks, comes on top. Its other encoders and
decoders are in :mod:`fedcast.models.backbones`.

Reconstructed: (1) The paper's windows are standardised per data set before the model sees them; fedcast's come in any unit. The same
formulas are therefore applied to the window in its own units, where its mean is 0 and its deviation 1; ``units = "data"`` applies them as
in the paper, for data that are standardised beforehand. (2) Missing points count as the window's mean; a patch without observed points is
no attention key, is looked up by nobody, and adds nothing to the decoder's output. A shorter context is one whose beginning is missing.
(3) Nine quantiles: offsets from the detached point forecast, read from the decoder's detached output. (4) No dropout (released: 0.1 in
the encoder, 0.2 in the MLP): worker threads share the random stream it draws from.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedcast.errors import ModelError
from fedcast.models.backbones import Backbone, build_decoder, build_encoder
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.layers import Linear, key_bias
from fedcast.models.patch import GAUSSIAN, Encoded, PatchTransformer, Tokens
from fedcast.models.settings import Settings

Serving = Literal["relative", "quantisation", "mixture"]

EPSILON = 1e-5
_SMALLEST = 1e-12
_LARGEST = 1e4  # data that were standardised never get there; keeps any input finite


class PrototypeSettings(Settings):
    """What a configuration's ``settings`` hold for this architecture; the defaults are the paper's.

    Attributes
    ----------
    prototypes
        Rows M of the memory.
    decoder_heads
        Attention heads of the decoder.
    statistics
        Width of the MLP that predicts the change of mean and deviation; 0: none, they stay those of the context.
    units
        What the formulas are applied to: the window in its own units, or in those of the data.
    backbone
        What encoder and decoder are made of; see :mod:`fedcast.models.backbones`.
    serving
        How a window judges the model (:meth:`PrototypeTransformer.window_errors`): by its quantisation error over the site's typical
        one, by its quantisation error as it is, or not at all, so that a mixture weights models by their forecasts.
    """

    method: ClassVar[str] = "FeDPM"

    prototypes: int = Field(256, ge=1)
    decoder_heads: int = Field(4, ge=1)
    statistics: int = Field(512, ge=0)
    units: Literal["window", "data"] = "window"
    backbone: Backbone = "transformer"
    serving: Serving = "relative"

    @classmethod
    def of(cls, config: ModelConfig) -> PrototypeSettings:
        """Read the settings of a configuration.

        Raises
        ------
        ModelError
            When a setting is unknown, or its value is refused or does not fit.
        """
        settings = cls.read(config)
        if config.d_model % settings.decoder_heads:
            raise ModelError(
                f"width {config.d_model} does not split into {settings.decoder_heads} decoder heads", hint="let decoder_heads divide it"
            )
        return settings


class Reading(NamedTuple):
    """Encoded windows and the prototypes that were looked up.

    Attributes
    ----------
    tokens
        All patches of the longest context; ``tokens.mask`` [B, N] is False for those without observed points.
    features
        Encoder output z [B, N, D], float32.
    nearest
        The prototypes [B, N, D], float32; their gradient goes to the memory.
    rows
        Where they stand in the memory, int64 [B, N].
    """

    tokens: Tokens
    features: Tensor
    nearest: Tensor
    rows: Tensor


class Prediction(NamedTuple):
    """A forecast in the parts that the paper's loss compares, in working units (the window's own or those of the data).

    Attributes
    ----------
    shape
        The horizon, standardised by its own mean and deviation, [B, H].
    shift, widening
        Predicted change of mean and deviation, [B, 1]; ``None`` without the MLP.
    mean, deviation
        Those of the context, [B, 1].
    output
        The forecast as every model gives it.
    """

    shape: Tensor
    shift: Tensor | None
    widening: Tensor | None
    mean: Tensor
    deviation: Tensor
    output: Output


class Memory(nn.Module):
    """The prototypes, [M, D]: all that FeDPM's sites share."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.empty(count, width))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prototype nearest to each feature [..., D] in squared L2, float32, and its row; of equally near ones the first."""
        prototypes = self.prototypes.float()
        with torch.no_grad():
            # |z - p|^2 without |z|^2, which is the same for all p
            distance = torch.addmm(prototypes.square().sum(1), features.flatten(0, -2), prototypes.T, alpha=-2.0)
            index = distance.argmin(1).view(features.shape[:-1])
        return F.embedding(index, prototypes), index


class ShapeDecoder(nn.Module):
    """A decoder of the configuration's kind, and a linear layer from all its tokens to the horizon."""

    def __init__(self, config: ModelConfig, settings: PrototypeSettings) -> None:
        super().__init__()
        self.body = build_decoder(settings.backbone, config, settings.decoder_heads)
        tokens = config.context_patches * (config.patch if settings.backbone == "cnn" else 1)
        self.out = Linear(tokens * config.d_model, config.horizon)

    def forward(self, prototypes: Tensor, bias: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Map prototypes [B, N, d] to the horizon's shape [B, H_max], and return the flattened tokens that it is read from."""
        seen = seen.unsqueeze(-1)
        x = self.body(prototypes * seen, bias)
        flat = (x * seen.repeat_interleave(x.shape[1] // seen.shape[1], dim=1)).flatten(1)
        return cast(Tensor, self.out(flat)), flat


class Heads(nn.Module):
    """The MLP for mean and deviation (the paper's MuStd), and offsets of nine quantiles.

    Attributes
    ----------
    typical_error
        Mean quantisation error of the site's own windows, [1]: set by the method, never trained.
    """

    def __init__(self, config: ModelConfig, hidden: int, tokens: int) -> None:
        super().__init__()
        inputs, width = config.context + 2, config.d_model
        sizes = (Linear(inputs, hidden), Linear(hidden, hidden), Linear(hidden, 2)) if hidden else ()
        self.statistics = nn.ModuleList(sizes)
        self.summary = Linear(tokens, width)
        self.quantiles = Linear(width, config.horizon * len(QUANTILES))
        self.typical_error = nn.Parameter(torch.ones(1))

    def changes(self, values: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor] | None:
        """Map a window [B, L], its mean and deviation [B, 1] to their changes until the horizon, float32 [B, 1] each."""
        if not len(self.statistics):
            return None
        inner, middle, last = self.statistics
        window = torch.cat((values, mean, deviation), dim=1).clamp(-_LARGEST, _LARGEST).to(cast(torch.dtype, last.weight.dtype))
        shift, widening = last(F.relu(middle(F.relu(inner(window))))).float().split(1, dim=1)
        return shift, widening

    def forward(self, flat: Tensor, point: Tensor) -> Tensor:
        """Map the decoder's flattened tokens and points [B, H] to quantiles [B, H, 9], float32; no gradient goes back."""
        offsets = self.quantiles(F.gelu(self.summary(flat.detach()))).float().view(len(flat), -1, len(QUANTILES))
        return cast(Tensor, point.detach().unsqueeze(-1) + offsets[:, : point.shape[1]])


class PrototypeTransformer(PatchTransformer):
    """Encoder, memory of prototypes, decoder; ``config.patch`` is 4 and ``config.d_model`` 64 in the paper.

    ``config.position`` has no meaning here. Features of an :class:`~fedcast.models.base.Output` are the encoder's.
    """

    architecture: ClassVar[str] = "prototype"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        nn.Module.__init__(self)
        settings = PrototypeSettings.of(config)
        self.config, self.settings = config, settings
        self.packs = False
        self.encoder: Any = build_encoder(settings.backbone, config)
        self.memory = Memory(settings.prototypes, config.d_model)
        self.decoder: Any = ShapeDecoder(config, settings)
        self.heads: Any = Heads(config, settings.statistics, self.decoder.out.in_features)
        _initialise(self, seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.memory.prototypes.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.memory.prototypes.dtype

    def use_native(self, on: bool) -> None:
        """Do nothing: the native kernels compute other blocks."""

    def read(self, context: Tensor, mask: Tensor) -> Reading:
        """Encode windows and look up a prototype for each patch; parameters as in :meth:`PatchTransformer.normalised`."""
        tokens = self.tokens(context, mask)
        missing = self.config.context_patches - tokens.mask.shape[1]
        values = F.pad(tokens.patches[..., : self.config.patch], (0, 0, missing, 0))
        tokens = tokens._replace(patches=values, mask=F.pad(tokens.mask, (missing, 0)))
        features = self.encoder(values, key_bias(tokens.mask, self.dtype)).float()
        return Reading(tokens, features, *self.memory(features))

    def encode(self, context: Tensor, mask: Tensor) -> Encoded:
        """Return features, and the prototypes that stand for them; parameters as in :meth:`PatchTransformer.normalised`."""
        return self.straight_through(self.read(context, mask))

    def straight_through(self, reading: Reading) -> Encoded:
        """Return what the decoder reads: exactly the prototypes, with the features in their place for the gradient."""
        tokens, features = reading.tokens, reading.features
        memory = reading.nearest.detach() + (features - features.detach())
        return Encoded(tokens, features, memory.to(self.dtype), key_bias(tokens.mask, self.dtype), None)

    def predict(self, encoded: Encoded, horizon: int) -> Prediction:
        """Forecast from encoded windows: ``y = shape * (widening + deviation) + shift + mean``; horizon as in :meth:`decode`."""
        tokens = encoded.tokens
        seen = tokens.mask.to(self.dtype)
        shapes, flat = self.decoder(encoded.memory, encoded.bias, seen)
        shape = shapes[:, :horizon].float()
        window = tokens.patches.flatten(1)[:, -self.config.context :].float()
        loc, scale = tokens.loc, tokens.scale
        mean, deviation = torch.zeros_like(loc).float(), torch.ones_like(scale).float()
        if self.settings.units == "data":
            # As in the released normalisation: sqrt(variance + 1e-5).
            window = (window * scale + loc).float()
            scale = torch.hypot(scale, scale.new_tensor(math.sqrt(EPSILON)))
            mean, deviation = loc.float(), scale.float()
        changes = self.heads.changes(window, mean, deviation)
        shift, widening = changes if changes is not None else (None, None)
        point = shape
        if shift is not None and widening is not None:
            point = shape * (1 + widening / deviation) + shift / deviation
        output = Output(point, self.heads(flat, point), encoded.features, tokens.mask, loc, scale)
        return Prediction(shape, shift, widening, mean, deviation, output)

    def decode(self, encoded: Encoded, horizon: int) -> Output:
        """Forecast from encoded windows, in normalised units; ``horizon`` is from 1 to ``config.horizon``."""
        return self.predict(encoded, horizon).output

    def in_units(self, values: Tensor, output: Output) -> Tensor:
        """Return values [B, H] of the data in working units."""
        return values if self.settings.units == "data" else (values - output.loc) / output.scale

    def window_errors(self, context: Tensor, mask: Tensor) -> Tensor | None:
        """Return the quantisation error of each window [B]: the mean of ``|z - p|^2 / D`` over patches with observed points.

        It stands in units of the site's typical error (``serving = "relative"``): as it is, it tells encoders apart rather than windows,
        since the site whose features lie closest together has the smallest one on anything. Where no point is observed it is 0:
        nothing tells such models apart.
        """
        if self.settings.serving == "mixture":
            return None
        reading = self.read(context, mask)
        error = (reading.features - reading.nearest).square().mean(-1)  # [B, N]
        seen = reading.tokens.mask
        mean = (error * seen).sum(1) / seen.sum(1).clamp_min(1)
        return mean / self.heads.typical_error.float().clamp_min(_SMALLEST) if self.settings.serving == "relative" else mean


def _initialise(model: PrototypeTransformer, seed: int) -> None:
    """Fill the weights: the memory U(-1/M, 1/M), positions N(0, 0.02), biases 0; the rest U(-b, b), b by Xavier or 1/sqrt(inputs).

    Xavier's bound, ``sqrt(6 / (inputs + outputs))``, is that of the decoder, the MLP for mean and deviation, and attention's input.
    """
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name.rpartition(".")[2]:
                parameter.zero_()
            elif name.endswith("positions"):
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.dim() >= 2:
                # A convolution's kernel stands in the third place.
                inputs, outputs = parameter[0].numel(), parameter[:, 0].numel()
                bound = inputs**-0.5
                if name.startswith("memory."):
                    bound = 1 / len(parameter)
                elif name.startswith(("decoder.", "heads.statistics.")) or ".qkv." in name:
                    bound = math.sqrt(6 / (inputs + outputs))
                parameter.uniform_(-bound, bound, generator=generator)
        model.heads.quantiles.bias.copy_(torch.tensor(GAUSSIAN).repeat(model.config.horizon))
