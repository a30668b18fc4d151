"""The routes of the studio: what the page asks of the server. Errors of users come back as {"error": message}."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from cli.command import users_message
from pipelines.base import VolumePipeline
from pipelines.inputs.request import VolumeRequest
from pipelines.sampling import SamplingConfig
from volumes import read_volume

from .again import as_command, as_python, table_of
from .downloads import DATASET, accepted, write_nnunet, write_pairs
from .guard import Guard, allowed_hosts
from .inputs import Change, Page, edit_of, number, request_of, sampling_of
from .labels import drawing
from .session import Session, Sessions, StudioMask, StudioResult, mask_drawing, without_voxels
from .uploads import TooLarge, receive, receive_file, uploaded_volume
from .views import view_bytes
from .worker import DONE, Generated, Job, Worker, generate, noted

PAGE = Path(__file__).parent / "page"
MOST_JSON = 1 << 20  # bytes
MOST_VOXELS = 1 << 28  # of a drawing
SCRIPT, BYTES = "text/javascript", "application/octet-stream"
Item = TypeVar("Item")


class NotFound(ValueError):
    """Something that the session does not have."""


class NotLoaded(ValueError):
    """A request that needs the model before it is loaded."""


@dataclass(frozen=True)
class Studio:
    """What the routes share.

    Attributes:
        pipeline: for "copy as command", which runs in any folder: a whole path, or a repository.
        niivue: the viewer's module, see `niivue_module`.
        cookie: name of the cookie of a session.
        most: bytes of uploads in one session.
        mask_pipe: returns the pipeline of masks to start from, and loads it when it is first called.
    """

    pipeline: str
    worker: Worker
    sessions: Sessions
    token: str
    niivue: str
    host: str = "127.0.0.1"
    cookie: str = "medvolume_studio"
    most: int = 1 << 30
    mask_pipe: Callable[[], VolumePipeline] | None = None

    @cached_property
    def page(self) -> Page:
        """What the page shows of the model. Raises: NotLoaded before it is loaded."""
        if self.worker.pipe is None:
            raise NotLoaded("the model is loading; try again in a moment")
        return Page(self.pipeline, self.worker.pipe)

    def end(self, session: Session) -> None:
        """End a session, its work and its files."""
        self.worker.cancel_all(session.id)
        self.sessions.end(session)


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


def studio_of(request: Request) -> Studio:
    """Return the studio of a request."""
    return request.app.state.studio


def session_of(request: Request) -> Session:
    """Return the session of a request, which the guard found."""
    return request.scope["session"]


def found(items: Mapping[str, Item], key: object, what: str) -> Item:
    """Return an item of a session. Raises: NotFound naming what there is not."""
    if not isinstance(key, str) or key not in items:
        raise NotFound(f"this session has no {what} {str(key)[:40]}; reload the page")
    return items[key]


async def json_of(request: Request) -> dict[str, object]:
    """Return the body of a request. Raises: ValueError for what is no JSON object."""
    text = await receive(request.stream(), MOST_JSON)
    try:
        content = json.loads(text or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("the request is no JSON object")
    return content


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
            "jobs": [job_json(studio.worker, job) for job in studio.worker.of(session.id)],
        }
    )


async def begin_upload(request: Request) -> Response:
    """Make a folder for the files of one upload."""
    folder = session_of(request).new_folder("uploads")
    return JSONResponse({"upload": folder.parent.name})


async def upload_file(request: Request) -> Response:
    """Receive one file of an upload, named in the query."""
    studio, session = studio_of(request), session_of(request)
    folder = upload_folder(session, request.path_params["upload"])
    file = await receive_file(
        request.stream(), folder, request.query_params.get("name", ""), studio.most - session.used
    )
    session.used += file.stat().st_size
    return JSONResponse({"file": file.name})


def upload_folder(session: Session, upload: object) -> Path:
    """Return the folder of an upload. Raises: NotFound."""
    there = {path.parent.name: path for path in session.folder.glob("uploads/*/*") if path.is_dir()}
    return found(there, upload, "upload")


def received(studio: Studio, session: Session, upload: object) -> Path:
    """Return what a reader is given of an upload, see `uploaded_volume`; what a zip unpacks to counts as uploaded."""
    file = uploaded_volume(upload_folder(session, upload), studio.most - session.used)
    session.used = sum(path.stat().st_size for path in (session.folder / "uploads").rglob("*") if path.is_file())
    return file


async def add_mask(request: Request) -> Response:
    """Add a mask: one that was uploaded, an example, or an empty one of a shape or on the grid of an image or mask."""
    studio, session, body = studio_of(request), session_of(request), await json_of(request)
    page, messages = studio.page, []

    def add() -> dict[str, object]:
        with noted(messages):
            if "upload" in body:
                file = received(studio, session, body["upload"])
                return session.add_mask(file, page.pipe, page.codes).to_json()
            if "example" in body:
                return session.example(page.example(body["example"]), page.pipe, page.codes).to_json()
            if "image" in body:
                image = found(session.images, body["image"], "image")
                return session.add_empty(image.grid, f"{image.name}_mask", page.codes).to_json()
            if "mask" in body:
                mask = found(session.masks, body["mask"], "mask")
                return session.add_empty(mask.grid, mask.root, page.codes).to_json()
            return session.add_empty(page.empty_grid(body.get("shape")), "painted", page.codes).to_json()

    return JSONResponse({"mask": await run_in_threadpool(add), "warnings": messages})


async def get_drawing(request: Request) -> Response:
    """The bytes of a mask, to paint on."""
    page = studio_of(request).page
    mask = found(session_of(request).masks, request.path_params["mask"], "mask")
    return Response(await run_in_threadpool(mask_drawing, mask, page.pipe, page.codes), media_type=BYTES)


async def view_mask(request: Request) -> Response:
    """The grid of a mask for the viewer: black, with the mask's drawing to lie on it."""
    mask = found(session_of(request).masks, request.path_params["mask"], "mask")
    return Response(await run_in_threadpool(view_bytes, mask.grid), media_type=BYTES)


