"""What the text and the MSC's tokens each do for a drawn lesion, and what the tokens hold of the true ones."""

import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.classifier.network import pick_device
from ldm.classifier.run import Classifier, load_classifier
from ldm.config import DataConfig, load_config
from ldm.core.errors import MedSoftError, UsageError, warn_of_first
from ldm.core.files import write_json
from ldm.core.tables import counted
from ldm.data.annotations import load_samples
from ldm.data.checks import real_ones
from ldm.data.preparation import PreparedSample, prepare, whole_pictures
from ldm.data.regions import inpainting_obstacle
from ldm.data.samples import Sample
from ldm.diffusion.noise import named_generator, normal
from ldm.diffusion.schedule import loss_inside
from ldm.features.build import compute_features
from ldm.inference.inpainter import Inpainter, Job
from ldm.inference.prompts import matched
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs, masked_cosine
from ldm.networks.opening import open_model

log = logging.getLogger("measure_paths")

PATHS = ("both", "text", "tokens", "crossed")  # what draws: see tool/measure_paths.py
REDRAWN = ("both", "swapped", "true_tokens")  # what draws held-out lesions again
TIMES = (0.25, 0.5, 0.75)  # shares of the noise schedule at which losses are measured


class Case(NamedTuple):
    """One sample, prepared, with its prompt and one of another lesion type."""

    sample: Sample
    prepared: PreparedSample
    lesion_type: str
    prompt: str
    other_type: str
    other_prompt: str


@dataclass(frozen=True)
class PathOptions:
    """What is measured, on what, by whom; the flags of tool/measure_paths.py."""

    ckpt: Path
    config: Path
    overrides: Sequence[str]
    data: Path
    judge: Path
    output: Path
    limit: int
    seed: int


def measure_paths(options: PathOptions) -> bool:
    """Measure, log and write ``output``; whether every sample could be used. Raises UsageError or MedSoftError for
    what cannot be measured."""
    for file in (options.ckpt, options.judge):
        if not file.is_file():
            raise UsageError(f"{file}: does not exist, or is no file")
    config = load_config(options.config, options.overrides)
    data, limit, seed = options.data, options.limit, options.seed
    classifier = load_classifier(options.judge, "")
    samples, rejects = load_samples(data)
    samples = real_ones(data, samples)
    plain = [each for each in samples if not each.healthy and each.severity != "subtle"]
    diseased = taking_turns([each for each in plain if each.lesion_type in _types(classifier)])
    if len({sample.lesion_type for sample in diseased}) < 2:
        raise MedSoftError(f"{data}: expected diseased samples of at least two lesion types that {options.judge} knows")
    net, encoder = open_model(config, read_checkpoint(options.ckpt))
    sampling = replace(config.sampling, precision="32-true", compile=False)
    inpainter = PathInpainter(net, encoder, sampling, pick_device(""))
    lesions, lost = _cases(diseased[:limit], diseased, config.data, seed)
    healthy, unused = _cases([each for each in samples if each.healthy][:limit], diseased, config.data, seed)
    if not healthy or not lesions:
        raise MedSoftError(f"{data}: {len(healthy)} healthy and {counted(len(lesions), 'diseased sample')} can be used")
    samples_used = {"healthy": len(healthy), "diseased": len(lesions)}
    drawn = {
        "drawings": {path: _judged(classifier, healthy, _drawn(inpainter, path, healthy, seed)) for path in PATHS},
        "redrawn": _redrawn(inpainter, classifier, lesions, seed),
    }
    held_out = _held_out(inpainter, lesions, seed)
    about = {"ckpt": str(options.ckpt), "seed": seed, "samples": samples_used}
    write_json(options.output, {**about, **drawn, "held_out": held_out})
    for part, rows in drawn.items():
        for name, row in rows.items():
            log.info("%-8s %-11s %s", part, name, {key: round(value, 3) for key, value in row.items()})
    log.info("held out %s", {key: round(row["mean"], 4) for key, row in held_out.items()})
    return not (rejects or lost or unused)


def _types(classifier: Classifier) -> list[str]:
    names = [name for name in classifier.info["classes"] if name != "healthy"]
    if names == ["diseased"]:
        raise MedSoftError("--judge: knows no lesion types; expected a classifier trained with task: type")
    return names


