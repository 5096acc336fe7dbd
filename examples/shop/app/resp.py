"""The little of Redis' protocol (RESP) that the shop needs."""

import os
import socket
import time


class Redis:
    """One connection. Usable by one thread at a time."""

    def __init__(self, timeout=5):
        host = os.environ.get("REDIS_HOST", "redis")
        port = int(os.environ.get("REDIS_PORT", "6379"))
        self.socket = socket.create_connection((host, port), timeout)
        self.answers = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answers.close()
        self.socket.close()

    def ask(self, *words):
        parts = [str(word).encode() for word in words]
        text = b"*%d\r\n" % len(parts)
        text += b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self.socket.sendall(text)
        return self._answer()

    def _answer(self):
        line = self.answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("redis went away")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"-":
            raise RuntimeError(rest.decode())
        count = int(rest)
        if count < 0:
            return None
        if kind == b"$":
            return self.answers.read(count + 2)[:-2].decode()
        return [self._answer() for _ in range(count)]


def ask(*words, tries=20):
    """One question on a connection of its own. Waits a little for a Redis that is just
    being replaced; asks again only where the question has not been sent yet."""
    for attempt in range(tries):
        try:
            connection = Redis()
        except OSError:
            if attempt + 1 == tries:
                raise
            time.sleep(0.1)
            continue
        with connection:
            return connection.ask(*words)
