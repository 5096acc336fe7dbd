"""Takes orders from the queue, one after the other."""

import signal
import sys
import time

import resp


def work():
    with resp.Redis(timeout=10) as redis:
        while True:
            # Returns after a second without an order, too.
            order = redis.ask("BRPOP", "orders", 1)
            if order is not None:
                redis.ask("INCR", "orders:done")
                print(f"done: {order[1]}", flush=True)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        try:
            work()
        except OSError as error:
            print(f"redis does not answer ({error}), trying again", flush=True)
            time.sleep(0.5)


main()
