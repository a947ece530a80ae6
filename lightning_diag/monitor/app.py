"""The server behind the live page: what the runs say, as JSON, and the page itself."""

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from lightning_diag.monitor.watched_runs import WatchedRuns
from lightning_diag.records.json_safe import json_safe
from lightning_diag.report.html import vega_bundle
from lightning_diag.report.page_template import STYLE
from lightning_diag.report.theme import chart_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["HOST", "make_app"]

HOST = "127.0.0.1"

# a page of another site may ask for this address by a name of its own: such names are refused
_NAMES = [HOST, "localhost"]
_OWN = ("same-origin", "none")
_LONGEST = 2000  # characters
_HEADERS = {
    # Vega makes functions out of the expressions of a chart
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(runs: WatchedRuns) -> "Starlette":
    """An ASGI application that shows `runs`, to be served on `HOST` alone."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answer(content: object, status: int = 200) -> Response:
        return JSONResponse(json_safe(content), status, headers=_HEADERS)

    def fixed(path: str, kind: str, make: "Callable[[], str]") -> Route:
        def send(request: Request) -> Response:
            return Response(make(), media_type=kind, headers=_HEADERS)

        return Route(path, send)

    # plain functions, since they read files: each is run in a thread

    def theme(request: Request) -> Response:
        ground = {"background": None}
        tones = {"light": chart_config(), "dark": chart_config(dark=True)}
        return answer({name: config | ground for name, config in tones.items()})

    def told(make: "Callable[[Request], object]") -> "Callable[[Request], Response]":
        def tell(request: Request) -> Response:
            try:
                return answer(make(request))
            except LookupError:
                return answer({"error": "There is no such run, or no such chart."}, 404)

        return tell

    def numbers(request: Request) -> list[int]:
        """The places of runs in the address: ``?runs=0,3``."""
        words = request.query_params.get("runs", "")[:_LONGEST].split(",")
        return [int(word) for word in words if word.isascii() and word.isdecimal()]

    state = told(lambda request: runs.state(numbers(request) or [0]))
    together = told(lambda request: runs.together(numbers(request)))
    chart = told(lambda request: runs.chart(**request.path_params))

    return Starlette(
        routes=[
            fixed("/", "text/html", lambda: _asset("page.html")),
            fixed("/page.css", "text/css", lambda: STYLE + _asset("page.css")),
            fixed("/page.js", "text/javascript", lambda: _asset("page.js")),
            fixed("/vega.js", "text/javascript", vega_bundle),
            Route("/api/theme", theme),
            Route("/api/state", state),
            Route("/api/together", together),
            Route("/api/chart/{number:int}/{name}", chart),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES, www_redirect=False),
            Middleware(_own_page_only),
        ],
    )


def _own_page_only(app: "ASGIApp") -> "ASGIApp":
    """Refuse what pages of other sites ask for: browsers say who asks."""
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    async def checked(scope: "Scope", receive: "Receive", send: "Send") -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        # a link from another page may open this one, but no script may read it
        opened = scope.get("path") == "/" and headers.get("sec-fetch-mode") == "navigate"
        foreign = site is not None and site not in _OWN and not opened
        if foreign or (origin is not None and origin != f"http://{headers.get('host')}"):
            refused = PlainTextResponse("Only the monitor's own page may ask.", 403, _HEADERS)
            await refused(scope, receive, send)
        else:
            await app(scope, receive, send)

    return checked


@cache
def _asset(name: str) -> str:
    folder = resources.files("lightning_diag.monitor") / "assets"
    return (folder / name).read_text(encoding="utf-8")
