"""FeDPM (arXiv 2604.04475): sites share a memory of prototypes; encoder, decoder and the head for mean and deviation stay local.

Found in its released code (fedpm.md B.3, B.4) and kept: the four smooth-L1 terms, the commitment and the memory term; the graph over all
sites' prototypes whose edges are cosines over delta between different sites; the mean of each connected component as a shared prototype,
the largest components first; the score by which a site's own prototypes take the other slots.

Reconstructed, where the released code has a defect or is silent: (1) each site starts a round from its own memory (their figure; the code
sends everybody that of the first site); (2) prototypes of components that get no slot stay candidates of their sites (the code loses
them); (3) no row is zero: free slots take the site's most used remaining prototypes (the code's zero rows can win the search); (4) equally
large components stand in the order of their use; one whose members cancel out is none; (5) a site forgets the moments of the memory,
whose rows come back in another order (the code forgets all moments); (6) the encoder starts from the same weights everywhere, as every
method's model does here; (7) commitment and memory term are means over patches with observed points and over D. ``as_released`` brings
back (1), (2) and (3).

``noise`` is the paper's noise ablation: drawn for every row, whatever a site's data are, with no bound on what one window changes and no
(epsilon, delta) accounting, so it is no privacy guarantee. Its scale is the standard deviation of the Gaussian and the diversity b of
the Laplace distribution; the released code gives Laplace the scale 1 / ``noise``, so that more noise is asked for and less is added.

A site's own model serves its domain. For domains that no site has seen, sites hand in their private weights once, after the last round;
the model with the smallest quantisation error on a window's context forecasts it (the paper keeps the best test score instead, an
oracle). Reconstructed: that error stands in units of the site's own mean error in its last round, without which one site, the one
whose features lie closest together, forecasts nearly every window of every domain. ``serving`` has the plain error, and the mixture by
which the other methods with personal parts are served.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Annotated, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.methods.base import Client, Method, Server, Unseen, Update, hyper
from fedcast.models.architectures.prototype import EPSILON, Prediction, PrototypeTransformer, Reading
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.contract import ModelShape
from fedcast.spec import ModelSpec
from fedcast.tasks.forecast import pinball

_HEADS = 8
_BEND = 0.1  # where the smooth L1 loss turns from quadratic to linear
_LIMIT = 50.0  # as in ForecastTask, in standard deviations of the context
_VANISHED = 1e-6


@dataclass(frozen=True)
class FedPM(Method):
    """Loss at a site: ``L_pred + beta |z - sg(p)|^2 + |sg(z) - p|^2``, z the features and p their nearest prototypes."""

    name: ClassVar[str] = "fedpm"
    summary: ClassVar[str] = "only a memory of prototypes travels; clusters of similar ones are shared, the others are personal"
    architecture: ClassVar[str] = "prototype"
    reorders: ClassVar[bool] = True

    prototypes: Annotated[int, Field(ge=1)] = hyper(256, "rows of the memory (M)")
    width: Annotated[int, Field(ge=16, multiple_of=16)] = hyper(64, "width of the memory and of the model (D), in place of the size's")
    patch: Annotated[int, Field(ge=1)] = hyper(4, "time steps a patch, in place of the model's")
    encoder_layers: Annotated[int, Field(ge=1)] = hyper(2, "blocks of the encoder")
    decoder_layers: Annotated[int, Field(ge=1)] = hyper(4, "blocks of the decoder")
    backbone: Literal["transformer", "cnn", "fc", "lstm", "gru"] = hyper("transformer", "what encoder and decoder are made of")
    statistics: Annotated[int, Field(ge=0)] = hyper(512, "width of the MLP that predicts mean and deviation (MuStd); 0: none")
    units: Literal["window", "data"] = hyper("window", "formulas apply to the window in its own units, or, for standardised data, as it is")
    beta: Annotated[float, Field(ge=0)] = hyper(0.25, "weight of the commitment of features to their prototypes")
    delta: Annotated[float, Field(gt=-1, le=1)] = hyper(0.7, "cosine above which prototypes of two sites are linked")
    gamma: Annotated[float, Field(ge=0, le=1)] = hyper(0.95, "largest share of the memory that is shared")
    diversity: Annotated[float, Field(ge=0)] = hyper(1.0, "weight of the dissimilarity to other sites in the choice of personal prototypes")
    similarity: Literal["mean", "max"] = hyper("mean", "to all prototypes of the other sites, or the closest one in no component")
    aggregation: Literal["cosine", "fedavg", "none"] = hyper("cosine", "server step; row-wise mean and no exchange are the ablations")
    fill: Literal["personalised", "random_isolated", "none"] = hyper("personalised", "the slots beside the shared ones; the others ablate")
    noise: Annotated[float, Field(ge=0)] = hyper(0.0, "scale of the noise added to an uploaded memory: an ablation, no privacy guarantee")
    noise_kind: Literal["gaussian", "laplace"] = hyper("gaussian", "distribution of that noise")
    serving: Literal["relative", "quantisation", "mixture"] = hyper(
        "relative", "unseen domains: the site of least quantisation error over its typical one, or as it is; or a mixture of all"
    )
    restart: bool = hyper(False, "replace prototypes that a round never used by features of its last batch (not in the paper)")
    as_released: bool = hyper(False, "as the released code: zero rows, and everybody trains on the first site's memory")

    def model_config(self, model: ModelSpec) -> ModelConfig:
        """Return the paper's model for a spec's context and horizon."""
        names = ("prototypes", "statistics", "units", "backbone", "serving")
        settings = tuple((name, getattr(self, name)) for name in names)
        return replace(
            super().model_config(model),
            d_model=self.width,
            n_heads=_HEADS,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            patch=self.patch,
            settings=settings,
        )

    def unseen(self) -> Unseen:
        """Serve unseen domains by the sites' models: each window by the one that :attr:`serving` names."""
        return "mixture"

    def exports(self) -> Literal["scored", "last"]:
        """Hand in private weights after the last round only: they are many times the memory."""
        return "last"

    def shares(self, name: str) -> bool:
        """Let only the memory travel."""
        return name.startswith("memory.")

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return the paper's loss, plus the pinball loss of the quantile head, which reads detached features."""
        model = cast(PrototypeTransformer, client.model)
        reading = model.read(batch.context, batch.mask)
        prediction = model.predict(model.straight_through(reading), batch.target.shape[1])
        target = model.in_units(batch.target, prediction.output)
        limited = target if self.units == "data" else target.clamp(-_LIMIT, _LIMIT)
        forecast = forecast_loss(prediction, limited, batch.target_mask)
        commitment, quantisation = memory_losses(reading)
        self._count(client, reading)
        client.record("forecast_loss", forecast)
        client.record("quantisation_error", quantisation)
        return forecast + self.beta * commitment + quantisation + quantile_loss(prediction.output, batch)

    def _count(self, client: Client, reading: Reading) -> None:
        """Note how often each prototype was chosen for a patch with observed points."""
        index, seen = reading.rows.flatten(), reading.tokens.mask.flatten()
        counts = client.scratch.setdefault("counts", torch.zeros(self.prototypes, dtype=torch.int64, device=index.device))
        counts.scatter_add_(0, index, seen.to(torch.int64))
        client.scratch["reading"] = reading

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Send the counts beside the memory, which may be noisy, and keep the round's mean quantisation error in the model."""
        counts: Tensor = client.scratch["counts"]
        dead = counts == 0
        client.record("dead_share", dead.float().mean())
        parameters = client.parameters
        parameters.layout.views(parameters.vector)["heads.typical_error"].fill_(client.records()["quantisation_error"])
        parameters.publish()
        if self.restart:
            self._restart(client, dead)
        return {"counts": counts.float(), **self._noisy(client)}

    def _noisy(self, client: Client) -> dict[str, Tensor]:
        """Return the memory with noise in place of the one that is sent, where there is to be any."""
        if not self.noise:
            return {}
        draw = client.rng.normal if self.noise_kind == "gaussian" else client.rng.laplace
        memory = client.parameters.shared
        return {"shared": memory + torch.from_numpy(draw(0.0, self.noise, len(memory))).to(memory)}

    def _restart(self, client: Client, dead: Tensor) -> None:
        """Replace dead prototypes by features of the last batch, drawn without replacement.

        Such a row stands for a single patch until it is trained, and travels: it says more about the site than a prototype does.
        """
        reading: Reading = client.scratch["reading"]
        features = reading.features.detach()[reading.tokens.mask]  # [K, D]
        rows = dead.nonzero().squeeze(1)
        drawn = torch.from_numpy(client.rng.permutation(len(features))[: len(rows)]).to(rows.device)
        client.parameters.shared.view(self.prototypes, self.width)[rows[: len(drawn)]] = features[drawn]
        client.parameters.publish()

    def reply_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the counts, ``[M]``."""
        return {"counts": (self.prototypes,)}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Send the site's own memory; as released, that of the first site."""
        if self.as_released and self.aggregation == "cosine":
            return {"shared": server.shared}
        return super().message(server, site)

    @property
    def averages(self) -> bool:
        """Whether the memory is a row-wise mean; clusters of prototypes are none."""
        return self.aggregation == "fedavg"

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Make a memory for each site out of all uploads, and log what became of the prototypes; who sent none keeps its own."""
        uploads = [update.tensors["shared"] for update in updates]
        counts = torch.stack([update.tensors["counts"] for update in updates]).double().clamp_min(0)
        memories = torch.stack(uploads).view(len(updates), self.prototypes, -1).double()
        server.log["dead_share"] = float((counts == 0).double().mean())
        clusters = align(memories, counts, self.delta)
        server.log["clusters"] = len(clusters.sizes)
        server.log["index_aligned"] = clusters.index_aligned
        if self.aggregation == "none":
            server.own |= {update.site: upload for update, upload in zip(updates, uploads, strict=True)}
            return
        if self.aggregation == "fedavg":
            server.shared = server.mean("shared", updates, [float(update.samples) for update in updates])
            return
        # Rounded first: 0.29 * 100 is a little less than 29 in floating point.
        most = floor(round(self.gamma * self.prototypes, 9))
        shared = clusters.centres[:most]
        server.log["shared_prototypes"] = len(shared)
        candidates = clusters.rank < 0 if self.as_released else (clusters.rank < 0) | (clusters.rank >= most)
        scores = utility_diversity(memories, counts, candidates, clusters.rank < 0, self.similarity, self.diversity)
        for n, update in enumerate(updates):
            rng = np.random.default_rng([server.round, zlib.crc32(update.site.encode())])
            rows = self._personal(candidates[n], scores[n], counts[n], self.prototypes - len(shared), rng)
            server.own[update.site] = self._compose(shared, memories[n], rows).float().flatten()
        # Who has not taken part yet gets the shared ones, and for the rest what everybody started from.
        newcomer = torch.cat([shared.float().flatten(), server.shared[shared.numel() :]])
        server.shared = server.own[updates[0].site] if self.as_released else newcomer

    def _personal(self, candidates: Tensor, scores: Tensor, counts: Tensor, free: int, rng: np.random.Generator) -> Tensor:
        """Return which of a site's prototypes take the free slots, int64, best first; as released, there may be too few."""
        mine = candidates.nonzero().squeeze(1)
        if self.fill == "none":
            return mine[:0]
        if self.fill == "random_isolated":
            chosen = mine[torch.from_numpy(rng.permutation(len(mine))[:free])]
        else:
            chosen = mine[scores[mine].argsort(descending=True, stable=True)[:free]]
        if self.as_released:
            return chosen
        used = counts.argsort(descending=True, stable=True)
        return torch.cat([chosen, used[~torch.isin(used, chosen)]])[:free]

    def _compose(self, shared: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
        """Return shared prototypes, then the chosen rows, [M, D]; without any fill the shared ones again and again, as released zeros."""
        made = torch.cat([shared, memory[rows]])
        if self.as_released:
            return F.pad(made, (0, 0, 0, self.prototypes - len(made)))
        # A repeated row wins no search that the first one does not win. Nothing to repeat: nothing was shared.
        return made[torch.arange(self.prototypes) % len(made)] if len(made) else memory


class Clusters(NamedTuple):
    """Prototypes of several sites that are alike.

    Attributes
    ----------
    rank
        Cluster of each prototype, int64 [N, M], 0 the largest; -1: alike to none of another site.
    centres
        Their means, float64 [C, D].
    sizes
        Their numbers of prototypes, int64 [C].
    index_aligned
        How many of them hold one row of all their sites' memories: kept from a common start rather than found.
    """

    rank: Tensor
    centres: Tensor
    sizes: Tensor
    index_aligned: int


def align(memories: Tensor, counts: Tensor, delta: float) -> Clusters:
    """Return the connected components of the graph that links prototypes of different sites with a cosine over ``delta`` (B.4.1, B.4.2).

    Parameters
    ----------
    memories
        Float64 [N, M, D].
    counts
        How often each was used, float64 [N, M]: of equally large components the more used one comes first.
    delta
        The threshold.
    """
    clients, size, width = memories.shape
    unit = F.normalize(memories, dim=-1).flatten(0, 1).numpy()
    # Products in float32, several times as fast; those within its rounding of delta are computed again in float64.
    short, margin = unit.astype(np.float32), float((width + 4) * np.finfo(np.float32).eps)
    found = np.arange(len(unit))
    # Site by site, so that the links of one site to those after it are all that is in memory.
    for start in range(0, len(unit) - size, size):
        later = start + size
        cosines = short[start:later] @ short[later:].T
        near = np.flatnonzero(cosines > delta - margin)
        rows, columns = near // cosines.shape[1] + start, near % cosines.shape[1] + later
        doubtful = np.flatnonzero(cosines.ravel()[near] <= delta + margin)
        exact = np.einsum("nd,nd->n", unit[rows[doubtful]], unit[columns[doubtful]])
        keep = np.ones(len(near), dtype=bool)
        keep[doubtful] = exact > delta
        ends = found[rows[keep]], found[columns[keep]]
        graph = coo_matrix((np.ones(len(ends[0]), dtype=bool), ends), shape=(len(unit), len(unit)))
        found = connected_components(graph, directed=False)[1][found]
    names, found = np.unique(found, return_inverse=True)
    count, labels = len(names), torch.from_numpy(found.astype(np.int64))
    flat = memories.flatten(0, 1)
    sizes = torch.bincount(labels, minlength=count)
    used = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, counts.flatten())
    centres = torch.zeros(count, width, dtype=torch.float64).index_add_(0, labels, flat) / sizes.unsqueeze(1)
    length = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, flat.norm(dim=1)) / sizes
    # A ring of prototypes can cancel out to (almost) nothing: no row may be zero, so its members stay with their sites.
    several = (sizes > 1) & (centres.norm(dim=1) > _VANISHED * length)
    order = sorted(several.nonzero().squeeze(1).tolist(), key=lambda c: (-int(sizes[c]), -float(used[c]), centres[c].tolist()))
    rank = torch.full((count,), -1)
    rank[order] = torch.arange(len(order))
    row = torch.arange(size).repeat(clients)
    first = torch.full((count,), size).scatter_reduce_(0, labels, row, "amin")
    last = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, labels, row, "amax")
    aligned = int((several & (first == last)).sum())
    return Clusters(rank[labels].view(clients, size), centres[order], sizes[order], aligned)


