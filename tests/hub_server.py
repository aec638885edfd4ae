"""A stand-in for the Hugging Face hub on loopback: the endpoints that huggingface_hub 2.4 uses to look at a repository,
to download from it and to commit to it.

Files of `large` bytes and more are kept as the hub keeps LFS files: `resolve` answers with a redirect to another origin
(here http://localhost instead of http://127.0.0.1), which wants no token and gets none, and their bytes come before the
commit that names them. Xet is not spoken: clients that write must have HF_HUB_DISABLE_XET. A repository is called
"user/name", or "datasets/user/name".

    with HubServer() as hub:
        commit = hub.add("google/some-repo", {"a/params.npz": data})
        hub.cut("params.npz", after=1000)            # the next GET breaks off
        hub.fail("params.npz", status=429, headers={"Retry-After": "7"})
"""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import HfFileSystem, constants

from faulty_server import Handler, Server

ERROR_CODES = {"gated": (403, "GatedRepo"), "repo": (404, "RepoNotFound"), "revision": (404, "RevisionNotFound")}
ERROR_CODES |= {"entry": (404, "EntryNotFound")}
REPO, API_REPO = r"((?:datasets/)?[^/]+/[^/]+)", r"((?:models|datasets)/[^/]+/[^/]+)"


class HubServer(Server):
    def __init__(self, *, large=1000):
        super().__init__(Hub)
        self.large = large
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.token: str | None = None
        self.public = False
        """Whether reading needs no token."""
        self.sent: dict[str, bytes] = {}
        """Large files that no commit names yet, by their SHA-256."""
        self.ranges = True

    def add(self, repo, files, *, branch="main"):
        """A new commit with exactly these files, which the branch now points at; its id."""
        commits = self.commits.setdefault(repo, {})
        content = "".join(f"{path}{hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo}{len(commits)}{content}".encode()).hexdigest()
        commits[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def files(self, repo):
        """The files on its main branch."""
        return self.commits[repo][self.refs[repo]["main"]]

    def make_bucket(self, repo):
        self.add(repo, {})

    def wipe(self):
        self.commits.clear()
        self.refs.clear()
        self.sent.clear()

    def names(self, repo):
        return sorted(self.files(repo))

    def get(self, repo, name):
        return self.files(repo)[name]

    def put(self, repo, name, data):
        self.add(repo, self.files(repo) | {name: data})

    def delete(self, repo, name):
        self.add(repo, {path: data for path, data in self.files(repo).items() if path != name})

    def attach(self, monkeypatch):
        """huggingface_hub asks this hub, without Xet and without pauses."""
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        HfFileSystem.clear_instance_cache()


class AnswerError(Exception):
    """(status, headers) of an answer that is not what was asked for."""


def error(kind, headers=None):
    status, code = ERROR_CODES[kind]
    return AnswerError(status, {"X-Error-Code": code, "X-Error-Message": f"{kind} error"} | (headers or {}))


class Hub(Handler):
    def found(self, body):
        routes = {
            ("GET", r"/cdn/([0-9a-f]{64})/(.+)"): self.cdn,
            ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)"): self.resolve,
            ("GET", rf"/api/{API_REPO}(?:/revision/([^/]+))?"): self.info,
            ("GET", rf"/api/{API_REPO}/tree/([^/]+)(?:/(.+))?"): self.tree,
            ("POST", rf"/api/{API_REPO}/paths-info/([^/]+)"): self.paths_info,
            ("POST", rf"/api/{API_REPO}/preupload/([^/]+)"): self.preupload,
            ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"): self.lfs_batch,
            ("PUT", r"/lfs/([0-9a-f]{64})"): self.lfs_upload,
            ("POST", rf"/api/{API_REPO}/commit/([^/]+)"): self.new_commit,
        }
        self.body = body
        for (method, pattern), answer in routes.items():
            match = re.fullmatch(pattern, self.path_asked)
            if match and method == self.command.replace("HEAD", "GET"):
                try:
                    return answer(*match.groups())
                except AnswerError as failure:
                    return *failure.args, b""
        return 404, {}, b""

    @property
    def hub(self):
        return self.server_state

    def commit(self, repo, revision, *, writing=False):
        """The commit and its files."""
        allowed = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not allowed and (writing or not self.hub.public):
            raise AnswerError(401, {})
        repo = repo.removeprefix("models/")
        if repo not in self.hub.commits:
            raise error("repo")
        if repo in self.hub.gated:
            raise error("gated")
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            raise error("revision")
        return commit, self.hub.commits[repo][commit]

    # ---- reading

    def resolve(self, repo, revision, filename):
        commit, files = self.commit(repo, revision)
        if filename not in files:
            raise error("entry", {"X-Repo-Commit": commit})
        data = files[filename]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"', "Accept-Ranges": "bytes"}
        if len(data) < self.hub.large:
            return self.bytes_of(data, headers)
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}/{filename}"}
        return 302, headers, b""

    def cdn(self, sha256, filename):
        for commits in self.hub.commits.values():
            for files in commits.values():
                data = files.get(filename)
                if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return self.bytes_of(data, {"ETag": f'"{sha256}"'})
        return 404, {}, b""

    def bytes_of(self, data, headers):
        return self.part(data, headers) if self.hub.ranges else (200, headers, data)

    def info(self, repo, revision):
        commit, files = self.commit(repo, revision or "main")
        name = repo.partition("/")[2]
        info = {"_id": "0" * 24, "id": name, "modelId": name, "sha": commit, "private": False, "gated": False}
        info |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in sorted(files)]}
        return as_json(info)

    def tree(self, repo, revision, folder):
        _, files = self.commit(repo, revision)
        start = f"{folder}/" if folder else ""
        inside = [name for name in sorted(files) if name.startswith(start)]
        if folder and not inside:
            raise error("entry")
        if parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]:
            return as_json([self.entry(name, files[name]) for name in inside])
        below = {start + name[len(start) :].split("/")[0] for name in inside}
        return as_json([self.entry(name, files.get(name)) for name in sorted(below)])

    def paths_info(self, repo, revision):
        _, files = self.commit(repo, revision)
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        return as_json([self.entry(path, files[path]) for path in paths if path in files])

    def entry(self, path, data):
        if data is None:
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        found = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found | ({"lfs": lfs} if len(data) >= self.hub.large else {})

    # ---- writing

    def preupload(self, repo, revision):
        self.commit(repo, revision, writing=True)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["size"] >= self.hub.large else "regular" for file in files}
        return as_json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    def lfs_batch(self, repo):
        wanted = json.loads(self.body)
        self.commit(repo, wanted["ref"]["name"], writing=True)
        for file in wanted["objects"]:
            if file["oid"] not in self.hub.sent:
                file["actions"] = {"upload": {"href": f"http://localhost:{self.hub.port}/lfs/{file['oid']}"}}
        return as_json({"transfer": "basic", "objects": wanted["objects"]})

    def lfs_upload(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return 400, {}, b"another content"
        self.hub.sent[sha256] = self.body
        return 200, {}, b""

    def new_commit(self, repo, revision):
        _, files = self.commit(repo, revision, writing=True)
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.sent[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(repo.removeprefix("models/"), files, branch=revision)
        return as_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})


def as_json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def git_hash(data):
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
