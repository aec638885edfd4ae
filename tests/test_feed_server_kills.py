"""Feed servers and trainers in processes of their own: killed at many moments, started again, and ended properly."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from mistudio.store import FeedOptions, Store, wire
from mistudio.store.served import ServedStore
from test_feed_server import LASTING, free_address, taken
from test_store import A, make

KILLS = 50
FORKING = """
import os, sys
from mistudio.store.serve import FeedServer, ServeOptions, open_slice
how = ServeOptions(bind=sys.argv[2])
store = open_slice(sys.argv[1], how)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        server = FeedServer(store, how)
        print(os.getpid(), flush=True)
        server.run()
    os.waitpid(child, 0)
"""
"""A process that starts a server, in a process of its own, for every line it reads."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make(tmp_path_factory.mktemp("served") / "s", rows=200, bucket_rows=30)


def test_a_server_killed_at_fifty_moments_loses_and_repeats_no_row(store):
    address, draw = free_address(), random.Random(0)
    command = [sys.executable, "-c", FORKING, str(store.path), address]
    served, expected = None, store.feed(A, 11, seed=4)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as forking:
        try:
            for _ in range(KILLS):
                print("start", file=forking.stdin, flush=True)
                server = int(forking.stdout.readline())
                if served is None:
                    how = FeedOptions(prefetch=0)
                    served = ServedStore.connect(address, patience=LASTING).feed(A, 11, seed=4, how=how)
                count = draw.randrange(3 * wire.CREDIT)  # up to three times as many as may have come already
                for _ in range(count):
                    assert torch.equal(next(served), next(expected))
                os.kill(server, signal.SIGKILL)
        finally:
            os.killpg(forking.pid, signal.SIGKILL)
        assert served.state() == expected.state()
        assert served.position.epoch >= 10


def test_a_server_of_the_command_line_says_where_it_is_serves_and_ends_when_asked(store):
    command = [sys.executable, "-m", "mistudio.cli", "feed", "serve", str(store.path), "--bind", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        said = server.stderr.readline()
        assert f"serving buckets 0 to 6 of {store.path} at tcp://127.0.0.1:" in said
        address = said.split(" at ")[1].split(";")[0]
        served = ServedStore.connect(address, patience=LASTING).feed(A, 50, seed=1)
        assert torch.equal(taken(served, 9), taken(store.feed(A, 50, seed=1), 9))
        server.send_signal(signal.SIGTERM)  # Ctrl-C is ignored by processes that a shell put into the background
        out, err = server.communicate()
    assert server.returncode == 0
    assert "GB of rows were sent" in out
    assert "Traceback" not in err


def test_a_trainer_that_ends_while_rows_are_under_way_ends_cleanly(store):
    code = (
        "from mistudio.store import Store\n"
        "from mistudio.store.serve import ServeOptions, serving\n"
        "from mistudio.store.served import ServedStore\n"
        f"with serving(Store.open({str(store.path)!r}), ServeOptions(bind='tcp://127.0.0.1:0')) as server:\n"
        f"    feed = ServedStore.connect(server.address).feed({A!r}, 150, seed=1)\n"
        "    next(feed)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
