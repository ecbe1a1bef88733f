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
    process, and may not outlive a power cut. States of later rounds belong to a history that was given up. Nothing stays in memory,
    so that a process can simulate any number of sites.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, round_: int) -> dict[str, Tensor]:
        """Return the newest state from before a round; empty when there is none."""
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
        aside = path.with_name(f"{path.stem}.{os.getpid()}.aside")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside)
        os.replace(aside, path)
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
