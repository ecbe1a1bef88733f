"""What a site keeps between rounds, in its own folder: private weights, optimiser moments, the method's tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcast.errors import CheckpointError

_NAME = re.compile(r"state-(\d{6})\.safetensors")


class SiteStates:
    """A site's states, one a round it took part in; the last three are kept.

    Three are enough: a coordinator that died in a round repeats that round, or the one before where its last checkpoint is damaged,
    and the site then starts again from the state before it. Written aside and renamed, but not synced: a state outlives a killed
    process, and may not outlive a power cut. States of later rounds belong to a history that was given up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._latest: tuple[int, dict[str, Tensor]] | None = None

    def before(self, round_: int) -> dict[str, Tensor]:
        """Return the newest state from before a round; empty when there is none."""
        if self._latest is not None and self._latest[0] < round_:
            return {name: tensor.clone() for name, tensor in self._latest[1].items()}
        rounds = [number for number in self._rounds() if number < round_]
        if not rounds:
            return {}
        path = self._path(max(rounds))
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the site state {path} is damaged", hint="remove the run folder and start again") from error

    def save(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state of a round; written aside and renamed, so a killed site never leaves half a state."""
        if not tensors:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(round_)
        # Copies: what a method goes on changing in memory must not differ from what a resumed run reads.
        kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        aside = path.with_name(f"{path.stem}.{os.getpid()}.aside")
        save_file(kept, aside)
        os.replace(aside, path)
        self._latest = (round_, kept)
        keep = {round_, *sorted(number for number in self._rounds() if number < round_)[-2:]}
        for number in self._rounds():
            if number not in keep:
                self._path(number).unlink()

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return [int(match[1]) for entry in self._folder.iterdir() if (match := _NAME.fullmatch(entry.name))]

    def _path(self, round_: int) -> Path:
        return self._folder / f"state-{round_:06d}.safetensors"
