"""The floor of a training step and of a round: operations and bytes that no implementation can do without.

Counted are the matrix products of forward and backward (2 operations a multiply-add) and the optimiser's element-wise pass. GELU,
softmax, layer norms, the loss and the copies between layouts are left out, so that the floor is a floor. Backward costs twice the
forward products, less the gradients of the input patches, which nobody needs.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.tables import markdown, write_json
from fedcast.models.base import QUANTILES, SIZES, ModelConfig
from fedcast.spec import ModelSpec

# AdamW: decay 1, first moment 3, second moment 4, denominator 3, update 3; clipping by norm: square, add, scale.
OPERATIONS_A_PARAMETER = 17
# Gradient, weight and both moments read, weight and both moments written, float32 each. With bfloat16 compute the gradient is half as
# long, and the weights for the next step are written in bfloat16 beside the float32 ones: the same sum.
OPTIMISER_BYTES_A_PARAMETER = 28


@dataclass(frozen=True)
class Step:
    """What one training step needs at least.

    Attributes
    ----------
    forward, backward, optimiser
        Floating point operations.
    optimiser_bytes
        Bytes that the optimiser reads and writes.
    parameters, tokens
        Parameters of the model, context patches in the batch.
    """

    forward: int
    backward: int
    optimiser: int
    optimiser_bytes: int
    parameters: int
    tokens: int

    @property
    def products(self) -> int:
        """Operations of the matrix products, forward and backward."""
        return self.forward + self.backward

    def seconds(self, products_per_second: float, bytes_per_second: float) -> float:
        """Return the least seconds at these rates: products at their ceiling, the optimiser at memory bandwidth."""
        return self.products / products_per_second + self.optimiser_bytes / bytes_per_second


def configuration(size: str, context: int = 512, horizon: int = 64) -> ModelConfig:
    """Return the configuration of a size by name."""
    return ModelConfig.of(ModelSpec(size=size, context=context, horizon=horizon))


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a patch transformer with rotary positions."""
    d, p = config.d_model, config.patch
    embedding = (2 * p * d + d) * 2 + d * d + d
    encoder = config.encoder_layers * (12 * d * d + 13 * d) + 2 * d
    decoder = config.horizon_patches * d + config.decoder_layers * (8 * d * d + 11 * d) + 2 * d
    heads = (1 + len(QUANTILES)) * p * (d + 1)
    return embedding + encoder + decoder + heads


def forward_products(config: ModelConfig, batch: int) -> int:
    """Return the operations of the forward matrix products of a batch of full contexts."""
    d, p, n, m = config.d_model, config.patch, config.context_patches, config.horizon_patches
    embedding = 2 * n * (2 * p * d * 2 + d * d)
    encoder = config.encoder_layers * (2 * n * 12 * d * d + 4 * n * n * d)
    decoder = config.decoder_layers * (2 * m * 6 * d * d + 2 * n * 2 * d * d + 4 * m * n * d)
    heads = 2 * m * d * p * (1 + len(QUANTILES))
    return batch * (embedding + encoder + decoder + heads)


def step(config: ModelConfig, batch: int) -> Step:
    """Return the floor of a training step on a batch of full contexts."""
    forward = forward_products(config, batch)
    inputs = batch * 2 * config.context_patches * 2 * config.patch * config.d_model * 2  # the two products that read the patches
    count = parameters(config)
    return Step(
        forward=forward,
        backward=2 * forward - inputs,
        optimiser=OPERATIONS_A_PARAMETER * count,
        optimiser_bytes=OPTIMISER_BYTES_A_PARAMETER * count,
        parameters=count,
        tokens=batch * config.context_patches,
    )


def round_bytes(config: ModelConfig, clients: int) -> int:
    """Return the bytes of a round's messages: every client receives the whole model in float32 and sends it back."""
    return 2 * clients * 4 * parameters(config)


def main() -> None:
    """Print the floor of every size, and the seconds a round at this machine's ceilings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="measure the machine's ceilings for a moment only")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    ceilings = machine.measure(quick=arguments.quick)
    columns = ["size", "parameters", "batch", "forward, GFLOP", "backward, GFLOP", "optimiser, GFLOP", "optimiser, MB", "a round: TFLOP"]
    columns += ["messages, MB", "least seconds, bfloat16", "least seconds, float32"]
    rows, records = [], []
    for size in SIZES:
        config = configuration(size, arguments.context, arguments.horizon)
        for batch in arguments.batches:
            floor = step(config, batch)
            steps = arguments.clients * arguments.steps
            least = {d: steps * floor.seconds(ceilings.products(d), ceilings.copy) for d in ("bfloat16", "float32")}
            sent = round_bytes(config, arguments.clients)
            rows.append(
                [size, f"{floor.parameters / 1e6:.2f} M", str(batch)]
                + [f"{x / 1e9:.2f}" for x in (floor.forward, floor.backward, floor.optimiser)]
                + [f"{floor.optimiser_bytes / 1e6:.0f}", f"{steps * floor.products / 1e12:.2f}", f"{sent / 1e6:.0f}"]
                + [f"{least['bfloat16']:.2f}", f"{least['float32']:.2f}"]
            )
            records.append({"size": size, "batch": batch, **asdict(floor), "round_bytes": sent, "least_seconds": least})
    print(f"Context {arguments.context}, horizon {arguments.horizon}; a round is {arguments.clients} clients x {arguments.steps} steps.\n")
    print(markdown(columns, rows))
    print(f"\n{ceilings.sentence()}")
    write_json(arguments.output, {"machine": ceilings.to_dict(), "rows": records})


if __name__ == "__main__":
    main()
