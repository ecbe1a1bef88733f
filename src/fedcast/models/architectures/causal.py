"""The masked reconstructor of FeDaL (arXiv 2508.04045): a decoder-only transformer over patches, with causal attention.

Found in the paper's figure (fedal.md A.2): patches, random patch masking, embedding, decoder-only transformer with causal attention
(theta_b), a projection head (theta_h) that reconstructs the patches from representation plus domain bias ``h + b``, where
``b = gamma_t Mean(h_t) + gamma_s Mean(h_s)`` with learnable scales.

Reconstructed: (1) Blocks, positions and embedding are those of :class:`~fedcast.models.patch.PatchTransformer`, as many blocks as its
encoder and decoder together have; a hidden patch enters as a learned token. (2) Mean and standard deviation are those of the visible
points, so a hidden point never tells anything. (3) A window is context and horizon; the forecast fills in the horizon, hidden as a
whole, in one pass. (4) Between rounds ``b`` is a tensor of the model: the site's own, and the mean of the sites' for domains that no site
has seen, so that a forecast does not depend on what else is in a batch. (5) Nine quantiles, read from detached features, so that the
paper's weights are trained by the paper's loss alone. (6) No dropout (the specification's 0.1): worker threads share the random
stream it draws from.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.errors import ModelError
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.layers import EncoderBlock, InstanceNorm, PatchEmbedding, exclude
from fedcast.models.masking import spread
from fedcast.models.patch import GAUSSIAN, Encoded, Heads, PatchTransformer, Tokens

_SCALE = 0.1
BiasAxes = Literal["mixed", "batch", "batch+token"]
"""Over which axes the domain bias is a mean; see :func:`fedcast.methods.fedal.domain_bias`."""


class CausalEncoder(nn.Module):
    """Patch embedding, a token for hidden patches, and blocks in which a token sees itself and what comes before it."""

    positions: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.patch, config.d_model)
        self.mask_token = nn.Parameter(torch.empty(config.d_model))
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(config.context_patches + config.horizon_patches, config.d_model))
        else:
            self.register_parameter("positions", None)
        layers = config.encoder_layers + config.decoder_layers
        self.blocks = nn.ModuleList(EncoderBlock(config.d_model, config.n_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, patches: Tensor, hidden: Tensor, bias: Tensor, table: tuple[Tensor, Tensor] | None, places: slice) -> Tensor:
        """Map patches [B, N, 2 * patch] to features [B, N, d].

        Parameters
        ----------
        patches
            Values, then mask.
        hidden
            bool [B, N]: patches that enter as the mask token.
        bias, table
            As in :class:`~fedcast.models.layers.EncoderBlock`; the bias is that of :func:`causal_bias`.
        places
            Positions of the N patches.
        """
        x = torch.where(hidden.unsqueeze(-1), self.mask_token, self.embedding(patches))
        if self.positions is not None:
            x = x + self.positions[places]
        for block in self.blocks:
            x = block(x, bias, table)
        return cast(Tensor, self.norm(x))


class DomainBias(nn.Module):
    """Scales of the domain bias, and the bias itself.

    Attributes
    ----------
    trend, season
        The scales gamma_t and gamma_s, [d]; they start at 0.1 (reconstructed: from 1 the bias is as large as what it is added to, and
        on the bundled data the reconstruction error fell more slowly).
    own
        The bias, [N, d], or [1, d] where it is the same at every patch; no gradient reaches it.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.trend, self.season = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.own = nn.Parameter(torch.empty(rows, width))

    def at(self, places: slice) -> Tensor:
        """Return the bias at positions, [n, d] or [1, d]."""
        return self.own.detach() if len(self.own) == 1 else self.own.detach()[places]


