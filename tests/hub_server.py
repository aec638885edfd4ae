"""A stand-in for the Hugging Face hub on loopback: the endpoints that huggingface_hub 2.4 uses to look at a model
repository and to download from it, and the ways in which they go wrong.

Files of `large` bytes and more are served as the hub serves LFS files: `resolve` answers with a redirect to another
origin (here http://localhost instead of http://127.0.0.1), which wants no token and gets none. Xet is not spoken.

    with HubServer() as hub:
        commit = hub.add("google/some-repo", {"a/params.npz": data})
        hub.cut("params.npz", after=1000)            # the next GET breaks off
        hub.fail("params.npz", status=429, headers={"Retry-After": "7"})
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ERROR_CODES = {"gated": (403, "GatedRepo"), "repo": (404, "RepoNotFound"), "revision": (404, "RevisionNotFound")}
ERROR_CODES |= {"entry": (404, "EntryNotFound")}


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path ends so."""

    suffix: str
    method: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    short_by: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


class HubServer:
    def __init__(self, *, large=1000):
        self.large = large
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.token: str | None = None
        self.ranges = True
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def add(self, repo, files, *, branch="main"):
        """A new commit with exactly these files, which the branch now points at; its id."""
        commits = self.commits.setdefault(repo, {})
        content = "".join(f"{path}{hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo}{len(commits)}{content}".encode()).hexdigest()
        commits[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def fail(self, suffix, *, status, times=1, method="GET", headers=None):
        self.faults.append(Fault(suffix, method, times, status=status, headers=headers or {}))

    def cut(self, suffix, *, after, times=1):
        """GET announces all bytes, sends some, and closes the connection."""
        self.faults.append(Fault(suffix, "GET", times, cut_after=after))

    def shorten(self, suffix, *, by, times=1):
        """GET announces fewer bytes than HEAD did, and sends those."""
        self.faults.append(Fault(suffix, "GET", times, short_by=by))

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


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            return self.cdn(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(path, *match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.model(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self.tree(match[1], match[2], match[3] or "")
        return self.send(404)

    def commit(self, repo, revision):
        """The commit and its files; None after an error was answered."""
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(401)
        if repo not in self.hub.commits:
            return self.error("repo")
        if repo in self.hub.gated:
            return self.error("gated")
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            return self.error("revision")
        return commit, self.hub.commits[repo][commit]

    def resolve(self, path, repo, revision, filename):
        if (fault := self.hub.fault(self.command, path)).status:
            return self.send(fault.status, headers=fault.headers)
        if (found := self.commit(repo, revision)) is None:
            return None
        commit, files = found
        if filename not in files:
            return self.error("entry", {"X-Repo-Commit": commit})
        data = files[filename]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        if len(data) < self.hub.large:
            return self.send_file(data, headers, fault)
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}/{filename}"}
        if fault.cut_after is not None or fault.short_by:
            fault.times += 1  # it is meant for the bytes, which come from the other origin
        return self.send(302, headers=headers)

    def cdn(self, sha256, filename):
        fault = self.hub.fault(self.command, filename)
        if fault.status:
            return self.send(fault.status, headers=fault.headers)
        for commits in self.hub.commits.values():
            for files in commits.values():
                data = files.get(filename)
                if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return self.send_file(data, {"ETag": f'"{sha256}"'}, fault)
        return self.send(404)

    def model(self, repo, revision):
        if (found := self.commit(repo, revision)) is None:
            return None
        commit, files = found
        info = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit, "private": False, "gated": False}
        info |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in sorted(files)]}
        return self.send_json(info)

    def tree(self, repo, revision, folder):
        if (found := self.commit(repo, revision)) is None:
            return None
        inside = {name: data for name, data in found[1].items() if not folder or name.startswith(f"{folder}/")}
        listing = []
        for name, data in sorted(inside.items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if len(data) >= self.hub.large:
                lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                entry |= {"lfs": lfs}
            listing.append(entry)
        return self.send_json(listing)

    def send_file(self, data, headers, fault):
        first = 0
        if self.hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            first = int(match[1])
            if first >= len(data):
                return self.send(416, headers={"Content-Range": f"bytes */{len(data)}"})
            headers = headers | {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        body = data[first : len(data) - fault.short_by]
        if fault.short_by:
            headers.pop("Content-Range", None)
        return self.send(206 if first else 200, body, headers, cut_after=fault.cut_after)

    def send_json(self, value):
        return self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, kind, headers=None):
        status, code = ERROR_CODES[kind]
        return self.send(status, headers={"X-Error-Code": code, "X-Error-Message": f"{kind} error"} | (headers or {}))

    def send(self, status, body=b"", headers=None, cut_after=None):
        """Answers; returns None."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True


def git_hash(data):
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
