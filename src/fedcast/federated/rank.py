"""One rank of a site's training: ``torchrun -m fedcast.federated.rank FOLDER``; :mod:`fedcast.federated.silo` starts it."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.data.store import SeriesStore
from fedcast.errors import FedcastError
from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.federated.silo import ANSWER, LOOK_S, MEETING, STORE, TASK, WHAT, write_error
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.spec import RunSpec
from fedcast.training.backend import Backend
from fedcast.training.ranks import joined


def main(folder: Path) -> None:
    """Train task after task that comes into a folder, together with the other ranks; the first one writes the answers beside them."""
    threading.Thread(target=_end_with_site, daemon=True).start()
    what = json.loads((folder / WHAT).read_text(encoding="utf-8"))
    spec = RunSpec.model_validate(what["spec"])
    Backend.resolve(spec.training).use()
    plan = Plan(spec, build_method(spec.method))
    with joined(folder / MEETING) as ranks:
        site = Site(SiteRole(**what["role"]), SeriesStore.open(folder / STORE), plan, Path(what["site"]), ranks=ranks)
        workspaces = Workspaces()
        for number in itertools.count(1):
            task, answer = folder / f"{TASK}-{number}", folder / f"{ANSWER}-{number}"
            while not task.is_file():
                time.sleep(LOOK_S)
            try:
                trained = site.train(Task.decode(task.read_bytes()), workspaces)
            except FedcastError as error:
                if ranks.rank == 0:
                    write_error(answer, error.message)
                raise
            if ranks.rank == 0:
                trained.write(answer)


def _end_with_site() -> None:
    """End this process when the site's own process has ended: the other end of the pipe is closed then."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