class CausalTransformer(PatchTransformer):
    """Decoder-only masked reconstructor; its forecast fills in the hidden horizon.

    ``config.settings`` may hold ``("bias", axes)``: the axes of a domain bias (:data:`BiasAxes`); without it there is none.
    """

    architecture: ClassVar[str] = "causal"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        nn.Module.__init__(self)
        settings = dict(config.settings)
        axes = settings.pop("bias", None)
        if settings or axes not in (None, *get_args(BiasAxes)):
            raise ModelError(
                f"settings {config.settings!r} are refused", hint=f"the only setting is bias, one of {', '.join(get_args(BiasAxes))}"
            )
        self.config = config
        self.packs = False
        self.encoder: Any = CausalEncoder(config)
        self.domain = None if axes is None else DomainBias(1 if axes == "batch+token" else self.window_patches, config.d_model)
        # There is no decoder: the name is what compiling a model looks for.
        self.decoder: Any = nn.Identity()
        self.heads = Heads(config)
        _initialise(self, seed)

    @property
    def window_patches(self) -> int:
        """Patches of context and horizon together."""
        return self.config.context_patches + self.config.horizon_patches

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return cast(torch.device, self.encoder.mask_token.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return cast(torch.dtype, self.encoder.mask_token.dtype)

    def use_native(self, on: bool) -> None:
        """Compute blocks with the native kernels where they fit, or stop doing so; see :meth:`PatchTransformer.use_native`."""
        for block in self.encoder.blocks:
            block.native = on

    def use_explicit(self) -> None:
        """Compute attention by plain products, which can be differentiated twice; torch's fused kernel cannot."""
        self.use_native(False)
        for block in self.encoder.blocks:
            block.explicit = True

    def represent(self, values: Tensor, mask: Tensor, hidden: Tensor) -> Encoded:
        """Return the representation h of windows with hidden patches.

        Parameters
        ----------
        values
            [B, T] in any unit, T = N * patch, at most context and horizon together; its last patch is the last of the horizon.
        mask
            bool [B, T], True where observed.
        hidden
            bool [B, N], True where a patch is to be reconstructed.

        Returns
        -------
        Encoded
            ``features`` [B, N, d]; ``tokens.mask`` is True where a patch is visible; ``tokens.loc`` and ``tokens.scale`` are of the
            visible points.

        Raises
        ------
        ModelError
            When a shape does not fit.
        """
        patch, (batch, length) = self.config.patch, values.shape
        count = length // patch
        if mask.shape != values.shape or length != count * patch or count > self.window_patches or hidden.shape != (batch, count):
            raise ModelError(
                f"values {tuple(values.shape)}, mask {tuple(mask.shape)} and hidden patches {tuple(hidden.shape)} do not fit",
                hint=f"give windows of at most {self.window_patches} whole patches of {patch} steps, and one flag a patch",
            )
        visible = mask & spread(hidden, patch).logical_not()
        normal, loc, scale = InstanceNorm.forward(torch.where(visible, values, 0.0), visible)
        channels = torch.stack((normal.float(), visible.float()), dim=1).view(batch, 2, count, patch)
        patches = channels.transpose(1, 2).reshape(batch, count, 2 * patch).to(self.dtype)
        seen = visible.view(batch, count, patch).any(dim=-1)
        return self._run(Tokens(patches, seen, loc, scale), hidden, self.window_patches - count)

    def output(self, encoded: Encoded, bias: Tensor | None = None) -> Output:
        """Return point and quantiles of every patch, in normalised units.

        Parameters
        ----------
        encoded
            N patches, the last of which is the last of the horizon, as :meth:`represent` gives them.
        bias
            Domain bias [N, d] or [1, d] to use instead of the model's own.
        """
        tokens, features = encoded.tokens, encoded.features
        if bias is None and self.domain is not None:
            bias = self.domain.at(slice(self.window_patches - features.shape[1], self.window_patches))
        point, quantiles = self._project(features, bias)
        return Output(point, quantiles, features.float(), tokens.mask, tokens.loc, tokens.scale)

    def fill(self, values: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruct all points of windows from their visible patches, [B, T] in the unit of ``values``; see :meth:`represent`."""
        output = self.output(self.represent(values, mask, hidden))
        return InstanceNorm.inverse(output.point, output.loc, output.scale)

    def normalised(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Fill in the horizon in one pass, in normalised units; see :meth:`PatchTransformer.normalised`."""
        if not 1 <= horizon <= self.config.horizon:
            raise ModelError(
                f"one pass gives 1 to {self.config.horizon} steps, not {horizon}", hint="call the model itself, which rolls longer horizons"
            )
        return self._continue(self.tokens(context, mask), horizon)

    def encode(self, context: Tensor, mask: Tensor) -> Encoded:
        """Return the representation of a context; being causal, it is the same whatever follows."""
        tokens = self.tokens(context, mask)
        count = tokens.mask.shape[1]
        return self._run(tokens, torch.zeros_like(tokens.mask), self.config.context_patches - count)

    def decode(self, encoded: Encoded, horizon: int) -> Output:
        """Fill in the horizon after encoded windows, in normalised units; ``horizon`` is from 1 to ``config.horizon``."""
        return self._continue(encoded.tokens, horizon)

    def _continue(self, tokens: Tokens, horizon: int) -> Output:
        config, count = self.config, tokens.mask.shape[1]
        needed = -(-horizon // config.patch)
        asked = tokens._replace(patches=F.pad(tokens.patches, (0, 0, 0, needed)), mask=F.pad(tokens.mask, (0, needed)))
        hidden = F.pad(torch.zeros_like(tokens.mask), (0, needed), value=True)
        features = self._run(asked, hidden, config.context_patches - count).features
        now = config.context_patches
        bias = None if self.domain is None else self.domain.at(slice(now, now + needed))
        point, quantiles = self._project(features[:, count:], bias)
        context = features[:, :count].float()
        return Output(point[:, :horizon], quantiles[:, :horizon], context, tokens.mask, tokens.loc, tokens.scale)

    def _run(self, tokens: Tokens, hidden: Tensor, first: int) -> Encoded:
        places = slice(first, first + hidden.shape[1])
        bias = causal_bias(tokens.mask | hidden, self.dtype)
        features = self.encoder(tokens.patches, hidden, bias, self._table(places), places)
        return Encoded(tokens, features, features, bias, None)

    def _project(self, features: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is not None:
            features = (features.float() + bias).to(self.dtype)
        point = self.heads.point(features).flatten(1)
        quantiles = self.heads.quantiles(features.detach()).view(len(features), -1, len(QUANTILES))
        return point.float(), quantiles.float()


def causal_bias(usable: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask [B, 1, N, N] with which a token sees itself and the usable ones [B, N] before it."""
    count = usable.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=usable.device).triu(1)
    itself = torch.eye(count, dtype=torch.bool, device=usable.device)
    excluded = (usable.logical_not().unsqueeze(1) | later) & itself.logical_not()
    return exclude(excluded, dtype).unsqueeze(1)


def _initialise(model: CausalTransformer, seed: int) -> None:
    if next(model.parameters()).is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, *_, leaf = name.split(".")
            if leaf in ("bias", "own"):
                parameter.zero_()
            elif part == "domain":
                parameter.fill_(_SCALE)
            elif leaf == "positions":
                parameter.normal_(0.0, 0.5, generator=generator)
            elif leaf == "mask_token" or part == "heads":
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.dim() == 2:
                residual = ".blocks." in name and ".out." in name
                spread_ = parameter.shape[1] ** -0.5 * ((2 * len(model.encoder.blocks)) ** -0.5 if residual else 1.0)
                parameter.normal_(0.0, spread_, generator=generator)
        # an untrained model says "Gaussian around the mean of what it sees"
        model.heads.quantiles.bias.copy_(torch.tensor(GAUSSIAN).repeat(model.config.patch))
