"""`tl-clt view`: the page served to this machine alone, with features, annotations and a live model.

Every request must come by 127.0.0.1 or localhost, from the page itself where it says from where, and with the token
that is in the address printed at the start. No path of a request is ever a path of the file system: what can be fetched
are the routes below.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tl_clt.arguments import as_whole
from tl_clt.errors import ConfigError, ExtraMissing, FeatureNotFound, NotWritten, ServerBusy, TlCltError
from tl_clt.viewer.host import Host, read_page_json
from tl_clt.viewer.html import Graphs, page_script, page_style

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder
    from tl_clt.viewer.html import FeatureSource

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from uvicorn import Config, Server
except ImportError as error:
    raise ExtraMissing(f"tl-clt view needs {error.name}: pip install starlette uvicorn.") from error

LOOPBACK = "127.0.0.1"
MOST_BYTES = 2 * 1024 * 1024
"""Of a request's body."""
MOST_SECONDS = 20.0
"""That a request's body may take to arrive."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BY_BROWSER = ("/", "/page.js", "/page.css", "/served.js")
"""Fetched by the browser itself, with the token in the address; all else by the page's script, with it in a header."""
DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tl-clt view</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css?token={token}">
<script defer src="page.js?token={token}"></script>
<script defer src="served.js?token={token}"></script>
</head>
<body class="tlclt-body">
<div id="page"></div>
<noscript>This page draws the graph with a script of its own. Allow scripts for this address.</noscript>
</body>
</html>
"""


def _say_where(url: str) -> None:
    sys.stderr.write(f"The page is at {url}\nCtrl-C ends it.\n")


def serve(
    graphs: Graphs,
    features: FeatureSource | None = None,
    model: HookedModel | None = None,
    clt: CrossLayerTranscoder | None = None,
    port: int = 0,
    *,
    annotations: str | Path | None = None,
    open_browser: bool = True,
    on_start: Callable[[str], None] = _say_where,
) -> None:
    """Serve the page of some graphs to this machine until Ctrl-C, which raises KeyboardInterrupt.

    Args:
        graphs: one graph, or several of one model, by name or in a list.
        features: where what is known of features comes from, a `FeatureStore` for example.
        model, clt: the model and the CLT that the graphs were traced with, to change features from the page; both or
            neither.
        port: of 127.0.0.1; 0 for one that is free.
        annotations: file that pins, groups and labels are kept in; without one the page's address alone keeps them.
        open_browser: open the page in the user's browser.
        on_start: told the page's address, in which the token is.

    Raises:
        ConfigError: there is no graph, the port is taken or none, or an event loop runs already, as in a notebook.
        CLTMismatch: the graphs were not traced with this model and CLT.
        FormatError, NotWritten: the file of annotations is damaged, or cannot be written.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigError("serve() cannot be called in a notebook: use graph.show(), or tl-clt view from a shell.")
    with PageServer(graphs, features, model, clt, port, annotations=annotations) as server:
        on_start(server.url)
        if open_browser:
            open_page(server.url)
        server.run()


def open_page(url: str) -> None:
    """Open a page in the user's browser, or do nothing where there is none."""
    with suppress(webbrowser.Error):
        webbrowser.open(url)


class PageServer:
    """A server of the page that listens from the start, and answers while it runs: `run` here, or `start` in a thread.

    Args:
        graphs, features, model, clt, port, annotations: as of `serve`.
    """

    def __init__(
        self,
        graphs: Graphs,
        features: FeatureSource | None = None,
        model: HookedModel | None = None,
        clt: CrossLayerTranscoder | None = None,
        port: int = 0,
        *,
        annotations: str | Path | None = None,
    ) -> None:
        require_port(port)
        self.host = Host(graphs, features, model, clt, annotations)
        self.token = secrets.token_urlsafe(32)
        self._socket = _listen(port)
        self.port = self._socket.getsockname()[1]
        guarded = Guard(page_app(self.host, self.token), self.token, self.port)
        # Nothing of a request is written to a log: the token is in addresses.
        cfg = Config(
            guarded,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        self._server = Server(cfg)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The page's address, in which the token is."""
        return f"http://{LOOPBACK}:{self.port}/?token={self.token}"

    def run(self) -> None:
        """Answer until Ctrl-C."""
        self._server.run(sockets=[self._socket])

    def start(self) -> None:
        """Answer in a thread, until the server is closed."""
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and listening."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def require_port(port: int) -> None:
    """Raise unless a port can be had.

    Raises:
        ConfigError: it is taken, or not for everybody, or none.
    """
    _listen(port).close()


def _listen(port: int) -> socket.socket:
    """A socket on this machine's loopback address alone."""
    port = as_whole("port", port, 0, 65535)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} of {LOOPBACK} cannot be had ({error.strerror}). Give another, or 0 for one that is free."
        ) from error
    return listening