def utility_diversity(
    memories: Tensor, counts: Tensor, candidates: Tensor, isolated: Tensor, similarity: Literal["mean", "max"], diversity: float
) -> Tensor:
    """Return the score of each prototype, float64 [N, M] (B.4.3): its use, minus its similarity to those of the other sites.

    ``V(e) = Freq(e) / max over the site's candidates of Freq - lambda / (N - 1) * sum over other sites m of mean_j cos(e, p_mj)``;
    with ``"max"`` the similarity is the largest cosine to another site's isolated prototype (0 where there is none; a reconstruction).

    Parameters
    ----------
    memories, counts
        As in :func:`align`.
    candidates, isolated
        Which prototypes stand for election, and which are in no component, bool [N, M].
    similarity, diversity
        Which similarity, and its weight lambda.
    """
    clients = len(memories)
    unit = F.normalize(memories, dim=-1)
    most = counts.masked_fill(~candidates, 0).amax(1, keepdim=True)
    utility = counts / most.clamp_min(1)
    alike = torch.zeros_like(counts)
    if similarity == "mean" and clients > 1:
        # A mean of cosines is the product with a mean of unit vectors.
        means = unit.mean(1)
        alike = torch.einsum("nmd,nd->nm", unit, (means.sum(0) - means) / (clients - 1))
    elif similarity == "max":
        for n in range(clients):
            others = torch.cat([unit[m][isolated[m]] for m in range(clients) if m != n] or [unit[n][:0]])
            alike[n] = (unit[n] @ others.T).amax(1) if len(others) else 0.0
    return utility - diversity * alike


