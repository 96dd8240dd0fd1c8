"""A fake server of the Hugging Face Hub for the real `huggingface_hub` client: repositories, branches,
commits, LFS uploads and downloads, all in memory; and failures at any stage.

The Xet protocol is not implemented; set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34  # not a real token
STAGES = {  # the first that a request fits
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "branch": r"POST /api/models/[^/]+/[^/]+/branch/",
    "preupload": r"POST /api/models/[^/]+/[^/]+/preupload/",
    "batch": r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
    "upload": r"PUT /lfs/",
    "commit": r"POST /api/models/[^/]+/[^/]+/commit/",
    "download": r"(GET|HEAD) /[^/]+/[^/]+/resolve/",
    "info": r"GET /api/",
}


class Hub:
    """The state of the server. `repos[name]["branches"][branch]` maps a path to its bytes.

    `failures[stage]` lists what happens to the next requests of a stage: an HTTP status, or "drop" to close the
    connection.
    """

    def __init__(self):
        self.repos, self.objects, self.failures, self.requests = {}, {}, {}, []
        self.slowly = 0.0  # seconds that an upload takes

    def files(self, name, branch="main"):
        return self.repos[name]["branches"][branch]


class Handler(BaseHTTPRequestHandler):
    """Answers requests with bytes or JSON, and prints nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _HubHandler(Handler):
    hub = None

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        line = f"{self.command} {path}"
        stage = next((name for name, pattern in STAGES.items() if re.match(pattern, line)), "other")
        self.hub.requests.append((stage, line))
        waiting = self.hub.failures.get(stage)
        if waiting:
            failure = waiting.pop(0)
            if failure == "drop":
                self.close_connection = True
                self.connection.close()
                return
            self.answer(failure, {"error": f"configured to fail at {stage}"})
            return
        if stage != "upload" and self.command != "HEAD" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        getattr(self, f"do_{stage}", self.do_other)(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def _chunks(self):
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def do_other(self, path, body):
        self.answer(404, {"error": f"this server does not know {path}"})

    def do_create(self, path, body):
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.root}/{name}"})
            return
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repos[name] = {"private": bool(private), "branches": {"main": {}}, "commits": []}
        self.answer(200, {"url": f"{self.root}/{name}", "name": name, "id": name})

    @property
    def root(self):
        return f"http://{self.headers['Host']}"

    def do_validate(self, path, body):
        self.answer(200, {"errors": [], "warnings": []})

    def _repo(self, path):
        match = re.match(r"/api/models/([^/]+/[^/]+)/?([^/]*)/?(.*)", path)
        return (match[1], self.hub.repos.get(match[1]), match[3]) if match else (None, None, "")

    def do_branch(self, path, body):
        _, repo, branch = self._repo(path)
        if branch in repo["branches"]:
            self.answer(409, {"error": "Reference already exists"})
            return
        repo["branches"][branch] = dict(repo["branches"]["main"])
        self.answer(200, {})

    def do_preupload(self, path, body):
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def do_batch(self, path, body):
        objects = []
        for blob in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.root}/lfs/{blob['oid']}?signature=secret"}}
            objects.append(blob | ({} if blob["oid"] in self.hub.objects else {"actions": action}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_upload(self, path, body):
        time.sleep(self.hub.slowly)
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "other bytes than were announced"})
            return
        self.hub.objects[oid] = body
        self.answer(200)

    def do_commit(self, path, body):
        name, repo, branch = self._repo(path)
        files = repo["branches"][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append((branch, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(str(len(repo["commits"])).encode()).hexdigest()
        self.answer(200, {"commitUrl": f"{self.root}/{name}/commit/{oid}", "commitOid": oid})

    def do_info(self, path, body):
        if path == "/api/whoami-v2":
            self.answer(200, {"name": "user", "type": "user", "orgs": []})
            return
        name, repo, rest = self._repo(path)
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        revision = rest.split("/")[0] or "main"
        branch = self._branch_of(repo, revision)
        if branch is None:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        files = repo["branches"][branch]
        if "/tree/" in path:
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            self.answer(200, listed)
            return
        siblings = [{"rfilename": file} for file in files]
        self.answer(
            200, {"id": name, "sha": self._commit_of(repo, branch), "private": repo["private"], "siblings": siblings}
        )

    def _commit_of(self, repo, branch):
        made = sum(where == branch for where, _ in repo["commits"])
        return hashlib.sha1(f"{branch} {made}".encode()).hexdigest()

    def _branch_of(self, repo, revision):
        """Return a branch by its name or by the commit that it stands at; None if there is none."""
        return next((name for name in repo["branches"] if revision in (name, self._commit_of(repo, name))), None)

    def do_download(self, path, body):
        match = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.hub.repos.get(match[1])
        branches = {} if repo is None else repo["branches"]
        branch = self._branch_of(repo, match[2]) if repo else None
        if branch is None or match[3] not in branches[branch]:
            code = "EntryNotFound" if branch else "RevisionNotFound" if repo else "RepoNotFound"
            self.answer(404, {"error": "not found"}, X_Error_Code=code)
            return
        data = branches[branch][match[3]]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, ETag=etag, X_Repo_Commit=self._commit_of(repo, branch))


@contextmanager
def running(handler):
    """Yield a server on this machine, with `handler` for its requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve():
    """Yield the state and the address of a running server."""
    hub = Hub()
    with running(type("Handler", (_HubHandler,), {"hub": hub})) as server:
        yield hub, f"http://127.0.0.1:{server.server_port}"