def taking_turns(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in an order in which their lesion types take turns while there are some of each."""
    kinds: dict[str | None, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.lesion_type, []).append(sample)
    rows = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds, key=str)))
    return [sample for row in rows for sample in row if sample is not None]


def _cases(
    samples: Sequence[Sample], sources: Sequence[Sample], data: DataConfig, seed: int
) -> tuple[list[Case], list[Sample]]:
    """``samples`` with prompts, a healthy one's those of ``sources`` in turn; and those that cannot be prepared."""
    cases, lost, faults = [], [], []
    for number, sample in enumerate(samples):
        own = sources[number % len(sources)] if sample.healthy else sample
        others = [each for each in sources if each.lesion_type != own.lesion_type]
        other = others[number % len(others)]
        prompts = [matched(each.prompt, sample) for each in (own, other)]
        try:
            reason = inpainting_obstacle(sample) or (None in prompts and "no prompt can be made to agree with it")
            if reason:
                raise MedSoftError(f"{sample.sample_id}: {reason}")
            prepared = prepare(sample, data, seed, 0)
        except MedSoftError as error:
            faults.append(f"skipped {error}")
            lost.append(sample)
            continue
        texts = [prompt.prompt for prompt in prompts if prompt]
        cases.append(Case(sample, prepared, own.lesion_type or "", texts[0], other.lesion_type or "", texts[1]))
    warn_of_first(log, faults)
    return cases, lost


def _batches(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[start : start + size] for start in range(0, len(cases), size)]


# Drawings.


class PathInpainter(Inpainter):
    """Draws with ``path``, one of PATHS or REDRAWN.

    ``others``: a batch's prompts of other types, whose tokens are taken when crossed, and which are taken when swapped.
    """

    path = "both"
    others: list[str]

    def condition(
        self, image: Tensor, soft_mask: Tensor, prompts: list[str], whole: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As that of ``Inpainter``, with the text or the tokens of ``path``."""
        if self.path == "swapped":
            return super().condition(image, soft_mask, self.others, whole)
        text, semantic = super().condition(image, soft_mask, prompts, whole)
        if self.path == "text":
            semantic = torch.zeros_like(semantic)
        elif self.path == "tokens":
            text = self.empty_text.expand_as(text)
        elif self.path == "crossed":
            semantic = super().condition(image, soft_mask, self.others, whole)[1]
        elif self.path == "true_tokens":
            context, _ = self.net.context_features(self.encoder, image, soft_mask, whole)
            semantic = self.net.semantic(context, self.encoder.encode_image(image)[0], soft_mask)
        return text, semantic


def _drawn(inpainter: PathInpainter, path: str, cases: Sequence[Case], seed: int) -> list[np.ndarray]:
    """The pixels of all cases, drawn by ``path``."""
    inpainter.path = path
    images = []
    for batch in _batches(cases, inpainter.sampling.batch_size):
        inpainter.others = [case.other_prompt for case in batch]
        jobs = [Job(seed, case.sample.sample_id, 0, case.prompt) for case in batch]
        images += inpainter.inpaint([case.prepared for case in batch], jobs)
    bad = [case.sample.sample_id for case, image in zip(cases, images, strict=True) if image.pixels is None]
    if bad:
        raise MedSoftError(f"{bad[0]}: the model produced values that are no numbers")
    return [image.pixels for image in images if image.pixels is not None]


def _redrawn(
    inpainter: PathInpainter, judge: Classifier, cases: Sequence[Case], seed: int
) -> dict[str, dict[str, float]]:
    """The held-out lesions themselves, and drawn anew in their own masks by each of REDRAWN.

    Swapped, the prompt is one of another type, and the mask is not its own: does the sentence rule, or the mask's form?
    With true tokens nothing is lost by the MSC: what is then still wrong is the U-Net's doing, or that of tokens which
    do not tell types apart.
    """
    paths = [path for path in REDRAWN if path != "true_tokens" or "msc" in inpainter.net.parts]  # a table hears none
    drawn = {path: _drawn(inpainter, path, cases, seed) for path in paths}
    drawn["themselves"] = [case.prepared.original for case in cases]
    return {name: _judged(judge, cases, pixels) for name, pixels in drawn.items()}


def _judged(judge: Classifier, cases: Sequence[Case], pixels: Sequence[np.ndarray]) -> dict[str, float]:
    classes, shares = judge.info["classes"], judge.probabilities([case.sample for case in cases], pixels)
    lesions = [place for place, name in enumerate(classes) if name != "healthy"]
    likeliest = [classes[lesions[place]] for place in shares[:, lesions].argmax(axis=1)]
    healthy = classes.index("healthy")
    return {
        "called_diseased": float((shares.argmax(axis=1) != healthy).mean()),
        "type_of_prompt": statistics.mean(
            kind == case.lesion_type for kind, case in zip(likeliest, cases, strict=True)
        ),
        "type_of_other": statistics.mean(kind == case.other_type for kind, case in zip(likeliest, cases, strict=True)),
    }


# Losses and tokens on held-out lesions.


@torch.inference_mode()
def _held_out(inpainter: PathInpainter, cases: Sequence[Case], seed: int) -> dict[str, dict[str, float]]:
    """Cosines, the loss inside the mask, and how much another condition adds to it: mean and standard error each."""
    rows: dict[str, list[Tensor]] = {}
    true, softs = [], []
    for batch in _batches(cases, inpainter.sampling.batch_size):
        values, target, soft = _losses(inpainter, batch, seed)
        for name, each in values.items():
            rows.setdefault(name, []).append(each)
        true.append(target.cpu())
        softs.append(soft.cpu())
    columns = {name: torch.cat(each).cpu() for name, each in rows.items()}
    means = cosines_of_type_means([case.lesion_type for case in cases], torch.cat(true), torch.cat(softs))
    if len(means):
        columns["cosine_of_type_mean"] = means
    own = columns.pop("own")
    added = {f"added_by_{name}": columns.pop(name) - own for name in [*columns] if not name.startswith("cosine")}
    found = {"loss_inside": own, **added, **columns}
    return {name: {"mean": float(v.mean()), "error": float(v.std() / len(v) ** 0.5)} for name, v in found.items()}


def _losses(inpainter: PathInpainter, cases: Sequence[Case], seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Losses inside the mask (B,) by what the U-Net is given, cosines; true tokens (B, N, D), patch mask (B, N)."""
    net, encoder, device = inpainter.net, inpainter.encoder, inpainter.device
    prepared = [case.prepared for case in cases]
    image = torch.stack([each.image for each in prepared]).to(device)
    soft_mask = torch.stack([each.mask for each in prepared]).to(device)
    whole = whole_pictures(prepared, device) if net.architecture.sees_whole else None
    features = compute_features(net, encoder, image, soft_mask, whole=whole)
    clip, latents = features["clip"], features["latents"]
    patches, context = net.patch_mask(soft_mask), clip["context_tokens"]
    prompts, others = [case.prompt for case in cases], [case.other_prompt for case in cases]

    def lesion(words: list[str]) -> Tensor:
        """The tokens (B, N, D) that the MSC predicts inside the mask from these prompts."""
        return net.msc(ControllerInputs.of({**clip, "prompt_embedding": encoder.encode_text(words)}))[0]

    def tokens(inside: Tensor) -> Tensor:
        """What the third attention reads where ``inside`` (B, N, D) are the tokens inside the mask."""
        return net.semantic(context, inside, soft_mask)

    found: dict[str, Tensor] = {}
    own = tokens(context)  # with a learned table whatever is inside
    text, other_text = net.cond_stage_model(prompts), net.cond_stage_model(others)
    given = {"own": (text, own)}
    if "msc" in net.parts:
        predicted = lesion(prompts)
        found["cosine"] = masked_cosine(predicted, clip["target_tokens"], patches)
        own = tokens(predicted)
        given = {"own": (text, own), "true_tokens": (text, tokens(clip["target_tokens"]))}
        given["other_tokens"] = text, tokens(lesion(others))
    given |= {"zero_tokens": (text, torch.zeros_like(own)), "other_text": (other_text, own)}
    given["empty_text"] = inpainter.empty_text.expand_as(text), own
    loss = _loss_of(net, latents, net.latent_mask(soft_mask), [case.sample.sample_id for case in cases], seed)
    return found | {name: loss(*each) for name, each in given.items()}, clip["target_tokens"], patches


def _loss_of(
    net: MedSoftModel, latents: dict[str, Tensor], mask: Tensor, names: Sequence[str], seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss inside the mask (B,) as a function of text and tokens, with noise by ``names``, a mean over TIMES."""
    latent = net.scaled(latents["latent_mean"])
    shape = latent.shape[1:]

    def loss(text: Tensor, semantic: Tensor) -> Tensor:
        total = torch.zeros(len(latent), device=latent.device)
        for share in TIMES:
            noise = torch.stack([normal(named_generator("paths", seed, share, name), shape) for name in names])
            noise, t = noise.to(latent), torch.full((len(latent),), int(share * net.schedule.timesteps))
            t = t.to(latent.device)
            noisy = net.schedule.add_noise(latent, noise, t)
            predicted = net.predict_noise(noisy, t, mask, latents["masked_latent"], text, semantic)
            total += loss_inside(predicted, noise, mask) / len(TIMES)
        return total

    return loss


def cosines_of_type_means(kinds: Sequence[str], true: Tensor, soft: Tensor) -> Tensor:
    """Cosine to the true tokens (B, N, D) of the mean true token inside the masks (B, N) of the type's other samples.

    One for each sample whose type has others.
    """
    sums = (true * soft.unsqueeze(-1)).sum(dim=1)
    means, kept = [], []
    for number, kind in enumerate(kinds):
        others = [place for place, each in enumerate(kinds) if each == kind and place != number]
        if others:
            kept.append(number)
            means.append(sums[others].sum(dim=0) / soft[others].sum())
    if not kept:
        return torch.empty(0)
    return masked_cosine(torch.stack(means)[:, None].expand_as(true[kept]), true[kept], soft[kept])
