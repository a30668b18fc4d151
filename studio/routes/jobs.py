"""The routes of jobs: to generate a volume or a mask, to see how far it is, and to cancel it."""

from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipelines.inputs.request import VolumeRequest
from pipelines.sampling import SamplingConfig
from volumes import read_volume

from ..inputs import Change, Page, edit_of, number, request_of, sampling_of
from ..session import Session, StudioMask, StudioResult, without_voxels
from ..worker import DONE, Generated, Job, Worker, generate
from .shared import NotFound, Studio, found, json_of, session_of, studio_of


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

    Raises: ValueError for anything but an edit.
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
