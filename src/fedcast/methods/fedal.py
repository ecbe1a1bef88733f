"""FeDaL (arXiv 2508.04045): a federated masked reconstructor that takes domain bias out at sites and at the server.

Found (fedal.md A.3, A.4): patch-masked reconstruction at a ratio of 0.75. Domain bias elimination (DBE) at a site: the representation h
is split into trend and seasonal part, ``b = gamma_t Mean(h_t) + gamma_s Mean(h_s)``, kept as a moving average over batches, and the
loss is ``E |head(h + b) - X|^2 + lambda |b - b_g|^2``, ``b_g`` being the mean of the sites' biases. Global bias elimination (GBE) at
the server: mean of the weights, gradient-level correction, training on the union of the sites' core-sets, convex fusion. The values of
hyper-parameters are reconstructions, and so is what each docstring names as one.

The correction as printed, ``s = s - beta sum(theta_i - theta_g)`` and ``theta_mean - s / beta``, does not depend on beta and has FedAvg's
fixed point (fedal.md A.4, derived), so it removes no bias. The default is FedDyn's, which the paper cites: the same server step
with the sum divided by the number of sites, and the site's counter-term. See ``dynamics``. Where it converges, it does so at the optimum
of the plain mean of the sites' losses, whatever the weights of the mean that it corrects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.errors import FederationError, SpecError
from fedcast.methods.base import Client, Method, Server, Update, hyper
from fedcast.methods.feddyn import FedDyn
from fedcast.models.architectures.causal import BiasAxes, CausalTransformer
from fedcast.models.base import ModelConfig
from fedcast.models.contract import ModelShape
from fedcast.models.masking import observed_patches, patch_mask
from fedcast.spec import ModelSpec
from fedcast.tasks.reconstruct import ReconstructTask, whole_windows
from fedcast.training import coreset as core

_TASK = ReconstructTask()
_TUNED_TOGETHER = 64  # core-set windows in a step at the server (the specification's 256 would be two steps with eight sites)


@dataclass(frozen=True)
class FedAl(Method):
    """Loss at a site: ``reconstruction + lambda |b - b_g|^2``; at the server: mean, correction, core-set tuning, fusion.

    The paper's ablations: ``align = 0`` (without bias alignment), ``dbe = false``, ``coreset = 0`` (without core-set tuning),
    ``dynamics = "none"`` (without gradient correction), ``gbe = false``. Without DBE and GBE it is FedAvg of a masked reconstructor.

    The default of ``beta`` under ``dyn_feddyn`` was chosen among 0.1, 0.03, 0.01 and 0.003 on bundled data, by reconstruction error
    and validation loss: trained on energy, health, medical and cloud, scored on them and on traffic, wind, nature and activity, which no
    run holds out by default; nano, context 128, horizon 32, patch 8, 20 rounds of 20 steps, without core-sets, one seed (a second one
    agreed with FedAvg's reconstruction error within 1 %, at a validation loss 3 % lower). A clipped gradient is about 0.001 a weight: at
    0.1 the pull to ``theta_g`` outweighs it, at 0.003 sites hardly answer the server's step. The specification's grid starts from 0.1.
    """

    name: ClassVar[str] = "fedal"
    summary: ClassVar[str] = (
        "masked reconstruction; domain bias taken out at sites, drift corrected and core-sets learnt from at the server"
    )
    architecture: ClassVar[str] = "causal"

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = hyper(0.75, "share of a window's patches that is hidden in training")
    dbe: bool = hyper(True, "domain bias elimination at sites; false is an ablation")
    align: Annotated[float, Field(ge=0)] = hyper(0.1, "weight of the bias alignment (lambda); 0 switches it off")
    axes: Literal["mixed", "batch", "batch+token"] = hyper("mixed", "what the bias is a mean over; mixed: patches too, but for the season")
    kernel: Annotated[int, Field(ge=0)] = hyper(0, "patches in the moving average that is the trend (tau), odd; 0: a quarter of a window")
    momentum: Annotated[float, Field(ge=0, lt=1)] = hyper(0.9, "share of the old domain bias that a batch keeps")
    gbe: bool = hyper(True, "global bias elimination at the server; false is an ablation")
    dynamics: Literal["dyn_feddyn", "dyn_literal", "dyn_scaled", "none"] = hyper("dyn_feddyn", "the gradient-level correction")
    beta: Annotated[float, Field(gt=0)] | None = hyper(None, "weight of the correction; absent: 0.03, and 0.1 for dyn_scaled")
    rho: Annotated[float, Field(ge=0, le=1)] | None = hyper(
        None, "share of s kept a round; absent: 0.5 for dyn_literal, 0.9 for dyn_scaled"
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = hyper(0.7, "share of the corrected weights in the fusion with the tuned ones")
    coreset: Annotated[int, Field(ge=0)] = hyper(64, "windows in a site's core-set (K); 0: no core-sets and no tuning")
    refresh: Annotated[int, Field(ge=1)] = hyper(5, "rounds after which a site learns its core-set anew")
    match_steps: Annotated[int, Field(ge=0)] = hyper(50, "steps of gradient matching")
    match_rate: Annotated[float, Field(gt=0)] = hyper(0.01, "learning rate of gradient matching")
    noise: Annotated[float, Field(ge=0)] = hyper(0.1, "size of the noise on a core-set's Fourier amplitudes (sigma)")
    tune_epochs: Annotated[int, Field(ge=1)] = hyper(1, "passes over all core-sets at the server")
    tune_rate: Annotated[float, Field(gt=0)] = hyper(1e-4, "learning rate of core-set tuning")

    def __post_init__(self) -> None:
        if self.kernel and self.kernel % 2 == 0:
            raise SpecError(f"a moving average over {self.kernel} patches has no middle", hint="make method.kernel odd")

    def model_config(self, model: ModelSpec) -> ModelConfig:
        """Return the causal reconstructor's configuration, with a domain bias unless that is switched off."""
        return replace(super().model_config(model), settings=(("bias", self.axes),) if self.dbe else ())

    def shares(self, name: str) -> bool:
        """Let everything travel but the site's own bias; the mean of the biases serves domains that no site has seen."""
        return name != "domain.own"

    def exports(self) -> Literal["never"]:
        """Hand in no private weights: the bias is in every reply already."""
        return "never"

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return the reconstruction error of hidden patches, the quantile head's loss and the alignment of the bias.

        Where the bias is of patches, [N, d], its squared distance is a mean over them (reconstructed).
        """
        model = cast(CausalTransformer, client.model)
        values, mask = whole_windows(batch, model.config.patch)
        usable = observed_patches(mask, model.config.patch)
        hidden = patch_mask(usable, self.mask_ratio, client.generator())
        encoded = model.represent(values, mask, hidden)
        bias = self._bias(client, encoded.features.float(), usable) if self.dbe else None
        error, quantile = _TASK.loss(model.output(encoded, bias), values, mask, hidden)
        client.record("reconstruction", error)
        loss = error + quantile
        if bias is not None and self.align > 0 and "bias" in client.received:
            distance = (bias - client.received["bias"]).square().sum(-1).mean()
            client.record("bias_distance", distance)
            loss = loss + self.align * distance
        return loss

    def _bias(self, client: Client, features: Tensor, usable: Tensor) -> Tensor:
        """Return the moving average of the domain bias, [N, d] or [1, d], with a gradient through this batch's share of it."""
        domain = cast(CausalTransformer, client.model).domain
        if domain is None:
            raise FederationError("the model has no domain bias", hint="build it from the method's own model_config")
        trend, season = domain_bias(features, usable, self.kernel or default_kernel(features.shape[1]), self.axes)
        trend, season = domain.trend.float() * trend, domain.season.float() * season
        client.record("bias_trend", trend.norm(dim=-1).mean())
        client.record("bias_season", season.norm(dim=-1).mean())
        old = client.scratch.get("bias", client.state.get("bias"))
        bias = trend + season if old is None else self.momentum * old + (1 - self.momentum) * (trend + season)
        client.scratch["bias"] = bias.detach()
        return bias

    def correction(self, client: Client) -> Tensor | None:
        """Return the gradient of the site's counter-term ``-<g_i, theta> + (beta / 2) |theta - theta_g|^2`` under ``dyn_feddyn``."""
        return FedDyn(alpha=self._weight).correction(client) if self._counters else None

    @property
    def _counters(self) -> bool:
        return self.gbe and self.dynamics == "dyn_feddyn"

    @property
    def _weight(self) -> float:
        return self.beta if self.beta is not None else 0.1 if self.dynamics == "dyn_scaled" else 0.03

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Keep the site's bias and counter-term; send the bias, and the core-set."""
        if self._counters:
            FedDyn(alpha=self._weight).reply(client)
        tensors = {}
        if self.dbe:
            tensors["bias"] = client.state["bias"] = client.scratch["bias"]
            client.parameters.private.copy_(tensors["bias"].flatten())
        if self.gbe and self.coreset > 0:
            tensors["coreset"] = self._coreset(client)
        return tensors

    def _coreset(self, client: Client) -> Tensor:
        """Return the core-set [K, T], learnt anew every ``refresh`` rounds (reconstructed: the paper's text suggests every round).

        It starts from K random windows, standardised, later from what it was. Noise is added once: drawn anew each round, it would
        average out. The distance of each vector to its nearest train window stays at the site, as ``coreset_nearest`` [K] in its
        state; the smallest and the median one go into the round's row.
        """
        last = client.state.get("coreset_round")
        if last is not None and client.round - int(last) < self.refresh:
            return client.state["coreset"]
        config, device = cast(CausalTransformer, client.model).config, client.parameters.vector.device

        def draw() -> tuple[Tensor, Tensor]:
            return whole_windows(client.sampler.gather(client.sampler.draw(self.coreset, client.rng)).to(device), config.patch)

        start = client.state["coreset"] if last is not None else core.standardise(*draw())
        model = core.float_model(config, client.parameters.layout, client.parameters.vector)
        generator = client.generator()
        learnt, mismatch = core.match_gradients(
            model, start, draw, _TASK, ratio=self.mask_ratio, steps=self.match_steps, rate=self.match_rate, generator=generator
        )
        made = core.perturb_amplitudes(learnt, self.noise, generator)
        nearest = core.nearest_distances(made, client.sampler, config.patch)
        client.record("coreset_mismatch", mismatch)
        client.record("coreset_nearest_minimum", nearest.min())
        client.record("coreset_nearest_median", nearest.quantile(0.5))
        client.state["coreset"], client.state["coreset_round"] = made, torch.tensor(float(client.round))
        client.state["coreset_nearest"] = nearest
        return made

    def reply_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the bias ``[N, d]`` or ``[1, d]`` and the core-set ``[K, T]``, T the steps of context and horizon."""
        patches = shape.context_patches + shape.horizon_patches
        shapes = self.message_shapes(shape)
        if self.gbe and self.coreset > 0:
            shapes["coreset"] = (self.coreset, patches * shape.patch)
        return shapes

    def message_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the global bias ``[N, d]`` or ``[1, d]``."""
        rows = 1 if self.axes == "batch+token" else shape.context_patches + shape.horizon_patches
        return {"bias": (rows, shape.d_model)} if self.dbe else {}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Send the shared weights and, from round 2 on, the global bias."""
        return {**super().message(server, site), **{name: server.tensors[name] for name in ("bias",) if name in server.tensors}}

    @property
    def averages(self) -> bool:
        """Whether the server trains on no core-sets of the sites."""
        return not (self.gbe and self.coreset > 0)

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Take the mean weighted by training points, renew the global bias (its weights are reconstructed), and eliminate global bias."""
        before, samples = server.shared, [float(update.samples) for update in updates]
        self.combine(server, updates, samples)
        if self.dbe:
            shape = updates[0].tensors["bias"].shape
            bias = server.mean("bias", updates, samples)
            server.tensors["bias"], server.private = bias.view(shape), bias
        if self.gbe:
            server.shared = self._corrected(server, updates, before)
            if self.coreset > 0:
                self._tune(server, updates)

    def _corrected(self, server: Server, updates: Sequence[Update], before: Tensor) -> Tensor:
        """Return the corrected weights.

        With D the sum of ``theta_i - theta_g`` over the replies and N the number of sites (all reconstructed): ``dyn_feddyn``
        ``s = s - beta D / N``, mean - s / beta; ``dyn_literal`` the same with ``s = rho s - ...`` and no counter-term at sites;
        ``dyn_scaled`` ``s = rho s - beta D / |replies|``, mean - s. After the last round ``dyn_feddyn`` leaves the mean as it is: the
        step ``s / beta`` counts on sites that go on training against it, and as in FedDyn's own code the mean is what is scored.
        """
        if self.dynamics == "none":
            return server.shared
        moved = server.mean("shared", updates, [1.0] * len(updates)) - before
        scaled = self.dynamics == "dyn_scaled"
        share = 1.0 if scaled else len(updates) / server.sites
        kept = 1.0 if self._counters else self.rho if self.rho is not None else 0.9 if scaled else 0.5
        s = kept * server.tensors.get("s", torch.zeros_like(before)) - self._weight * share * moved
        server.tensors["s"] = s
        step = s if scaled else s / self._weight
        server.log["correction_norm"] = float(step.norm())
        return server.shared if self._counters and server.round == server.rounds else server.shared - step

    def _tune(self, server: Server, updates: Sequence[Update]) -> None:
        """Train on the union of core-sets and fuse, ``alpha * corrected + (1 - alpha) * tuned``; seeded by the round."""
        if server.config is None:
            raise FederationError("the server does not know its model", hint="give Server.config, or set coreset = 0")
        vector = torch.cat([server.shared, server.private])
        model = core.float_model(server.config, server.layout, vector)
        errors = core.tune(
            model,
            torch.cat([update.tensors["coreset"] for update in updates]),
            _TASK,
            ratio=self.mask_ratio,
            epochs=self.tune_epochs,
            rate=self.tune_rate,
            batch_size=_TUNED_TOGETHER,
            generator=torch.Generator().manual_seed(server.round),
        )
        tuned = server.layout.flatten(dict(model.named_parameters()))[: server.layout.shared_size]
        server.log["coreset_error"] = errors[-1]
        server.log["tuning_norm"] = float((tuned - server.shared).norm())
        server.shared = self.alpha * server.shared + (1 - self.alpha) * tuned


def default_kernel(patches: int) -> int:
    """Return the patches of the moving average: 25 as in Autoformer, or the largest odd number up to a quarter of the window.

    But at least 3: a trend over one patch is the representation itself, and no season is left.
    """
    quarter = patches // 4
    return min(25, max(3, quarter if quarter % 2 else quarter - 1))


def decompose(features: Tensor, usable: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Return trend and seasonal part of representations [B, N, d] along the patches.

    The trend is Autoformer's moving average: ``AvgPool_kernel`` with the edges repeated (reconstructed: over patches). A patch without
    observed points takes the place of none: the nearest one before it stands there, or the first one.

    Parameters
    ----------
    features
        Representations [B, N, d].
    usable
        bool [B, N].
    kernel
        Patches averaged, odd.
    """
    places = torch.arange(features.shape[1], device=features.device).expand_as(usable)
    first = usable.int().argmax(dim=1, keepdim=True)
    source = torch.where(usable, places, -1).cummax(dim=1).values.maximum(first)
    filled = features.gather(1, source.unsqueeze(-1).expand_as(features))
    reach = kernel // 2
    padded = F.pad(filled.transpose(1, 2), (reach, reach), mode="replicate")
    trend = F.avg_pool1d(padded, kernel, stride=1).transpose(1, 2)
    return trend, filled - trend


def domain_bias(features: Tensor, usable: Tensor, kernel: int, axes: BiasAxes) -> tuple[Tensor, Tensor]:
    """Return means of trend and seasonal part of representations [B, N, d], [N, d] or [1, d] each, over usable patches.

    Over patches the seasonal part averages to nearly nothing (fedal.md A.3.1, derived), so by default (``"mixed"``, reconstructed)
    the trend's mean is over batch and patches, the seasonal part's over the batch alone, and their sum is [N, d]. ``"batch"``: both
    over the batch; ``"batch+token"``: both over batch and patches, [1, d].
    """
    trend, season = decompose(features, usable, kernel)
    weight = usable.unsqueeze(-1).float()
    every = (0, 1)

    def mean(x: Tensor, over: tuple[int, ...]) -> Tensor:
        return ((x * weight).sum(over, keepdim=True) / weight.sum(over, keepdim=True).clamp_min(1.0)).squeeze(0)

    return mean(trend, (0,) if axes == "batch" else every), mean(season, every if axes == "batch+token" else (0,))
