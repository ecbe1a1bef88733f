"""FedTRL: bi-level heterogeneous learning (arXiv 2604.06727).

Local level, against conflict inside a domain: a discriminator behind a gradient-reversal layer removes what tells a site's
sub-domains apart, and prototypes are pulled to a global barycentre. Server level, against conflict between domains: encoders are
averaged with entropy-regularised weights. Found in the paper's sources: adversarial term with gradient reversal, prototype
alignment to a global barycentre, entropy-regularised domain-aware weights on encoders only. The formulas, values and the sign of
the weights are reconstructions: see each docstring. The defaults of alpha and beta are the smallest of the specification's grid
(0.01 to 1): on a development split of the catalogue (docs/evidence.md) they did better than its 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedcast.data.windows import Batch, WindowSampler
from fedcast.methods.base import Client, Method, Server, Unseen, Update, hyper
from fedcast.methods.subdomains import count_labels, make_labeller
from fedcast.models.contract import ModelShape

_EMA = 0.9
_ALTERNATIONS = 3
_TAU_FLOOR = 1e-3
_COMPARED = 64  # sites; a round's row holds the cosine of each pair: with 1,000 sites that was 20 MB and 0.7 s


class _ReverseGradient(torch.autograd.Function):
    """Identity forward; multiplies the gradient by ``-strength`` backward (Ganin et al., 2016)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * -ctx.strength, None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """Return ``features`` unchanged, with its gradient reversed and scaled by ``strength``."""
    reversed_: Tensor = _ReverseGradient.apply(features, strength)  # type: ignore[no-untyped-call]
    return reversed_


