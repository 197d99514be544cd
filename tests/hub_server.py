"""A small Hugging Face Hub on the loopback address: the routes that ``huggingface_hub`` uses to download and upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, and how it misbehaves."""

    url: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by repository and file."""
    private: dict[str, bool] = field(default_factory=dict)
    """Of repositories that were made."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by checksum, committed or not."""
    error: Optional[tuple[int, str]] = None
    """Status and X-Error-Code of every answer."""
    spoilt: bool = False
    """Whether what is sent has the right length and a wrong last byte."""
    cut: bool = False
    """Whether what is sent breaks off after half of it."""
    requests: list[str] = field(default_factory=list)
    """Methods and paths, in order."""


@contextmanager
def serve() -> Iterator[Hub]:
    """Serves until the block is done."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: Optional[dict[str, str]] = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if hub.error is not None:
                return self.answer(hub.error[0], headers={"X-Error-Code": hub.error[1], "X-Error-Message": "no"})
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.answer_about("/".join(parts[2:4]))
            repository = hub.files.get("/".join(parts[:2]))
            if repository is None or parts[2:3] != ["resolve"]:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            if parts[3] not in ("main", "v1", COMMIT):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            content = repository.get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if hub.spoilt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if hub.cut and self.command == "GET":
                headers["Content-Length"] = str(len(content))
                content = content[: len(content) // 2]
                self.close_connection = True
            self.answer(200, content, headers)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            if hub.error is not None:
                return self.answer(hub.error[0], headers={"X-Error-Code": hub.error[1], "X-Error-Message": "no"})
            path, answer = self.path.split("?")[0], {}
            if path == "/api/repos/create":
                about = json.loads(body)
                name = f"{about['organization']}/{about['name']}"
                hub.private[name] = about.get("private") or about.get("visibility") == "private"
                hub.files.setdefault(name, {})
                answer = {"url": f"{hub.url}/{name}", "id": name, "name": name}
            elif "/preupload/" in path:
                modes = {True: "lfs", False: "regular"}
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": modes[name.endswith(".safetensors")],
                                     "shouldIgnore": False} for name in names]}  # fmt: skip
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [{**x, "actions": {"upload": {"href": f"{hub.url}/objects/{x['oid']}"}}}
                           for x in json.loads(body)["objects"]]  # fmt: skip
                answer = {"transfer": "basic", "objects": objects}
            elif "/commit/" in path:
                repository = "/".join(path.split("/")[3:5])
                for line in map(json.loads, body.decode().splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                    if line["key"] == "lfsFile":
                        hub.files[repository][value["path"]] = hub.objects[value["oid"]]
                answer = {"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def do_PUT(self) -> None:
            hub.objects[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200)

        def answer_about(self, name: str) -> None:
            if name not in hub.files:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file} for file in hub.files[name]]
            about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
