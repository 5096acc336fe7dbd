"""The shop's web app, with Python's own HTTP server.

GET  /         a page with the number of visits
GET  /version  which version of the app answers
GET  /health   200 while this copy can work
POST /orders   puts an order into the worker's queue
GET  /orders   how many orders were placed and done
"""

import hashlib
import html
import hmac
import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import resp

VERSION = os.environ.get("SHOP_VERSION", "1")
NAME = os.environ.get("SHOP_NAME", "A shop")
LONGEST_ORDER = 64 * 1024


def cashier_key():
    with open("/run/secrets/cashier", "rb") as file:
        return file.read().strip()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is written at once, so there is nothing to wait for.
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.path == "/":
            visits = resp.ask("INCR", "visits")
            page = f"<!doctype html><title>{html.escape(NAME)}</title>"
            page += f"<h1>{html.escape(NAME)}</h1><p>Visit number {visits}.\n"
            self.answer(200, page, "text/html; charset=utf-8")
        elif self.path == "/version":
            self.answer_json({"app": "shop", "version": VERSION})
        elif self.path == "/health":
            self.answer_json({"ok": True})
        elif self.path == "/orders":
            placed, done = resp.ask("MGET", "orders:placed", "orders:done")
            self.answer_json({"placed": int(placed or 0), "done": int(done or 0)})
        else:
            self.answer(404, "There is no such page.\n")

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if length > LONGEST_ORDER:
            self.close_connection = True
            return self.answer(413, "That is too much for one order.\n")
        order = self.rfile.read(length)
        if self.path != "/orders":
            return self.answer(404, "There is no such page.\n")
        # Signed, so that the receipt can be checked at the counter.
        receipt = hmac.new(cashier_key(), order, hashlib.sha256).hexdigest()
        resp.ask("LPUSH", "orders", order.decode(errors="replace"))
        resp.ask("INCR", "orders:placed")
        self.answer_json({"receipt": receipt}, status=201)

    def answer_json(self, value, status=200):
        self.answer(status, json.dumps(value) + "\n", "application/json")

    def answer(self, status, text, kind="text/plain; charset=utf-8"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # Which copy answered.
        self.send_header("X-Instance", socket.gethostname())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass  # the front sees every request already


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main():
    server = Server(("0.0.0.0", 8000), Handler)

    def stop(*_):
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    print(f"shop {VERSION} listens on 8000", flush=True)
    server.serve_forever()
    sys.exit(0)


main()
