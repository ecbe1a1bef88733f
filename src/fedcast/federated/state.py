"""What a site keeps between rounds, in its own folder: private weights, optimiser moments, the method's tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fedcast.errors import CheckpointError
from fedcast.safe import UnsafeError
from fedcast.tensors import read_file

_NAME = re.compile(r"state-(\d{6})\.safetensors")


class SiteStates:
    """A site's states, one a round it took part in: the newest, and the last two whose round counted at the server.

    Those are enough: a coordinator that died in a round repeats that round, or the one before where its last checkpoint is damaged,
    and the site then starts again from the last state that counted. Written aside and renamed, but not synced: a state outlives a
    killed process, and may not outlive a power cut. Nothing stays in memory, so that a process can simulate any number of sites.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> dict[str, Tensor]:
        """Return the newest state, whether its round counted or not; empty when there is none."""
        return self._load(max(self._rounds(), default=None))

    def of(self, counted: int) -> dict[str, Tensor]:
        """Return the state of the last round that counted; empty when the site had none by then.

        Raises
        ------
        CheckpointError
            When the site had one and it is gone: to go on from an older one would spoil the round unseen.
        """
        found = max((number for number in self._rounds() if number <= counted), default=None)
        if found is not None and found != counted:
            raise CheckpointError(
                f"the site's state of round {counted} is gone from {self._folder}, the newest before it is of round {found}",
                hint="put the folder back as it was, or remove its state files to let the site begin anew",
            )
        return self._load(found)

    def _load(self, number: int | None) -> dict[str, Tensor]:
        if number is None:
            return {}
        path = self._path(number)
        try:
            return read_file(path).tensors
        except (UnsafeError, OSError) as error:
            raise CheckpointError(f"the site state {path} is damaged: {error}", hint="remove the run folder and start again") from error

    def save(self, round_: int, tensors: Mapping[str, Tensor], counted: int) -> None:
        """Keep the state of a round; written aside and renamed, so a killed site never leaves half a state.

        States of rounds between ``counted`` and ``round_`` are of work that came too late, and are removed. Those after ``round_`` stay:
        where an old task comes once more, they are what counts.
        """
        if not tensors:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(round_)
        aside = path.with_name(f"{path.stem}.{os.getpid()}.aside")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside)
        os.replace(aside, path)
        counting = sorted(number for number in self._rounds() if number <= counted)
        for number in self._rounds():
            if number < round_ and number not in counting[-2:]:
                self._path(number).unlink()

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return [int(match[1]) for entry in self._folder.iterdir() if (match := _NAME.fullmatch(entry.name))]

    def _path(self, round_: int) -> Path:
        return self._folder / f"state-{round_:06d}.safetensors"
