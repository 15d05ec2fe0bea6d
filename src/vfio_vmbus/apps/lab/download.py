"""A download over HTTP/1.1: a pseudo-random body that follows from a seed, its checksum at both ends."""

import hashlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO
from urllib.parse import urlsplit

from vfio_vmbus.apps.lab.messages import Download, HttpBody
from vfio_vmbus.errors import PeerError, RefusedError, UsageError, WaitTimeout

CHUNK = 1 << 20
IDLE_SECONDS = 30  # without progress, after which the server gives up a connection
PROGRESS_SECONDS = 0.1


def body_file(size: int, seed: int) -> tuple[BinaryIO, str]:
    """A file in memory of `size` bytes that follow from seed and size, and their SHA-256 in hex."""
    source, digest = random.Random(seed), hashlib.sha256()
    file = os.fdopen(os.memfd_create("http-body"), "w+b", buffering=0)
    for start in range(0, size, CHUNK):
        piece = source.randbytes(min(CHUNK, size - start))
        digest.update(piece)
        file.write(piece)
    return file, digest.hexdigest()


def serve_body(size: int, seed: int) -> HttpBody:
    """Serves the body at / on a port of its own, on all addresses, until this process ends."""
    file, sha256 = body_file(size, seed)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS

        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if size:
                self.connection.sendfile(file, 0, size)

        def log_message(self, *_: object) -> None:
            """Says nothing; the lab reports."""

    server = Server(("", 0), Handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return HttpBody(server.server_address[1], size, sha256)


class Server(ThreadingHTTPServer):
    """Does not report clients that went away."""

    def handle_error(self, _request: object, _address: object) -> None:
        pass


def download(url: str, timeout: float, progress: Callable[[int, int], None]) -> Download:
    """Gets the URL within `timeout` seconds; calls progress(bytes so far, bytes in all) ten times a second
    and at the end.

    Raises WaitTimeout, RefusedError for an answer other than 200, PeerError for a body that ends too early.
    """
    begun = time.perf_counter()
    connection = http.client.HTTPConnection(*_target(url), timeout=timeout)
    try:
        connection.request("GET", urlsplit(url).path or "/")
        response = connection.getresponse()
        if response.status != 200:
            raise RefusedError(f"{url}: HTTP status {response.status} {response.reason}")
        return _read(url, connection, response, begun, timeout, progress)
    except TimeoutError:
        raise WaitTimeout(f"the download of {url}", timeout) from None
    except http.client.HTTPException as error:
        raise PeerError(f"{url}: no HTTP/1.1 answer: {error!r}") from None
    finally:
        connection.close()


def _target(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 80
    except ValueError:
        pass  # a port that is no number
    raise UsageError(f"URL {url!r}: http://address:port/ is expected")


def _read(
    url: str,
    connection: http.client.HTTPConnection,
    response: http.client.HTTPResponse,
    begun: float,
    timeout: float,
    progress: Callable[[int, int], None],
) -> Download:
    total = response.length
    if total is None:
        raise PeerError(f"{url}: an answer without Content-Length")
    digest, done, shown = hashlib.sha256(), 0, begun
    while done < total:
        left = begun + timeout - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)
        piece = response.read1(CHUNK)
        if not piece:
            raise PeerError(f"{url}: the body ended after {done} of {total} bytes")
        digest.update(piece)
        done += len(piece)
        if (now := time.perf_counter()) - shown >= PROGRESS_SECONDS:
            progress(done, total)
            shown = now
    progress(done, total)
    return Download(done, digest.hexdigest(), time.perf_counter() - begun)
