"""Which keys the SuperLink knows, and that they are the kit's: Flower's own commands register and take out, its database says what is.

Flower's list of nodes has no keys, and what is bound to a key may not be guessed, so the keys are read from the SuperLink's database.
Its layout is the pinned version's; another one is refused by name.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedcast.consortium.kits import CONNECTION, CoordinatorKit
from fedcast.errors import ConsortiumError, IdentityError
from fedcast.federated.flower.processes import environment, program

_UNREGISTERED: Final = "unregistered"
_COMMAND_S: Final = 60.0


@dataclass(frozen=True)
class Node:
    """A row of the SuperLink's nodes.

    Attributes
    ----------
    number
        Flower's number of the node.
    public_key
        The key, in OpenSSH's format without a comment.
    registered
        Whether it may join; a key that was taken out stays on record and is never accepted again.
    """

    number: int
    public_key: str
    registered: bool


def known_nodes(database: Path) -> list[Node]:
    """Return every node of a SuperLink's database, those that were taken out included.

    Raises
    ------
    ConsortiumError
        When the database cannot be read, or is another version's.
    """
    from cryptography.hazmat.primitives import serialization as form

    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=10.0)) as connection:
            rows = connection.execute("SELECT node_id, public_key, status FROM node").fetchall()
        nodes = []
        for number, pem, status in rows:
            line = form.load_pem_public_key(pem).public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode("ascii")
            nodes.append(Node(number % (1 << 64), line, status != _UNREGISTERED))  # SQLite keeps the unsigned number as a signed one
    except (sqlite3.Error, ValueError, TypeError) as error:
        hint = "fedcast is made for flwr 1.41: pip install 'fedcast[flower]'; or stop the coordinator and delete the file"
        raise ConsortiumError(f"{database} cannot be read: {error}", hint=hint) from error
    return nodes


def register_sites(kit: CoordinatorKit, say: Callable[[str], None]) -> dict[str, int]:
    """Bring a running SuperLink to exactly the kit's keys, and keep Flower's number of every site in ``nodes.json``.

    Parameters
    ----------
    kit
        The coordinator's kit.
    say
        Called with a line for each site that is registered or taken out.

    Returns
    -------
    dict of str to int
        Flower's number of every site, by name.

    Raises
    ------
    IdentityError
        When a site's key was taken out before.
    ConsortiumError
        When Flower refuses, or its database cannot be read.
    """
    names = {key: name for name, key in kit.sites.items()}
    before = {number: name for name, number in kit.nodes().items()}
    known = known_nodes(kit.database)
    spent = {node.public_key for node in known if not node.registered}
    for node in known:
        if node.registered and node.public_key not in names:
            flower(kit, "supernode", "unregister", str(node.number), CONNECTION)
            say(f"{before.get(node.number, f'node {node.number}')}: the key is not in the kit and was taken out")
    for key, name in names.items():
        if key in spent:
            hint = f"give it a new one: fedcast consortium add {name} --replace"
            raise IdentityError(f"the key of site {name!r} was taken out before, and Flower takes no key twice", hint=hint)
    present = {node.public_key for node in known if node.registered}
    for key, name in names.items():
        if key not in present:
            flower(kit, "supernode", "register", str(kit.public_key(name)), CONNECTION, "--name", name)
            say(f"{name}: key registered")
    numbers = {names[node.public_key]: node.number for node in known_nodes(kit.database) if node.registered and node.public_key in names}
    if missing := sorted(kit.sites.keys() - numbers.keys()):
        raise ConsortiumError(f"Flower did not register site {missing[0]!r}", hint="start the coordinator again")
    kit.write_nodes(numbers)
    return numbers


def flower(kit: CoordinatorKit, *words: str) -> Mapping[str, Any]:
    """Run one of Flower's commands against the SuperLink on this machine and return its JSON.

    Raises
    ------
    ConsortiumError
        When it fails, or does not answer in time.
    """
    command = [program("flwr"), *words, "--format", "json"]
    hint = "fedcast consortium status says whether the SuperLink runs"
    what = f"`flwr {' '.join(words[:2])}`"
    try:
        done = subprocess.run(command, env=environment(kit.flower), stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S)
    except subprocess.TimeoutExpired as error:
        raise ConsortiumError(f"{what} did not answer in {_COMMAND_S:.0f} seconds", hint=hint) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or answer.get("success") is not True:
        said = answer.get("error-message") if isinstance(answer, dict) else done.stderr.decode("utf-8", "replace")
        last = next((line.strip() for line in reversed(str(said).splitlines()) if line.strip()), "no reason given")
        raise ConsortiumError(f"{what} was refused: {last}", hint=hint)
    return answer
