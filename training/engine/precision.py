"""The precision to compute in."""

import torch


def native_bf16() -> bool:
    """Return whether this machine computes in bf16 natively: a CUDA device that reports so, or a CPU with the
    instructions.

    Elsewhere bf16 is emulated: on a CPU with AVX2 alone a 3-D convolution is about 100 times slower than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(name: str) -> str:
    """Resolve "auto" to "bf16" where it is native, else to "no". Other names stay."""
    return ("bf16" if native_bf16() else "no") if name == "auto" else name
