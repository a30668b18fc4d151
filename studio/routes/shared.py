"""What the routes of the studio share: its model and sessions, and what a request names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from starlette.requests import Request

from pipelines.base import VolumePipeline

from ..inputs import Page
from ..session import Session, Sessions
from ..uploads import receive
from ..worker import Worker

MOST_JSON = 1 << 20  # bytes
BYTES = "application/octet-stream"
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
    """Return the body of a request. Raises: ValueError for anything but a JSON object."""
    text = await receive(request.stream(), MOST_JSON)
    try:
        content = json.loads(text or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("the request is not a JSON object")
    return content
