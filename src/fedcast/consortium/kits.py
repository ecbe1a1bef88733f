"""The two kinds of start-up kits, as folders on disk: the coordinator's, and one a site.

::

    coordinator/                              hospital-a/
        consortium.toml                           site.toml
        ca.crt  server.crt  server.key            ca.crt  node.key  node.pub
        sites/hospital-a.pub                      flower/
        nodes.json                                fedcast-site.service
        flower/  config.toml  state.db            README.txt
        nginx.conf  fedcast-coordinator.service
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedcast.consortium.certificates import check_host, check_public_key
from fedcast.errors import ConsortiumError

CONSORTIUM_FILE: Final = "consortium.toml"
SITE_FILE: Final = "site.toml"
CONNECTION: Final = "consortium"
"""Name of the connection in a kit's Flower configuration."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_FILE_LIMIT: Final = 1 << 20

Port = Annotated[int, Field(ge=1, le=65535)]
_Model = TypeVar("_Model", bound=BaseModel)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _SiteEntry(_File):
    name: str
    public_key: str


class _ConsortiumFile(_File):
    name: str
    host: str
    port: Port
    proxy_port: Port
    sites: list[_SiteEntry]


class _SiteFile(_File):
    consortium: str
    site: str
    coordinator: str
    policy: dict[str, Any] = {}  # what the site allows; see fedcast.federated.flower


def check_name(name: str, what: str = "site") -> str:
    """Return a name that is safe as a file name, in a certificate and in a configuration file.

    Raises
    ------
    ConsortiumError
        When it is not 1 to 63 letters, digits, ``-`` and ``_`` that begin with a letter or a digit.
    """
    if not _NAME.fullmatch(name):
        hint = "use 1 to 63 letters, digits, - and _, beginning with a letter or a digit"
        raise ConsortiumError(f"{name!r} cannot be the name of a {what}", hint=hint)
    return name


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a consortium's sites; two may not differ by case alone, since some file systems see no difference.

    Raises
    ------
    ConsortiumError
        When a name is not safe, or stands there twice.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = check_name(name).casefold()
        if key in seen:
            raise ConsortiumError(f"the sites {seen[key]!r} and {name!r} are one", hint="give every site a name of its own")
        seen[key] = name
    return tuple(seen.values())


@dataclass(frozen=True)
class CoordinatorKit:
    """The coordinator's kit.

    Attributes
    ----------
    folder
        Where it lies, absolute.
    name
        The consortium's name.
    host
        Host name or address under which sites reach the proxy.
    port
        The SuperLink's port, on loopback alone.
    proxy_port
        The port that is open to sites.
    sites
        Public key of every site, by name, in the order of names.
    """

    folder: Path
    name: str
    host: str
    port: int
    proxy_port: int
    sites: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read a coordinator's kit.

        Raises
        ------
        ConsortiumError
            When there is none, or a file of it is missing, malformed or contradicts another.
        """
        folder = folder.absolute()
        made = "make one with `fedcast consortium init DIR --host HOST --site NAME`, or name its coordinator/ folder with --kit"
        data = _read(folder / CONSORTIUM_FILE, _ConsortiumFile, made)
        check_names(entry.name for entry in data.sites)
        keys = {entry.name: check_public_key(entry.public_key, f"the key of site {entry.name!r}") for entry in data.sites}
        kit = cls(
            folder, check_name(data.name, "consortium"), check_host(data.host), data.port, data.proxy_port, dict(sorted(keys.items()))
        )
        for path in (kit.authority, kit.certificate, kit.key):
            _need(path, "coordinator")
        for name, key in kit.sites.items():
            line = _need(kit.public_key(name), "coordinator").read_text(encoding="utf-8")
            if check_public_key(line, str(kit.public_key(name))) != key:
                message = f"{kit.public_key(name)} is another key than the one in {kit.folder / CONSORTIUM_FILE}"
                raise ConsortiumError(message, hint=f"fedcast consortium add {name} --replace --public-key FILE writes both")
        return kit

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The coordinator's certificate."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The private key of the coordinator's certificate."""
        return self.folder / "server.key"

    @property
    def proxy(self) -> Path:
        """The configuration of nginx."""
        return self.folder / "nginx.conf"

    @property
    def flower(self) -> Path:
        """Flower's own folder (``FLWR_HOME``): configuration, database and log."""
        return self.folder / "flower"

    @property
    def database(self) -> Path:
        """The SuperLink's database; while a run goes on, models lie in it in clear."""
        return self.flower / "state.db"

    @property
    def address(self) -> str:
        """The SuperLink's address on this machine."""
        return f"127.0.0.1:{self.port}"

    def public_key(self, site: str) -> Path:
        """Return the file of a site's public key."""
        return self.folder / "sites" / f"{site}.pub"

    def nodes(self) -> dict[str, int]:
        """Return Flower's number for every site that has been registered, by name.

        Raises
        ------
        ConsortiumError
            When ``nodes.json`` is damaged.
        """
        path = self.folder / "nodes.json"
        try:
            return TypeAdapter(dict[str, int]).validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            hint = f"stop the coordinator, delete {path} and {self.database}, and start it: every site is registered anew"
            raise ConsortiumError(f"{path} cannot be read", hint=hint) from error

    def write_nodes(self, nodes: Mapping[str, int]) -> None:
        """Keep Flower's numbers of the sites."""
        write_private(self.folder / "nodes.json", json.dumps(dict(sorted(nodes.items())), indent=2) + "\n")

    def write(self) -> None:
        """Keep what the kit says in ``consortium.toml``, and every site's public key in a file of its own."""
        entries = [{"name": name, "public_key": key} for name, key in sorted(self.sites.items())]
        document = {"name": self.name, "host": self.host, "port": self.port, "proxy_port": self.proxy_port, "sites": entries}
        (self.folder / "sites").mkdir(mode=0o700, exist_ok=True)
        for name, key in self.sites.items():
            write_private(self.public_key(name), f"{key} {name}\n")
        write_private(self.folder / CONSORTIUM_FILE, tomli_w.dumps(document))

    def write_connection(self) -> None:
        """Write Flower's configuration: one connection, to the SuperLink on this machine; the kit may have been moved since it was made."""
        write_connection(self.flower, self.address, self.authority)