def memory_losses(reading: Reading) -> tuple[Tensor, Tensor]:
    """Return ``|z - sg(p)|^2`` and ``|sg(z) - p|^2``, means over D and over patches with observed points."""
    seen = reading.tokens.mask.unsqueeze(-1).float()
    points = seen.sum().clamp_min(1) * reading.features.shape[-1]
    commitment = ((reading.features - reading.nearest.detach()).square() * seen).sum() / points
    quantisation = ((reading.features.detach() - reading.nearest).square() * seen).sum() / points
    return commitment, quantisation


def forecast_loss(prediction: Prediction, target: Tensor, mask: Tensor) -> Tensor:
    """Return the paper's ``L_pred`` (B.3): four smooth-L1 terms of unit weight, or two where mean and deviation are not predicted.

    ``SL1(s, (y - mu_y) / sig_y) + SL1(dmu, mu_y - mu_x) + SL1(dsig, sig_y - sig_x) + SL1(s (sg(dsig) + sig_x) + sg(dmu) + mu_x, y)``,
    s the shape. Means over observed points of the horizon, and over windows that have some.

    Parameters
    ----------
    prediction
        The forecast, in working units.
    target
        The horizon y in working units, [B, H].
    mask
        True where it is observed, [B, H].
    """
    observed = mask.float()
    counts = observed.sum(1, keepdim=True)
    divisor, known = counts.clamp_min(1), (counts > 0).float()
    mean = (target * observed).sum(1, keepdim=True) / divisor
    deviation = (((target - mean) * observed).square().sum(1, keepdim=True) / divisor + EPSILON).sqrt()

    def term(ours: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
        return (F.smooth_l1_loss(ours, theirs, reduction="none", beta=_BEND) * weight).sum() / weight.sum().clamp_min(1)

    loss = term(prediction.shape, (target - mean) / deviation, observed)
    new_mean, new_deviation = prediction.mean, prediction.deviation
    if prediction.shift is not None and prediction.widening is not None:
        loss = loss + term(prediction.shift, mean - prediction.mean, known)
        loss = loss + term(prediction.widening, deviation - prediction.deviation, known)
        new_mean = new_mean + prediction.shift.detach()
        new_deviation = new_deviation + prediction.widening.detach()
    return loss + term(prediction.shape * new_deviation + new_mean, target, observed)


def quantile_loss(output: Output, batch: Batch) -> Tensor:
    """Return the mean pinball loss over observed targets, in standard deviations of the context, as in :class:`ForecastTask`."""
    observed = batch.target_mask.float()
    target = ((batch.target - output.loc) / output.scale).clamp(-_LIMIT, _LIMIT)
    return (pinball(target, output.quantiles) * observed).sum() / observed.sum().clamp_min(1) / len(QUANTILES)
