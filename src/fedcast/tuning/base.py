"""The contract of a tuning: which weights train, and from where they start.

A tuning is one file: a frozen dataclass of its hyper-parameters and the hooks it needs. It works with any method and model: methods
see the parameters that it lets train, and only those can travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.models.contract import Model
from fedcast.registry import build, register
from fedcast.spec import TuningSpec

TUNINGS: dict[str, type[Tuning]] = {}


@dataclass(frozen=True)
class Tuning:
    """Base of all tunings; subclass it in a file of its own and it is registered under ``name``.

    Class attributes
    ----------------
    name
        The name in a spec.
    summary
        One line for ``fedcast tunings``.
    rewires
        Whether it puts modules of its own into the model, which native kernels and a mixture of models would not see.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    rewires: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass; a duplicate or empty name is refused."""
        super().__init_subclass__(**kwargs)
        register("tuning", cls, cls.name, TUNINGS)

    def check(self, rounds: int) -> None:
        """Refuse, by :class:`~fedcast.errors.SpecError`, a run whose number of federated rounds leaves no room for what the tuning does."""

    def prepare(self, model: Model, seed: int) -> Model:
        """Return the model to train, changed in place or wrapped; parameters that do not require a gradient are frozen.

        Called alike at the server and in every workspace: it must depend on nothing but its arguments.

        Parameters
        ----------
        model
            The starting model, all of whose parameters require a gradient.
        seed
            Seed of whatever is drawn.
        """
        return model

    def plain(self, model: Model) -> Model:
        """Return a tuned model in the form it had before :meth:`prepare`, where it has one: adapters merged into the weights."""
        return model

    def save(self, model: Model, folder: Path) -> None:
        """Write a tuned model as a folder that ``Forecaster.from_pretrained`` loads; subclasses add what is their own, such as adapters."""
        self.plain(model).save_pretrained(folder)

    def candidates(self) -> Sequence[Tuning]:
        """Return the tunings among which the validation loss chooses; itself alone where there is nothing to choose."""
        return (self,)

    # What a federation agrees on beside the weights, such as which modules are kept. All tensors are float32.

    def state_shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the state that the server sends with the weights; empty: there is none."""
        return {}

    def apply(self, model: Model, state: Mapping[str, Tensor]) -> None:
        """Bring the state into the model before it is trained or scored; ``state`` is empty before the first :meth:`decide`."""

    def answer_shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of what a site answers after its steps."""
        return {}

    def answer(
        self, model: Model, loss: Callable[[Batch], Tensor], batches: Callable[[], Sequence[Batch]], *, round: int, rounds: int, seed: int
    ) -> dict[str, Tensor]:
        """Return what a site answers after its steps, such as the importance of modules on its validation windows.

        Parameters
        ----------
        model
            The trained model; its gradients may be overwritten, its weights must not be.
        loss
            The task's loss of a batch.
        batches
            Gives the site's validation windows, in batches; none where the site has no validation windows.
        round, rounds
            This round (from 1) and how many there are.
        seed
            The run's seed, the same at every site.
        """
        return {}

    def decide(
        self,
        state: Mapping[str, Tensor],
        answers: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        *,
        round: int,
        rounds: int,
        seed: int,
    ) -> dict[str, Tensor]:
        """Return the state after a round, at the server, from the sites' answers (in the order of their names) and training points."""
        return dict(state)


def build_tuning(spec: TuningSpec) -> Tuning:
    """Return the tuning a spec names, its hyper-parameters checked; see :func:`fedcast.registry.build`."""
    return build("tuning", spec.name, spec.options, TUNINGS, help=f"see `fedcast tunings {spec.name}`")