async def paint_mask(request: Request) -> Response:
    """Keep a painted mask: the body is its drawing."""
    page, session = studio_of(request).page, session_of(request)
    mask = found(session.masks, request.path_params["mask"], "mask")
    data = await receive(request.stream(), MOST_VOXELS)
    painted = await run_in_threadpool(session.paint, mask.grid, mask.root, data, page.codes, mask, page.pipe)
    return JSONResponse({"mask": painted.to_json()})


async def get_mask_file(request: Request) -> Response:
    """A mask as a file."""
    mask = found(session_of(request).masks, request.path_params["mask"], "mask")
    if mask.file.is_dir():
        raise ValueError(f"{mask.name}: is a folder of DICOM files, which you have; paint on it to get a NIfTI file")
    return FileResponse(mask.file, filename=mask.file.name)


async def add_image(request: Request) -> Response:
    """Add an uploaded image."""
    studio, session, body = studio_of(request), session_of(request), await json_of(request)
    messages: list[str] = []

    def add() -> dict[str, object]:
        with noted(messages):
            file = received(studio, session, body.get("upload"))
            return session.add_image(file, studio.page.pipe).to_json()

    return JSONResponse({"image": await run_in_threadpool(add), "warnings": messages})


async def view_image(request: Request) -> Response:
    """An image for the viewer."""
    image = found(session_of(request).images, request.path_params["image"], "image")
    reading = studio_of(request).page.pipe.data.reading
    return Response(await run_in_threadpool(lambda: view_bytes(read_volume(image.file, **reading))), media_type=BYTES)


async def start_job(request: Request) -> Response:
    """Queue a volume."""
    studio, session, body = studio_of(request), session_of(request), await json_of(request)
    page = studio.page
    if body.get("new_mask"):
        job = studio.worker.submit(
            session.id, new_mask(studio, session, sampling_of(page, {"seed": body.get("seed", 0)})[1])
        )
        return JSONResponse(job_json(studio.worker, job), 202)
    mask = None if body.get("mask") is None else found(session.masks, body["mask"], "mask")
    given = body.get("images") or {}
    if not isinstance(given, dict):
        raise ValueError("images are an object of channel and image")
    images = {str(channel): found(session.images, key, "image").file for channel, key in given.items()}
    wanted = request_of(page, body, mask, images)
    sampling, seed = sampling_of(page, body)
    change = change_of(session, body)
    if change is not None and mask is None:
        raise ValueError("an edit needs a mask; choose one")

    def work(_: object, job: Job) -> StudioResult:
        folder, pipe, request = session.new_folder("results"), page.pipe, wanted
        if change is not None and mask is not None:
            pipe, request = page.editor, edit_of(page, session, wanted, mask, change, sampling)
        made = generate(pipe, request, sampling, seed, folder, job)
        return keep_result(session, page, made, seed, None if mask is None else mask.id, job)

    return JSONResponse(job_json(studio.worker, studio.worker.submit(session.id, work)), 202)


