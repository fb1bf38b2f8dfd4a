"""The guard of conftest.py: without it, a test that needs the network would pass on one machine and fail on another."""

import socket

import pytest


@pytest.mark.parametrize("host", ["192.0.2.1", "huggingface.co"])  # 192.0.2.0/24 is kept for documentation
def test_a_connection_that_leaves_the_machine_is_refused(host: str):
    with pytest.raises(RuntimeError, match="stay on loopback"):
        socket.create_connection((host, 443), timeout=1)


def test_an_address_is_refused_without_a_look_up():
    with socket.socket() as client, pytest.raises(RuntimeError, match="stay on loopback"):
        client.connect_ex(("192.0.2.1", 443))


def test_loopback_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            client.sendall(b"x")
            assert connection.recv(1) == b"x"
