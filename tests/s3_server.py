"""An S3 server on loopback (moto's), behind a proxy that makes chosen requests fail; and files over plain http.

with S3Server() as s3:
    s3.make_bucket("bucket")
    s3.fail("00001.safetensors", status=503, times=2)
    s3.cut("00001.safetensors", after=100)       # the answer breaks off
    s3.stall("00001.safetensors")                # the answer does not come
    s3.change("00001.safetensors", at=300)       # a bit of the answer is flipped
"""

import http.client
import logging
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path ends so."""

    suffix: str
    method: str
    times: int
    status: int | None = None
    cut_after: int | None = None
    stall: bool = False
    change_at: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


logging.getLogger("werkzeug").setLevel(logging.ERROR)


class Server:
    """A threading HTTP server whose handler knows it, with faults and a record of requests."""

    def __init__(self, handler):
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.most_at_once = self.at_once = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"server_state": self}))
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_address[1]}"
        self.url = f"http://{self.host}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, suffix, *, status, times=1, method="GET"):
        self.faults.append(Fault(suffix, method, times, status=status))

    def cut(self, suffix, *, after, times=1):
        self.faults.append(Fault(suffix, "GET", times, cut_after=after))

    def stall(self, suffix, *, times=1):
        self.faults.append(Fault(suffix, "GET", times, stall=True))

    def change(self, suffix, *, at, times=1):
        self.faults.append(Fault(suffix, "GET", times, change_at=at))

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and path.endswith(fault.suffix):
                    fault.times -= 1
                    return fault
        return Fault("", method, 0)

    def seen(self, method, suffix=""):
        return [r for r in self.requests if r.method == method and r.path.endswith(suffix)]


class S3Server(Server):
    def __init__(self):
        super().__init__(Proxy)
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self):
        self.moto.start()
        self.behind = "{}:{}".format(*self.moto.get_host_and_port())
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=f"http://{self.behind}", **keys)
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self.moto.stop()

    def make_bucket(self, name):
        self.client.create_bucket(Bucket=name)

    def delete_bucket(self, name):
        for entry in self.client.list_objects_v2(Bucket=name).get("Contents", []):
            self.client.delete_object(Bucket=name, Key=entry["Key"])
        self.client.delete_bucket(Bucket=name)

    def names(self, bucket):
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def get(self, bucket, key):
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def put(self, bucket, key, data):
        self.client.put_object(Bucket=bucket, Key=key, Body=data)


class Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        with state.lock:
            state.requests.append(Request(self.command, path, self.headers.get("Range")))
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            self.answer(state.fault(self.command, path))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with state.lock:
                state.at_once -= 1

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def answer(self, fault):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if fault.stall:
            self.server_state.over.wait()
            self.close_connection = True
            return
        status, headers, data = self.found(body) if fault.status is None else (fault.status, {}, b"")
        if fault.change_at is not None and len(data) > fault.change_at:
            data = data[: fault.change_at] + bytes([data[fault.change_at] ^ 1]) + data[fault.change_at + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in map(str.lower, headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if fault.cut_after is None else data[: fault.cut_after])
        if fault.cut_after is not None:
            self.wfile.flush()
            self.close_connection = True


class Proxy(Handler):
    def found(self, body):
        connection = http.client.HTTPConnection(self.server_state.behind)
        connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")}
        connection.close()
        return answer.status, kept, data


class FileServer(Server):
    """The files of a folder, with ranges unless `ranges` is False."""

    def __init__(self, folder: Path, *, ranges: bool = True):
        super().__init__(Files)
        self.folder, self.ranges = folder, ranges


class Files(Handler):
    def found(self, body):
        path = self.server_state.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or not self.server_state.ranges:
            return 200, {"Accept-Ranges": "bytes"} if self.server_state.ranges else {}, data
        start, end = int(match[1]), min(int(match[2]), len(data) - 1)
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]