def new_mask(studio: Studio, session: Session, seed: int) -> Callable[[object, Job], StudioMask]:
    """Return the work that generates a mask. Raises: ValueError without a pipeline of masks."""
    load = studio.mask_pipe
    if load is None:
        raise ValueError("this studio generates no masks; start it with --mask_pipeline")

    def work(_: object, job: Job) -> StudioMask:
        pipe, page = load(), studio.page
        if pipe.data.image_labels != page.pipe.data.labels:
            raise ValueError(
                f"--mask_pipeline generates {pipe.data.image_labels}, and the model knows {page.pipe.data.labels}"
            )
        made = generate(pipe, VolumeRequest(name="map"), SamplingConfig(), seed, session.new_folder("masks"), job)
        file = made.path.rename(made.path.with_name(f"map_seed{seed}.nii.gz"))
        return session.add_mask(file, page.pipe, page.codes)

    return work


def change_of(session: Session, body: Mapping[str, object]) -> Change | None:
    """Return the edit that the page asks for; None where everything is generated.

    Raises: ValueError for what is no edit.
    """
    asked = body.get("edit")
    if asked is None:
        return None
    if not isinstance(asked, dict):
        raise ValueError("an edit is an object of result and strength")
    strength = asked.get("strength")
    result = found(session.results, asked.get("result"), "volume")
    return Change(result, None if strength is None else number(strength, "strength"))


def keep_result(session: Session, page: Page, made: Generated, seed: int, mask: str | None, job: Job) -> StudioResult:
    """Add a generated volume to its session."""
    with session.lock:
        number = max((result.number for result in session.results.values()), default=0) + 1
        result = StudioResult(
            id=session.next_id(),
            number=number,
            path=made.path,
            grid=without_voxels(read_volume(made.files[0])),
            request=made.request,
            record=made.record,
            seed=seed,
            mask=mask,
            seconds=made.seconds,
            warnings=[session.shown(text) for text in job.warnings],
            maps=page.map_codes is not None,
        )
        session.results[result.id] = result
    return result


def job_json(worker: Worker, job: Job) -> dict[str, object]:
    """Return a job for the page."""
    result = job.result.to_json() if job.state == DONE and isinstance(job.result, StudioResult) else None
    return {
        "id": job.id,
        "state": job.state,
        "position": worker.position(job),
        "step": job.step,
        "steps": job.steps,
        "message": job.message,
        "result": result,
        "mask": job.result.to_json() if isinstance(job.result, StudioMask) else None,
    }


def job_of(request: Request) -> Job:
    """Return the job that a request names. Raises: NotFound."""
    job = studio_of(request).worker.find(session_of(request).id, request.path_params["job"])
    if job is None:
        raise NotFound("this session has no such volume in the queue; reload the page")
    return job


async def get_job(request: Request) -> Response:
    """How far a volume is."""
    job, session = job_of(request), session_of(request)
    shown = job_json(studio_of(request).worker, job)
    return JSONResponse(shown | {"message": session.shown(job.message)})


async def cancel_job(request: Request) -> Response:
    """Cancel a volume."""
    worker, job = studio_of(request).worker, job_of(request)
    worker.cancel(job)
    return JSONResponse(job_json(worker, job))


def result_of(request: Request) -> StudioResult:
    """Return the result that a request names. Raises: NotFound."""
    return found(session_of(request).results, request.path_params["result"], "volume")


async def view_result(request: Request) -> Response:
    """A volume for the viewer: one channel of it, counted from 0."""
    result, channel = result_of(request), request.query_params.get("channel", "0")
    files = result.files
    if not channel.isdecimal() or int(channel) >= len(files):
        raise NotFound(f"the volume has no channel {channel[:10]}")
    return Response(await run_in_threadpool(lambda: view_bytes(read_volume(files[int(channel)]))), media_type=BYTES)


async def result_drawing(request: Request) -> Response:
    """A generated label map as a drawing."""
    result, codes = result_of(request), studio_of(request).page.map_codes
    if codes is None:
        raise NotFound("this model generates no label maps")
    values = await run_in_threadpool(lambda: read_volume(result.files[0], exact=True).array[0])
    return Response(drawing(codes.encode(values)), media_type=BYTES)


async def accept_result(request: Request) -> Response:
    """Take a volume into the collection, or out of it."""
    result, body = result_of(request), await json_of(request)
    result.accepted = body.get("accepted") is True
    return JSONResponse(result.to_json())


async def again(request: Request) -> Response:
    """How a volume is made again."""
    result, pipeline = result_of(request), studio_of(request).pipeline
    stem = result.to_json()["name"]
    return JSONResponse(
        {
            "python": as_python(pipeline, result.request, result.record, str(stem)),
            "command": as_command(pipeline, result.request, result.record, result.seed),
            "table": table_of(result.request),
        }
    )


async def download_result(request: Request) -> Response:
    """A pair of mask and volume, with its record."""
    result, pipeline, session = result_of(request), studio_of(request).pipeline, session_of(request)
    archive = session.new_folder("downloads") / f"{result.to_json()['name']}_seed{result.seed}.zip"
    await run_in_threadpool(write_pairs, [result], pipeline, archive)
    return sent_once(archive)


async def download_collection(request: Request) -> Response:
    """The collection as a zip."""
    session, pipeline = session_of(request), studio_of(request).pipeline
    archive = session.new_folder("downloads") / "collection.zip"
    await run_in_threadpool(write_pairs, accepted(session.results.values()), pipeline, archive)
    return sent_once(archive)


async def download_nnunet(request: Request) -> Response:
    """The collection as a data set for nnU-Net."""
    session, page = session_of(request), studio_of(request).page
    work = session.new_folder("downloads")
    archive = work / f"{DATASET}.zip"
    await run_in_threadpool(write_nnunet, accepted(session.results.values()), page.pipe.data, work, archive)
    return sent_once(archive)


def sent_once(archive: Path) -> Response:
    """Return a file that is removed once it is sent, with all that was written on the way to it."""
    return FileResponse(archive, filename=archive.name, background=BackgroundTask(remove_tree, archive.parent))


def remove_tree(folder: Path) -> None:
    """Remove a folder of files."""
    shutil.rmtree(folder, ignore_errors=True)


async def end_session(request: Request) -> Response:
    """End the session."""
    studio = studio_of(request)
    await run_in_threadpool(studio.end, session_of(request))
    response = JSONResponse({})
    response.delete_cookie(studio.cookie)
    return response


ROUTES = [
    ("GET", "/api/state", get_state),
    ("POST", "/api/uploads", begin_upload),
    ("PUT", "/api/uploads/{upload}", upload_file),
    ("POST", "/api/masks", add_mask),
    ("GET", "/api/masks/{mask}/drawing", get_drawing),
    ("GET", "/api/masks/{mask}/view", view_mask),
    ("POST", "/api/masks/{mask}/paint", paint_mask),
    ("GET", "/api/masks/{mask}/file", get_mask_file),
    ("POST", "/api/images", add_image),
    ("GET", "/api/images/{image}/view", view_image),
    ("POST", "/api/jobs", start_job),
    ("GET", "/api/jobs/{job}", get_job),
    ("DELETE", "/api/jobs/{job}", cancel_job),
    ("GET", "/api/results/{result}/view", view_result),
    ("GET", "/api/results/{result}/drawing", result_drawing),
    ("POST", "/api/results/{result}/accept", accept_result),
    ("GET", "/api/results/{result}/again", again),
    ("GET", "/api/results/{result}/download", download_result),
    ("GET", "/api/collection.zip", download_collection),
    ("GET", "/api/nnunet.zip", download_nnunet),
    ("DELETE", "/api/session", end_session),
]
