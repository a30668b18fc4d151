"""How much memory training and generation take, found by running them without numbers.

Tensors are fake (shapes and types, no data; PyTorch's FakeTensorMode), so a step of any size is run in seconds, and every
operation's result is counted as long as it lives. What is not seen: scratch space inside a kernel, the allocator's
fragments, and the program itself (some 0.5 GB; on CUDA another 0.5 GB for its context).
"""

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoencoder import VolumeAutoencoder
from autoencoder.adversarial import (
    Slices,
    VolumeDiscriminator,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from autoencoder.losses import l1_loss, latent_loss
from diffusion import LatentUNet3D
from training.engine.muon import is_kernel

MOMENT_BYTES = 4  # float32; AdamW keeps two moments of a weight, Muon one of the kernels of convolutions
GIB = 2**30


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made under it, as long as they live; `peak` is the most at a time. What is in place or a
    view counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mkldnn_convolution.default:  # has no fake kernel
            x, weight, bias, padding, stride, dilation, groups = args
            func = torch.ops.aten.convolution.default
            args = (x, weight, bias, stride, padding, dilation, False, [0] * len(padding), groups)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
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


def peak_of(model: nn.Module, work: Callable[[], object], *, training: bool = False) -> int:
    """Peak bytes of what `work` makes with `model`, whose weights become fake: it is of no use afterwards. The weights
    themselves do not count, their gradients do."""
    mode = FakeTensorMode()
    _make_fake(model, mode)
    with mode, torch.set_grad_enabled(training), LiveTensors() as live:
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


def training_bytes(model: nn.Module, step: Callable[[], object], *, muon: bool = False) -> dict[str, int]:
    """{"weights", "average" (of the weights), "optimizer", "step" (activations and gradients at their peak), "total"} in
    bytes, weights in float32. Of several networks: in one nn.ModuleList.

    Args:
        muon: whether kernels of convolutions are updated by Muon.
    """
    weights = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(p.numel() * (1 if muon and is_kernel(p) else 2) for p in trained)
    parts = {
        "weights": 4 * weights,
        "average": 4 * weights,
        "optimizer": MOMENT_BYTES * moments,
        "step": peak_of(model, step, training=True),
    }
    return {**parts, "total": sum(parts.values())}


def autoencoder_step(
    vae: VolumeAutoencoder,
    crop: Sequence[int],
    batch: int,
    *,
    discriminator: VolumeDiscriminator | None = None,
    slices: int = 1,
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """A step of training on `batch` crops: forward, L1 and latent losses, backward, and the discriminator's part. A
    perceptual network is not in it.

    Args:
        critic: the discriminator, which looks at so many `slices` of each crop.
        autocast: type that networks compute in; None for float32.
    """

    def step() -> None:
        device = next(vae.parameters()).device
        image = torch.rand(batch, vae.config["in_channels"], *crop, device=device)
        fov = torch.ones(batch, 1, *crop, dtype=torch.bool, device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            reconstruction, latents = vae(image, sample_posterior=True, return_dict=False)
        loss = l1_loss(reconstruction, image, fov) + latent_loss(latents, fov)[1]
        if discriminator is None:
            loss.backward()
            return
        planes = torch.zeros(2 * batch, slices, dtype=torch.int64, device=device)
        discriminator.requires_grad_(False)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            fake = discriminator(reconstruction, Slices(0, planes[:batch]))
            with torch.no_grad():
                real = discriminator(image, Slices(0, planes[:batch]))
        discriminator.requires_grad_(True)
        (loss + generator_loss(fake) + feature_matching_loss(real, fake)).backward()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = discriminator(torch.cat([image, reconstruction.detach()]), Slices(0, planes))
        halves = [[layer.chunk(2) for layer in features] for features in found]
        discriminator_loss(*([[layer[i] for layer in features] for features in halves] for i in range(2))).backward()

    return step


def unet_inputs(unet: LatentUNet3D, cells: Sequence[int], batch: int) -> dict[str, Any]:
    """Arguments of the U-Net for `batch` latents of `cells` (h, w, d), with all its conditions."""
    config, device = unet.config, next(unet.parameters()).device
    given: dict[str, Any] = {
        "sample": torch.zeros(batch, config["in_channels"], *cells, device=device),
        "timestep": torch.zeros(batch, device=device),
        "return_dict": False,
    }
    if config["num_labels"]:
        places = math.prod(unet.mask_stride)
        given["mask"] = torch.ones(batch, *cells, places, dtype=torch.int32, device=device)
    if config["classes"]:
        given["classes"] = torch.zeros(batch, len(config["classes"]), dtype=torch.int64, device=device)
    if config["numbers"]:
        given["numbers"] = torch.zeros(batch, len(config["numbers"]), device=device)
    if config["images"]:
        given["image"] = torch.zeros(batch, len(unet.condition_schema.image_columns), *cells, device=device)
    return given


def unet_step(
    unet: LatentUNet3D, cells: Sequence[int], batch: int, *, autocast: torch.dtype | None = None
) -> Callable[[], None]:
    """A step of training on `batch` latents: forward (under autocast to a type, or not), squared error, backward."""

    def step() -> None:
        inputs = unet_inputs(unet, cells, batch)
        with torch.autocast(inputs["sample"].device.type, autocast, enabled=autocast is not None):
            prediction = unet(**inputs)[0]
        ((prediction.float() - inputs["sample"]) ** 2).mean().backward()

    return step


def generation_bytes(
    vae: VolumeAutoencoder, unet: LatentUNet3D | None, shape: Sequence[int], batch: int
) -> dict[str, int]:
    """{"weights", "denoising" (`batch` volumes at once, one step), "decoding" (one volume), "total"} in bytes, in float32,
    of volumes padded to `shape`. Guidance doubles the denoising. The latent cache encodes a volume in what it takes to
    decode one."""
    latents = vae.config["latent_channels"]
    cells = [n // s for n, s in zip(shape, vae.stride, strict=True)]
    models = [vae] if unet is None else [vae, unet]
    parts = {"weights": sum(4 * p.numel() for model in models for p in model.parameters())}
    if unet is not None:
        parts["denoising"] = peak_of(unet, lambda: unet(**unet_inputs(unet, cells, batch)))
    parts["decoding"] = peak_of(vae, lambda: vae.decode(torch.zeros(1, latents, *cells), return_dict=False))
    return {**parts, "total": parts["weights"] + max(parts.get("denoising", 0), parts["decoding"])}


def dataset_bytes(shapes: Sequence[Sequence[int]], channels: int, masks: bool) -> int:
    """What `VolumeDataset` holds in memory, in each process: float32 images and int16 masks."""
    voxels = sum(math.prod(shape) for shape in shapes)
    return voxels * (4 * channels + (2 if masks else 0))


def told(parts: Mapping[str, int]) -> str:
    """The parts in words."""
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if name != "total")


def measured_peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` takes at its peak, beyond what is held before: of the accelerator's allocator, or on the CPU of the
    process's resident memory.

    Raises: ValueError on a CPU where Linux's /proc does not tell.
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
    if trim := getattr(
        ctypes.CDLL(None), "malloc_trim", None
    ):  # else what was freed, but not given back, is used again
        trim(0)
    forget.write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
