"""HTTP servers on loopback whose requests can be made to go wrong: what the stand-ins for S3, Google Cloud Storage and
the Hugging Face hub share, and files over plain http.

server.fail("00001.safetensors", status=503, times=2)
server.cut("00001.safetensors", after=100)       # the answer announces all its bytes, and breaks off
server.shorten("00001.safetensors", by=100)      # the answer announces fewer bytes, and sends those
server.stall("00001.safetensors")                # the answer does not come
server.change("00001.safetensors", at=300)       # a bit of the answer is flipped
"""

import http.client
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path ends so."""

    suffix: str
    method: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    short_by: int = 0
    stall: bool = False
    change_at: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""

    @property
    def range(self):
        return self.headers.get("range")


class Server:
    """A threading HTTP server whose handler knows it as `server_state`, with faults and a record of requests."""

    def __init__(self, handler):
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.most_at_once = self.at_once = 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"server_state": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, suffix, *, status, times=1, method="GET", headers=None, body=b""):
        self.faults.append(Fault(suffix, method, times, status=status, headers=headers or {}, body=body))

    def cut(self, suffix, *, after, times=1):
        self.faults.append(Fault(suffix, "GET", times, cut_after=after))

    def shorten(self, suffix, *, by, times=1):
        self.faults.append(Fault(suffix, "GET", times, short_by=by))

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

    def seen(self, method, part=""):
        """The requests of a method whose path contains `part`."""
        return [r for r in self.requests if r.method == method and part in r.path]

    def forget(self):
        """No faults and no record of requests, as at the start."""
        self.faults.clear()
        self.requests.clear()


class Handler(BaseHTTPRequestHandler):
    """Answers with `found(body)`: (status, headers, bytes) for `self.command` and `self.path_asked`."""

    server_state: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a header waits 40 ms for its body

    def log_message(self, *_):
        pass

    def do_GET(self):
        state, self.path_asked = self.server_state, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        with state.lock:
            state.requests.append(Request(self.command, self.path_asked, headers))
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            self.answer(state.fault(self.command, self.fault_path))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with state.lock:
                state.at_once -= 1

    @property
    def fault_path(self):
        """What `Fault.suffix` is the end of."""
        return self.path_asked

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def answer(self, fault):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault.stall:
            self.server_state.over.wait()
            self.close_connection = True
            return
        if fault.status is not None:
            self.send(fault.status, fault.headers, fault.body)
            return
        status, headers, data = self.found(body)
        if status == 302:  # the fault is meant for the bytes, which come from elsewhere
            fault.times += 1
            self.send(status, headers, data)
            return
        if fault.change_at is not None and len(data) > fault.change_at:
            data = data[: fault.change_at] + bytes([data[fault.change_at] ^ 1]) + data[fault.change_at + 1 :]
        if fault.short_by:
            data = data[: -fault.short_by]
            headers = {name: value for name, value in headers.items() if name != "Content-Range"}
        self.send(status, headers, data, fault.cut_after)

    def send(self, status, headers, data, cut_after=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in map(str.lower, headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def part(self, data, headers):
        """The answer that holds the bytes of `data` that the request's Range asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, headers, data
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        if start == 0 and not match[2]:
            return 200, headers, data
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]


class Proxy(Handler):
    """Passes requests on to the server at `server_state.behind` (host:port), and its answers back."""

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
        path = self.server_state.folder / self.path_asked.lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        if not self.server_state.ranges:
            return 200, {}, path.read_bytes()
        return self.part(path.read_bytes(), {"Accept-Ranges": "bytes"})
