"""Processes that come together, and the names of those that do not."""

import socket
import threading
import time

import pytest

from medglip_jax.parallel.roll_call import HostMissing, call_roll


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def meet(port, processes, count, seconds=20.0, names=(), delay=0.0):
    """What each process gets: None, or the error."""
    results = {}

    def call(process):
        time.sleep(delay if process == 0 else 0)
        try:
            results[process] = call_roll(f"localhost:{port}", process, count, seconds=seconds, names=names)
        except HostMissing as error:
            results[process] = error

    threads = [threading.Thread(target=call, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("delay", [0.0, 0.5])  # of the first process, which the others try to reach meanwhile
def test_all_go_on_when_all_have_come(port, delay):
    assert meet(port, range(5), 5, delay=delay) == dict.fromkeys(range(5))


def test_missing_processes_are_named_everywhere(port):
    names = [f"node{index}" for index in range(5)]
    results = meet(port, (0, 2, 3), 5, seconds=1.5, names=names)
    assert sorted(results) == [0, 2, 3]
    for error in results.values():
        assert error.missing == (1, 4)
        assert "processes 1 (node1), 4 (node4) of 5 did not join within 1.5 seconds" in str(error)


def test_missing_first_process_is_named(port):
    (error,) = meet(port, (1,), 2, seconds=0.5).values()
    assert error.missing == (0,)
    assert f"process 0 (localhost) of 2 did not join within 0.5 seconds (nothing at localhost:{port}: " in str(error)


def test_strangers_do_not_count(port):
    def knock():
        for _ in range(50):
            try:
                with socket.create_connection(("localhost", port), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\n")
                    return
            except OSError:
                time.sleep(0.05)

    stranger = threading.Thread(target=knock)
    stranger.start()
    results = meet(port, (0, 1), 3, seconds=2.0)
    stranger.join()
    assert all(error.missing == (2,) for error in results.values())
