"""Jobs to measure: each function builds models and inputs, and returns the `Work` to time, with its FLOPs if known.

Every job takes `device` and `precision`: float32 (TF32 off), tf32 (CUDA only) or bf16. In bf16 our weights are bf16,
as the pipeline loads them; peers and trainings run under autocast, as in their own scripts.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from monai.inferers.inferer import SlidingWindowInferer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKL3D, kl_loss, l1_loss
from benchmarks import generation
from diffusion import Conditions, denoise, make_scheduler
from volumes import make_phantom

from . import choices
from .measure import Work
from .models import AUTOENCODERS, UNETS, decode, encode, latent_shape, parameters, posterior, predict

Shape = tuple[int, int, int]
OUR_WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "hippocampus" / "vae"


def decoding(
    model: str, shape: Shape, device: str, precision: str, *, streamed: bool = False, compiled: bool = False
) -> Work:
    """Decode latents of `shape` (X, Y, Z) voxels."""
    net, latents = build_autoencoder(model, device, precision, streamed, compiled), noise(latent_shape(shape), device)
    latents = latents.to(next(net.parameters()).dtype)

    def run() -> None:
        with torch.inference_mode(), autocast(device, precision):
            decode(net, latents)

    return Work(run, facts(net, lambda meta: decode(meta, meta_input(latent_shape(shape))), AUTOENCODERS[model]))


def encoding(
    model: str, shape: Shape, device: str, precision: str, *, streamed: bool = False, compiled: bool = False
) -> Work:
    """Encode a volume of `shape` (X, Y, Z) voxels."""
    net, volume = build_autoencoder(model, device, precision, streamed, compiled), noise((1, *shape), device)
    volume = volume.to(next(net.parameters()).dtype)

    def run() -> None:
        with torch.inference_mode(), autocast(device, precision):
            encode(net, volume)

    return Work(run, facts(net, lambda meta: encode(meta, meta_input((1, *shape))), AUTOENCODERS[model]))


def sliding_window_decoding(model: str, shape: Shape, window: int, device: str, precision: str) -> Work:
    """Decode with MONAI's SlidingWindowInferer, cubes of `window` latent voxels, overlap 0.25, Gaussian blending."""
    net, latents = build_autoencoder(model, device, precision), noise(latent_shape(shape), device)
    inferer = SlidingWindowInferer(roi_size=window, sw_batch_size=1, overlap=0.25, mode="gaussian")

    def run() -> None:
        with torch.inference_mode(), autocast(device, precision):
            inferer(latents, lambda part: decode(net, part))

    return Work(run, {"parameters": parameters(net), "window": window})


def decoding_to_disk(shape: Shape, device: str, precision: str, folder: str) -> Work:
    """Decode `shape` (X, Y, Z) voxels with our decoder slab by slab into a file; the result is never in memory."""
    net = build_autoencoder("ours", device, precision, streamed=True)
    latents = noise(latent_shape(shape), device).to(next(net.parameters()).dtype)

    def run() -> dict[str, int]:
        written = 0
        with torch.inference_mode(), tempfile.TemporaryFile(dir=folder) as sink:
            for slab in net.decode_slabs(latents):
                written += sink.write(slab.float().cpu().contiguous().numpy().data)
        return {"bytes_written": written}

    return Work(run, {"parameters": parameters(net)})


def seam(model: str, size: int, device: str, *, weights: str | None = None, window: int | None = None) -> Work:
    """Measure the error of decoding in pieces, on the latents of a phantom of `size` ** 3 voxels.

    Ours is decoded in slabs, a peer by a sliding window of `window` latent voxels. Errors are relative to the range of
    the volume that is decoded at once (largest minus smallest voxel).
    """
    net: Any = build_autoencoder(model, device, "float32", streamed=window is None, weights=weights)
    volume = torch.from_numpy(make_phantom(0, (size, size, size))[0].array)[None].to(device)
    volume = 2 * (volume - volume.min()) / (volume.max() - volume.min()) - 1

    @torch.inference_mode()
    def run() -> dict[str, float]:
        if window is None:
            pieces, whole = decode_both_ways(net, volume)
        else:
            latents = encode(net, volume)
            whole = decode(net, latents)
            inferer = SlidingWindowInferer(roi_size=window, sw_batch_size=1, overlap=0.25, mode="gaussian")
            pieces: Tensor = inferer(latents, lambda part: decode(net, part))  # pyright: ignore[reportAssignmentType]
        error = (pieces - whole) / (whole.max() - whole.min())
        return {"max": error.abs().max().item(), "rms": error.square().mean().sqrt().item()}

    return Work(run, {"trained": weights is not None, "window": window})


