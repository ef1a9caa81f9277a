"""Takes the port before anything slow happens. Knows no HTTP."""

import errno
import ipaddress
import socket

from moestro.server.facts import Refused


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound and listening, so that a second start fails at once. Refused says what to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise Refused(f"--host: {host!r} is not an address of this machine") from None
    try:
        # "::" is every address of this machine, as 0.0.0.0 is to those who know only IPv4.
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise Refused(_cause(error, host, port)) from None


def _cause(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --port, or --port 0 for any"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs more rights than this user has; choose another with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {host!r} is not an address of this machine"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches it; a wildcard address becomes loopback."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
