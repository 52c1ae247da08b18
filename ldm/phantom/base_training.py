"""Training of the phantom base (see ``tool/train_phantom_base.py``): the small world's pretrained models."""

import csv
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoints.checkpoint import read_tensors, write_checkpoint
from ldm.config import Config
from ldm.core.devices import autocast
from ldm.core.files import named_seed, write_json, write_text
from ldm.data.crop import Fit
from ldm.data.images import to_unit
from ldm.data.masks import TARGET_LABEL, Feather, Mask, lesion_shaped, soft_mask_for
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.autoencoder import Autoencoder
from ldm.networks.model import MedSoftModel, hide
from ldm.phantom.shapes import generic_picture, texture
from ldm.phantom.spines import BASE_WORLD, BIOMEDCLIP_PAIRS, biomedclip_pairs, render_phantom

log = logging.getLogger(__name__)

HEALTHY_WORDS = ("healthy", "a healthy spine", "a spine", "bone")
CPU = torch.device("cpu")
CHECKPOINT_NAME = "sd-phantom-inpainting.ckpt"


class PhantomBaseTrainer:
    """Trains autoencoder, BiomedCLIP stand-in and U-Net one after the other; finished parts are kept in ``output``."""

    def __init__(self, config: Config, output: Path, seed: int = 0, overwrite: bool = False) -> None:
        self.config, self.output, self.seed, self.overwrite = config, output, seed, overwrite
        self.fit = Fit(config.data.fit, config.data.image_size, config.data.context)
        self.feather = Feather(config.data.feather, config.data.feather_unit)
        self.autoencoder_file = output / "autoencoder.safetensors"  # until the whole checkpoint is written

    # ------------------------------------------------------------------------------------------------ data

    def _healthy_crops(self, count: int, masks: int) -> tuple[Tensor, Tensor]:
        """Crops (count * masks, 1, S, S) in [0, 1] around lesion-shaped masks in healthy spines, and the soft masks."""
        crops, softs = [], []
        for index in tqdm(range(count), desc="healthy spines", leave=False):
            phantom = render_phantom(BASE_WORLD, index, None)
            for k in range(masks):
                hard = lesion_shaped(phantom.anatomy == TARGET_LABEL, named_seed("base", index, k))
                soft = soft_mask_for(Mask(hard.astype(np.float32)), self.feather)
                window = self.fit.crop_window(phantom.image.shape, soft)
                crops.append(window.forward(to_unit(phantom.image)))
                softs.append(window.forward_mask(soft))
        return torch.from_numpy(np.stack(crops))[:, None], torch.from_numpy(np.stack(softs))[:, None]

    def _generic(self, count: int) -> tuple[Tensor, Tensor, list[str]]:
        """Generic pictures (count, 1, S, S), soft masks around their shapes, sentences."""
        pictures, softs, sentences = [], [], []
        for index in tqdm(range(count), desc="generic pictures", leave=False):
            picture, mask, sentence = generic_picture(np.random.default_rng(named_seed("generic", index)))
            pictures.append(picture)
            softs.append(soft_mask_for(Mask(mask.astype(np.float32)), self.feather))
            sentences.append(sentence)
        return torch.from_numpy(np.stack(pictures))[:, None], torch.from_numpy(np.stack(softs))[:, None], sentences

    def _batches(self, count: int, size: int, steps: int, part: str) -> Iterator[tuple[int, Tensor]]:
        """(step, indices) with a progress bar; reshuffled every epoch, a function of seed and part."""
        generator = torch.Generator().manual_seed(named_seed(part, self.seed))
        order = torch.empty(0, dtype=torch.long)
        for step in tqdm(range(steps), desc=part, mininterval=5):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(count, generator=generator)])
            yield step, order[:size]
            order = order[size:]

    # ------------------------------------------------------------------------------------------------ autoencoder

    def train_autoencoder(self, steps: int, batch: int = 16) -> None:
        """Reconstruction (squared error, and that of the gradients) with a slight pull of latents to the normal."""
        for found in (self.output / CHECKPOINT_NAME, self.autoencoder_file):
            if found.exists() and not self.overwrite:
                log.info("autoencoder: already trained (in %s)", found)
                return
        torch.manual_seed(named_seed("autoencoder", self.seed))
        net = Autoencoder(self.config.autoencoder)
        most = steps * batch  # no more pictures than will be looked at
        spines, _ = self._healthy_crops(min(500, most), 3)
        generic, _, _ = self._generic(min(1000, most))
        textures = [texture(np.random.default_rng(named_seed("texture", index))) for index in range(min(1000, most))]
        data = torch.cat([spines, generic, torch.from_numpy(np.stack(textures))[:, None]]).expand(-1, 3, -1, -1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
        rows, start = [], time.monotonic()
        for step, chosen in self._batches(len(data), batch, steps, "autoencoder"):
            image = data[chosen] * 2 - 1
            with autocast(CPU):
                posterior = net.encode(image)
                decoded = net.decode(posterior.sample(torch.randn_like(posterior.mean))).float()
            wrong = decoded - image
            error = wrong.square().mean() + sum(wrong.diff(dim=dim).square().mean() for dim in (2, 3))
            pull = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).float().mean()
            loss = error + 5e-6 * pull
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == steps - 1:
                psnr = -10 * torch.log10((decoded - image).detach().square().mean() / 4).item()
                rows.append(
                    ("autoencoder", step, f"{loss.item():.5f}", f"{time.monotonic() - start:.0f}", f"{psnr:.2f}")
                )
        self._rescale(net, data[:256] * 2 - 1)
        write_checkpoint(self.autoencoder_file, net.state_dict(), {})
        self._log(rows)

    @torch.no_grad()
    def _rescale(self, net: Autoencoder, images: Tensor) -> None:
        """Scale the latent so that, times SD's latent scale, it has unit spread: SD's constant then fits as it is."""
        spread = net.encode(images).mean.std() * self.config.diffusion.latent_scale
        half = self.config.autoencoder.latent_channels
        net.quant_conv.weight[:half] /= spread
        net.quant_conv.bias[:half] /= spread
        net.quant_conv.bias[half:] -= 2 * spread.log()  # the posterior's variance shrinks with it
        net.post_quant_conv.weight *= spread

    # ------------------------------------------------------------------------------------------------ U-Net and text

    def train_unet(self, steps: int, batch: int = 32) -> None:
        """Inpainting with plain words; the third attention does not exist here, as it does not in Stable Diffusion."""
        target = self.output / CHECKPOINT_NAME
        if target.exists() and not self.overwrite:
            log.info("U-Net: already trained (%s)", target)
            return
        torch.manual_seed(named_seed("unet", self.seed))
        model = MedSoftModel(self.config, ["unet", "autoencoder", "text"])
        model.first_stage_model.load_state_dict(read_tensors(self.autoencoder_file))
        model.first_stage_model.requires_grad_(False)
        moments, masked, softs, prompts = self._latents(model, steps * batch)
        frozen = [p for n, p in model.named_parameters() if ".attn3." in n or ".norm4." in n]
        for parameter in frozen:
            parameter.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=False
        )
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
        rows, start, smooth = [], time.monotonic(), 1.0
        for step, chosen in self._batches(len(softs), batch, steps, "unet"):
            mean, logvar = moments[0][chosen], moments[1][chosen]
            latent = model.scaled(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
            t = torch.randint(0, model.schedule.timesteps, (len(chosen),))
            noise = torch.randn_like(latent)
            words = ["" if torch.rand(()) < 0.1 else prompts[index][step % len(prompts[index])] for index in chosen]
            noisy = model.schedule.add_noise(latent, noise, t)
            with autocast(CPU):
                text = model.cond_stage_model(words)
                predicted = model.predict_noise(noisy, t, softs[chosen], masked[chosen], text, None)
            loss = diffusion_loss(predicted, noise, softs[chosen], 2.0).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            smooth += 0.05 * (loss.item() - smooth)
            if step % 20 == 0 or step == steps - 1:
                rows.append(("unet", step, f"{smooth:.5f}", f"{time.monotonic() - start:.0f}", ""))
        self._save_base(average.module, target)
        self.autoencoder_file.unlink()
        self._log(rows)

    @torch.no_grad()
    def _latents(
        self, model: MedSoftModel, most: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, list[tuple[str, ...]]]:
        """Moments, scaled masked-image latents, latent masks and possible prompts of all the U-Net learns from."""
        spines, spine_masks = self._healthy_crops(min(700, most), 3)
        generic, generic_masks, sentences = self._generic(min(3000, most))
        images, softs = torch.cat([spines, generic]), torch.cat([spine_masks, generic_masks])
        prompts = [HEALTHY_WORDS] * len(spines) + [(sentence,) for sentence in sentences]
        means, logvars, masked = [], [], []
        for image, soft in zip(tqdm(images.split(64), desc="latents", mininterval=5), softs.split(64), strict=True):
            rgb = image.expand(-1, 3, -1, -1) * 2 - 1
            posterior = model.encode(rgb)
            means.append(posterior.mean)
            logvars.append(posterior.logvar)
            masked.append(model.scaled(model.encode(hide(rgb, soft)).mode))
        return (torch.cat(means), torch.cat(logvars)), torch.cat(masked), model.latent_mask(softs), prompts

    def _save_base(self, model: MedSoftModel, path: Path) -> None:
        """Half precision, without the parts Stable Diffusion does not have."""
        state = {
            key: value.half()
            for key, value in model.state_dict().items()
            if ".attn3." not in key and ".norm4." not in key
        }
        write_checkpoint(path, state, {"origin": "tool/train_phantom_base.py"})

    # ------------------------------------------------------------------------------------------------ BiomedCLIP

    def train_clip(self, steps: int, batch: int = 64) -> None:
        """Contrastive training on crops of healthy and diseased phantoms and their sentences, through open_clip."""
        folder = self.output / "biomedclip"
        if (folder / "open_clip_pytorch_model.bin").exists() and not self.overwrite:
            log.info("BiomedCLIP stand-in: already trained (%s)", folder)
            return
        images, prompts = self._clip_pairs(min(BIOMEDCLIP_PAIRS, steps * batch))
        settings = self._write_clip_folder(folder, prompts)
        from open_clip.model import CustomTextCLIP
        from open_clip.tokenizer import HFTokenizer

        torch.manual_seed(named_seed("clip", self.seed))
        model = settings["model_cfg"]
        text_cfg = {**model["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
        net = CustomTextCLIP(model["embed_dim"], {**model["vision_cfg"], "timm_model_pretrained": False}, text_cfg)
        ids = HFTokenizer(str(folder), context_length=model["text_cfg"]["context_length"])(prompts)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        size, rows, start = model["vision_cfg"]["image_size"], [], time.monotonic()
        for step, chosen in self._batches(len(ids), batch, steps, "clip"):
            pixels = F.interpolate(images[chosen] * 2 - 1, size=(size, size), mode="bicubic", antialias=True)
            image, text, scale = net(pixels.expand(-1, 3, -1, -1), ids[chosen])
            same = (ids[chosen][:, None] == ids[chosen][None]).all(dim=-1).float()
            target = same / same.sum(dim=1, keepdim=True)  # equal sentences are equally right
            logits = scale * image @ text.T
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                net.logit_scale.clamp_(0, 4.6)
            if step % 20 == 0 or step == steps - 1:
                hit = (target[range(len(chosen)), logits.argmax(dim=1)] > 0).float().mean().item()
                rows.append(("clip", step, f"{loss.item():.5f}", f"{time.monotonic() - start:.0f}", f"{hit:.3f}"))
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        from ldm.core.files import atomic_file

        with atomic_file(folder / "open_clip_pytorch_model.bin") as handle:
            handle.write(buffer.getvalue())
        self._log(rows)

    def _clip_pairs(self, count: int) -> tuple[Tensor, list[str]]:
        """Crops (count, 1, S, S) and their sentences: one third healthy, the rest of every type and severity."""
        crops, prompts = [], []
        for item in tqdm(list(biomedclip_pairs(count)), desc="image-sentence pairs", leave=False):
            phantom = render_phantom(*item)
            hard = phantom.mask
            if phantom.healthy:
                hard = lesion_shaped(phantom.anatomy == TARGET_LABEL, named_seed("pairs", item[1]))
            soft = soft_mask_for(Mask(hard.astype(np.float32)), self.feather)
            crops.append(self.fit.crop_window(phantom.image.shape, soft).forward(to_unit(phantom.image)))
            prompts.append(phantom.prompt)
        return torch.from_numpy(np.stack(crops))[:, None], prompts

    def _write_clip_folder(self, folder: Path, prompts: list[str]) -> dict:
        """The folder's small files in BiomedCLIP's format: settings, BERT's configuration, WordPiece tokenizer."""
        from transformers import BertTokenizer

        folder.mkdir(parents=True, exist_ok=True)
        words = sorted({word for prompt in prompts for word in prompt.lower().replace("-", " - ").split()})
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.-'"]
        pieces += [
            p for p in dict.fromkeys([*words, *letters, *("##" + letter for letter in letters)]) if p not in pieces
        ]
        write_text(folder / "vocab.txt", "\n".join(pieces) + "\n")
        BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
        clip = self.config.biomedclip
        bert = {
            "model_type": "bert",
            "vocab_size": len(pieces),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
        }
        write_json(folder / "config.json", bert)
        vision = {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 16 * clip.grid,
        }
        text = {
            "hf_model_name": "models/phantom_base/biomedclip",
            "hf_tokenizer_name": "models/phantom_base/biomedclip",
            "hf_model_pretrained": False,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 32,
        }
        settings = {
            "model_cfg": {"embed_dim": clip.text_dim, "vision_cfg": vision, "text_cfg": text},
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        write_json(folder / "open_clip_config.json", settings)
        return json.loads(json.dumps(settings))

    # ------------------------------------------------------------------------------------------------ log

    def _log(self, rows: list[tuple]) -> None:
        """Replace this part's rows in OUTPUT/training_log.csv."""
        path = self.output / "training_log.csv"
        kept = []
        if path.exists():
            kept = [row for row in csv.reader(path.read_text().splitlines()[1:]) if row[0] != rows[0][0]]
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(
            [("part", "step", "loss", "seconds", "psnr_or_hits"), *kept, *rows]
        )
        write_text(path, buffer.getvalue())
