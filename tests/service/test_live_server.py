"""The tests' own server on a socket."""

import gc
import select
import socket

import pytest

from tests.service.harness import ServiceHarness
from tests.service.live_server import DEADLINE, served


@pytest.mark.long
def test_a_client_that_reads_nothing_leaves_no_open_connection(rig: ServiceHarness) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with served(rig) as address:
            client.connect(address)
            request = f"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n\r\n"
            client.sendall(request.encode())
            assert select.select([client], [], [], DEADLINE)[0]  # the answer, larger than all buffers, has begun
        gc.collect()  # an open transport would raise its ResourceWarning here, which fails the test
