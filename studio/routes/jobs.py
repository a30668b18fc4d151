"""The routes of jobs: to generate a volume or a mask, to see how far it is, and to cancel it."""

from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipelines.base import VolumePipeline
from pipelines.edit_pipeline import MedVolumeEditPipeline
from pipelines.inputs.request import VolumeRequest
from pipelines.sampling import SamplingConfig
from volumes import read_volume

from ..inputs import Change, edit_of, left_to, number, request_of, sampling_of
from ..models import StudioModel
from ..session import Session, StudioMask, StudioResult, without_voxels
from ..worker import DONE, Generated, Job, generate
from .shared import NotFound, Studio, found, json_of, session_of, studio_of

Work = Callable[[VolumePipeline, Job], object]


async def start_job(request: Request) -> Response:
    """Queue a volume, a new mask, or nothing but the loading of a model."""
    studio, session, body = studio_of(request), session_of(request), await json_of(request)
    name = studio.named(body.get("model"))
    if body.get("new_mask"):
        name, work = new_mask(studio, session, sampling_of({"seed": body.get("seed", 0)})[1])
    elif body.get("load"):
        work = loaded(studio, name)
    else:
        work = new_volume(studio, session, name, body)
    return JSONResponse(job_json(studio, studio.worker.submit(session.id, name, work)), 202)


def loaded(studio: Studio, name: str) -> Work:
    """Return the work that does nothing once a model is loaded. Raises: ValueError, as `Studio.model`, now or then."""
    studio.model(name)
    return lambda pipe, job: studio.model(name)


def new_volume(studio: Studio, session: Session, name: str, body: Mapping[str, object]) -> Work:
    """Return the work that generates a volume.

    Raises: ValueError for a request that means nothing, and for a model that is known not to fit to the first.
    """
    studio.model(name)
    mask = None if body.get("mask") is None else found(session.masks, body["mask"], "mask")
    given = body.get("images") or {}
    if not isinstance(given, dict):
        raise ValueError("images are an object of channel and image")
    images = {str(channel): found(session.images, key, "image").file for channel, key in given.items()}
    wanted = request_of(studio.first, body, mask, images)
    asked, seed = sampling_of(body)
    change = change_of(session, body)
    if change is not None and mask is None:
        raise ValueError("an edit needs a mask; choose one")

    def work(pipe: VolumePipeline, job: Job) -> StudioResult:
        model = studio.model(name)
        assert model is not None  # it is loaded
        sampling, request = left_to(model, asked), wanted
        if change is not None and mask is not None:
            pipe = MedVolumeEditPipeline.from_pipe(pipe)
            pipe.set_progress_bar_config(disable=True)
            request = edit_of(model, session, wanted, mask, change, sampling)
        made = generate(pipe, request, sampling, seed, session.new_folder("results"), job)
        return keep_result(session, model, made, seed, None if mask is None else mask.id, job)

    return work


def new_mask(studio: Studio, session: Session, seed: int) -> tuple[str, Work]:
    """Return the name of the pipeline of masks, and the work that generates one. Raises: ValueError without any."""
    if studio.mask_pipeline is None:
        raise ValueError("this studio generates no masks; start it with --mask_pipeline")

    def work(pipe: VolumePipeline, job: Job) -> StudioMask:
        first = studio.first
        if pipe.data.image_labels != first.data.labels:
            raise ValueError(
                f"--mask_pipeline generates {pipe.data.image_labels}, and the model knows {first.data.labels}"
            )
        made = generate(pipe, VolumeRequest(name="map"), SamplingConfig(), seed, session.new_folder("masks"), job)
        file = made.path.rename(made.path.with_name(f"map_seed{seed}.nii.gz"))
        return session.add_mask(file, first)

    return studio.mask_pipeline, work


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


def keep_result(
    session: Session, model: StudioModel, made: Generated, seed: int, mask: str | None, job: Job
) -> StudioResult:
    """Add a generated volume to its session."""
    with session.lock:
        number = max((result.number for result in session.results.values()), default=0) + 1
        result = StudioResult(
            id=session.next_id(),
            number=number,
            model=model.name,
            path=made.path,
            grid=without_voxels(read_volume(made.files[0])),
            request=made.request,
            record=made.record,
            seed=seed,
            mask=mask,
            seconds=made.seconds,
            warnings=[session.shown(text) for text in job.warnings],
            maps=model.map_codes is not None,
        )
        session.results[result.id] = result
    return result


def job_json(studio: Studio, job: Job) -> dict[str, object]:
    """Return a job for the page."""
    result = job.result.to_json() if job.state == DONE and isinstance(job.result, StudioResult) else None
    return {
        "id": job.id,
        "state": job.state,
        "position": studio.worker.position(job),
        "loading": studio.titles[job.model] if job.loading else None,
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
    shown = job_json(studio_of(request), job)
    return JSONResponse(shown | {"message": session.shown(job.message)})


async def cancel_job(request: Request) -> Response:
    """Cancel a volume."""
    studio, job = studio_of(request), job_of(request)
    studio.worker.cancel(job)
    return JSONResponse(job_json(studio, job))