@dataclass(frozen=True)
class FedTRL(Method):
    """Loss at a site: ``task + alpha * L_dom + beta * L_align`` (which letter goes with which term is a reconstruction)."""

    name: ClassVar[str] = "fedtrl"
    summary: ClassVar[str] = "bi-level: domain-adversarial and prototype regularisers at sites, entropy-regularised encoder average"

    alpha: Annotated[float, Field(ge=0)] = hyper(0.01, "weight of the domain-adversarial loss; 0 switches it off")
    beta: Annotated[float, Field(ge=0)] = hyper(0.01, "weight of the prototype alignment; 0 switches it off")
    reversal: Annotated[float, Field(ge=0)] = hyper(1.0, "largest strength of the gradient reversal (lambda_max)")
    labels: Literal["auto", "dataset", "kmeans", "segment", "random"] = hyper("auto", "sub-domain labels; auto: dataset, or kmeans for one")
    clusters: Annotated[int, Field(ge=2)] = hyper(4, "number of sub-domains for k-means, segment and random labels")
    aggregation: Literal["entropic", "samples", "uniform"] = hyper("entropic", "server weights; samples and uniform are the ablations")
    tau: Annotated[float, Field(gt=0)] | None = hyper(None, "temperature of the weights; absent: the median distance, at least 0.001")
    gamma: Annotated[float, Field(ge=0)] = hyper(0.5, "exponent of the prior: weights start from (training points) ** gamma")
    barycentre: Literal["euclidean", "wasserstein"] = hyper("euclidean", "barycentre of feature means, or of diagonal Gaussians (W2)")
    travels: Literal["encoder", "all"] = hyper("encoder", "what travels; all is an ablation")

    serving: Literal["mixture", "shadow"] = hyper("mixture", "unseen domains: mixture of the sites' decoders, or their mean")

    def unseen(self) -> Unseen:
        """Serve unseen domains as asked for (not found in the paper's sources; both are reconstructions)."""
        return "shadow" if self.travels == "all" else self.serving

    def shares(self, name: str) -> bool:
        """Let the encoder travel (found: only encoders are aggregated), or everything as an ablation."""
        return self.travels == "all" or name.startswith("encoder.")

    def modules(self, shape: ModelShape, sampler: WindowSampler) -> dict[str, nn.Module]:
        """Return the discriminator ``d -> d/2 -> C`` on patch features, where the site has more than one sub-domain.

        Its classes are the site's own, so it stays there. No dropout (the specification's 0.1): a global random stream would make
        the bytes depend on the number of worker threads.
        """
        classes = count_labels(self.labels, sampler, self.clusters)
        if self.alpha == 0 or classes < 2:
            return {}
        width = shape.d_model
        return {"discriminator": nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, classes))}

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return ``task + alpha * L_dom + beta * L_align`` and keep the running prototype (EMA 0.9 of batch means of features)."""
        loss, output = client.task_loss(batch)
        client.record("task_loss", loss)
        weight = output.feature_mask.unsqueeze(-1).float()  # [B, N, 1]
        features = output.features.float()  # [B, N, d]
        means = (features * weight).sum(1) / weight.sum(1).clamp_min(1)  # [B, d]
        self._note_prototype(client, means.detach())
        adversary, aligns = "discriminator" in client.extra, self.beta > 0 and "prototype" in client.received
        if not (adversary or aligns):
            return loss
        labels = client.memo("labeller", lambda: make_labeller(self.labels, client.sampler, self.clusters, seed=0))(batch).to(means.device)
        if adversary:
            loss = loss + self.alpha * self._domain_loss(client, features, weight.squeeze(-1), labels)
        if aligns:
            alignment = align(means, labels, client.received["prototype"])
            client.record("alignment", alignment)
            loss = loss + self.beta * alignment
        return loss

    def _domain_loss(self, client: Client, features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the discriminator over patches, sub-domains weighted evenly (eq. 3 of the paper, reconstructed)."""
        # DANN's schedule: strength grows from 0 to `reversal` over the rounds, so that the discriminator learns first.
        strength = self.reversal * (2 / (1 + math.exp(-10 * client.round / client.rounds)) - 1)
        discriminator = client.extra["discriminator"]
        dtype = next(discriminator.parameters()).dtype
        logits = discriminator(reverse_gradient(features, strength).to(dtype)).float()  # [B, N, C]
        entropy = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none")
        counts = torch.bincount(labels, minlength=logits.shape[-1]).clamp_min(1)
        balance = (weight / counts[labels].unsqueeze(1)).flatten()  # [B * N]
        hits = (logits.detach().argmax(-1) == labels.unsqueeze(1)).flatten()
        client.record("discriminator_accuracy", (hits * balance).sum() / balance.sum())
        client.record("discriminator_chance", 1 / len(torch.unique(labels)))
        return (entropy * balance).sum() / balance.sum()

    def _note_prototype(self, client: Client, means: Tensor) -> None:
        mean, variance = means.mean(0), means.var(0, unbiased=False)
        client.record("feature_variance", variance.mean())
        for name, value in (("prototype", mean), ("variance", variance)):
            old = client.scratch.get(name)
            client.scratch[name] = value if old is None else _EMA * old + (1 - _EMA) * value

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Send the prototype, and for the Wasserstein barycentre the standard deviation of features."""
        tensors = {"prototype": client.scratch["prototype"]}
        if self.barycentre == "wasserstein":
            tensors["deviation"] = client.scratch["variance"].sqrt()
        return tensors

    def reply_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare prototype and deviation, ``[d]`` each."""
        names = ("prototype", "deviation") if self.barycentre == "wasserstein" else ("prototype",)
        return dict.fromkeys(names, (shape.d_model,))

    def message_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the barycentre, ``[d]``."""
        return {"prototype": (shape.d_model,)}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Send the shared weights and, from round 2 on, the barycentre."""
        tensors = {"shared": server.shared}
        if "prototype" in server.tensors:
            tensors["prototype"] = server.tensors["prototype"]
        return tensors

    @property
    def averages(self) -> bool:
        """No: prototypes choose the weights, and the barycentre is their weighted mean."""
        return False

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Average encoders with entropy-regularised weights and renew the barycentre (fedtrl.md A4, reconstructed)."""
        prototypes = torch.stack([u.tensors["prototype"] for u in updates]).double()  # [K, d]
        spread = torch.stack([u.tensors["deviation"] for u in updates]).double() if self.barycentre == "wasserstein" else None
        samples = torch.tensor([float(u.samples) for u in updates], dtype=torch.float64)
        if self.aggregation == "entropic":
            weights, distances, tau = entropic_weights(prototypes, samples**self.gamma, tau=self.tau, deviations=spread)
            server.log["distances"] = {u.site: float(d) for u, d in zip(updates, distances, strict=True)}
            server.log["tau"] = tau
        else:
            weights = samples if self.aggregation == "samples" else torch.ones_like(samples)
            weights = weights / weights.sum()
        self.combine(server, updates, weights.tolist())
        server.tensors["prototype"] = (weights @ prototypes).float()
        if len(updates) <= _COMPARED:
            unit = F.normalize(prototypes, dim=1)
            server.log["sites"] = [u.site for u in updates]
            server.log["similarity"] = (unit @ unit.T).tolist()


def align(means: Tensor, labels: Tensor, prototype: Tensor) -> Tensor:
    """Return the alignment loss: mean over sub-domains of ``||p_c / ||p_c|| - P / ||P|| ||^2`` (fedtrl.md A3c, reconstructed).

    Parameters
    ----------
    means
        Mean features of the windows ``[B, d]``.
    labels
        Sub-domain of each window ``[B]``.
    prototype
        Global barycentre ``[d]``, detached.
    """
    present, position = torch.unique(labels, return_inverse=True)
    sums = torch.zeros(len(present), means.shape[1]).index_add(0, position, means)  # [C, d]
    # Normalising the sum equals normalising the mean.
    return (F.normalize(sums, dim=1) - F.normalize(prototype.detach(), dim=0)).square().sum(1).mean()


def entropic_weights(
    prototypes: Tensor, prior: Tensor, *, tau: float | None = None, deviations: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return entropy-regularised weights around the barycentre of prototypes.

    Alternates three times between the barycentre ``P = sum w_k p_k`` and the closed form of
    ``min_w sum w_k d_k + tau sum w_k log(w_k / pi_k)``, which is ``w_k ~ pi_k exp(-d_k / tau)`` (fedtrl.md A4, reconstructed).
    As ``tau`` grows the weights become the prior: with the prior proportional to training points that is FedAvg.

    Parameters
    ----------
    prototypes
        Feature means ``[K, d]``.
    prior
        Unnormalised prior ``[K]``.
    tau
        Temperature; ``None`` takes the median distance, which makes the weights independent of the distance's unit.
    deviations
        Feature standard deviations ``[K, d]``: distances are then squared 2-Wasserstein distances of diagonal Gaussians, else
        one minus the cosine.

    Returns
    -------
    tuple
        Weights ``[K]`` summing to one, distances ``[K]``, and the temperature used.
    """
    prior = prior / prior.sum()
    weights = prior
    distances, temperature = torch.zeros_like(prior), _TAU_FLOOR
    for _ in range(_ALTERNATIONS):
        centre = weights @ prototypes
        if deviations is None:
            distances = 1 - F.cosine_similarity(prototypes, centre.unsqueeze(0), dim=1)
        else:
            distances = (prototypes - centre).square().sum(1) + (deviations - weights @ deviations).square().sum(1)
        # torch.median takes the lower of two middle values, which lets one of two sites take all the weight.
        temperature = tau if tau is not None else max(float(torch.quantile(distances, 0.5)), _TAU_FLOOR)
        weights = torch.softmax(prior.log() - distances / temperature, dim=0)
    return weights, distances, temperature
