"""Who may use the studio: whoever has the token of its address, and then the cookie of a session."""

import hmac
import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .session import Sessions

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
REFUSED = "The studio opens at the address with its token, which `medvolume studio` printed where it was started.\n"
SAME = ("same-origin", "none")  # what browsers say of requests that our own page, or nobody, made
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' blob: data: 'wasm-unsafe-eval'; worker-src 'self' blob: data:; "
        "img-src 'self' blob: data:; font-src 'self' data:; connect-src 'self' blob: data:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Middleware: refuses requests without a session, and requests that another page made.

    The address with the token begins a session and leads to the address without it, so that the token stays out of the
    history of the browser. The session is in `scope["session"]`.

    Args:
        cookie: its name, which has the port in it: browsers send cookies of one host to all its ports.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, token: str, cookie: str) -> None:
        self.app, self.sessions, self.token, self.cookie = app, sessions, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)
        session = self.sessions.find(request.cookies.get(self.cookie))
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and request.method == "GET":
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                await self._refuse(scope, receive, send)
                return
            response = RedirectResponse("/", 303)
            if session is None:
                try:
                    session = self.sessions.start()
                except ValueError as error:
                    await PlainTextResponse(f"{error}\n", 503)(scope, receive, send)
                    return
            response.set_cookie(self.cookie, session.id, httponly=True, samesite="lax")
            await response(scope, receive, send)
            return
        if session is None or not is_own(request):
            await self._refuse(scope, receive, send)
            return
        scope["session"] = session
        await self.app(scope, receive, with_headers(send))

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(REFUSED, 403)(scope, receive, with_headers(send))


def is_own(request: Request) -> bool:
    """Return whether our own page made a request, or somebody who opens the page, from wherever the link was."""
    opens = request.method == "GET" and request.url.path == "/"
    return opens or request.headers.get("sec-fetch-site", "none") in SAME


def with_headers(send: Send) -> Send:
    """Return `send` with `HEADERS` added to each response."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return sent


def new_token() -> str:
    """Return a token for the address of a server."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server on this host."""
    return host in (*LOOPBACK, "::1") or host.startswith("127.")


def allowed_hosts(host: str) -> list[str]:
    """Return the names by which browsers may call the server, for starlette's TrustedHostMiddleware.

    Other names are those of pages that lead a browser here behind its back.
    """
    if host in ("0.0.0.0", "::"):  # every address of the machine, whose names nobody knows here
        return ["*"]
    return list(dict.fromkeys([f"[{host}]" if ":" in host else host, *LOOPBACK]))
