"""The server: it begins with a socket, a token and a temporary folder, and ends with none of them."""

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cli.command import CannotContinue, users_message
from pipelines.base import VolumePipeline
from pipelines.batch_generation import DTYPES
from pipelines.pipeline import MedVolumePipeline
from volumes.devices import find_device

NEEDED = ("starlette", "uvicorn", "ipyniivue")
RISK = """
Caution: with --host {host} other machines reach the studio. Whoever knows the token can use this computer for
generation, and upload files to it. The connection is not encrypted: others on the network can read token, masks and
volumes. To use the studio of a machine that you reach by ssh, leave out --host and forward the port:
    ssh -L {port}:127.0.0.1:{port} MACHINE
"""


@dataclass(frozen=True)
class ServerSettings:
    """The arguments of the command, see `medvolume studio --help`."""

    pipeline: Sequence[str]
    mask_pipeline: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    upload_mb: int = 1024
    device: str | None = None
    precision: str = "no"


def serve(settings: ServerSettings) -> None:
    """Serve the studio until it is told to end.

    Raises: ValueError if a package is missing or the port is taken. CannotContinue if the first pipeline cannot be
    loaded.
    """
    check_installed()
    import uvicorn

    from .app import Studio, make_app
    from .guard import is_loopback, new_token
    from .niivue import niivue_module
    from .session import Sessions
    from .worker import Worker

    viewer = niivue_module()
    failures: list[BaseException] = []
    with listening(settings) as listener, TemporaryDirectory(prefix="medvolume-studio-") as folder:
        port = listener.getsockname()[1]

        server: uvicorn.Server | None = None

        def failed(error: BaseException) -> None:
            failures.append(error)
            if server is not None:
                server.should_exit = True

        pipelines = list(dict.fromkeys(map(from_anywhere, settings.pipeline)))
        worker = Worker(lambda name: load(settings, name), pipelines[0], failed)
        studio = Studio(
            pipelines=pipelines,
            worker=worker,
            sessions=Sessions(Path(folder)),
            token=new_token(),
            niivue=viewer,
            host=settings.host,
            cookie=f"medvolume_studio_{port}",
            most=settings.upload_mb << 20,
            mask_pipeline=None if settings.mask_pipeline is None else from_anywhere(settings.mask_pipeline),
        )
        config = uvicorn.Config(make_app(studio), log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        server = uvicorn.Server(config)
        if failures:  # the model could not be loaded, before `failed` knew of the server
            server.should_exit = True
        if not is_loopback(settings.host):
            print(RISK.format(host=settings.host, port=port), flush=True)
        print(f"The studio is at {address(settings.host, port)}/?token={studio.token}", flush=True)
        print("Ctrl-C ends it, and removes the files of its sessions.", flush=True)
        try:
            server.run(sockets=[listener])
        finally:
            worker.close()
    if failures:
        raise CannotContinue(users_message(failures[0]) or repr(failures[0])) from failures[0]


def check_installed() -> None:
    """Raises: ValueError if a package of the extra `studio` is missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the studio needs {', '.join(missing)}: pip install -e '.[studio]' -c constraints.txt")


def listening(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens where the settings say. Raises: ValueError if it cannot."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{settings.host}:{settings.port}: cannot listen there ({reason}); give another --port, 0 for a free one"
        ) from error


def address(host: str, port: int) -> str:
    """Return the address of the page, for a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def from_anywhere(pipeline: str) -> str:
    """Return the name of a pipeline for "copy as command", which runs in another folder: of a local one its path."""
    return str(Path(pipeline).resolve()) if Path(pipeline).is_dir() else pipeline


def load(settings: ServerSettings, pipeline: str) -> VolumePipeline:
    """Load a pipeline."""
    device = find_device(settings.device)
    pipe = MedVolumePipeline.from_pretrained(pipeline, dtype=DTYPES[settings.precision]).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
