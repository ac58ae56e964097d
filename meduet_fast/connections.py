"""Look at the file descriptors of this process: find and close its network connections."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def descriptors() -> list[int]:
    """List this process's open file descriptors."""
    return [int(item.name) for item in Path("/dev/fd").iterdir()]


def connections() -> Iterator[tuple[int, socket.socket]]:
    """Yield each TCP connection's descriptor, and a socket of it that is closed afterwards."""
    for descriptor in descriptors():
        with suppress(OSError):  # the listing's own, closed since
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        yield descriptor, connection


def close_inherited() -> None:
    """Close the parent's connections in a forked process.

    As long as anybody has them open, those at the other end do not learn that the parent was killed.
    """
    for descriptor, _ in connections():
        os.close(descriptor)


def hang_up(spared_port: int) -> None:
    """End all connections but those to or from a port; whoever is at the other end learns of it at once."""
    for _, connection in connections():
        with suppress(OSError):  # a socket that listens is not connected
            if spared_port not in (connection.getpeername()[1], connection.getsockname()[1]):
                connection.shutdown(socket.SHUT_RDWR)
