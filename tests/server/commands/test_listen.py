"""Taking the port."""

import socket

import pytest

from moestro.server.commands.listen import is_loopback, listening_socket, url_of
from moestro.server.facts.refusal import Refused


def test_a_second_start_fails_at_once():
    with listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(Refused, match=rf"port {port} on 127.0.0.1 is in use.*--port"):
            listening_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1", "a" * 300])
def test_an_address_of_somebody_else(host):
    with pytest.raises(Refused, match="--host"):
        listening_socket(host, 0)


def test_url():
    with listening_socket("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_url_of_ipv6():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")
    with listening_socket("::", 0) as listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 beside IPv4 here")
@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_every_address_is_of_both_families(loopback):
    with (
        listening_socket("::", 0) as listener,
        socket.create_connection((loopback, listener.getsockname()[1]), timeout=5),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("example", False),
    ],
)
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback
