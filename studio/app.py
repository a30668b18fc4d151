"""The application of the studio: the page and its routes. Errors of users come back as {"error": message}."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cli.command import users_message

from .guard import Guard, allowed_hosts
from .routes import inputs, jobs, results
from .routes.shared import NotFound, NotLoaded, Studio, session_of, studio_of
from .uploads import TooLarge

PAGE = Path(__file__).parent / "page"
SCRIPT = "text/javascript"


def make_app(studio: Studio) -> Starlette:
    """Return the application."""
    routes = [
        Route("/", lambda request: FileResponse(PAGE / "index.html")),
        Route("/studio.css", lambda request: FileResponse(PAGE / "studio.css")),
        Route("/studio.js", lambda request: FileResponse(PAGE / "studio.js", media_type=SCRIPT)),
        Route("/regions.js", lambda request: FileResponse(PAGE / "regions.js", media_type=SCRIPT)),
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
    if not studio.worker.loaded.is_set():
        return JSONResponse({"ready": False})
    return JSONResponse(
        {
            "ready": True,
            "models": [{"name": name, "title": studio.titles[name]} for name in studio.pipelines],
            "pipeline": studio.first.to_json(),
            "new_masks": studio.mask_pipeline is not None,
            "masks": [mask.to_json() for mask in list(session.masks.values())],
            "images": [image.to_json() for image in list(session.images.values())],
            "results": [result.to_json() for result in list(session.results.values())],
            "jobs": [jobs.job_json(studio, job) for job in studio.worker.of(session.id)],
        }
    )


async def get_model(request: Request) -> Response:
    """What the page needs to know of the model that the query names; null before it was loaded."""
    studio = studio_of(request)
    model = studio.model(studio.named(request.query_params.get("name")))
    return JSONResponse({"pipeline": None if model is None else model.to_json()})


async def end_session(request: Request) -> Response:
    """End the session."""
    studio = studio_of(request)
    await run_in_threadpool(studio.end, session_of(request))
    response = JSONResponse({})
    response.delete_cookie(studio.cookie)
    return response


ROUTES = [
    ("GET", "/api/state", get_state),
    ("GET", "/api/model", get_model),
    ("POST", "/api/uploads", inputs.begin_upload),
    ("PUT", "/api/uploads/{upload}", inputs.upload_file),
    ("POST", "/api/masks", inputs.add_mask),
    ("GET", "/api/masks/{mask}/drawing", inputs.get_drawing),
    ("GET", "/api/masks/{mask}/view", inputs.view_mask),
    ("POST", "/api/masks/{mask}/paint", inputs.paint_mask),
    ("GET", "/api/masks/{mask}/file", inputs.get_mask_file),
    ("POST", "/api/images", inputs.add_image),
    ("GET", "/api/images/{image}/view", inputs.view_image),
    ("POST", "/api/jobs", jobs.start_job),
    ("GET", "/api/jobs/{job}", jobs.get_job),
    ("DELETE", "/api/jobs/{job}", jobs.cancel_job),
    ("GET", "/api/results/{result}/view", results.view_result),
    ("GET", "/api/results/{result}/drawing", results.result_drawing),
    ("POST", "/api/results/{result}/accept", results.accept_result),
    ("GET", "/api/results/{result}/again", results.again),
    ("GET", "/api/results/{result}/download", results.download_result),
    ("GET", "/api/collection.zip", results.download_collection),
    ("GET", "/api/nnunet.zip", results.download_nnunet),
    ("DELETE", "/api/session", end_session),
]
