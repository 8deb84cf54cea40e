"""A hub on this machine: what huggingface_hub asks of one over HTTP, kept in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlparse


@contextmanager
def fake_hub():
    """Yields ``url``, ``repos`` (name -> {file: bytes}), ``private`` (names), ``refuse`` (status of replies)."""
    hub = SimpleNamespace(url="", repos={}, private=set(), refuse=None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: SimpleNamespace

    def log_message(self, *args):
        pass

    def reply(self, content, status=200, headers=None, with_body=True):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def commit_of(self, repo):
        names = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.hub.repos[repo].items())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlparse(self.path).path.strip("/").split("/")
        if self.hub.refuse:
            return self.reply({"error": "refused"}, self.hub.refuse)
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repos:
                return self.reply(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
                )
            self.hub.repos[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            return self.reply({"url": f"{self.hub.url}/{name}"})
        if parts[1] == "validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        repo, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        assert what == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del self.hub.repos[repo][line["value"]["path"]]
        return self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": self.commit_of(repo)})

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body=True):
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            repo = "/".join(parts[2:4])
            if repo not in self.hub.repos:
                return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}, with_body)
            if parts[4:5] == ["tree"]:
                tree = [
                    {"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in self.hub.repos[repo].items()
                ]
                return self.reply(tree, with_body=with_body)
            siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
            about = {"id": repo, "modelId": repo, "sha": self.commit_of(repo), "siblings": siblings}
            about["private"] = repo in self.hub.private
            return self.reply(about | {"tags": [], "downloads": 0, "likes": 0}, with_body=with_body)
        repo, file = "/".join(parts[:2]), "/".join(parts[4:])
        if repo not in self.hub.repos or file not in self.hub.repos[repo]:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}, with_body)
        data = self.hub.repos[repo][file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit_of(repo)}
        return self.reply(data, 200, headers, with_body)
