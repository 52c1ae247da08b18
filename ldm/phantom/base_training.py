"""Training of the phantom base (see ``tool/train_phantom_base.py``): the small world's pretrained models."""

import io
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoints.checkpoint import NEW_IN_UNET, read_checkpoint, write_checkpoint
from ldm.checkpoints.fitting import load_exactly
from ldm.config import Architecture, Config, DataConfig, DiffusionConfig
from ldm.core.devices import autocast
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import atomic_file, fingerprint, named_seed, read_json, remove_partials, write_json
from ldm.core.run_folder import RunFolder, differences
from ldm.core.schema import identity
from ldm.core.tables import read_table, write_csv
from ldm.diffusion.schedule import diffusion_loss
from ldm.networks.autoencoder import Autoencoder
from ldm.networks.biomedclip_folder import read_folder
from ldm.networks.model import MedSoftModel, hide
from ldm.networks.weight_average import WeightAverage
from ldm.phantom.base_data import clip_pairs, generic_images, healthy_crops, textures
from ldm.phantom.clip_folder import write_clip_folder
from ldm.phantom.spines import BIOMEDCLIP_PAIRS
from ldm.phantom.worlds import STANDARD, named, world_of

log = logging.getLogger(__name__)

HEALTHY_PROMPTS = ("healthy", "a healthy spine", "a spine", "bone")
CPU = torch.device("cpu")
CHECKPOINT_NAME = "sd-phantom-inpainting.ckpt"
AUTOENCODER_NAME = "autoencoder.safetensors"  # until the whole checkpoint is written
CLIP_NAME = "biomedclip/open_clip_pytorch_model.bin"
FILES = {"autoencoder": (CHECKPOINT_NAME, AUTOENCODER_NAME), "clip": (CLIP_NAME,), "unet": (CHECKPOINT_NAME,)}
LOG_NAME, RECORD = "training_log.csv", "training.json"
COLUMNS = ("part", "step", "loss", "seconds", "psnr_or_hits")
Rows = list[dict[str, str]]  # of one part in the log
Trainer = Callable[[Architecture, DataConfig, Path, int, int], Rows]  # of a part: sizes, crops, output, steps, seed
Loss = tuple[Tensor, Tensor | None]  # what is minimised, and another number of the same batch for the log


def train_base(config: Config, output: Path, steps: Mapping[str, int], seed: int, overwrite: bool, world: str) -> None:
    """Train the parts that ``steps`` names (autoencoder, clip, unet; in this order) and write them into ``output``.

    A part that is there already is kept: an interrupted run goes on with the part that it was in. With ``overwrite``
    they all go first, so that the start after an interruption takes none of them for a new one.
    ``world``: of the pairs that clip learns from; the other parts know no lesion, and are the same for every world.
    Raises UsageError while another process trains there, for a U-Net without an autoencoder, for a part that was
    trained with other settings, for one that the U-Net of the same file was trained on, and for other parts than clip
    with a ``world``.
    """
    if world != STANDARD and set(steps) != {"clip"}:
        raise UsageError(f"--world {world}: only clip is trained on lesions; give --parts clip")
    clip = partial(train_clip, world=world_of(world).name)
    trainers: dict[str, Trainer] = {"autoencoder": train_autoencoder, "clip": clip, "unet": train_unet}
    parts = [part for part in trainers if part in steps]
    sizes = fingerprint([identity(config.architecture, "architecture"), identity(config.data, "features")])
    with RunFolder(output, LOG_NAME, what="models").lock():
        _check_together(output, steps, overwrite)
        known = _read_record(output / RECORD)
        for part in parts if overwrite else ():
            known.pop(part, None)
            for name in FILES[part]:
                (output / name).unlink(missing_ok=True)
        for folder in (output, output / "biomedclip"):
            remove_partials(folder)
        there = {part: next(filter(Path.exists, map(output.joinpath, FILES[part])), None) for part in parts}
        if there.get("clip"):
            _check_world(output, world)
        asked = {part: {"steps": steps[part], "seed": seed, "config": sizes} for part in parts}
        for part, file in there.items():
            if file and (changed := differences(known.get(part, {}), asked[part])):
                cure = "give another --output_dir, or --overwrite"
                raise UsageError(f"{file}: {part} was trained otherwise ({', '.join(changed)}); {cure}")
        for part, file in there.items():
            if file:
                log.info("%s: already trained (in %s)", part, file)
                continue
            made = trainers[part](config.architecture, config.data, output, steps[part], seed)
            known[part] = asked[part]
            write_json(output / RECORD, known)
            _write_log(output / LOG_NAME, part, made)


def _read_record(path: Path) -> dict[str, Any]:
    """By part, the settings that it was trained with; nothing of parts that older versions have trained."""
    found = read_json(path, "record of the phantom base") if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise MedSoftError(
            f"{path}: expected an object of objects, one for each part; delete it to keep the parts as they are"
        )
    return found


def _write_log(path: Path, part: str, made: Rows) -> None:
    """Put the rows of a part in the place of those that the log has of it."""
    before = read_table(path, COLUMNS, "training log") if path.exists() else []
    rows = [{"part": part, **row} for row in made]
    write_csv(path, [*(row for row in before if row["part"] != part), *rows], COLUMNS)


def _check_together(output: Path, steps: Collection[str], overwrite: bool) -> None:
    """UsageError for an autoencoder or a U-Net that would be trained without the other one of their file."""
    whole, alone = output / CHECKPOINT_NAME, output / AUTOENCODER_NAME
    if whole.exists() and not overwrite:
        return
    if "unet" in steps and "autoencoder" not in steps and not alone.exists():
        raise UsageError(f"{alone}: does not exist; train the autoencoder in the same command")
    if whole.exists() and "autoencoder" in steps and "unet" not in steps:
        raise UsageError(f"{whole}: holds a U-Net that was trained on its autoencoder; give --parts autoencoder unet")


def _check_world(output: Path, world: str) -> None:
    """UsageError if the BiomedCLIP stand-in in ``output`` was trained on another world."""
    found = read_json((output / CLIP_NAME).with_name("open_clip_config.json")).get("world", STANDARD)
    if found != world:
        cure = "give another --output_dir, or --overwrite"
        raise UsageError(f"{output / CLIP_NAME}: was trained on the world {found}, not {world}; {cure}")


def train_autoencoder(sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int) -> Rows:
    """Reconstruction (squared error, and that of the gradients) with a slight pull of latents to the normal."""
    torch.manual_seed(named_seed("autoencoder", seed))
    net, batch = Autoencoder(sizes.autoencoder), 16
    most = steps * batch  # no more images than will be looked at
    spines, _ = healthy_crops(crops, min(500, most), 3)
    generic, _, _ = generic_images(crops, min(1000, most))
    data = torch.cat([spines, generic, textures(min(1000, most))]).expand(-1, 3, -1, -1)

    def step(number: int, chosen: Tensor) -> Loss:
        image = data[chosen] * 2 - 1
        with autocast(CPU):
            posterior = net.encode(image)
            decoded = net.decode(posterior.sample(torch.randn_like(posterior.mean))).float()
        wrong = decoded - image
        error = wrong.square().mean() + sum(wrong.diff(dim=dim).square().mean() for dim in (2, 3))
        pull = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).float().mean()
        return error + 5e-6 * pull, -10 * torch.log10(wrong.square().mean() / 4)

    rows = fit(net.parameters(), batches(len(data), batch, steps, "autoencoder", seed), step, steps, 2e-3)
    rescale(net, data[:256] * 2 - 1, sizes.diffusion)
    write_checkpoint(output / AUTOENCODER_NAME, net.state_dict(), {})
    return rows


@torch.no_grad()
def rescale(net: Autoencoder, images: Tensor, config: DiffusionConfig) -> None:
    """Scale the latent of ``images`` (N, 3, S, S) in [-1, 1] so that, times SD's latent scale, it has unit spread: SD's
    constant then fits as it is."""
    spread = net.encode(images).mean.std() * config.latent_scale
    weight, bias = net.quant_conv.parameters()
    half = len(weight) // 2
    weight[:half] /= spread
    bias[:half] /= spread
    bias[half:] -= 2 * spread.log()  # the posterior's variance shrinks with it
    net.post_quant_conv.weight *= spread


def train_unet(sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int) -> Rows:
    """Inpainting with plain words; the third attention does not exist here, as it does not in Stable Diffusion."""
    autoencoder, batch = output / AUTOENCODER_NAME, 32
    torch.manual_seed(named_seed("unet", seed))
    model = MedSoftModel(sizes, ["unet", "autoencoder", "text"])
    cure = "give the --config that it was made with, or another --output_dir"
    load_exactly(model.first_stage_model, read_checkpoint(autoencoder).state, autoencoder, "--config", cure)
    model.first_stage_model.requires_grad_(False)
    moments, masked, softs, prompts = latents(model, crops, steps * batch)
    for name, parameter in model.named_parameters():
        if NEW_IN_UNET.match(name):
            parameter.requires_grad_(False)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    average = WeightAverage(trained, 0.995, warm_up=0)

    def step(number: int, chosen: Tensor) -> Loss:
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
        return loss, None

    shuffled = batches(len(softs), batch, steps, "unet", seed)
    rows = fit(trained.values(), shuffled, step, steps, 1e-3, decay=1e-4, after=average.update)
    # Half precision, without the parts Stable Diffusion does not have.
    with average.swapped():
        state = {key: value.half() for key, value in model.state_dict().items() if not NEW_IN_UNET.match(key)}
    write_checkpoint(output / CHECKPOINT_NAME, state, {"origin": "tool/train_phantom_base.py"})
    autoencoder.unlink()
    return rows