@dataclass(frozen=True)
class SiteKit:
    """A site's kit.

    Attributes
    ----------
    folder
        Where it lies, absolute.
    consortium, site
        The consortium's name and the site's.
    host, port
        Where the coordinator's proxy is reached.
    """

    folder: Path
    consortium: str
    site: str
    host: str
    port: int

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read a site's kit.

        Raises
        ------
        ConsortiumError
            When there is none, a file of it is missing or malformed, or others may read its private key.
        """
        folder = folder.absolute()
        data = _read(folder / SITE_FILE, _SiteFile, "unpack the kit that the coordinator sent, and name its folder with --kit")
        host, colon, port = data.coordinator.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ConsortiumError(f"{folder / SITE_FILE}: coordinator = {data.coordinator!r} is not host:port", hint="ask for a new kit")
        host = check_host(host.removeprefix("[").removesuffix("]"))
        kit = cls(folder, check_name(data.consortium, "consortium"), check_name(data.site), host, int(port))
        _need(kit.authority, "site")
        if _need(kit.key, "site").stat().st_mode & 0o077 and os.name == "posix":
            raise ConsortiumError(f"others on this machine may read {kit.key}", hint=f"chmod 600 {kit.key}")
        return kit

    @property
    def address(self) -> str:
        """The coordinator's address, as Flower takes it."""
        return address_of(self.host, self.port)

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        """The site's private key."""
        return self.folder / "node.key"

    @property
    def flower(self) -> Path:
        """Flower's own folder (``FLWR_HOME``)."""
        return self.folder / "flower"

    def write(self) -> None:
        """Keep what the kit says in ``site.toml``."""
        document = {"consortium": self.consortium, "site": self.site, "coordinator": self.address}
        write_private(self.folder / SITE_FILE, tomli_w.dumps(document))


def address_of(host: str, port: int) -> str:
    """Return host and port as one address; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_connection(home: Path, address: str, authority: Path) -> None:
    """Write Flower's configuration into its folder: one connection, named ``consortium``.

    Parameters
    ----------
    home
        Flower's own folder; it is made, closed to others, where it is missing.
    address
        The SuperLink's host and port.
    authority
        The authority's certificate.
    """
    home.mkdir(mode=0o700, exist_ok=True)
    connection = {"address": address, "root-certificates": str(authority)}
    write_private(home / "config.toml", tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))


def write_private(path: Path, content: str | bytes) -> None:
    """Write a file that its owner alone may read, in whole or not at all.

    Raises
    ------
    ConsortiumError
        When it cannot be written.
    """
    aside = path.with_name(f"{path.name}.new")
    try:
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise ConsortiumError(f"cannot write {path}: {error.strerror}", hint="check the folder's owner and the free space") from error


def _need(path: Path, kind: str) -> Path:
    if not path.is_file():
        raise ConsortiumError(f"the {kind}'s kit lacks {path}", hint="put the file back from the kit as it was made")
    return path


def _read(path: Path, model: type[_Model], hint: str) -> _Model:
    try:
        if path.stat().st_size > _FILE_LIMIT:
            raise ConsortiumError(f"{path} is larger than {_FILE_LIMIT} bytes", hint=hint)
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return model.model_validate(document)
    except OSError as error:
        raise ConsortiumError(f"there is no kit at {path.parent}: {path.name} cannot be read", hint=hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConsortiumError(f"{path}: {where}: {first['msg']}", hint="put back the file as it was made") from error
    except ValueError as error:  # not TOML, or not text
        raise ConsortiumError(f"{path} is not TOML: {error}", hint="put back the file as it was made") from error
