from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from tests.consortium.conftest import site_kit

from fedcast.consortium.certificates import check_server, new_node_key, read_certificate
from fedcast.consortium.kits import CoordinatorKit, SiteKit, check_names
from fedcast.consortium.provision import Consortium, add_site, remove_site, renew
from fedcast.errors import CertificateError, ConsortiumError

Make = Callable[..., Consortium]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_when_a_consortium_is_made_then_its_kits_have_the_files_that_the_docs_name(consortium: Make) -> None:
    made = consortium()
    kit = made.coordinator.folder
    expected = {"consortium.toml", "ca.crt", "server.crt", "server.key", "sites", "flower", "nginx.conf", "fedcast-coordinator.service"}
    assert {path.name for path in kit.iterdir()} == expected
    assert {path.name for path in (kit / "sites").iterdir()} == {"hospital-a.pub", "hospital-b.pub"}
    assert mode(kit) == mode(kit / "flower") == 0o700
    site = made.folder / "sites" / "hospital-a"
    assert {path.name for path in site.iterdir()} == {
        "site.toml", "ca.crt", "node.key", "node.pub", "flower", "fedcast-site.service", "README.txt",
    }  # fmt: skip
    assert tomllib.loads((kit / "flower" / "config.toml").read_text())["superlink"]["consortium"]["root-certificates"] == str(
        kit / "ca.crt"
    )


def test_when_a_consortium_is_made_then_no_file_of_it_is_for_others_to_read(consortium: Make) -> None:
    made = consortium()
    assert mode(made.folder) == 0o700
    assert [path for path in made.folder.rglob("*") if path.is_file() and mode(path) & 0o077] == []


def test_when_a_site_unpacks_its_kit_then_it_has_its_own_key_and_nobody_else_s(consortium: Make, tmp_path: Path) -> None:
    made = consortium()
    with tarfile.open(made.kits["hospital-a"]) as archive:
        assert {entry.uname for entry in archive.getmembers()} == {""}
        archive.extractall(tmp_path / "unpacked", filter="data")
    kit = SiteKit.open(tmp_path / "unpacked" / "hospital-a")
    assert (kit.site, kit.consortium, kit.address) == ("hospital-a", "demo", f"localhost:{made.coordinator.proxy_port}")
    public = load_ssh_private_key(kit.key.read_bytes(), None).public_key()
    assert public == load_ssh_public_key(made.coordinator.sites["hospital-a"].encode())
    packed = made.kits["hospital-a"].read_bytes()
    for secret in (made.authority / "ca.key", made.coordinator.key, made.folder / "sites" / "hospital-b" / "node.key"):
        assert secret.read_bytes().splitlines()[3] not in packed  # the first lines are alike in all keys


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_when_ssh_keygen_reads_a_node_key_then_it_finds_the_public_key_of_the_kit(consortium: Make) -> None:
    kit = site_kit(consortium())
    said = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", str(kit.key)], capture_output=True, text=True, check=True).stdout
    assert said.split()[:2] == (kit.folder / "node.pub").read_text().split()[:2]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_when_openssl_verifies_the_certificate_strictly_then_it_holds_for_the_host_and_for_loopback(consortium: Make) -> None:
    kit = consortium(host="coordinator.example.org").coordinator
    for name in ("-verify_hostname coordinator.example.org", "-verify_hostname localhost", "-verify_ip 127.0.0.1", "-verify_ip ::1"):
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-CAfile",
            str(kit.authority),
            *name.split(),
            str(kit.certificate),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\\b", ".hidden", "-rf", "a b", "a\n", "ä", "x" * 64, "a.b", "@SITE@", "$(id)"])
