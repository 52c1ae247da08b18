"""Sizes at true size: parameters, checkpoints of the stages, arithmetic of one call at 512 x 512.

Nothing is downloaded and no weights are made: the networks are built on PyTorch's meta device.
"""

from collections.abc import Callable
from typing import Any

import torch
from open_clip import CustomTextCLIP
from torch.utils.flop_counter import FlopCounterMode

from ldm.bench.common import BIOMEDBERT, BIOMEDCLIP
from ldm.checkpoints.checkpoint import NAMES, NEW_IN_UNET
from ldm.config import Architecture, TrainingConfig, load_config, stage_configs
from ldm.core.paths import SHIPPED
from ldm.core.tables import markdown_table
from ldm.networks.attention import Conditioning
from ldm.networks.biomedclip import build_clip
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs, input_shapes
from ldm.training.stage import training_groups

BASE = SHIPPED / "models" / "mldm_v15.yaml"

INTRODUCTION = """# Sizes

Made by `python tool/model_sizes.py --output docs/sizes.md` from `models/mldm_v15*.yaml`; a test compares them.
M: million parameters. GB: 10^9 bytes. GFLOP: 10^9 floating-point operations; a multiplication and an addition are two.
"""


def document() -> str:
    """The whole Markdown text."""
    with torch.device("meta"), torch.no_grad():
        config = load_config(BASE)
        model, clip = MedSoftModel(config.architecture), build_clip(BIOMEDCLIP, BIOMEDBERT)
        parts = [[name, f"{count / 1e6:.2f} M", f"{4 * count / 1e9:.2f} GB"] for name, count in parameters(model, clip)]
        calls = [[name, f"{count / 1e9:.1f}"] for name, count in operations(model, clip)]
    converted = sum(4 * parameter.numel() for parameter in model.parameters())
    files = [["`ckpt_for_stage1.ckpt`, `ckpt_for_stage2.ckpt`", ", ".join(NAMES.values()), "", _gb(converted)]]
    for stage, config in stage_configs(BASE).items():
        row = stage_sizes(config.architecture, config.training)
        built = ", ".join(NAMES[part] for part in row["parts"])
        trained = f"{row['trained'] / 1e6:.2f} M"
        total = f"{_gb(row['weights'] + row['optimizer'])} ({_gb(row['weights'])} + {_gb(row['optimizer'])})"
        files.append([f"`last.ckpt` of {stage}", built, trained, total])
    return "\n".join(
        [
            INTRODUCTION,
            "## Parameters\n",
            markdown_table(["part", "parameters", "in float32"], parts) + "\n",
            "The third attention is attn3 with its norm4, in 16 blocks. BiomedCLIP is frozen and in no checkpoint.\n",
            "## Checkpoints\n",
            markdown_table(["file", "holds", "trained", "size while training (weights + optimizer)"], files) + "\n",
            "All in float32. While a stage trains, `last.ckpt` also holds AdamW's two moments of every trained "
            "parameter; a finished one holds the weights only.\n",
            "## One call, batch 1, 512 x 512\n",
            markdown_table(["call", "GFLOP"], calls) + "\n",
            "Matrix products and convolutions, as PyTorch's `FlopCounterMode` counts them. Guidance: two U-Net calls.",
        ]
    ) + "\n"  # fmt: skip


def parameters(model: MedSoftModel, clip: CustomTextCLIP) -> list[tuple[str, int]]:
    """Number of parameters by part of a MedSoftModel with all parts, and of a BiomedCLIP."""

    def count(*prefixes: str, third: bool = False, of: torch.nn.Module = model) -> int:
        named = ((key, each.numel()) for key, each in of.named_parameters() if key.startswith(prefixes))
        return sum(number for key, number in named if third == bool(NEW_IN_UNET.match(key)))

    encoder, decoder = ("first_stage_model.encoder.", "first_stage_model.quant_conv."), "first_stage_model."
    return [
        ("U-Net (Stable Diffusion 1.5 inpainting)", count("model.")),
        ("third attention", count("model.", third=True)),
        ("autoencoder: encoder", count(*encoder)),
        ("autoencoder: decoder", count(decoder) - count(*encoder)),
        ("text encoder (CLIP ViT-L/14)", count("cond_stage_model.")),
        ("Medical Semantic Controller", count("msc.")),
        ("BiomedCLIP: image tower", count("visual.", of=clip)),
        ("BiomedCLIP: text tower", count("text.", of=clip)),
    ]


def stage_sizes(architecture: Architecture, training: TrainingConfig) -> dict[str, Any]:
    """A stage's ``parts`` (names), ``trained`` parameters, and bytes of ``weights`` and ``optimizer`` in last.ckpt."""
    with torch.device("meta"):
        net = MedSoftModel(architecture, training.builds)
    groups = training_groups(net, training).values()
    trained = sum(parameter.numel() for group in groups for parameter in group.values())
    weights = sum(tensor.nbytes for tensor in net.state_dict().values())
    return {"parts": net.parts, "trained": trained, "weights": weights, "optimizer": 2 * 4 * trained}


def operations(model: MedSoftModel, clip: CustomTextCLIP) -> list[tuple[str, int]]:
    """Floating-point operations of single calls of networks on the meta device."""

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    asked = model.architecture
    size, pixels, sizes = asked.latent_size, asked.image_size, asked.biomedclip
    x, mask, t = torch.empty(1, 9, size, size), torch.empty(1, 1, size, size), torch.empty(1)
    text = torch.empty(1, asked.text_encoder.max_length, asked.unet.context_dim)
    semantic = torch.empty(1, sizes.grid**2 // 4, asked.unet.semantic_dim)
    inputs = ControllerInputs.of({name: torch.empty(shape) for name, shape in input_shapes(sizes, 1, pixels).items()})
    return [
        ("U-Net, third attention silent", counted(lambda: model.unet(x, t, Conditioning(text)))),
        (
            f"U-Net, third attention on {semantic.shape[1]} tokens",
            counted(lambda: model.unet(x, t, Conditioning(text, semantic, mask))),
        ),
        ("autoencoder: encode", counted(lambda: model.encode(torch.empty(1, 3, pixels, pixels)))),
        ("autoencoder: decode", counted(lambda: model.decode(x[:, :4]))),
        ("Medical Semantic Controller", counted(lambda: model.msc(inputs))),
        ("BiomedCLIP: image", counted(lambda: clip.encode_image(torch.empty(1, 3, *clip.visual.image_size)))),
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
