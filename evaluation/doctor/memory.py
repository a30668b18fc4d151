"""Memory that training and generation take, found by running them without values.

Tensors are fake (shapes and types, no data; PyTorch's FakeTensorMode), so a step of any size runs in seconds, and every
operation's result counts as long as it lives. On a CPU, the workspace of convolutions counts too (`cpu_memory`).

Not counted: on CUDA, scratch space inside a kernel; memory that an allocator keeps after it was freed (glibc's, of
blocks below 32 MiB); and the program itself (some 0.5 GB; on CUDA another 0.5 GB for its context).
"""

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoencoder import VolumeAutoencoder
from diffusion import Conditions, LatentDenoiser
from training import LdmTrainingStep, Learner, VaeTrainingStep

from .cpu_memory import workspace

WEIGHT_BYTES = 4  # float32
CONDITIONS = ("mask", "classes", "numbers", "image")
GIB = 2**30


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors that are made under it, as long as they live; `peak` is the highest sum. A view, and
    an operation in place, count once.

    Fake tensors have no values. Where a step reads one, it is 0 here; and a boolean mask selects everything, the
    largest case.

    Args:
        held: tensors from before, which do not count.
        cpu: whether the workspace of this machine's CPU counts.
    """

    def __init__(self, held: Iterable[Tensor] = (), cpu: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.cpu = cpu
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        extra = workspace(func, args) if self.cpu else 0
        if func is torch.ops.aten.mkldnn_convolution.default:  # has no fake kernel
            x, weight, bias, padding, stride, dilation, groups = args
            func = torch.ops.aten.convolution.default
            args = (x, weight, bias, stride, padding, dilation, False, [0] * len(padding), groups)
        if args and isinstance(args[0], FakeTensor):
            aten = torch.ops.aten
            if func is aten._local_scalar_dense.default:
                return 0.0 if args[0].is_floating_point() else 0
            if func is aten.bincount.default:
                length = (kwargs or {}).get("minlength", args[-1])
                func, args, kwargs = aten.zeros.default, ([length],), {"dtype": torch.int64}
            elif func is aten.index.Tensor and getattr(args[1][0], "dtype", None) is torch.bool:
                func, args = aten.clone.default, (args[0].flatten(0, args[1][0].ndim - 1),)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        if self.cpu:
            self.peak = max(self.peak, self.live + extra)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


def peak_of(model: nn.Module, work: Callable[[], object], *, training: bool = False, cpu: bool = False) -> int:
    """Return the peak bytes of what `work` makes with `model`. The weights do not count, their gradients do.

    The weights become fake, so the model is of no use afterwards.

    Args:
        training: whether gradients are computed.
        cpu: whether to count the workspace of this machine's CPU.
    """
    mode = FakeTensorMode()
    _make_fake(model, mode)
    held = [*model.parameters(), *model.buffers()]
    with mode, torch.set_grad_enabled(training), LiveTensors(held, cpu) as live:
        work()
    return live.peak


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer.detach())


class OneProcess:
    """The part of Accelerate that a training step uses, in one process, on one device and without any global state.

    Args:
        autocast: type that networks compute in; None for float32.
    """

    num_processes = 1

    def __init__(self, device: torch.device, autocast: torch.dtype | None = None):
        self.device, self.dtype = device, autocast

    def autocast(self) -> torch.autocast:
        """Compute in the chosen type."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """Wrap a network's forward pass as Accelerate does: under autocast, with float32 outputs."""
        if self.dtype is not None:
            model.forward = convert_outputs_to_fp32(self.autocast()(model.forward))
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()


def networks_of(step: VaeTrainingStep | LdmTrainingStep) -> nn.ModuleList:
    """Return the networks that a step runs: those that learn, and a frozen one of a perceptual loss."""
    networks: list[nn.Module] = [learner.network for learner in step.learners]
    if isinstance(step, VaeTrainingStep) and step.perception is not None:
        networks.append(step.perception.network)
    return nn.ModuleList(networks)


def training_work(
    step: VaeTrainingStep | LdmTrainingStep, shape: Sequence[int], batch: int, accelerator: OneProcess
) -> Callable[[], None]:
    """Prepare a training step of the trainer's own, and return a function that runs it on a batch of made-up samples.

    Args:
        shape: of a patch in voxels, or of a volume in latent voxels.
    """
    device: Any = accelerator.device
    for learner in step.learners:
        learner.prepare(accelerator)  # pyright: ignore[reportArgumentType]
    if isinstance(step, VaeTrainingStep) and step.adversary is not None:
        step.vae.updates = step.adversary.config.start_step  # the discriminator has started

    def work() -> None:
        generators = [torch.Generator(device).manual_seed(index) for index in range(batch)]
        with torch.enable_grad():
            if isinstance(step, VaeTrainingStep):
                image = torch.rand(batch, step.vae.network.config["in_channels"], *shape, device=device)
                fov = torch.ones(batch, 1, *shape, dtype=torch.bool, device=device)
                step({"image": image, "fov": fov}, generators)
                return
            inputs = unet_inputs(step.unet.network, shape, batch)
            mean = inputs.pop("sample")
            conditions = Conditions(**{name: inputs[name] for name in CONDITIONS if name in inputs})
            weight = torch.ones(batch, 1, *shape, device=device)
            step({"mean": mean, "std": torch.ones_like(mean), "weight": weight, "conditions": conditions}, generators)

    return work


def training_bytes(
    step: VaeTrainingStep | LdmTrainingStep, work: Callable[[], object], *, cpu: bool = False
) -> dict[str, int]:
    """Return {"weights", "average" (of the weights), "optimizer", "step" (activations and gradients at their peak),
    "total"} in bytes, weights in float32. The step's weights are of no use afterwards.

    Args:
        work: `training_work` of the step.
        cpu: as in `peak_of`.
    """
    networks = networks_of(step)
    parts = {
        "weights": WEIGHT_BYTES * sum(p.numel() for p in networks.parameters()),
        "average": WEIGHT_BYTES * sum(p.numel() for learner in step.learners for p in learner.network.parameters()),
        "optimizer": sum(optimizer_bytes(learner) for learner in step.learners),
        "step": peak_of(networks, work, training=True, cpu=cpu),
    }
    return {**parts, "total": sum(parts.values())}


def optimizer_bytes(learner: Learner) -> int:
    """Return the bytes of an optimizer's state: two moments of a weight for AdamW, one of a kernel for Muon."""
    groups = learner.optimizer.param_groups
    return WEIGHT_BYTES * sum((1 if g.get("muon") else 2) * sum(p.numel() for p in g["params"]) for g in groups)


def unet_inputs(unet: LatentDenoiser, shape: Sequence[int], batch: int) -> dict[str, Tensor]:
    """Return arguments of the U-Net for `batch` latents of `shape` (h, w, d), with all its conditions."""
    config, device, schema = unet.config, next(unet.parameters()).device, unet.condition_schema
    inputs = {
        "sample": torch.zeros(batch, config["in_channels"], *shape, device=device),
        "timestep": torch.zeros(batch, device=device),
    }
    if schema.mask:
        places = math.prod(unet.mask_stride)
        inputs["mask"] = torch.ones(batch, *shape, places, dtype=torch.int32, device=device)
    if schema.classes:
        inputs["classes"] = torch.zeros(batch, len(schema.classes), dtype=torch.int64, device=device)
    if schema.numbers:
        inputs["numbers"] = torch.zeros(batch, len(schema.numbers), device=device)
    if schema.images:
        inputs["image"] = torch.zeros(batch, len(schema.image_columns), *shape, device=device)
    return inputs


def generation_bytes(
    vae: VolumeAutoencoder, unet: LatentDenoiser | None, shape: Sequence[int], batch: int, *, cpu: bool = False
) -> dict[str, int]:
    """Return {"weights", "denoising" (`batch` volumes at once, one step), "decoding" (one volume), "total"} in bytes,
    in float32, for volumes padded to `shape`. Guidance doubles the denoising. Encoding for the latent cache takes as
    much as decoding.

    Args:
        cpu: as in `peak_of`.
    """
    latents = vae.config["latent_channels"]
    latent_shape = [n // s for n, s in zip(shape, vae.stride, strict=True)]
    models = [vae] if unet is None else [vae, unet]
    parts = {"weights": WEIGHT_BYTES * sum(p.numel() for model in models for p in model.parameters())}
    if unet is not None:

        def denoise() -> None:
            unet(**unet_inputs(unet, latent_shape, batch), return_dict=False)

        parts["denoising"] = peak_of(unet, denoise, cpu=cpu)

    def decode() -> None:
        vae.decode(torch.zeros(1, latents, *latent_shape), return_dict=False)

    parts["decoding"] = peak_of(vae, decode, cpu=cpu)
    return {**parts, "total": parts["weights"] + max(parts.get("denoising", 0), parts["decoding"])}


def dataset_bytes(shapes: Sequence[Sequence[int]], channels: int, masks: bool) -> int:
    """Return what prepared volumes take on the disk at most: float32 images and int16 masks."""
    voxels = sum(math.prod(shape) for shape in shapes)
    return voxels * (4 * channels + (2 if masks else 0))


def format_parts(parts: Mapping[str, int]) -> str:
    """Return the parts as "weights 0.12, step 1.30" in GiB."""
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if name != "total")


def measured_peak(work: Callable[[], object], device: torch.device) -> int:
    """Measure the bytes that `work` takes at its peak, beyond those held before: by the accelerator's allocator, or, on
    the CPU, by the process's resident memory.

    Raises: ValueError on a CPU without Linux's /proc.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        raise ValueError("a dry run on the CPU reads its memory from /proc, which only Linux has; give --device cuda")
    gc.collect()
    # Otherwise memory that was freed, but not returned to the system, is used again.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    forget.write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
