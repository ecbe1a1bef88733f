"""Toto 1.0: a decoder over patches of 64 steps that gives a mixture of Student-t distributions for each step of the next patch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES
from fedcast.models.contract import Encoding
from fedcast.models.files import CONFIG, WEIGHTS, check_tensors, read_weights
from fedcast.models.layers import observed_mean, scaled_target
from fedcast.models.published.base import Library, PublishedConfig, read_json, write_json
from fedcast.models.published.patches import QuantileModel
from fedcast.models.published.pretrained import save_weights, without_dropout
from fedcast.models.seeding import seeded

CONTEXT_PATCHES = 64
"""Patches of context that the model was trained with, 4096 steps; its configuration does not say it."""
POINTS = 256
"""Points of each distribution that quantiles are taken from."""
_OWN = {"scaler_cls", "output_distribution_classes", "spacewise_every_n_layers", "embed_dim"}


class Toto(QuantileModel):
    """Toto 1.0 behind fedcast's contract.

    Sources: Cohen et al., *This Time is Different: An Observability Perspective on Time Series Foundation Models*, arXiv 2505.14766,
    and ``toto-ts`` 0.2. The loss is the authors': 0.575 times the negative log-likelihood plus 0.425 times a robust loss of the mean,
    of the target only.

    Quantiles are those of 256 points of each step's distribution, spread evenly over it, so that nothing is drawn. A horizon of more
    than a pass is rolled by the median; the library draws sample paths, whose spread grows further. One variate, without covariates.
    Toto 2 is another library's, which needs Python 3.12. It was never run on the published weights here, as they could not be had.
    """

    family: ClassVar[str] = "toto-1"
    summary: ClassVar[str] = "decoder over patches of 64 steps; a mixture of Student-t distributions for 64 steps in one pass"
    library: ClassVar[Library] = Library(
        "toto-ts",
        "toto",
        "pip install einops gluonts huggingface-hub jaxtyping lightning orjson rotary-embedding-torch"
        " && pip install --no-deps toto-ts==0.2.0",
    )
    hub: ClassVar[tuple[str, ...]] = ("Datadog/Toto-Open-Base-1.0",)
    licence: ClassVar[str] = "code Apache-2.0, weights Apache-2.0"
    heads: ClassVar[tuple[str, ...]] = ("model.unembed.", "model.output_distribution.")
    lora_targets: ClassVar[tuple[str, ...]] = ("wQKV", "wO")
    quantiles: ClassVar[str] = "sampled"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` has the settings of Toto 1.0."""
        return config.keys() >= _OWN

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint of the authors."""
        model = cls.drawn(read_json(folder / CONFIG), 0)
        from toto.model.transformer import XFORMERS_SWIGLU_AVAILABLE

        state = model.network._map_state_dict_keys(read_weights(folder / WEIGHTS), XFORMERS_SWIGLU_AVAILABLE)
        state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.freqs")}
        check_tensors(folder, model.network.state_dict(), state)
        model.network.load_state_dict(state)
        return model

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 6,000 parameters: 8 steps a patch and a pass, context 512."""
        return {
            "patch_size": 8,
            "stride": 8,
            "embed_dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_hidden_dim": 16,
            "dropout": 0.1,
            "spacewise_every_n_layers": 2,
            "spacewise_first": False,
            "scaler_cls": "<class 'model.scaler.CausalPatchStdMeanScaler'>",
            "output_distribution_classes": ["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
            "output_distribution_kwargs": {"k_components": 2},
        }

    @classmethod
    def drawn(cls, settings: Mapping[str, Any], seed: int) -> Self:
        """Return a model with the keys of a ``config.json``."""
        # The library says at every import that xFormers, which it can do without, is not there.
        warnings.filterwarnings("ignore", message="xFormers", category=ImportWarning)
        from toto.model.toto import Toto as Network

        with seeded(seed):
            network: Any = without_dropout(Network(**{**settings, "use_memory_efficient_attention": False}))
        # A function that is wrapped for a class cannot be copied where the library has put it, in an instance.
        rotary = network.model.transformer.rotary_emb
        rotary.apply_rotary_emb = rotary.apply_rotary_emb.__func__
        patch = settings["patch_size"]
        return cls(network, PublishedConfig(cls.family, CONTEXT_PATCHES * patch, patch, patch, settings["embed_dim"]), settings)

    def write(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` as ``Toto.load_from_checkpoint`` reads them."""
        save_weights(self.network.state_dict(), folder)
        write_json(folder / CONFIG, self.settings)

    def distribution(self, values: Tensor, mask: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Return the mixture of each step of the next patch, its loc and scale [B, 1], and one feature a patch [B, N, d]."""
        backbone = self.network.model
        inputs, seen = values[:, None], mask[:, None]
        scaled, loc, scale = backbone.scaler(inputs, weights=torch.ones_like(inputs), padding_mask=seen)
        embedded, groups = backbone.patch_embed(scaled, torch.zeros_like(inputs))
        features = backbone.transformer(embedded, groups)[:, 0]
        steps = backbone.unembed(features[:, -1]).reshape(len(values), self.config.patch, self.config.d_model)
        return backbone.output_distribution(steps), loc[:, 0, -1:], scale[:, 0, -1:], features

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch [B, N, d], float32; nothing is forecast."""
        values, mask, _, _ = self.patched(context, mask)
        return self.distribution(values, mask)[3].float()

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantiles of each step's mixture, and one feature a patch."""
        mixture, loc, scale, features = self.distribution(values, mask)
        quantiles = mixture_quantiles(mixture).to(loc)
        return quantiles * scale[..., None] + loc[..., None], features

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the authors' loss over observed targets, and one feature a patch; nothing is drawn."""
        from toto.model.losses import CombinedLoss

        self.check_target(batch)
        values, mask, mean, deviation = self.patched(batch.context, batch.mask)
        mixture, loc, scale, features = self.distribution(values, mask)
        short = self.config.horizon - batch.target.shape[1]
        target = F.pad(scaled_target(batch.target, mean, deviation), (0, short)).to(features.dtype)
        losses = CombinedLoss()(mixture, (target - loc) / (scale + torch.finfo(scale.dtype).eps))
        return observed_mean(losses.float(), F.pad(batch.target_mask, (0, short))), Encoding(features.float(), self.observed(mask))


def mixture_quantiles(mixture: Any) -> Tensor:
    """Return the nine quantiles of mixtures of Student-t distributions [..., K]: [..., 9], on the CPU, in float64.

    They are those of 256 points: a lattice of the golden section over component and quantile within it, put through the inverse
    distribution functions. The same mixture has the same quantiles, wherever and beside whatever it is computed.
    """
    parts = mixture.component_distribution
    weight, df, loc, scale = (
        part.detach().double().cpu().numpy() for part in (mixture.mixture_distribution.probs, parts.df, parts.loc, parts.scale)
    )
    index = np.arange(POINTS)
    which, level = (index + 0.5) / POINTS, (0.5 + index * (5**0.5 - 1) / 2) % 1.0
    bounds = weight.cumsum(axis=-1)[..., None, :-1]
    component = (which[:, None] > bounds).sum(axis=-1)
    df, loc, scale = (np.take_along_axis(part, component, axis=-1) for part in (df, loc, scale))
    points = torch.from_numpy(loc + scale * stdtrit(df, np.broadcast_to(level, df.shape)))
    return points.quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=-1).movedim(0, -1)
