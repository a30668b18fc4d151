"""The routes of the studio: what the page asks of the server. Errors of users come back as {"error": message}."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cli.command import users_message

from . import input_routes, job_routes, result_routes
from .guard import Guard, allowed_hosts
from .shared import NotFound, NotLoaded, Studio, session_of, studio_of
from .uploads import TooLarge

PAGE = Path(__file__).parent / "page"
SCRIPT = "text/javascript"


def make_app(studio: Studio) -> Starlette:
    """Return the application."""
    routes = [
        Route("/", lambda request: FileResponse(PAGE / "index.html")),
        Route("/studio.css", lambda request: FileResponse(PAGE / "studio.css")),
        Route("/studio.js", lambda request: FileResponse(PAGE / "studio.js", media_type=SCRIPT)),
        Route("/niivue.js", lambda request: Response(studio.niivue, media_type=SCRIPT)),
        *(Route(path, to, methods=[method]) for method, path, to in ROUTES),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(studio.host), www_redirect=False),
            Middleware(Guard, sessions=studio.sessions, token=studio.token, cookie=studio.cookie),
        ],
        exception_handlers={ValueError: explain, OSError: explain, MemoryError: explain},
    )
    app.state.studio = studio
    return app


def explain(request: Request, error: Exception) -> Response:
    """Turn an error of a user into a response."""
    kinds = {TooLarge: 413, NotFound: 404, NotLoaded: 503}
    status = next((status for kind, status in kinds.items() if isinstance(error, kind)), 400)
    return JSONResponse({"error": session_of(request).shown(users_message(error) or str(error))}, status)


async def get_state(request: Request) -> Response:
    """All that a page needs when it opens, or opens again."""
    studio, session = studio_of(request), session_of(request)
    if studio.worker.pipe is None:
        return JSONResponse({"ready": False})
    return JSONResponse(
        {
            "ready": True,
            "pipeline": await run_in_threadpool(studio.page.to_json),
            "new_masks": studio.mask_pipe is not None,
            "masks": [mask.to_json() for mask in list(session.masks.values())],
            "images": [image.to_json() for image in list(session.images.values())],
            "results": [result.to_json() for result in list(session.results.values())],
            "jobs": [job_routes.job_json(studio.worker, job) for job in studio.worker.of(session.id)],
        }
    )


async def end_session(request: Request) -> Response:
    """End the session."""
    studio = studio_of(request)
    await run_in_threadpool(studio.end, session_of(request))
    response = JSONResponse({})
    response.delete_cookie(studio.cookie)
    return response


ROUTES = [
    ("GET", "/api/state", get_state),
    ("POST", "/api/uploads", input_routes.begin_upload),
    ("PUT", "/api/uploads/{upload}", input_routes.upload_file),
    ("POST", "/api/masks", input_routes.add_mask),
    ("GET", "/api/masks/{mask}/drawing", input_routes.get_drawing),
    ("GET", "/api/masks/{mask}/view", input_routes.view_mask),
    ("POST", "/api/masks/{mask}/paint", input_routes.paint_mask),
    ("GET", "/api/masks/{mask}/file", input_routes.get_mask_file),
    ("POST", "/api/images", input_routes.add_image),
    ("GET", "/api/images/{image}/view", input_routes.view_image),
    ("POST", "/api/jobs", job_routes.start_job),
    ("GET", "/api/jobs/{job}", job_routes.get_job),
    ("DELETE", "/api/jobs/{job}", job_routes.cancel_job),
    ("GET", "/api/results/{result}/view", result_routes.view_result),
    ("GET", "/api/results/{result}/drawing", result_routes.result_drawing),
    ("POST", "/api/results/{result}/accept", result_routes.accept_result),
    ("GET", "/api/results/{result}/again", result_routes.again),
    ("GET", "/api/results/{result}/download", result_routes.download_result),
    ("GET", "/api/collection.zip", result_routes.download_collection),
    ("GET", "/api/nnunet.zip", result_routes.download_nnunet),
    ("DELETE", "/api/session", end_session),
]
