"""BiomedCLIP, the frozen image-text encoder of the method."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.fitting import NoRandomWeights, load_exactly
from ldm.core.errors import MedSoftError, first_line
from ldm.core.files import fingerprint
from ldm.networks.biomedclip_folder import BiomedClipFolder, read_folder, read_tokenizer
from ldm.networks.encoder import EncoderIdentity, ImageTextEncoder
from ldm.networks.text_encoder import PromptReading, PromptWarnings

if TYPE_CHECKING:
    from open_clip.model import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer

PROBE = "A Lytic lesion of L3, 1.5 cm (Müller)"  # capitals, signs and an accent: what tokenizers treat differently


def build_clip(model_cfg: dict[str, Any], bert: dict[str, Any]) -> "CustomTextCLIP":
    """open_clip's network for ``model_cfg`` of an open_clip_config.json, random, its text tower sized by ``bert``.

    open_clip itself would fetch BERT's config.json from the hub; nothing is fetched here.
    """
    from open_clip.model import CustomTextCLIP

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(bert))
        vision = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
        text = {**model_cfg["text_cfg"], "hf_model_name": scratch, "hf_model_pretrained": False}
        return CustomTextCLIP(model_cfg["embed_dim"], vision, text)


class BiomedClip(ImageTextEncoder):
    """BiomedCLIP from its folder (see ``biomedclip_folder``) or from ``hf-hub:OWNER/NAME``.

    Raises MedSoftError naming the file that is missing, damaged or of another model.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        found = read_folder(source)
        self.folder = found.folder
        self.clip = _built(found)
        self._tokenizer = read_tokenizer(found.folder, found.context_length, self.clip.text.vocab_size)
        self._warnings = PromptWarnings("BiomedCLIP", "[UNK], a word that is not in its vocabulary")
        _, self.fingerprint, self.preparation = _identity(found, self._tokenizer)
        preprocess = _preprocess(found)
        self.register_buffer("image_mean", torch.tensor(preprocess["mean"])[:, None, None], False)
        self.register_buffer("image_std", torch.tensor(preprocess["std"])[:, None, None], False)
        trunk: Any = self.clip.visual.trunk
        self.image_size: int = trunk.patch_embed.img_size[0]
        self.grid = self.image_size // trunk.patch_embed.patch_size[0]
        self.token_dim, self.text_dim = trunk.num_features, self.clip.text.output_dim
        self.freeze()

    @classmethod
    def identify(cls, source: str | Path) -> EncoderIdentity:
        """By the bytes of the weights and by how images and prompts are prepared. Raises as ``read_folder`` does."""
        found = read_folder(source)
        rows = found.bert.get("vocab_size", sys.maxsize)
        return _identity(found, read_tokenizer(found.folder, found.context_length, rows))

    def normalise(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Image (B, 3, S, S) in [-1, 1] -> encoder input; ``hidden`` (B, 1, S, S) > 0 becomes 0 after normalisation.

        Hidden pixels are replaced before the image is resampled, so no pixel of the input depends on them.
        """
        size = (self.image_size, self.image_size)
        if hidden is not None:
            image = torch.where(hidden > 0, 2 * self.image_mean - 1, image)
        resized = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = ((resized + 1) / 2 - self.image_mean) / self.image_std
        if hidden is None:
            return pixels
        gone = F.interpolate(hidden.float(), size=size, mode="bilinear", antialias=True) > 0  # every touched pixel
        return pixels * (~gone)

    @torch.no_grad()
    def encode_image(self, image: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, grid**2, D) and CLS token (B, D) after the trunk's final norm."""
        features = self.clip.visual.trunk.forward_features(self.normalise(image, hidden))
        return features[:, 1:], features[:, 0]

    @torch.no_grad()
    def embed_image(self, image: Tensor) -> Tensor:
        """Projected image embeddings (B, text_dim), not normalised."""
        return self.clip.encode_image(self.normalise(image))

    def reading(self, prompt: str) -> PromptReading:
        """What ``encode_text`` would make of a prompt: its tokens, and the words that are read as [UNK]."""
        wrapped, room = self._tokenizer, self._tokenizer.context_length - 2
        found = wrapped.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        offsets, unk = found["offset_mapping"], wrapped.tokenizer.unk_token_id
        unknown = [span for span, number in zip(offsets, found["input_ids"], strict=True) if number == unk]
        return PromptReading.of(prompt, offsets, unknown, room)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings (B, text_dim), not normalised. Warnings say once what is cut or unknown."""
        for prompt in prompts:
            self._warnings.report(prompt, self.reading(prompt))
        return self.clip.encode_text(self._tokenizer(list(prompts)).to(self.device))


def _identity(found: BiomedClipFolder, tokenizer: "HFTokenizer") -> EncoderIdentity:
    preparation = {"images": _normalisation_id(_preprocess(found)), "prompts": _tokenizer_id(tokenizer)}
    return EncoderIdentity(found.folder, found.weights.sha256(), preparation)


def _preprocess(found: BiomedClipFolder) -> dict[str, Any]:
    return {**_published_normalisation(), **found.preprocess_cfg}


def _published_normalisation() -> dict[str, Any]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}


def _normalisation_id(preprocess: Mapping[str, Any]) -> str:
    """Empty for the published mean and standard deviation, whose features need no name that tells them apart."""
    values = {key: [float(value) for value in preprocess[key]] for key in _published_normalisation()}
    return "" if values == {k: list(v) for k, v in _published_normalisation().items()} else fingerprint(values)


def _tokenizer_id(tokenizer: "HFTokenizer") -> str:
    """By what it does: the same words written into other files are the same tokenizer."""
    words = sorted(tokenizer.tokenizer.get_vocab().items())
    return fingerprint([words, tokenizer.context_length, tokenizer([PROBE])[0].tolist()])


def _built(found: BiomedClipFolder) -> "CustomTextCLIP":
    try:
        with NoRandomWeights():
            made = build_clip(found.model_cfg, found.bert)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise MedSoftError(
            f"{found.folder}: its open_clip_config.json builds no network ({first_line(error)})"
        ) from error
    if getattr(made.visual.trunk, "num_prefix_tokens", None) != 1:
        raise MedSoftError(
            f"{found.folder}: {found.model_cfg['vision_cfg']['timm_model_name']} has no patch tokens and one CLS "
            "token; expected a vision transformer, as BiomedCLIP's"
        )
    load_exactly(made, found.state, found.weights.path, "open_clip_config.json beside it", "download both again")
    return made
