"""Who is missing when the processes of a run come together.

JAX ends every process that waited in vain with a stack of C++ and no name. So the processes meet before: all tell the
first one that they are there, and it tells all of them who is not.
"""

import json
import socket
import time
from collections.abc import Sequence

_RETRY = 0.2  # seconds between attempts to reach the first process
_LATE = 10.0  # seconds that the others wait longer than the first one, for its answer


class HostMissing(ValueError):
    """Processes of the run did not come within the time.

    Attributes:
        missing: their numbers.
    """

    def __init__(self, missing: Sequence[int], count: int, seconds: float, names: Sequence[str], detail: str = ""):
        self.missing = tuple(missing)
        told = ", ".join(f"{index} ({names[index]})" if index < len(names) else str(index) for index in self.missing)
        super().__init__(
            f"process{'es' * (len(self.missing) > 1)} {told} of {count} did not join within {seconds:g} seconds"
            f"{detail}: look at the log there, and whether the first process can be reached from there"
        )


def call_roll(
    address: str,
    process: int,
    count: int,
    *,
    seconds: float = 300.0,
    names: Sequence[str] = (),
) -> None:
    """Returns when all processes of a run have called it.

    The first process listens on the port that JAX listens on afterwards.

    Args:
        address: HOST:PORT of the first process.
        process: number of this one.
        count: of processes.
        seconds: to wait for the others.
        names: of the hosts, by process; may be empty.

    Raises:
        HostMissing: some did not come; the same in every process that did.
    """
    host, _, port = address.rpartition(":")
    if process == 0:
        _listen(int(port), count, seconds, names)
    else:
        _report(host.strip("[]"), int(port), process, count, seconds, names)


def _listen(port: int, count: int, seconds: float, names: Sequence[str]) -> None:
    end = time.monotonic() + seconds
    present: dict[int, socket.socket] = {}
    with _server(port) as server:
        while len(present) < count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                number = int(connection.recv(32).split()[1])  # b"medglip 3\n"
            except (OSError, ValueError, IndexError):  # nobody came in time, or it was somebody else
                continue
            if 0 < number < count:
                present[number] = connection
        missing = sorted(set(range(1, count)) - present.keys())
        for connection in present.values():
            with connection:
                try:
                    connection.sendall(json.dumps(missing).encode() + b"\n")
                except OSError:
                    continue  # it has gone; JAX notices
    if missing:
        raise HostMissing(missing, count, seconds, names)


def _server(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    except OSError:  # a machine without IPv6
        return socket.create_server(("", port), backlog=4096)


def _report(host: str, port: int, process: int, count: int, seconds: float, names: Sequence[str]) -> None:
    end = time.monotonic() + seconds
    answer, error = b"", OSError("no answer")
    while not answer.endswith(b"\n"):
        if time.monotonic() >= end:
            raise HostMissing([0], count, seconds, names or [host], f" (nothing at {host}:{port}: {error})") from error
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(b"medglip %d\n" % process)
                connection.settimeout(max(0.1, end + _LATE - time.monotonic()))
                with connection.makefile("rb") as lines:
                    answer = lines.readline()
        except OSError as caught:
            error = caught
        if not answer.endswith(b"\n"):
            time.sleep(_RETRY)
    if missing := json.loads(answer):
        raise HostMissing(missing, count, seconds, names)
