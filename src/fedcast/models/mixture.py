"""One model for a domain that no site has seen, out of the models of the sites that have seen others.

Where decoders are personal, a new domain has none. Averaging the sites' decoders (the shadow of fedtrl.md A4) averages weights that
were never trained to agree. This mixture keeps them apart and lets the window itself say whom to trust: every decoder forecasts the
window's last patches, each from what comes before it, and its weight falls with a power of its error. A reconstruction: the paper's
reviewers found unclear what zero-shot inference uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.architectures import build_model
from fedcast.models.base import QUANTILES, Forecast, ModelConfig, Output
from fedcast.models.files import Document, check_tensors, read_config, read_model, write_model
from fedcast.models.patch import Encoded, PatchTransformer, roll
from fedcast.safe import UnsafeError, check_name

FORMAT = "fedcast.domain_mixture"
POWER = 10.0
BACKTESTS = 8
"""Power and number of patches were chosen on training domains alone, each served by the experts of the others (docs/evidence.md)."""

_LEAST = 1e-3  # an error below a thousandth of the window's deviation is as good as any


class _Document(Document):
    format: Literal["fedcast.domain_mixture"]
    model: dict[str, int | str | list[list[int | float | str]]]
    experts: Annotated[list[str], Field(min_length=1)]


class DomainMixture(nn.Module):
    """A mixture of one model a domain, weighted window by window.

    Parameters
    ----------
    experts
        The domains' models by name; they may share their encoder, which is then computed once.

    Attributes
    ----------
    config
        Shape of every expert.
    """

    def __init__(self, experts: dict[str, PatchTransformer]) -> None:
        super().__init__()
        if not experts:
            raise ModelError("a mixture of no models forecasts nothing", hint="give at least one expert")
        self.names = list(experts)
        self.experts = nn.ModuleList(experts.values())
        self.config: ModelConfig = next(iter(experts.values())).config

    @classmethod
    def of(cls, config: ModelConfig, states: dict[str, dict[str, Tensor]], shared: Sequence[str]) -> Self:
        """Build a mixture from the experts' parameters.

        Parameters
        ----------
        config
            Their shape.
        states
            Parameters of each expert by name.
        shared
            Names of the parameters that are the same in all of them; when the encoder's are among them it is one module.
        """
        experts: dict[str, PatchTransformer] = {}
        first: PatchTransformer | None = None
        for name, state in states.items():
            with torch.device("meta"):
                expert = build_model(config)
            expert.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
            if first is not None and all(key in shared for key in state if key.startswith("encoder.")):
                expert.encoder = first.encoder
            first = first or expert
            experts[name] = expert
        return cls(experts)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self._expert(0).device

    def _expert(self, index: int) -> PatchTransformer:
        expert = self.experts[index]
        if not isinstance(expert, PatchTransformer):
            raise ModelError("an expert of the mixture is no patch transformer", hint="build the mixture with DomainMixture.of")
        return expert

    def expert(self, name: str) -> PatchTransformer:
        """Return the model of one domain."""
        return self._expert(self.names.index(name))

    def _encode(self, context: Tensor, mask: Tensor) -> list[Encoded]:
        """Encode windows once for each different encoder; one entry an expert."""
        encoded: dict[int, Encoded] = {}
        answer = []
        for index in range(len(self.experts)):
            expert = self._expert(index)
            key = id(expert.encoder)
            if key not in encoded:
                encoded[key] = expert.encode(context, mask)
            answer.append(encoded[key])
        return answer

    def _all(self, context: Tensor, mask: Tensor, horizon: int) -> list[Output]:
        return [self._expert(index).decode(encoded, horizon) for index, encoded in enumerate(self._encode(context, mask))]

    def weights(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the experts' weights [B, K]: in proportion to ``error ** -10``.

        The error is the geometric mean over the window's last eight patches, as far as there are that many, of how wrong an expert is
        that forecasts the patch from what comes before it: twice the mean pinball loss over nine levels. Only ratios of errors count, so
        noisy windows tell experts apart as well as smooth ones. A window too short or too empty to be judged on gives all experts the
        same weight.

        Where the architecture has an error of its own (:meth:`PatchTransformer.window_errors`), the expert with the smallest one has
        all the weight; experts with the same one share it.

        Parameters
        ----------
        context, mask
            As in :meth:`PatchTransformer.normalised`.
        """
        own = [error for i in range(len(self.experts)) if (error := self._expert(i).window_errors(context, mask)) is not None]
        if own:
            least = torch.stack(own, dim=1)  # [B, K]
            chosen = (least == least.amin(dim=1, keepdim=True)).float()
            return chosen / chosen.sum(dim=1, keepdim=True)
        length, tail = context.shape[1], min(self.config.patch, self.config.horizon)
        total = torch.zeros(len(context), len(self.experts), device=context.device)
        count = torch.zeros(len(context), 1, device=context.device)
        for end in range(length, max(length - BACKTESTS * tail, tail), -tail):
            error, judged = self._backtest(context[:, :end], mask[:, :end], tail)
            total += torch.where(judged, error.clamp_min(_LEAST).log(), 0.0)
            count += judged
        return torch.softmax(-POWER * total / count.clamp_min(1.0), dim=1)

    def _backtest(self, context: Tensor, mask: Tensor, tail: int) -> tuple[Tensor, Tensor]:
        """Return the experts' errors on a window's last steps [B, K], in its standard deviations, and where there are any, [B, 1]."""
        seen = mask[:, -tail:] & context[:, -tail:].isfinite()  # [B, P]
        truth = torch.where(seen, context[:, -tail:], 0.0)
        head, head_mask = context[:, :-tail], mask[:, :-tail]
        judged = seen.any(dim=1) & (head_mask & head.isfinite()).any(dim=1)  # [B]
        scale = self._expert(0).tokens(context, mask).scale
        levels = truth.new_tensor(QUANTILES)
        errors = []
        for output in self._all(head, head_mask, tail):
            gap = truth - output.loc - output.scale * output.quantiles.permute(2, 0, 1)  # [9, B, P]
            loss = torch.maximum(levels[:, None, None] * gap, (levels[:, None, None] - 1) * gap).mean(0) / scale
            errors.append(2 * (loss * seen).sum(1) / seen.sum(1).clamp_min(1))
        return torch.stack(errors, dim=1).nan_to_num(nan=1e6, posinf=1e6), judged.unsqueeze(1)

    def forward(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units, for any horizon; see :meth:`PatchTransformer.forward`."""
        weights = self.weights(context, mask)

        def one_pass(context: Tensor, mask: Tensor, steps: int) -> Output:
            outputs = self._all(context, mask, steps)
            point = torch.stack([output.point for output in outputs])  # [K, B, H]
            quantiles = torch.stack([output.quantiles.sort(dim=-1).values for output in outputs])  # [K, B, H, 9]
            share = weights.T.to(point.dtype)
            mixed = (share[..., None] * point).sum(0), (share[..., None, None] * quantiles).sum(0)
            return outputs[0]._replace(point=mixed[0], quantiles=mixed[1])

        return roll(one_pass, self.config, context, mask, horizon)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; a shared encoder is written once."""
        state: dict[str, Tensor] = {}
        first = self._expert(0)
        for name in self.names:
            expert = self.expert(name)
            for key, tensor in expert.state_dict().items():
                if expert is first or expert.encoder is not first.encoder or not key.startswith("encoder."):
                    state[f"{name}/{key}"] = tensor
        write_model(Path(folder), FORMAT, {"model": self.config.to_dict(), "experts": self.names}, state)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a mixture that :meth:`save_pretrained` wrote; its forecasts are the same to the bit.

        Raises
        ------
        CheckpointError
            As :meth:`PatchTransformer.from_pretrained`.
        """
        path = Path(folder)
        document, state = read_model(path, _Document)
        config = read_config(path, document.model)
        with torch.device("meta"):
            expected = build_model(config).state_dict()
        encoder = [key for key in expected if key.startswith("encoder.")]
        if len(set(document.experts)) < len(document.experts):
            raise CheckpointError(f"{path} names an expert twice", hint="save the model again with this version of fedcast")
        try:
            for name in document.experts:
                check_name(name)
        except UnsafeError as error:
            raise CheckpointError(f"{path} is refused at experts: {error}", hint="give experts the names of sites") from error
        first, *others = document.experts
        one = all(f"{name}/{key}" not in state for name in others for key in encoder)
        wanted = {
            f"{name}/{key}": tensor
            for name in document.experts
            for key, tensor in expected.items()
            if name == first or not one or key not in encoder
        }
        check_tensors(path, wanted, state)
        states = {name: {key: state.get(f"{name}/{key}", state[f"{first}/{key}"]) for key in expected} for name in document.experts}
        return cls.of(config, states, encoder if one else [])
