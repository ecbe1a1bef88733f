"""Core-sets: a few learnt windows that stand for a site's data, made by gradient matching (FeDaL, fedal.md A.3.2 and A.4).

Found: windows C are learnt so that the gradient of the loss on them is that on the site's own mini-batches; noise goes onto the Fourier
amplitudes alone; the server goes on training with the union of all of them. The values of steps, rates and noise are reconstructions.
All of it computes in float32 on a model of its own, whatever the run computes with: gradients of gradients need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.data.windows import Windows, WindowSampler
from fedcast.models.architectures.causal import CausalTransformer
from fedcast.models.base import ModelConfig
from fedcast.models.layers import InstanceNorm
from fedcast.models.masking import observed_patches, patch_mask
from fedcast.tasks.reconstruct import ReconstructTask, whole_windows
from fedcast.training.flat import Layout

SEARCHED = 65_536
"""Train windows at most among which the nearest one is looked for."""
_BLOCK = 4096
_Draw = Callable[[], tuple[Tensor, Tensor]]


def float_model(config: ModelConfig, layout: Layout, vector: Tensor) -> CausalTransformer:
    """Return a float32 model of its own with the weights in a flat vector [size], whose gradients can be differentiated again."""
    with torch.device("meta"):
        model = CausalTransformer(config)
    model.load_state_dict({name: view.float().clone() for name, view in layout.views(vector).items()}, assign=True)
    model.requires_grad_(True)
    model.use_explicit()
    return model


def standardise(values: Tensor, mask: Tensor) -> Tensor:
    """Return windows [K, T] with mean 0 and standard deviation 1 over their observed points (bool [K, T]), 0 elsewhere."""
    normal: Tensor = InstanceNorm.forward(torch.where(mask, values, 0.0), mask)[0]
    return normal


def match_gradients(
    model: CausalTransformer,
    vectors: Tensor,
    draw: _Draw,
    task: ReconstructTask,
    *,
    ratio: float,
    steps: int,
    rate: float,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Learn a core-set: ``min_C sum_x |grad L(C) - grad L(x)|^2`` over mini-batches x, by Adam.

    Gradients are those of the projection head and the last block (reconstructed: the others would cost several times as much), L is the
    squared error of hidden patches, hidden alike in C and x.

    Parameters
    ----------
    model
        A :func:`float_model`; its weights stay.
    vectors
        Where C starts, [K, T], standardised.
    draw
        Gives values and mask of K windows of the site, [K, T] each.
    ratio
        Share of patches to hide.
    steps, rate
        Steps of Adam and its learning rate.
    generator
        The source of the masks.

    Returns
    -------
    tuple
        The learnt core-set [K, T], and the mean of ``|grad L(C) - grad L(x)|^2 / |grad L(x)|^2`` over the last half of the steps.
    """
    weights = last_weights(model)
    learnt = vectors.clone().requires_grad_(True)
    whole = torch.ones_like(vectors, dtype=torch.bool)
    optimiser = torch.optim.Adam([learnt], lr=rate)
    ratios = []
    for _ in range(steps):
        values, mask = draw()
        seed = int(torch.randint(2**62, (), generator=generator))
        goal = torch.autograd.grad(_error(model, values, mask, task, ratio, seed), weights)
        own = torch.autograd.grad(_error(model, learnt, whole, task, ratio, seed), weights, create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(own, goal, strict=True)]).sum()
        optimiser.zero_grad()
        distance.backward(inputs=[learnt])  # type: ignore[no-untyped-call]
        optimiser.step()
        ratios.append(distance.detach() / torch.stack([b.square().sum() for b in goal]).sum())
    late = ratios[len(ratios) // 2 :]
    return learnt.detach(), float(torch.stack(late).mean()) if late else float("nan")


def last_weights(model: CausalTransformer) -> list[Tensor]:
    """Return the weights whose gradients are matched, projection head and last block, and take the gradient of all others away."""
    names = ("heads.point.", f"encoder.blocks.{len(model.encoder.blocks) - 1}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _error(model: CausalTransformer, values: Tensor, mask: Tensor, task: ReconstructTask, ratio: float, seed: int) -> Tensor:
    patch = model.config.patch
    hidden = patch_mask(observed_patches(mask, patch), ratio, torch.Generator().manual_seed(seed))
    error, _ = task.loss(model.output(model.represent(values, mask, hidden)), values, mask, hidden)
    return error


def perturb_amplitudes(vectors: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Return vectors [K, T] with noise on their Fourier amplitudes, phases kept.

    ``A' = max(0, A (1 + noise * e))`` with e standard normal (the size of the noise is a reconstruction).
    """
    spectrum = torch.fft.rfft(vectors)
    draws = torch.randn(spectrum.shape, generator=generator).to(vectors.device)
    # A factor that is not negative scales the amplitude and leaves the phase.
    noisy: Tensor = torch.fft.irfft(spectrum * (1 + noise * draws).clamp_min(0), n=vectors.shape[1])
    return noisy


def nearest_distances(vectors: Tensor, sampler: WindowSampler, patch: int) -> Tensor:
    """Return each vector's distance to its nearest train window, [K]: what a core-set gives away.

    The distance is the root mean squared difference per step after both are standardised, ``sqrt(2 (1 - r))`` with r their correlation:
    0 for a copy whatever its level and scale, 1.41 for a window that has nothing to do with it. Up to :data:`SEARCHED` windows are
    compared, spread evenly over all.

    Parameters
    ----------
    vectors
        [K, T].
    sampler
        The site's train windows.
    patch
        Time steps a patch.
    """
    # The mean is that of all points; missing ones count as 0 on both sides, as in the windows the core-set started from.
    own = F.normalize(vectors - vectors.mean(dim=1, keepdim=True), dim=1)
    best = torch.full((len(vectors),), -1.0, device=vectors.device)
    windows = sampler.evenly(SEARCHED)
    for start in range(0, len(windows), _BLOCK):
        rows = slice(start, start + _BLOCK)
        batch = sampler.gather(Windows(windows.series[rows], windows.end[rows])).to(vectors.device)
        real = F.normalize(standardise(*whole_windows(batch, patch)), dim=1)
        best = torch.maximum(best, (own @ real.T).amax(dim=1))
    return (2 * (1 - best)).clamp_min(0).sqrt()


def tune(
    model: CausalTransformer,
    coresets: Tensor,
    task: ReconstructTask,
    *,
    ratio: float,
    epochs: int,
    rate: float,
    batch_size: int,
    generator: torch.Generator,
) -> list[float]:
    """Train a model in place on core-sets by AdamW without weight decay, in random order; return the mean squared error of each epoch.

    Parameters
    ----------
    model
        A :func:`float_model`.
    coresets
        The union of all core-sets, [M, T].
    task
        The loss.
    ratio
        Share of patches to hide.
    epochs, rate, batch_size
        Passes over the core-sets, learning rate, windows a step.
    generator
        The source of order and masks.
    """
    patch = model.config.patch
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    errors = []
    with one_thread():
        for _ in range(epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(coresets), generator=generator), batch_size):
                values = coresets[rows]
                mask = torch.ones_like(values, dtype=torch.bool)
                hidden = patch_mask(observed_patches(mask, patch), ratio, generator)
                error, quantile = task.loss(model.output(model.represent(values, mask, hidden)), values, mask, hidden)
                optimiser.zero_grad()
                (error + quantile).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += float(error.detach()) * len(rows)
            errors.append(total / len(coresets))
    return errors


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: how torch splits a product over cores changes its rounding, and fleets set different numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
