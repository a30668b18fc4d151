"""What the routes of the studio share: its models and sessions, and what a request names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from starlette.requests import Request

from ..models import StudioModel, check_together, short_names
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
        pipelines: names of the models: whole paths, or repositories, so that "copy as command" runs in any folder. The
            first is loaded at the start, and sessions rest on it.
        niivue: the viewer's module, see `niivue_module`.
        cookie: name of the cookie of a session.
        most: bytes of uploads in one session.
        mask_pipeline: name of the pipeline of masks to start from.
    """

    pipelines: Sequence[str]
    worker: Worker
    sessions: Sessions
    token: str
    niivue: str
    host: str = "127.0.0.1"
    cookie: str = "medvolume_studio"
    most: int = 1 << 30
    mask_pipeline: str | None = None

    @property
    def first(self) -> StudioModel:
        """The model that masks and views of sessions rest on. Raises: NotLoaded before it is loaded."""
        if self.pipelines[0] not in self.worker.models:
            raise NotLoaded("the model is loading; try again in a moment")
        return self.worker.models[self.pipelines[0]]

    @cached_property
    def titles(self) -> Mapping[str, str]:
        """A short name of each model."""
        return short_names([*self.pipelines, *([] if self.mask_pipeline is None else [self.mask_pipeline])])

    def named(self, name: object) -> str:
        """Return the name of a model, that of the first for None. Raises: NotFound for one that is not served."""
        if name is None:
            return self.pipelines[0]
        if not isinstance(name, str) or name not in self.pipelines:
            raise NotFound(f"this studio has no model {str(name)[:200]}; reload the page")
        return name

    def model(self, name: str) -> StudioModel | None:
        """Return what is known of a model; None before it was loaded.

        Raises: ValueError for one that does not fit to the first.
        """
        model = self.worker.models.get(name)
        if model is not None:
            check_together(self.first, model)
        return model

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
