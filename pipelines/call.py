"""The state of one call of a pipeline, so that calls may run side by side, in threads or one within another."""

import inspect
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypedDict
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn
from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm

from autoencoder.identity import has_hooks
from diffusion.denoise import StepChange
from pipelines.inputs.arguments import flag, names

TENSOR_INPUTS = ("latents",)  # that a callback may be given
BAR = {"desc": "denoise", "leave": False}  # unless set_progress_bar_config says otherwise
BAR_OPTIONS = {*inspect.signature(plain_tqdm.__init__).parameters} - {"self", "iterable", "total", "initial", "kwargs"}


@dataclass(eq=False)
class CallState:
    """The state of one call that callbacks see, and change.

    Attributes:
        guidance_scale: of the next step.
        interrupt: whether no further step is made.
        num_timesteps: of the batch that is denoised.
    """

    guidance_scale: Any = 1.0
    interrupt: bool = False
    num_timesteps: int = 0


_here: ContextVar[tuple[tuple[Any, CallState], ...]] = ContextVar("calls", default=())  # one within another
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def one_at_a_time(*models: nn.Module) -> Iterator[None]:
    """Wait until no other call runs those of the models that cannot run twice at once: whose weights hooks move or
    cast, or whose code is compiled (torch has one switch for it in all threads). All others run side by side."""
    with _guard:
        locks = [_locks.setdefault(model, threading.RLock()) for model in models if _is_exclusive(model)]
    with ExitStack() as stack:
        for lock in sorted(locks, key=id):  # in one order for all, so that no two wait for each other
            stack.enter_context(lock)
        yield


def _is_exclusive(model: nn.Module) -> bool:
    compiled = any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) for one in model.modules())
    return compiled or has_hooks(model)


def _of_call(name: str) -> property:
    """An attribute of the call that the caller is in; from outside, of all calls that run, or else of the last one."""

    def read(pipe: "PipelineCalls") -> Any:
        return getattr(pipe._states()[-1], name)

    def write(pipe: "PipelineCalls", value: Any) -> None:
        for state in pipe._states():
            setattr(state, name, value)

    return property(read, write)


class PipelineCalls:
    """diffusers' attributes of a call, by which callbacks control it, and its progress bar."""

    _callback_tensor_inputs = list(TENSOR_INPUTS)
    _interrupt, _guidance_scale, _num_timesteps = map(_of_call, ("interrupt", "guidance_scale", "num_timesteps"))
    _running: list[CallState]
    _last: CallState
    _progress_bar_config: Mapping[str, Any]

    @property
    def guidance_scale(self) -> Any:
        """Of the call, as it is now; a callback sets `_guidance_scale`, for the steps of its batch that follow."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the call makes no further steps; a callback, or another thread, sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many timesteps the batch goes through."""
        return self._num_timesteps

    def _states(self) -> list[CallState]:
        for pipe, state in reversed(_here.get()):
            if pipe is self:
                return [state]
        return list(self._running) or [self._last]

    @contextmanager
    def _call_state(self) -> Iterator[CallState]:
        """The state of a call that begins, and ends with the block."""
        state = CallState()
        self._running.append(state)
        token = _here.set((*_here.get(), (self, state)))
        try:
            yield state
        finally:
            _here.reset(token)
            self._running.remove(state)
            self._last = state

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of tqdm for the bar of each batch's steps, in place of those set before: desc, leave, file,
        bar_format, disable (None: without a terminal), ... Raises: ValueError for what tqdm does not take."""
        if unknown := sorted(kwargs.keys() - BAR_OPTIONS):
            raise ValueError(f"set_progress_bar_config: no option {', '.join(unknown)}; tqdm has {sorted(BAR_OPTIONS)}")
        if kwargs.get("disable") is not None:
            kwargs["disable"] = flag("set_progress_bar_config: disable", kwargs["disable"])
        try:
            _trial_bar()(total=1, **kwargs | {"disable": False, "file": io.StringIO()}).close()
        except Exception as error:  # of many kinds: tqdm trusts its options
            raise ValueError(f"set_progress_bar_config: tqdm does not take {kwargs}: {error!r}") from error
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """As in diffusers."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        quiet = distributed and torch.distributed.get_rank() != 0
        options: Mapping[str, Any] = {**BAR, "disable": quiet, **getattr(self, "_progress_bar_config", {})}
        return tqdm(iterable, total=total, **options)


def _trial_bar() -> Any:
    """A class of bars that share nothing with others: tqdm keeps its lock for ever where a bar cannot be shown."""
    trial = type("TrialBar", (plain_tqdm,), {"monitor_interval": 0, "_instances": WeakSet()})
    trial.set_lock(threading.RLock())
    return trial


