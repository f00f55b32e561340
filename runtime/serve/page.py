"""The page to chat in: the files of the folder page, as bytes. `/` is its index.html, `/page/app.js` its app.js."""

import hashlib
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# A browser runs and shows nothing that another server sends, whatever a model writes.
_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def files() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Return the files of the page by name ("vendor/marked.js"): their bytes and the headers of their answers."""
    table = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            headers = {
                "content-type": _TYPES[path.suffix],
                "content-security-policy": _SECURITY,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
                "cross-origin-resource-policy": "same-origin",
                "cache-control": "no-cache",  # kept, but asked for each time: an update of the package is seen at once
                "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            }
            table[path.relative_to(FOLDER).as_posix()] = content, headers
    return table


async def _file(request: Request) -> Response:
    """Answer with a file, or with 304 if the browser has it. The name is looked up, and never joined to a folder."""
    name = request.path_params.get("name", "index.html")
    if name not in files():
        raise HTTPException(404, f"the page has no file {name!r}")
    content, headers = files()[name]
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if headers["etag"] in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


routes = [Route("/", _file), Route("/page/{name:path}", _file)]
