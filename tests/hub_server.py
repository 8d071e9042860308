"""A stand-in for the HTTP interface of the Hugging Face Hub: repositories in memory, one commit each."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0" * 39 + "1"


class HubServer:
    """Use as a context manager; ``address`` is what HF_ENDPOINT takes, ``files`` holds {repository: {name: bytes}}."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, body, code=200, **headers):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                if size:
                    data = self.rfile.read(size)
                else:  # chunks
                    data = b""
                    while length := int(self.rfile.readline().strip() or b"0", 16):
                        data += self.rfile.read(length)
                        self.rfile.readline()
                    self.rfile.readline()
                parts = self.path.strip("/").split("/")
                if parts[:3] == ["api", "repos", "create"]:
                    asked = json.loads(data)
                    name = f"{asked.get('organization')}/{asked['name']}"
                    server.files.setdefault(name, {})
                    server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                    return self.answer({"url": f"{server.address}/{name}"})
                if parts == ["api", "validate-yaml"]:
                    return self.answer({"errors": [], "warnings": []})
                name, verb = "/".join(parts[2:4]), parts[4]
                if verb == "preupload":
                    names = [file["path"] for file in json.loads(data)["files"]]
                    modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in names]
                    return self.answer({"files": modes})
                for line in data.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        server.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                return self.answer({"commitUrl": f"{server.address}/{name}/commit/{SHA}", "commitOid": SHA,
                                    "success": True})  # fmt: skip

            def do_GET(self):
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[0] == "api":
                    name = "/".join(parts[2:4])
                    if name not in server.files:
                        return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                    files = server.files[name]
                    if "tree" in parts:
                        entries = [
                            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for file, data in files.items()
                        ]
                        return self.answer(entries)
                    return self.answer({"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]})
                name, file = "/".join(parts[:2]), parts[-1]
                data = server.files[name][file]
                tag = hashlib.sha1(data).hexdigest()
                return self.answer(data, ETag=f'"{tag}"', X_Repo_Commit=SHA, Accept_Ranges="none")

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
