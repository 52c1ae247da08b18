"""What the machine can do."""

import torch


def half_is_fast() -> bool:
    """True if this machine multiplies bfloat16 in hardware: a GPU from Ampere on, or a CPU with AVX-512 BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def resolve_precision(name: str) -> str:
    """``auto`` -> bf16-mixed or 32-true for this machine; Lightning's own names stay."""
    return ("bf16-mixed" if half_is_fast() else "32-true") if name == "auto" else name


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products and convolutions where that is fast; weights and sums stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half_is_fast())
