"""Google Cloud Storage on loopback (gcp-storage-emulator's), behind a proxy that makes chosen requests fail.

with GsServer() as gs:
    gs.make_bucket("bucket")
    gs.fail("00001.safetensors", status=503, times=2)
"""

import json
import logging
from urllib.parse import parse_qs, quote, urlsplit
from urllib.request import Request, urlopen

from gcp_storage_emulator.server import create_server

from faulty_server import Proxy, Server


class GsServer(Server):
    def __init__(self):
        super().__init__(GsProxy)
        self.emulator = create_server("127.0.0.1", 0, in_memory=True)
        for name in ("gcp_storage_emulator", "api"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def __enter__(self):
        self.emulator.start()
        self.behind = f"127.0.0.1:{self.emulator._api._httpd.server_address[1]}"
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self.emulator.stop()

    def make_bucket(self, name):
        self._ask("POST", "/storage/v1/b?project=p", json.dumps({"name": name}).encode(), "application/json")

    def wipe(self):
        """No buckets."""
        self.emulator.wipe()

    def names(self, bucket):
        return [entry["name"] for entry in json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o")).get("items", [])]

    def get(self, bucket, name):
        return self._ask("GET", f"/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")

    def put(self, bucket, name, data):
        query = f"uploadType=media&name={quote(name, safe='')}"
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o?{query}", data, "application/octet-stream")

    def delete(self, bucket, name):
        self._ask("DELETE", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")

    def _ask(self, method, path, data=None, kind=None):
        headers = {} if kind is None else {"Content-Type": kind}
        with urlopen(Request(f"http://{self.behind}{path}", data, headers, method=method)) as answer:
            return answer.read()


class GsProxy(Proxy):
    """An upload's path is taken to end with the name of what is uploaded."""

    @property
    def fault_path(self):
        query = parse_qs(urlsplit(self.path).query)
        return (
            f"{self.path_asked}/{query['name'][0]}"
            if "upload" in self.path_asked and "name" in query
            else self.path_asked
        )
