"""A hub on the loopback interface: serves folders as the Hugging Face hub does, as far as its clients ask."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@contextmanager
def serve(repositories: Mapping[str, tuple[str, Path]]) -> Iterator[str]:
    """The endpoint (a URL) of a hub with these repositories: {"models/owner/name": (commit, folder)}.

    Data sets are "datasets/owner/name". The commit is the head of `main`; every other revision answers 404. A
    repository's commit and folder may be replaced while the hub serves.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if not path:
                return self._send(b"hub", {})
            for repository, (commit, folder) in repositories.items():
                api, files = f"api/{repository}", f"{repository.removeprefix('models/')}/resolve"
                if not f"{path}/".startswith((f"{api}/", f"{files}/")):
                    continue
                asked, _, rest = path.removeprefix(api).removeprefix(files).strip("/").partition("/")
                revision, _, under = (f"{asked}/{rest}" if path.startswith(files) else rest).partition("/")
                if revision not in ("", "main", commit):
                    return self._send(b"", {"X-Error-Code": "RevisionNotFound"}, status=404)
                if path.startswith(files):
                    return self._file(folder / under, commit)
                if asked == "tree":
                    recursive = "recursive=true" in urlsplit(self.path).query.lower()
                    found = (folder / under).glob("**/*" if recursive else "*")
                    return self._json([_entry(each, folder) for each in found])
                if asked in ("", "revision"):
                    files_there = [{"rfilename": str(found.relative_to(folder))} for found in folder.rglob("*.*")]
                    return self._json({"id": repository.partition("/")[2], "sha": commit, "siblings": files_there})
            self._send(b"", {"X-Error-Code": "RepoNotFound"}, status=404)

        def _file(self, file: Path, revision: str) -> None:
            headers = {"X-Repo-Commit": revision}
            if not file.is_file():
                return self._send(b"", {**headers, "X-Error-Code": "EntryNotFound"}, status=404)
            content = file.read_bytes()
            self._send(content, {**headers, "ETag": f'"{_blob_id(content)}"'})

        def _json(self, value: object) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _entry(found: Path, folder: Path) -> dict[str, object]:
    path = str(found.relative_to(folder))
    if found.is_dir():
        return {"type": "directory", "path": path, "oid": _blob_id(path.encode())}
    content = found.read_bytes()
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
