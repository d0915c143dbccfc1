"""A hub on the loopback: as much of Hugging Face's API as its library needs to fetch models and data sets."""

import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repositories in a folder, ``models/owner/name`` and ``datasets/owner/name``, and what was asked of them."""

    def __init__(self, root: Path):
        self.root, self.asked, self.gated = root, [], set()
        self.cut_after: dict[str, int] = {}
        """File names, and after how many bytes the connection ends, once."""

    def files(self, kind, repository):
        folder = self.root / kind / repository
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def commit(self, kind, repository):
        return hashlib.sha1(repr([(n, p.read_bytes()) for n, p in self.files(kind, repository).items()]).encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def reply(self, status, body=b"", headers=None, *, cut=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.*)?)?", path)
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        kind, repository = (found[1] or "models", found[2]) if found else ("models", "nobody/nothing")
        files = hub.files(kind, repository)
        if not files:
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        commit = hub.commit(kind, repository).hexdigest()
        revision = (api[4] if api else file[3] if file else "") or "main"
        if revision not in ("main", commit):
            return self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        if api:
            if api[3] == "tree":
                return self.json(self.tree(files, (api[5] or "").strip("/"), "recursive=true" in self.path.lower()))
            siblings = [{"rfilename": n, "size": p.stat().st_size} for n, p in files.items()]
            of_all = {"id": repository, "sha": commit, "private": False, "gated": False, "tags": [], "downloads": 0}
            return self.json(of_all | {"siblings": siblings, "likes": 0, "disabled": False})
        if repository in hub.gated and "Authorization" not in self.headers:
            return self.reply(403, headers={"X-Error-Code": "GatedRepo"})
        name = file[4] if file else ""
        if name not in files:
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self.send_file(files[name], name, commit)

    def tree(self, files, folder, recursive):
        """The entries of a folder."""
        inside = {n: p for n, p in files.items() if not folder or n.startswith(f"{folder}/")}
        depth = folder.count("/") + 2 if folder else 1
        folders = {"/".join(n.split("/")[:depth]) for n in inside if n.count("/") >= depth}
        oid = lambda name: hashlib.sha1(name.encode()).hexdigest()
        return [
            *({"type": "directory", "path": name, "size": 0, "oid": oid(name)} for name in sorted(folders)),
            *(
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(n)}
                for n, p in inside.items()
                if recursive or n.count("/") < depth
            ),
        ]

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, path, name, commit):
        body = path.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status, start = (206, int(begin[1])) if begin else (200, 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = self.hub.cut_after.pop(name, None) if self.command == "GET" else None
        self.reply(status, body[start:], headers, cut=cut)


@contextlib.contextmanager
def serving(root):
    """Yields the hub that serves a folder, and its address."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
