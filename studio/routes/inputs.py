"""The routes of uploads, masks and images: what a volume is generated from."""

from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from volumes import read_volume

from ..inputs import whole_shape
from ..session import Session, mask_drawing
from ..uploads import receive, receive_file, uploaded_volume
from ..views import view_bytes
from ..worker import noted
from .shared import BYTES, Studio, found, json_of, session_of, studio_of

MOST_VOXELS = 1 << 28  # of a drawing


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
    model, messages = studio.first, []

    def add() -> dict[str, object]:
        with noted(messages):
            if "upload" in body:
                file = received(studio, session, body["upload"])
                return session.add_mask(file, model).to_json()
            if "example" in body:
                return session.example(model.example(body["example"]), model).to_json()
            if "image" in body:
                image = found(session.images, body["image"], "image")
                return session.add_empty(image.grid, f"{image.name}_mask", model).to_json()
            if "mask" in body:
                mask = found(session.masks, body["mask"], "mask")
                return session.add_empty(mask.grid, mask.root, model).to_json()
            shape = body.get("shape")
            return session.add_empty(
                model.empty_grid(None if shape is None else whole_shape(shape)), "painted", model
            ).to_json()

    return JSONResponse({"mask": await run_in_threadpool(add), "warnings": messages})


async def get_drawing(request: Request) -> Response:
    """The bytes of a mask, to paint on."""
    model = studio_of(request).first
    mask = found(session_of(request).masks, request.path_params["mask"], "mask")
    return Response(await run_in_threadpool(mask_drawing, mask, model), media_type=BYTES)


async def view_mask(request: Request) -> Response:
    """The grid of a mask for the viewer: black, with the mask's drawing to lie on it."""
    mask = found(session_of(request).masks, request.path_params["mask"], "mask")
    return Response(await run_in_threadpool(view_bytes, mask.grid), media_type=BYTES)


async def paint_mask(request: Request) -> Response:
    """Keep a painted mask: the body is its drawing."""
    model, session = studio_of(request).first, session_of(request)
    mask = found(session.masks, request.path_params["mask"], "mask")
    data = await receive(request.stream(), MOST_VOXELS)
    painted = await run_in_threadpool(session.paint, mask.grid, mask.root, data, model, mask)
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
            return session.add_image(file, studio.first).to_json()

    return JSONResponse({"image": await run_in_threadpool(add), "warnings": messages})


async def view_image(request: Request) -> Response:
    """An image for the viewer."""
    image = found(session_of(request).images, request.path_params["image"], "image")
    reading = studio_of(request).first.data.reading
    return Response(await run_in_threadpool(lambda: view_bytes(read_volume(image.file, **reading))), media_type=BYTES)
