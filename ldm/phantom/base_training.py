"""Training of the phantom base (see ``tool/train_phantom_base.py``): the small world's pretrained models."""

import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ldm.checkpoints.checkpoint import NEW_IN_UNET, read_checkpoint, write_checkpoint
from ldm.config import Architecture, Config, DataConfig, DiffusionConfig
from ldm.core.devices import autocast
from ldm.core.errors import UsageError
from ldm.core.files import atomic_file, named_seed, remove_partials
from ldm.core.run_folder import RunFolder
from ldm.core.tables import read_table, write_csv
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.autoencoder import Autoencoder
from ldm.networks.model import MedSoftModel, hide
from ldm.phantom.base_data import clip_pairs, generic_images, healthy_crops, textures
from ldm.phantom.clip_folder import write_clip_folder
from ldm.phantom.fit import Loss, fit
from ldm.phantom.spines import BIOMEDCLIP_PAIRS

log = logging.getLogger(__name__)

HEALTHY_PROMPTS = ("healthy", "a healthy spine", "a spine", "bone")
CPU = torch.device("cpu")
CHECKPOINT_NAME = "sd-phantom-inpainting.ckpt"
AUTOENCODER_NAME = "autoencoder.safetensors"  # until the whole checkpoint is written
CLIP_NAME = "biomedclip/open_clip_pytorch_model.bin"
LOG_NAME = "training_log.csv"
COLUMNS = ("part", "step", "loss", "seconds", "psnr_or_hits")
Rows = list[dict[str, str]]  # of one part in the log


def train_base(config: Config, output: Path, steps: Mapping[str, int], seed: int = 0, overwrite: bool = False) -> None:
    """Train the parts that ``steps`` names (autoencoder, clip, unet; in this order) and write them into ``output``.

    A part that is there already is kept unless ``overwrite``: an interrupted run goes on with the part that it was in.
    Raises UsageError while another process trains there, and for a U-Net without an autoencoder.
    """
    done = {"autoencoder": (CHECKPOINT_NAME, AUTOENCODER_NAME), "clip": (CLIP_NAME,), "unet": (CHECKPOINT_NAME,)}
    train = {"autoencoder": train_autoencoder, "clip": train_clip, "unet": train_unet}
    with RunFolder(output, LOG_NAME, what="models").lock():
        for folder in (output, output / "biomedclip"):
            remove_partials(folder)
        for part in [part for part in train if part in steps]:
            found = [output / name for name in done[part] if (output / name).exists()]
            if found and not overwrite:
                log.info("%s: already trained (in %s)", part, found[0])
            else:
                rows = train[part](config.architecture, config.data, output, steps[part], seed)
                path = output / LOG_NAME
                before = read_table(path, COLUMNS, "training log") if path.exists() else []
                write_csv(path, [*(row for row in before if row["part"] != part), *rows], COLUMNS)


def train_autoencoder(
    sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int, batch: int = 16
) -> Rows:
    """Reconstruction (squared error, and that of the gradients) with a slight pull of latents to the normal."""
    torch.manual_seed(named_seed("autoencoder", seed))
    net = Autoencoder(sizes.autoencoder)
    most = steps * batch  # no more images than will be looked at
    spines, _ = healthy_crops(crops, min(500, most), 3)
    generic, _, _ = generic_images(crops, min(1000, most))
    data = torch.cat([spines, generic, textures(min(1000, most))]).expand(-1, 3, -1, -1)

    def step(chosen: tuple[int, Tensor]) -> Loss:
        image = data[chosen[1]] * 2 - 1
        with autocast(CPU):
            posterior = net.encode(image)
            decoded = net.decode(posterior.sample(torch.randn_like(posterior.mean))).float()
        wrong = decoded - image
        error = wrong.square().mean() + sum(wrong.diff(dim=dim).square().mean() for dim in (2, 3))
        pull = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).float().mean()
        return error + 5e-6 * pull, -10 * torch.log10(wrong.square().mean() / 4)

    losses = fit(net.parameters(), batches(len(data), batch, steps, "autoencoder", seed), step, steps, 2e-3)
    rows = logged("autoencoder", losses, steps, lambda psnr: f"{psnr:.2f}")
    rescale(net, data[:256] * 2 - 1, sizes.diffusion)
    write_checkpoint(output / AUTOENCODER_NAME, net.state_dict(), {})
    return rows


@torch.no_grad()
def rescale(net: Autoencoder, images: Tensor, config: DiffusionConfig) -> None:
    """Scale the latent so that, times SD's latent scale, it has unit spread: SD's constant then fits as it is."""
    spread = net.encode(images).mean.std() * config.latent_scale
    half = len(net.quant_conv.weight) // 2
    net.quant_conv.weight[:half] /= spread
    net.quant_conv.bias[:half] /= spread
    net.quant_conv.bias[half:] -= 2 * spread.log()  # the posterior's variance shrinks with it
    net.post_quant_conv.weight *= spread


