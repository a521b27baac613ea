"""Network addresses."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from asd_megatron.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine's loopback interface; of the names, only localhost is."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


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