class Changes(TypedDict, total=False):
    """What a callback changed in the steps of a batch, for the records."""

    latents: list[int]  # steps after which it replaced them
    guidance_scale: dict[str, float | dict[str, float]]  # {step: scale after it}
    interrupted_after: int  # steps


@dataclass
class StepCallback:
    """diffusers' `callback_on_step_end` as the one that `denoise` takes, for one batch.

    Attributes:
        check_guidance: raises a ValueError for a scale that the call cannot have.
        changes: empty if the callback changed nothing.
        total: timesteps of the batch, whatever the callback makes of the pipeline's `_num_timesteps`.
    """

    pipe: "PipelineCalls"
    state: CallState
    step_end: "StepEnd"
    check_guidance: Callable[[Any], float | dict[str, float] | None]
    changes: Changes = field(default_factory=lambda: Changes())
    total: int = 0

    def __post_init__(self) -> None:
        self.scale = self.check_guidance(self.state.guidance_scale)

    def bar(self, total: int) -> Any:
        """The progress bar of the batch, of so many timesteps."""
        self.total = self.state.num_timesteps = total
        return self.pipe.progress_bar(total=total)

    def __call__(self, step: int, timestep: Tensor, latents: Tensor) -> StepChange | None:
        """Called after each step with its number, its timestep and latents (B, C, h, w, d). Raises: ValueError for what
        a callback must not return."""
        replaced = None
        if self.step_end.callback is not None:
            before, inputs = latents.clone(), self.step_end.tensor_inputs
            returned = self.step_end.callback(self.pipe, step, timestep, dict.fromkeys(inputs, latents))
            after = checked_latents(returned, latents, inputs)
            if not torch.equal(before, after):  # in place, too
                if torch.isfinite(before).all() and not torch.isfinite(after).all():
                    raise ValueError("callback_on_step_end returned latents that are not finite (NaN or infinite)")
                replaced = after
                self.changes.setdefault("latents", []).append(step)
        more = step + 1 < self.total
        scale, changed = self.check_guidance(self.state.guidance_scale), None
        if scale != self.scale and more:
            self.scale, changed = scale, 1.0 if scale is None else scale
            self.changes.setdefault("guidance_scale", {})[str(step)] = changed
        if self.state.interrupt and more:
            self.changes["interrupted_after"] = step + 1
        return StepChange(replaced, changed, stop=bool(self.state.interrupt))


def checked_latents(returned: Any, latents: Tensor, inputs: Sequence[str]) -> Tensor:
    """The latents after a callback: what it returned, or if it returned none, its argument. Raises: ValueError unless
    it returned None or a dict of what it was given, with latents of the same shape, type and device."""
    if returned is not None and not isinstance(returned, Mapping):
        raise ValueError(
            f"callback_on_step_end returned {type(returned).__name__}; return the dict that it is given, "
            '{"latents": ...}, or None'
        )
    if unknown := [key for key in returned or {} if key not in inputs]:
        raise ValueError(f"callback_on_step_end returned {unknown}; it may return {list(inputs)}, as it is given")
    after = (returned or {}).get("latents", latents)
    wanted = f"latents {tuple(latents.shape)}, {latents.dtype}, on {latents.device}"
    if not isinstance(after, Tensor):
        raise ValueError(f"callback_on_step_end returned {type(after).__name__} for latents; return {wanted}")
    if (after.shape, after.dtype, after.device) != (latents.shape, latents.dtype, latents.device):
        found = f"latents {tuple(after.shape)}, {after.dtype}, on {after.device}"
        raise ValueError(f"callback_on_step_end returned {found}; return {wanted}")
    return after


@dataclass(frozen=True)
class StepEnd:
    """`callback_on_step_end` of a call, and the names of the tensors that it is given.

    A callback of diffusers' classes names its tensors itself.
    Raises: ValueError for what is not a callback, and for tensors that this pipeline does not have.
    """

    callback: Callable[..., Any] | None = None
    tensor_inputs: Sequence[str] = ("latents",)

    def __post_init__(self) -> None:
        callback = self.callback
        if callback is not None and not callable(callback):
            raise ValueError(
                "callback_on_step_end is called as callback(pipe, step, timestep, tensors); got "
                f"{type(callback).__name__}"
            )
        of_class = isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
        inputs = callback.tensor_inputs if of_class else self.tensor_inputs
        inputs = tuple(dict.fromkeys(names("callback_on_step_end_tensor_inputs", inputs)))
        if unknown := [name for name in inputs if name not in TENSOR_INPUTS]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {', '.join(unknown)}; this pipeline's steps have "
                f"{', '.join(TENSOR_INPUTS)}"
            )
        object.__setattr__(self, "tensor_inputs", inputs)
