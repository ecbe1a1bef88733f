"""Sundial: a decoder over patches of 16 steps whose head draws sample paths of 720 steps by flow matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES
from fedcast.models.contract import Encoding
from fedcast.models.layers import scaled_target
from fedcast.models.published.patches import QuantileModel, in_patches, interpolated
from fedcast.models.published.timer import CONTEXT, AuthorsDecoder, decoded

SAMPLES = 100
"""Sample paths that quantiles are taken from."""


class Sundial(AuthorsDecoder, QuantileModel):
    """Sundial behind fedcast's contract.

    Sources: Liu et al., *Sundial: A Family of Highly Capable Time Series Foundation Models*, ICML 2025; the authors' network as it
    lies in ``sktime.libs.sundial``, of which layers and head are used. No code of a checkpoint is executed. It was never run on the
    published weights here, as they could not be had.

    The loss is the authors' TimeFlow loss: the head is given a mixture of target and noise, and learns the target, with a weight of
    1 / h for step h. Forecasts are quantiles of 100 sample paths; every window gets the same noise, so that a forecast depends on
    nothing but its window. A horizon of more than a pass is rolled by the median, as the authors do.
    """

    family: ClassVar[str] = "sundial"
    summary: ClassVar[str] = "decoder over patches of 16 steps; sample paths of 720 steps in one pass, by flow matching"
    hub: ClassVar[tuple[str, ...]] = ("thuml/sundial-base-128m",)
    heads: ClassVar[tuple[str, ...]] = ("flow_loss.",)
    quantiles: ClassVar[str] = "sampled"
    splits: ClassVar[bool] = False

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 16,000 parameters: 16 steps a patch, 32 steps a pass."""
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        head = {"flow_loss_depth": 1, "num_sampling_steps": 4, "diffusion_batch_mul": 4}
        lengths = {"input_token_len": 16, "output_token_lens": [32], "max_position_embeddings": CONTEXT}
        return {**shape, **head, **lengths, "dropout_rate": 0.1}

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """Return the authors' classes of network and configuration."""
        from sktime.libs.sundial import SundialConfig, SundialForPrediction

        return SundialForPrediction, SundialConfig

    def features(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch [B, N, d] for standardised values and their mask [B, N * patch]."""
        begun = mask.cummax(dim=1).values
        parts = (torch.where(begun, interpolated(values, mask), 0.0), begun.to(values.dtype))
        patches = torch.cat([in_patches(part, self.config.patch) for part in parts], dim=2)
        embed = self.network.model.embed_layer
        embedded = embed.output_layer(embed.act(embed.hidden_layer(patches))) + embed.residual_layer(patches)
        return decoded(self.network.model, embedded, self.observed(mask))

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch [B, N, d], float32; nothing is forecast."""
        values, mask, _, _ = self.patched(context, mask)
        return self.features(values, mask).float()

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantiles of sample paths, and one feature a patch."""
        features = self.features(values, mask)
        noise = torch.randn(SAMPLES, self.config.horizon, generator=torch.Generator().manual_seed(0)).to(features)
        start = noise.repeat(len(features), 1)
        state, path, head = features[:, -1].repeat_interleave(SAMPLES, dim=0), start, self.network.flow_loss
        steps = head.num_sampling_steps
        for step in range(steps):
            time = start.new_full((len(start),), 1000 * step / steps)
            path = path + (head.net(path, time, state) - start) / steps
        samples = path.float().reshape(len(features), SAMPLES, self.config.horizon)
        return samples.quantile(samples.new_tensor(QUANTILES), dim=1).permute(1, 2, 0), features

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the TimeFlow loss over observed targets, and one feature a patch; noise and mixing times are drawn."""
        self.check_target(batch)
        values, mask, loc, scale = self.patched(batch.context, batch.mask)
        features = self.features(values, mask)
        short, draws = self.config.horizon - batch.target.shape[1], self.network.config.diffusion_batch_mul
        # a missing target would reach the others through the head
        goal = torch.where(batch.target_mask, scaled_target(batch.target, loc, scale), 0.0)
        target, seen, state = (
            part.to(features.dtype).repeat(draws, 1)
            for part in (F.pad(goal, (0, short)), F.pad(batch.target_mask, (0, short)), features[:, -1])
        )
        drawing = generator()
        noise = torch.randn(target.shape, generator=drawing).to(target)
        time = torch.rand(len(target), 1, generator=drawing).to(target)
        found = self.network.flow_loss.net(time * target + (1 - time) * noise, 1000 * time[:, 0], state)
        weight = 1.0 / torch.arange(1, self.config.horizon + 1, device=target.device)
        loss = (seen * weight * (found - target).square()).sum(dim=1).mean()
        return loss, Encoding(features.float(), self.observed(mask))
