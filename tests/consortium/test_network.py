from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from tests.consortium.conftest import site_kit

from fedcast.consortium.diagnosis import diagnose
from fedcast.consortium.kits import CoordinatorKit, SiteKit
from fedcast.consortium.network import contact
from fedcast.consortium.provision import Consortium
from fedcast.errors import CertificateError, ConsortiumError, FedcastError, IdentityError, UnreachableError

Make = Callable[..., Consortium]
NO_KEY = "Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n[code: 2004] Failed to activate SuperNode."


@contextmanager
def serving(
    kit: CoordinatorKit, *, tls: bool = True, status: int = 415, ahead: timedelta = timedelta(), address: str = "127.0.0.1"
) -> Iterator[None]:
    """Answer on a kit's public port as its coordinator would, or as it would not."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", format_datetime(datetime.now(UTC) - ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def handle(self) -> None:
            with suppress(OSError):  # a site that does not trust the certificate hangs up
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((address, kit.proxy_port), Handler) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(kit.certificate, kit.key)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def trouble(kit: SiteKit, output: str = "") -> FedcastError:
    found = diagnose(kit, output)
    assert found is not None
    return found


def test_when_all_is_well_then_the_certificate_is_shown_and_nothing_is_diagnosed(consortium: Make) -> None:
    made = consortium()
    with serving(made.coordinator):
        found = contact("localhost", made.coordinator.proxy_port, made.coordinator.authority)
        assert "localhost" in found.certificate.names
        assert found.clock is not None
        assert abs(found.clock) < timedelta(seconds=5)
        assert diagnose(site_kit(made)) is None


def test_when_the_certificate_is_another_authority_s_then_that_is_said(consortium: Make) -> None:
    made, other = consortium(), consortium("other")
    shutil.copy(other.coordinator.authority, site_kit(made).authority)
    with serving(made.coordinator):
        error = trouble(site_kit(made))
    assert isinstance(error, CertificateError)
    assert "was not signed by this consortium's authority" in error.message


@pytest.mark.parametrize(("days", "words"), [(-40, "expired on"), (40, "is not valid before")])
def test_when_the_certificate_s_time_is_over_or_to_come_then_its_date_is_said(consortium: Make, days: int, words: str) -> None:
    made = consortium(now=datetime.now(UTC) + timedelta(days=days), days=30)
    with serving(made.coordinator):
        error = trouble(site_kit(made))
    assert isinstance(error, CertificateError)
    moment = datetime.now(UTC) + timedelta(days=days) + (timedelta(days=30) if days < 0 else timedelta(hours=-1))
    if days < 0:
        assert f"{words} {moment:%Y-%m-%d}" in error.message
    else:
        assert words in error.message or "authority" in error.message  # the authority begins on the same day
    assert "clock" in error.hint


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is loopback on Linux alone")
def test_when_the_certificate_holds_for_another_host_then_both_are_named(consortium: Make) -> None:
    kit = consortium(host="coordinator.example.org").coordinator
    named = r"holds for coordinator\.example\.org, localhost.*not for 127\.0\.0\.2"
    with serving(kit, address="127.0.0.2"), pytest.raises(CertificateError, match=named):
        contact("127.0.0.2", kit.proxy_port, kit.authority)


def test_when_the_coordinator_speaks_plain_text_then_it_is_refused(consortium: Make) -> None:
    made = consortium()
    with serving(made.coordinator, tls=False):
        error = trouble(site_kit(made))
    assert isinstance(error, CertificateError)
    assert "does not speak TLS" in error.message


def test_when_what_answers_says_nothing_then_waiting_ends(consortium: Make) -> None:
    made = consortium()
    with socket.create_server(("127.0.0.1", made.coordinator.proxy_port)):
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="does not answer in time"):
            contact("localhost", made.coordinator.proxy_port, made.coordinator.authority, timeout=0.3)
        assert time.monotonic() - began < 5


def test_when_nothing_answers_then_host_and_port_are_named(consortium: Make) -> None:
    made = consortium()
    error = trouble(site_kit(made))
    assert isinstance(error, UnreachableError)
    assert f"localhost:{made.coordinator.proxy_port} cannot be reached" in error.message
    assert str(made.coordinator.proxy_port) in error.hint


@pytest.mark.parametrize("status", [502, 503, 504])
def test_when_the_proxy_answers_alone_then_the_superlink_is_named(consortium: Make, status: int) -> None:
    made = consortium()
    with serving(made.coordinator, status=status):
        error = trouble(site_kit(made))
    assert isinstance(error, UnreachableError)
    assert "the SuperLink behind it does not" in error.message


@pytest.mark.parametrize(("seconds", "words"), [(60, "seconds ahead of"), (-900, "seconds behind")])
def test_when_the_clocks_differ_by_more_than_a_signature_may_then_that_is_said(consortium: Make, seconds: int, words: str) -> None:
    made = consortium()
    with serving(made.coordinator, ahead=timedelta(seconds=seconds)):
        error = trouble(site_kit(made))
    assert isinstance(error, IdentityError)
    assert words in error.message
    assert "NTP" in error.hint


def test_when_the_clocks_differ_by_as_much_as_is_tolerated_then_nothing_is_diagnosed(consortium: Make) -> None:
    made = consortium()
    with serving(made.coordinator, ahead=timedelta(seconds=-200)):
        assert diagnose(site_kit(made)) is None


def test_when_flower_says_that_the_key_was_not_taken_then_the_site_s_key_is_named(consortium: Make) -> None:
    made = consortium()
    with serving(made.coordinator):
        error = trouble(site_kit(made), NO_KEY)
    assert isinstance(error, IdentityError)
    assert "'hospital-a'" in error.message
    assert "node.pub" in error.hint


def test_when_the_private_key_is_damaged_then_it_is_named_before_anything_else(consortium: Make) -> None:
    kit = site_kit(consortium())
    kit.key.write_text("nonsense")
    error = trouble(kit)
    assert "node.key is no private key in OpenSSH's format" in error.message


def test_when_the_authority_s_certificate_is_damaged_then_it_is_named(consortium: Make, tmp_path: Path) -> None:
    kit = consortium().coordinator
    damaged = tmp_path / "ca.crt"
    damaged.write_text("nonsense")
    with pytest.raises(ConsortiumError, match=r"ca\.crt is no certificate that can be read"):
        contact("localhost", kit.proxy_port, damaged)
