"""Check where the page can be served."""

from __future__ import annotations

import errno
import socket


def check_address(host: str, port: int) -> None:
    """Raise a ValueError that names the option, for a port or host where nothing can be served."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be in 1..65535, got {port}")
    name = host.strip("[]")
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((name, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use; choose another --port") from error
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} needs special rights; choose another --port") from error
        raise ValueError(f"cannot serve at --host {host}: {error.strerror}") from error
