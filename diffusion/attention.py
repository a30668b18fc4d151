"""Self-attention over all positions of a level, through diffusers' dispatcher (native SDPA, flash, xformers, sage are
one switch)."""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from autoencoder.layers import ChannelRMSNorm

CPU_BACKENDS = ("native", "_native_flash", "_native_math", "flex")  # of diffusers' names; the others are CUDA kernels


def check_attention_backend(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError if the attention backend of `model`, or that of the process, has no kernel for `device`."""
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.processor.check(device)


class SelfAttentionProcessor:
    """The call into the dispatcher; `set_attention_backend` finds it by `_attention_backend`."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def check(self, device: torch.device) -> None:
        """Raise ValueError if the attention backend, the module's own or the process's, has no kernel for `device`."""
        name = AttentionBackendName(self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]).value
        if device.type == "cpu" and name not in CPU_BACKENDS:
            raise ValueError(
                f"the {name} attention backend needs a CUDA device: move the model to one, or "
                "set_attention_backend('native')"
            )

    def __call__(self, attention: "SelfAttention", tokens: Tensor) -> Tensor:
        self.check(tokens.device)
        query, key, value = (
            attention.qkv(tokens).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        )  # each (B, tokens, heads, head_dim)
        query, key = attention.norm_query(query).to(value.dtype), attention.norm_key(key).to(value.dtype)
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        ).flatten(2)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """x + attention(norm(x)) over the h * w * d positions of (B, C, h, w, d); queries and keys are RMS-normalized
    (Henry et al. 2020).
    """

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]
    _supports_qkv_fusion = False
    processor: SelfAttentionProcessor

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"{channels} channels do not divide into heads of {head_dim}")
        self.heads = channels // head_dim
        self.norm = ChannelRMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_query, self.norm_key = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.set_processor(SelfAttentionProcessor())  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, cells, C)
        mixed = self.out(self.processor(self, tokens))
        return x + mixed.unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3)