class Guard:
    """Stands before the app: whom it answers, and what every answer says to browsers."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token.encode()
        hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]
        self._hosts = [host.encode() for host in hosts + ([LOOPBACK, "localhost"] if port == 80 else [])]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        refusal = self._refusal(scope)
        answer = self._app if refusal is None else answer_json({"error": refusal}, 403)
        await answer(scope, receive, send_secured)

    def _refusal(self, scope: Scope) -> str | None:
        """Why a request is not answered."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        # A name of somebody's that leads here (DNS rebinding) is not one of ours.
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return "This server is asked by another name than its own. Open the address that tl-clt view printed."
        if any(origin.lower() != b"http://" + hosts[0].lower() for origin in origins):
            return "Another page may not ask this server."
        if not self._has_token(scope, headers.get(b"authorization", [])):
            return "The token is missing or wrong. Open the whole address that tl-clt view printed."
        return None

    def _has_token(self, scope: Scope, authorizations: list[bytes]) -> bool:
        given = b""
        if scope["path"] in BY_BROWSER:
            given = next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("token", [])), "").encode()
        elif len(authorizations) == 1:
            given = authorizations[0].removeprefix(b"Bearer ")
        return hmac.compare_digest(given, self._token)


def page_app(host: Host, token: str) -> Starlette:
    """The routes. What may ask for them, `Guard` decides."""
    files = {
        "/": (DOCUMENT.format(token=token), "text/html"),
        "/page.js": (page_script(), "text/javascript"),
        "/page.css": (page_style(), "text/css"),
        "/served.js": ((Path(__file__).parent / "served.js").read_text(encoding="utf-8"), "text/javascript"),
    }

    async def file(request: Request) -> Response:
        text, kind = files[request.url.path]
        return Response(text, media_type=kind)

    def graph_of(request: Request) -> int:
        number = _number_in(request, "graph")
        if number >= len(host.graphs):
            raise HTTPException(404, f"There is no graph {number}: there are {len(host.graphs)}, counted from 0.")
        return number

    async def data(request: Request) -> Response:
        return answer_json(await run_in_threadpool(host.data))

    async def feature(request: Request) -> Response:
        layer, number = _number_in(request, "layer"), _number_in(request, "feature")
        return answer_json(await run_in_threadpool(host.feature, layer, number))

    async def annotate(request: Request) -> Response:
        await run_in_threadpool(host.annotate, await _sent(request))
        return answer_json({})

    async def steer(request: Request) -> Response:
        number, asked = graph_of(request), await _sent(request)
        if not isinstance(asked, dict) or set(asked) != {"interventions"}:
            raise HTTPException(400, 'Send {"interventions": [...]}.')
        return answer_json(await run_in_threadpool(host.steer, number, asked["interventions"]))

    routes = [
        *(Route(path, file) for path in files),
        Route("/data", data),
        Route("/features/{layer}/{feature}", feature),
        Route("/annotations", annotate, methods=["POST"]),
        Route("/steer/{graph}", steer, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _refused, TlCltError: _failed, ClientDisconnect: _left, Exception: _broken},
    )
    app.router.redirect_slashes = False
    return app


def answer_json(value: Any, status: int = 200) -> Response:
    """JSON, in which characters that are none (half a surrogate pair) are written as numbers."""
    return Response(json.dumps(value, allow_nan=False, separators=(",", ":")), status, media_type="application/json")


def _number_in(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise HTTPException(404, f"{text[:40]!r} is no number of a {name}.")
    return int(text)


async def _sent(request: Request) -> Any:
    """The JSON of a request's body, of which no more is read than there may be."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "Send JSON, as application/json.")
    too_large = HTTPException(413, f"A request may have {MOST_BYTES} bytes at most.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MOST_BYTES:
                raise too_large

    try:
        await asyncio.wait_for(read(), MOST_SECONDS)
        return read_page_json(body.decode("utf-8"))
    except asyncio.TimeoutError:
        raise HTTPException(408, f"The request did not arrive within {MOST_SECONDS:.0f} seconds.") from None
    except UnicodeDecodeError:
        raise HTTPException(400, "The request is no UTF-8.") from None


# -- errors, of which the page learns the message and never the place ------------------------------------------------


def _refused(request: Request, error: Exception) -> Response:
    """Of the routes above, or of Starlette's: no such path, no such method."""
    status, words = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
    return answer_json({"error": words}, status)


def _failed(request: Request, error: Exception) -> Response:
    """One of this package's own, whose message is for the user."""
    kinds = {FeatureNotFound: 404, ServerBusy: 409, NotWritten: 507}
    status = next((status for kind, status in kinds.items() if isinstance(error, kind)), 400)
    return answer_json({"error": f"{type(error).__name__}: {error}"}, status)


def _left(request: Request, error: Exception) -> Response:
    """The page was closed before it had sent all; nobody hears this."""
    return answer_json({"error": "The request was not sent to its end."}, 400)


def _broken(request: Request, error: Exception) -> Response:
    """Anything else, whose traceback is shown in the terminal of the server alone."""
    return answer_json({"error": f"The server failed ({type(error).__name__}); its terminal says more."}, 500)
