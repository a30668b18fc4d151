"""The routes of generated volumes: to look at them, to collect and to download them."""

import shutil
from pathlib import Path

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from volumes import read_volume

from ..again import as_command, as_python, table_of
from ..downloads import DATASET, accepted, write_nnunet, write_pairs
from ..labels import drawing
from ..session import StudioResult
from ..views import view_bytes
from .shared import BYTES, NotFound, found, json_of, session_of, studio_of


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
    result, codes = result_of(request), studio_of(request).first.map_codes
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
    result = result_of(request)
    stem = result.to_json()["name"]
    return JSONResponse(
        {
            "python": as_python(result.model, result.request, result.record, str(stem)),
            "command": as_command(result.model, result.request, result.record, result.seed),
            "table": table_of(result.request),
        }
    )


async def download_result(request: Request) -> Response:
    """A pair of mask and volume, with its record."""
    result, session = result_of(request), session_of(request)
    archive = session.new_folder("downloads") / f"{result.to_json()['name']}_seed{result.seed}.zip"
    await run_in_threadpool(write_pairs, [result], archive)
    return sent_once(archive)


async def download_collection(request: Request) -> Response:
    """The collection as a zip."""
    session = session_of(request)
    archive = session.new_folder("downloads") / "collection.zip"
    await run_in_threadpool(write_pairs, accepted(session.results.values()), archive)
    return sent_once(archive)


async def download_nnunet(request: Request) -> Response:
    """The collection as a data set for nnU-Net."""
    session, model = session_of(request), studio_of(request).first
    work = session.new_folder("downloads")
    archive = work / f"{DATASET}.zip"
    await run_in_threadpool(write_nnunet, accepted(session.results.values()), model.data, work, archive)
    return sent_once(archive)


def sent_once(archive: Path) -> Response:
    """Return a file that is removed once it is sent, with all that was written on the way to it."""
    return FileResponse(archive, filename=archive.name, background=BackgroundTask(remove_tree, archive.parent))


def remove_tree(folder: Path) -> None:
    """Remove a folder of files."""
    shutil.rmtree(folder, ignore_errors=True)