def train_unet(sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int, batch: int = 32) -> Rows:
    """Inpainting with plain words; the third attention does not exist here, as it does not in Stable Diffusion."""
    autoencoder = output / AUTOENCODER_NAME
    if not autoencoder.exists():
        raise UsageError(f"{autoencoder}: does not exist; train the autoencoder in the same command")
    torch.manual_seed(named_seed("unet", seed))
    model = MedSoftModel(sizes, ["unet", "autoencoder", "text"])
    model.first_stage_model.load_state_dict(read_checkpoint(autoencoder).state)
    model.first_stage_model.requires_grad_(False)
    moments, masked, softs, prompts = latents(model, crops, steps * batch)
    for name, parameter in model.named_parameters():
        if NEW_IN_UNET.match(name):
            parameter.requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=False)
    smooth = torch.ones(())

    def step(numbered: tuple[int, Tensor]) -> Loss:
        number, chosen = numbered
        mean, logvar = moments[0][chosen], moments[1][chosen]
        latent = model.scaled(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        t = torch.randint(0, model.schedule.timesteps, (len(chosen),))
        noise = torch.randn_like(latent)
        given = [prompts[index] for index in chosen]
        chosen_prompts = ["" if torch.rand(()) < 0.1 else each[number % len(each)] for each in given]
        noisy = model.schedule.add_noise(latent, noise, t)
        with autocast(CPU):
            text = model.cond_stage_model(chosen_prompts)
            predicted = model.predict_noise(noisy, t, softs[chosen], masked[chosen], text, None)
        loss = diffusion_loss(predicted, noise, softs[chosen], 2.0).mean()
        return loss, loss

    def averaged() -> Iterator[Loss]:
        """Each step's loss, smoothed over about twenty steps; the weights' average follows the weights."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        shuffled = batches(len(softs), batch, steps, "unet", seed)
        for loss, figure in fit(trained, shuffled, step, steps, 1e-3, decay=1e-4):
            average.update_parameters(model)
            smooth.add_(0.05 * (loss - smooth))
            yield smooth, figure

    rows = logged("unet", averaged(), steps, lambda figure: "")
    # Half precision, without the parts Stable Diffusion does not have.
    state = {key: value.half() for key, value in average.module.state_dict().items() if not NEW_IN_UNET.match(key)}
    write_checkpoint(output / CHECKPOINT_NAME, state, {"origin": "tool/train_phantom_base.py"})
    autoencoder.unlink()
    return rows


@torch.no_grad()
def latents(
    model: MedSoftModel, config: DataConfig, most: int
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, list[tuple[str, ...]]]:
    """Moments, scaled masked-image latents, latent masks and possible prompts of all the U-Net learns from."""
    spines, spine_masks = healthy_crops(config, min(700, most), 3)
    generic, generic_masks, plain = generic_images(config, min(3000, most))
    images, softs = torch.cat([spines, generic]), torch.cat([spine_masks, generic_masks])
    prompts: list[tuple[str, ...]] = [HEALTHY_PROMPTS] * len(spines) + [(prompt,) for prompt in plain]
    means, logvars, masked = [], [], []
    for image, soft in zip(tqdm(images.split(64), desc="latents", mininterval=5), softs.split(64), strict=True):
        rgb = image.expand(-1, 3, -1, -1) * 2 - 1
        posterior = model.encode(rgb)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
        masked.append(model.scaled(model.encode(hide(rgb, soft)).mean))
    return (torch.cat(means), torch.cat(logvars)), torch.cat(masked), model.latent_mask(softs), prompts


def train_clip(sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int, batch: int = 64) -> Rows:
    """Contrastive training on crops of healthy and diseased phantoms and their prompts, through open_clip."""
    folder = output / "biomedclip"
    images, prompts = clip_pairs(crops, min(BIOMEDCLIP_PAIRS, steps * batch))
    made = write_clip_folder(folder, prompts, sizes.biomedclip)["model_cfg"]
    torch.manual_seed(named_seed("clip", seed))
    text_cfg = {**made["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    net = CustomTextCLIP(made["embed_dim"], {**made["vision_cfg"], "timm_model_pretrained": False}, text_cfg)
    ids = HFTokenizer(str(folder), context_length=made["text_cfg"]["context_length"])(prompts)
    size = made["vision_cfg"]["image_size"]

    def step(numbered: tuple[int, Tensor]) -> Loss:
        chosen = numbered[1]
        pixels = F.interpolate(images[chosen] * 2 - 1, size=(size, size), mode="bicubic", antialias=True)
        image, text, scale = net(pixels.expand(-1, 3, -1, -1), ids[chosen])
        same = (ids[chosen][:, None] == ids[chosen][None]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)  # equal prompts are equally right
        logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, (target[range(len(chosen)), logits.argmax(dim=1)] > 0).float().mean()

    def limited() -> Iterator[Loss]:
        """Each step's loss; the scale of the logits stays below CLIP's own limit."""
        shuffled = batches(len(ids), batch, steps, "clip", seed)
        for values in fit(net.parameters(), shuffled, step, steps, 1e-3, decay=0.02, warmup=0.1):
            with torch.no_grad():
                net.logit_scale.clamp_(0, 4.6)
            yield values

    rows = logged("clip", limited(), steps, lambda hits: f"{hits:.3f}")
    buffer = io.BytesIO()  # torch.save itself would not tell a full disk as an OSError
    torch.save(net.state_dict(), buffer)
    with atomic_file(output / CLIP_NAME) as handle:
        handle.write(buffer.getvalue())
    return rows


def batches(count: int, size: int, steps: int, part: str, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(step, indices) with a progress bar; reshuffled every epoch, a function of seed and part."""
    generator = torch.Generator().manual_seed(named_seed(part, seed))
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(steps), desc=part, mininterval=5):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield step, order[:size]
        order = order[size:]


def logged(part: str, losses: Iterable[Loss], steps: int, shown: Callable[[float], str]) -> Rows:
    """Run all steps; a row of the log for every twentieth and for the last one."""
    rows, start = [], time.monotonic()
    for number, (loss, figure) in enumerate(losses):
        if number % 20 == 0 or number == steps - 1:
            values = part, str(number), f"{loss.item():.5f}", f"{time.monotonic() - start:.0f}", shown(figure.item())
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows
