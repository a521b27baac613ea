"""Network addresses."""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_address

from asd_megatron.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine's loopback interface; of the names, only localhost is."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def own_names(peer: str | None) -> frozenset[str]:
    """Names and addresses of this machine beside its host name, loopback left out: what the host name resolves to, its
    complete and its short name, and the address of the interface towards `peer`."""
    name = socket.gethostname()
    found = {socket.getfqdn(), name.partition(".")[0]}
    with suppress(OSError):
        found.update(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    if peer:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing
            found.add(str(probe.getsockname()[0]))
    return frozenset(entry for entry in found if not is_loopback(entry))


def resolve(host: str, what: str) -> str:
    """The address of `host`, a name or an address, at which other nodes reach it. Raises UserError, which begins with
    `what`, for a name that this machine does not know, or gives to its own loopback interface."""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{what} {host!r} cannot be resolved ({error}): give its name or address on this network"
        ) from None
    if is_loopback(address) and not is_loopback(host):
        raise UserError(
            f"{what} {host!r} is {address} on this machine, where no other node reaches it: give its address on the"
            " cluster's network (`ip address` shows it there), or correct /etc/hosts"
        )
    return address