@torch.no_grad()
def latents(
    model: MedSoftModel, config: DataConfig, most: int
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, list[tuple[str, ...]]]:
    """Of the N images that the U-Net learns from: mean and log-variance of their latents, scaled latents of the masked
    images, all (N, 4, s, s), latent masks (N, 1, s, s), and the prompts that each may have."""
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


def train_clip(sizes: Architecture, crops: DataConfig, output: Path, steps: int, seed: int, world: str) -> Rows:
    """Contrastive training on crops of healthy and diseased phantoms and their prompts, through open_clip.

    In a ``world`` of the standard one's images and other sentences, the image tower is that of the stand-in which
    ``sizes`` names, unchanged: only the text tower learns, and the image tokens stay comparable.
    """
    folder, batch = output / "biomedclip", 64
    images, prompts = clip_pairs(crops, min(BIOMEDCLIP_PAIRS, steps * batch), world)
    made = write_clip_folder(folder, prompts, sizes.biomedclip, named(world))["model_cfg"]
    torch.manual_seed(named_seed("clip", seed))
    text_cfg = {**made["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    net = CustomTextCLIP(made["embed_dim"], {**made["vision_cfg"], "timm_model_pretrained": False}, text_cfg)
    ids = HFTokenizer(str(folder), context_length=made["text_cfg"]["context_length"], trust_remote_code=False)(prompts)
    size = made["vision_cfg"]["image_size"]

    def pixels(chosen: Tensor) -> Tensor:
        resized = F.interpolate(images[chosen] * 2 - 1, size=(size, size), mode="bicubic", antialias=True)
        return resized.expand(-1, 3, -1, -1)

    known = None
    if world != STANDARD and world_of(world).same_images:
        keep_image_tower(net, sizes.biomedclip.path)
        with torch.no_grad():
            every = torch.arange(len(ids)).split(batch)
            known = torch.cat([net.encode_image(pixels(chosen), normalize=True) for chosen in every])

    def step(number: int, chosen: Tensor) -> Loss:
        if known is None:
            image, text, scale = net(pixels(chosen), ids[chosen])
        else:
            image, text, scale = known[chosen], net.encode_text(ids[chosen], True), net.logit_scale.exp()
        same = (ids[chosen][:, None] == ids[chosen][None]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)  # equal prompts are equally right
        logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, (target[range(len(chosen)), logits.argmax(dim=1)] > 0).float().mean()

    @torch.no_grad()
    def limit(number: int) -> None:
        net.logit_scale.clamp_(0, 4.6)  # CLIP's own limit

    shuffled = batches(len(ids), batch, steps, "clip", seed)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rows = fit(trained, shuffled, step, steps, 1e-3, decay=0.02, warmup=0.1, after=limit)
    buffer = io.BytesIO()  # torch.save itself would not tell a full disk as an OSError
    torch.save(net.state_dict(), buffer)
    with atomic_file(output / CLIP_NAME) as handle:
        handle.write(buffer.getvalue())
    return rows


def keep_image_tower(net: CustomTextCLIP, source: str) -> None:
    """Give ``net`` the image tower of the BiomedCLIP folder ``source``, frozen."""
    found = read_folder(source)
    tower = {key.removeprefix("visual."): value for key, value in found.state.items() if key.startswith("visual.")}
    cure = "name an encoder of these sizes in biomedclip.path"
    load_exactly(net.visual, tower, found.weights.path, "the image tower that is trained beside", cure)
    net.visual.requires_grad_(False)
    net.visual.eval()


def batches(count: int, size: int, steps: int, part: str, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(step, indices) with a progress bar; reshuffled every epoch, a function of seed and part."""
    generator = torch.Generator().manual_seed(named_seed(part, seed))
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(steps), desc=part, mininterval=5):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield step, order[:size]
        order = order[size:]


def fit(
    parameters: Iterable[torch.nn.Parameter],
    shuffled: Iterable[tuple[int, Tensor]],
    step: Callable[[int, Tensor], Loss],
    steps: int,
    rate: float,
    *,
    decay: float = 0.0,
    warmup: float = 0.05,
    after: Callable[[int], None] = lambda number: None,
) -> Rows:
    """Minimise ``step`` over the ``steps`` batches of ``shuffled``: AdamW, one cycle up to the learning rate and down.

    ``warmup``: share of the steps in which the rate rises. ``after`` is called after each update. Returns a row of the
    log for every twentieth step and the last: the mean loss since the row before, the other number of this batch.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
    rows, losses, start = [], [], time.monotonic()
    for number, chosen in shuffled:
        loss, figure = step(number, chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        after(number)
        losses.append(loss.item())
        if number % 20 == 0 or number == steps - 1:
            row = {"step": str(number), "loss": f"{sum(losses) / len(losses):.5f}"}
            row["seconds"] = f"{time.monotonic() - start:.0f}"
            rows.append({**row, "psnr_or_hits": "" if figure is None else f"{figure.item():.3f}"})
            losses.clear()
    return rows