def test_when_a_site_has_an_unsafe_name_then_it_is_refused_and_nothing_is_left_behind(consortium: Make, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConsortiumError, match="cannot be the name of a site"):
        consortium(sites=["good", name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a", "a"], ["Ward", "ward"], ["b", "a", "A"]])
def test_when_two_sites_differ_by_case_alone_then_they_are_refused(names: list[str]) -> None:
    with pytest.raises(ConsortiumError, match="are one"):
        check_names(names)


@pytest.mark.parametrize("host", ["", "a b", "-x", "http://h", "h:8443", "h/..", "a..b", "x;reload", "h\n", "x" * 64 + ".org"])
def test_when_the_host_is_malformed_then_it_is_refused(consortium: Make, host: str) -> None:
    with pytest.raises(ConsortiumError, match="no host name and no IP address"):
        consortium(host=host)


@pytest.mark.parametrize(
    ("host", "address"), [("192.0.2.7", "192.0.2.7:9"), ("2001:db8::7", "[2001:db8::7]:9"), ("h.example", "h.example:9")]
)
def test_when_the_host_is_an_address_then_certificate_and_kits_carry_it(consortium: Make, host: str, address: str) -> None:
    made = consortium(host=host, proxy_port=9)
    assert host in read_certificate(made.coordinator.certificate).names
    assert site_kit(made).address == address
    assert site_kit(made).host == host


def test_when_the_folder_is_there_then_nothing_is_overwritten(consortium: Make) -> None:
    before = {path: path.read_bytes() for path in consortium().folder.rglob("*") if path.is_file()}
    with pytest.raises(ConsortiumError, match="is there already"):
        consortium()
    assert {path: path.read_bytes() for path in before} == before


def test_when_a_site_is_added_then_it_has_a_kit_and_the_others_keep_their_keys(consortium: Make, tmp_path: Path) -> None:
    made = consortium()
    _, packed = add_site(made.coordinator, "hospital-c", tmp_path / "more")
    kit = CoordinatorKit.open(made.coordinator.folder)
    assert packed.is_file()
    assert list(kit.sites) == ["hospital-a", "hospital-b", "hospital-c"]
    assert {name: kit.sites[name] for name in made.coordinator.sites} == made.coordinator.sites
    assert kit.public_key("hospital-c").read_text().split()[:2] == (tmp_path / "more" / "hospital-c" / "node.pub").read_text().split()[:2]
    with pytest.raises(ConsortiumError, match="already a site 'hospital-c'"):
        add_site(kit, "hospital-c", tmp_path / "again")
    with pytest.raises(ConsortiumError, match="no site 'hospital-d'"):
        add_site(kit, "hospital-d", tmp_path / "again", replaces=True)


def test_when_a_site_made_its_own_key_then_its_kit_holds_no_private_one(consortium: Make, tmp_path: Path) -> None:
    made = consortium()
    private, line = new_node_key()
    add_site(made.coordinator, "hospital-c", tmp_path / "more", public_key=f"{line} me@ward\n")
    folder = tmp_path / "more" / "hospital-c"
    assert not (folder / "node.key").exists()
    with pytest.raises(ConsortiumError, match=r"lacks .*node\.key"):
        SiteKit.open(folder)
    (folder / "node.key").write_bytes(private)
    (folder / "node.key").chmod(0o644)
    with pytest.raises(ConsortiumError, match="others on this machine may read"):
        SiteKit.open(folder)
    (folder / "node.key").chmod(0o600)
    assert SiteKit.open(folder).site == "hospital-c"


@pytest.mark.parametrize("line", ["", "nonsense", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJuuzgUm3HHbtCR3kAKyAZvLUCzIvWq6ICmF0Zl2XQJ5"])
def test_when_a_public_key_is_no_p384_key_then_it_is_refused(consortium: Make, tmp_path: Path, line: str) -> None:
    with pytest.raises(ConsortiumError, match="no public ECDSA key on the curve P-384"):
        add_site(consortium().coordinator, "hospital-c", tmp_path / "more", public_key=line)


def test_when_a_key_is_another_site_s_then_it_is_refused(consortium: Make, tmp_path: Path) -> None:
    kit = consortium().coordinator
    with pytest.raises(ConsortiumError, match="another site's"):
        add_site(kit, "hospital-c", tmp_path / "more", public_key=kit.sites["hospital-a"])


def test_when_a_site_gets_a_new_key_then_the_kit_has_the_new_one_alone(consortium: Make, tmp_path: Path) -> None:
    made = consortium()
    add_site(made.coordinator, "hospital-a", tmp_path / "more", replaces=True)
    kit = CoordinatorKit.open(made.coordinator.folder)
    assert kit.sites["hospital-a"] != made.coordinator.sites["hospital-a"]
    assert kit.sites["hospital-b"] == made.coordinator.sites["hospital-b"]


def test_when_a_site_is_removed_then_the_kit_no_longer_has_its_key(consortium: Make) -> None:
    made = consortium()
    remove_site(made.coordinator, "hospital-a")
    kit = CoordinatorKit.open(made.coordinator.folder)
    assert list(kit.sites) == ["hospital-b"]
    assert not kit.public_key("hospital-a").exists()
    with pytest.raises(ConsortiumError, match="no site 'hospital-a'"):
        remove_site(kit, "hospital-a")


def test_when_a_key_file_is_not_the_one_that_the_kit_names_then_the_kit_is_refused(consortium: Make) -> None:
    kit = consortium().coordinator
    shutil.copy(kit.public_key("hospital-b"), kit.public_key("hospital-a"))
    with pytest.raises(ConsortiumError, match=r"hospital-a\.pub is another key than"):
        CoordinatorKit.open(kit.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ("name = 'x'", "host: Field required"),
        ("name = 'demo'\nhost = 'h'\nport = 0\nproxy_port = 1\nsites = []", "port: Input should be greater"),
        ("name = 'demo'\nhost = 'h; x'\nport = 1\nproxy_port = 2\nsites = []", "no host name"),
        ("name = 'demo'\nhost = 'h'\nport = 1\nproxy_port = 2\nsites = []\ncode = 'x'", "Extra inputs"),
        (
            "name = 'demo'\nhost = 'h'\nport = 1\nproxy_port = 2\nsites = [{name = '../x', public_key = 'k'}]",
            "cannot be the name of a site",
        ),
    ],
)
def test_when_a_kit_s_file_is_malformed_then_file_and_key_are_named(consortium: Make, text: str, message: str) -> None:
    kit = consortium().coordinator
    (kit.folder / "consortium.toml").write_text(text)
    with pytest.raises(ConsortiumError, match=message):
        CoordinatorKit.open(kit.folder)


def test_when_a_certificate_is_renewed_then_it_is_the_same_authority_s_and_holds_longer(consortium: Make) -> None:
    old = datetime.now(UTC) - timedelta(days=400)
    made = consortium(now=old)
    kit = made.coordinator
    with pytest.raises(CertificateError, match="expired on"):
        check_server(kit.authority, kit.certificate, kit.key, kit.host)
    renew(kit, made.authority)
    assert check_server(kit.authority, kit.certificate, kit.key, kit.host).ends > datetime.now(UTC) + timedelta(days=364)
    with pytest.raises(ConsortiumError, match="another authority"):
        renew(kit, consortium("other").authority)


def test_when_a_certificate_is_not_the_coordinator_s_then_the_reason_is_named(consortium: Make) -> None:
    kit, other = consortium().coordinator, consortium("other", host="elsewhere.example").coordinator
    late = datetime.now(UTC) - timedelta(days=1)
    for parts, message in (
        ((other.authority, kit.certificate, kit.key, "localhost"), "was not signed by"),
        ((kit.authority, kit.certificate, other.key, "localhost"), "is not the private key of"),
        ((kit.authority, kit.certificate, kit.key, "elsewhere.example"), "holds for localhost, 127.0.0.1, ::1, not for elsewhere.example"),
    ):
        with pytest.raises(CertificateError, match=message):
            check_server(*parts)
    with pytest.raises(CertificateError, match="is not valid before"):
        check_server(kit.authority, kit.certificate, kit.key, "localhost", now=late)
    with pytest.raises(ConsortiumError, match="no private key that can be read"):
        check_server(kit.authority, kit.certificate, kit.certificate, "localhost")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", ["coordinator/fedcast-coordinator.service", "sites/hospital-a/fedcast-site.service"])
def test_when_systemd_reads_a_unit_then_it_finds_nothing_wrong_but_what_is_to_be_adapted(consortium: Make, unit: str) -> None:
    path = consortium().folder / unit
    command = ["systemd-analyze", "verify", "--man=no", "--generators=no", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_LOG_LEVEL": "notice"}).stderr
    about = [line for line in said.splitlines() if path.name in line and "is not executable" not in line]
    assert about == []
    assert "@" not in path.read_text().replace("@system-service", "")