def decode_both_ways(vae: AutoencoderKL3D, volume: Tensor) -> tuple[Tensor, Tensor]:
    """Decode the volume's latents in slabs of one plane (the worst case), and at once."""
    vae.disable_tiling()
    latents = encode(vae, volume)
    whole = decode(vae, latents)
    vae.enable_tiling(slab_bytes=1)
    return decode(vae, latents), whole


def training_autoencoder(
    model: str,
    shape: Shape,
    batch: int,
    device: str,
    precision: str,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Work:
    """Run forward, backward and AdamW step on `batch` patches; the losses are L1 and KL for all models."""
    net = build_autoencoder(model, device, "float32", compiled=compiled, training=True)
    if checkpointing:
        net.enable_gradient_checkpointing()
    volume = noise((1, *shape), device, batch)
    step = optimizer_step(net, lambda m, x: autoencoder_loss(m, x), volume, device, precision)
    known = facts(
        net, lambda meta: autoencoder_loss(meta, meta_input((1, *shape), batch)).backward(), AUTOENCODERS[model]
    )
    return Work(step, known)


def training_unet(
    model: str,
    shape: Shape,
    batch: int,
    device: str,
    precision: str,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Work:
    """Run forward, backward and AdamW step on `batch` latents of `shape` (h, w, d); the loss is the MSE."""
    net: Any = UNETS[model]().to(device).train()
    if checkpointing:
        net.enable_gradient_checkpointing()
    if compiled:
        net.compile()
    latents = noise((4, *shape), device, batch)
    step = optimizer_step(net, unet_loss, latents, device, precision)
    known = facts(net, lambda meta: unet_loss(meta, meta_input((4, *shape), batch)).backward(), UNETS[model])
    return Work(step, known)


def sampling(
    model: str,
    shape: Shape,
    steps: int,
    device: str,
    precision: str,
    *,
    steps_run: int | None = None,
    compiled: bool = False,
) -> Work:
    """Sample once: ours by Euler steps (`diffusion.denoise`), MONAI's latent U-Net by DDIM, its voxel U-Net by DDPM.

    Args:
        model: name of the U-Net.
        shape: shape of the latents, or voxels for "monai voxels".
        steps: number of steps of a sample.
        device: device to run on.
        precision: precision to run in.
        steps_run: number of steps to run; the report multiplies the time by `steps / steps_run`.
        compiled: whether to use torch.compile.
    """
    set_precision(precision)
    net = build_unet(model, device, precision)
    if compiled:
        net.compile()
    start = noise((1 if model == "monai voxels" else 4, *shape), device).to(next(net.parameters()).dtype)

    def run() -> None:
        with torch.no_grad(), autocast(device, precision, enabled=model != "ours"):
            if model == "ours":
                denoise(net, start, make_scheduler("rectified_flow"), Conditions(), num_inference_steps=steps)
            else:
                scheduler = DDPMScheduler() if model == "monai voxels" else DDIMScheduler()
                _sample_peer(net, start, scheduler, steps, steps_run or steps)

    def one_step(meta: nn.Module) -> None:
        predict(meta, meta_input(tuple(start.shape[1:])), torch.zeros(1, device="meta"))

    known = facts(net, one_step, UNETS[model])
    return Work(
        run, {**known, "steps": steps, "steps_run": steps_run or steps, "flops": known["flops"] * (steps_run or steps)}
    )


def _sample_peer(net: nn.Module, noisy: Tensor, scheduler: Any, steps: int, steps_run: int) -> None:
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps[:steps_run]:
        prediction = predict(net, noisy, timestep.expand(len(noisy)).to(noisy.device))
        noisy = scheduler.step(prediction, timestep, noisy, return_dict=False)[0]


def attention_backend(backend: str, shape: Shape, device: str, precision: str) -> Work:
    """Call our U-Net with one of diffusers' attention backends, and compare with its `_native_math`."""
    set_precision(precision)
    net = build_unet("ours", device, precision)
    with torch.no_grad():  # a new U-Net's last layer is zero and would hide errors of attention
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    latents, timestep = (
        noise((4, *shape), device).to(next(net.parameters()).dtype),
        torch.full((1,), 500.0, device=device),
    )
    with torch.inference_mode():
        net.set_attention_backend("_native_math")
        reference = predict(net, latents, timestep).float()
        net.set_attention_backend(backend)

    @torch.inference_mode()
    def run() -> dict[str, float]:
        error = (predict(net, latents, timestep).float() - reference).abs().max() / reference.abs().max()
        return {"relative_error": error.item()}

    return Work(run, {"parameters": parameters(net)})


def generating(device: str, *, steps: int, repeats: int, folder: str) -> Work:
    """Measure seconds per volume of the shipped pipeline: benchmarks/generation.py."""
    output = str(Path(folder) / "generation.json")
    arguments = ["--steps", str(steps), "--guidance_scale", "1", "--repeats", str(repeats)]
    arguments += ["--device", device, "--output", output]
    return Work(lambda: _without_provenance(generation.main(arguments)))


def timing_choices(*, repeats: int, folder: str) -> Work:
    """Measure the gain of each optimization: benchmarks/speed/choices.py."""
    arguments = ["--repeats", str(repeats), "--output", str(Path(folder) / "choices.json")]
    return Work(lambda: _without_provenance(choices.main(arguments)))


def _without_provenance(report: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in report.items() if k not in ("command", "date", "commit", "machine", "versions", "masks")}


def build_autoencoder(
    model: str,
    device: str,
    precision: str,
    streamed: bool = False,
    compiled: bool = False,
    *,
    weights: str | None = None,
    training: bool = False,
) -> Any:
    """Build an autoencoder on its device; `weights` is a safetensors file of a peer, or our folder."""
    set_precision(precision)
    torch.manual_seed(0)
    if weights is not None and model == "ours":
        net: Any = AutoencoderKL3D.from_pretrained(weights)
    else:
        net = AUTOENCODERS[model]()
        if weights is not None:
            net.load_state_dict(load_file(weights))
    net = net.to(device).train(training)
    if precision == "bf16" and model == "ours":
        net = net.to(torch.bfloat16)
    if streamed:
        net.enable_tiling()
    if compiled:
        net.encoder.compile()
        net.decoder.compile()
    return net


def build_unet(model: str, device: str, precision: str) -> Any:
    """Build a U-Net on its device."""
    torch.manual_seed(0)
    net = UNETS[model]().to(device).eval()
    return net.to(torch.bfloat16) if precision == "bf16" and model == "ours" else net


def set_precision(precision: str) -> None:
    """Switch TF32 on or off, and cuDNN's search for the fastest kernel on (CUDA only)."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextmanager
def autocast(device: str, precision: str, enabled: bool = True) -> Iterator[None]:
    """Use bf16 autocast if the precision is bf16."""
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled and precision == "bf16"):
        yield


def autoencoder_loss(model: nn.Module, volume: Tensor) -> Tensor:
    """Compute L1 and a small KL of a sample of the posterior, as in training."""
    encoded = posterior(model, volume)
    fov = torch.ones_like(volume, dtype=torch.bool)
    return l1_loss(decode(model, encoded.sample()).float(), volume, fov) + 1e-4 * kl_loss(encoded, fov)


def unet_loss(model: nn.Module, latents: Tensor) -> Tensor:
    """Compute the mean squared error against noise."""
    target, timestep = torch.randn_like(latents), torch.full((len(latents),), 500.0, device=latents.device)
    return F.mse_loss(predict(model, latents, timestep).float(), target)


def optimizer_step(
    net: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], batch: Tensor, device: str, precision: str
) -> Callable[[], None]:
    """Return one training step as a function without arguments."""
    set_precision(precision)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with autocast(device, precision):
            value = loss(net, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def noise(shape: Sequence[int], device: str, batch: int = 1) -> Tensor:
    """Return standard normal noise, the same in every call."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def facts(net: nn.Module, call: Callable[[nn.Module], Any], build: Callable[[], nn.Module]) -> dict[str, int]:
    """Count the parameters, and the FLOPs of `call` on the meta device, where no kernel is unknown to the counter."""
    with torch.device("meta"):
        meta = build()
    with FlopCounterMode(display=False) as counter:
        call(meta)
    return {"parameters": parameters(net), "flops": counter.get_total_flops()}


def meta_input(shape: Sequence[int], batch: int = 1) -> Tensor:
    """Return an empty batch on the meta device."""
    return torch.empty(batch, *shape, device="meta")
