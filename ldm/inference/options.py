"""What one run of inference is asked for. Its contradictions are refused before anything heavy is imported."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import INITS, SAMPLERS, SAMPLING_PRECISIONS, SPACINGS
from ldm.core.cli import AMOUNT, COUNT, PROCESSES, SEED, SHARE, WHOLE, Number, flag
from ldm.core.errors import UsageError
from ldm.inference.prompts import DEFAULT_MATCH, Match
from ldm.inference.shares import Share, read_share

METHODS = ("paste", "poisson")
FORMATS = ("folder", "tar")
MASKS = ("carry", "blob", "own")
TRIES = 3  # of --check
MM = Number(float, 0.001, 1000)
# What may stand beside --replay, which takes the rest from the meta.json of the image that it makes again.
FREE_IN_REPLAY = ("output_dir", "ckpt", "config", "replay", "train_json", "biomedclip", "device", "overwrite")


@dataclass(frozen=True)
class InferenceOptions:
    """The flags of dataset_infer.py, under their names; None stands for the configuration's own value."""

    output_dir: Path = flag("dataset folder to write", dataclasses.MISSING)
    ckpt: Path | None = flag("a final checkpoint, such as stage2_2/last.ckpt")
    config: Path | None = flag("model YAML")
    data: Path | None = flag("dataset folder or annotation JSON")
    choose: str | None = flag(
        "all, healthy, diseased, or a text file with one sample_id per line (default: healthy ones, else all)",
        metavar="WHICH",
    )
    like: Path | None = flag("the same images and masks as in these earlier results", metavar="RESULTS")
    replay: Path | None = flag("the image this meta.json belongs to, again", metavar="META.json")
    image: Path | None = flag(
        "one image, with --mask and --prompt; a meta.json beside it is read. Or a volume: DICOM file or folder, NIfTI, "
        "NRRD, MHA"
    )
    mask: Path | None = flag("its lesion mask: an image, or for a volume also one (NIfTI, DICOM SEG, RTSTRUCT, ...)")
    plane: str | None = flag(
        "of a volume (default: that of its only slice, else sagittal)", choices=("sagittal", "coronal", "axial")
    )
    slice: int | None = flag(
        "of a volume: which slice, from 0 at the right, the front or the feet (default: where the mask is largest)",
        type=WHOLE,
    )
    window: Sequence[str] | None = flag(
        "of the one image: bone, soft_tissue, or LOW HIGH in values, such as HU; of a volume also file or body",
        nargs="+",
        metavar="RULE",
    )
    spacing: Sequence[float] | None = flag(
        "of the one image: mm between pixels, or between rows and between columns", nargs="+", type=MM, metavar="MM"
    )
    limit: int | None = flag("at most so many samples that can be inpainted", type=COUNT)
    variants: int = flag("results per sample", 1, type=COUNT)
    prompt: str | None = flag("one prompt for all (default: the sample's own, or one from --train_json)")
    match: Sequence[str] = flag(
        "how prompts agree with the level, region and modality in meta.json: level (of a diseased sample of the same "
        "level; where there is none, as replace; the default), replace (its level and region are replaced by the "
        "image's), or none; and keys of meta.json: of a diseased sample with the image's value there, if there is one",
        DEFAULT_MATCH,
        nargs="+",
        metavar="HOW|KEY",
    )
    masks: str = flag(
        "of healthy samples: carry (the mask of the lesion that the prompt was written about, by the two vertebrae; "
        "blob where that cannot be done), blob (lesion-shaped), or own (their soft_mask.png, which is taken first "
        "with each of these)",
        "carry",
        choices=MASKS,
    )
    train_json: Path = flag("gives healthy samples their prompts", Path("openimages_format_train.json"))
    seed: int = flag("seed of masks, prompts and noise", 0, type=SEED)
    batch_size: int | None = flag("images at a time (default: sampling.batch_size)", type=COUNT)
    sampler: str | None = flag(f"{' or '.join(SAMPLERS)} (default: sampling.sampler)")
    steps: int | None = flag("sampling steps (default: sampling.steps)", type=COUNT)
    step_spacing: str | None = flag(f"of the time steps: {' or '.join(SPACINGS)} (default: sampling.spacing)")
    init: str | None = flag(
        f"what sampling begins with: {', '.join(INITS)}: the image with the lesion of the prompt's sample pasted "
        "(default: sampling.init)"
    )
    strength: float | None = flag(
        "share of the steps that --init image or paste is noised for: 0 not at all, 1 wholly (default: "
        "sampling.strength)",
        type=SHARE,
    )
    guidance_scale: float | None = flag("1 = no guidance (default: sampling.guidance_scale)", type=AMOUNT)
    guidance_interval: tuple[float, float] | None = flag(
        "shares of the steps between which guidance acts (default: sampling.guidance_interval)",
        nargs=2,
        type=SHARE,
        metavar=("FROM", "TO"),
    )
    precision: str | None = flag(f"{' or '.join(SAMPLING_PRECISIONS)} (default: sampling.precision)")
    compile: bool = flag("compile the networks at the first batch: for many images on a GPU", False)
    exact: bool = flag("one image at a time and one thread: equal files on every run", False)
    biomedclip: Path | None = flag("BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    device: str = flag("auto, cpu, cuda, cuda:1, ...", "auto")
    devices: int = flag("processes on this node", 1, type=PROCESSES)
    num_nodes: int = flag("nodes, each with --devices", 1, type=PROCESSES)
    share: Share | None = flag(
        "one of N equal parts of the work, K from 1 to N, each a command of its own, into the same folder",
        type=read_share,
        metavar="K/N",
    )
    check: bool = flag(
        "keep an image only if its lesion is like the real training lesions, of --train_json: changed, without a seam, "
        "of its sentence's type for BiomedCLIP, neither too dark nor too bright, no copy; others are drawn again with "
        "further seeds, with --like too",
        False,
    )
    tries: int | None = flag(f"with --check: drawings of an image until one is accepted (default: {TRIES})", type=COUNT)
    judge: Path | None = flag("with --check: a classifier.safetensors that has to see the type that was asked for")
    format: str = flag(
        "folder: a sample folder for each result; tar: WebDataset tars of 1000 samples", "folder", choices=FORMATS
    )
    overwrite: bool = flag("replace the results of another run", False)
    overrides: Sequence[str] = ()  # KEY=VALUE of the YAML

    def validate(self) -> None:
        """UsageError for flags that contradict each other, and for paths that are not there."""
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt: expected a sentence, found nothing")
        if self.prompt is not None and len(self.prompt.strip().splitlines()) > 1:
            raise UsageError("--prompt: expected one sentence on one line, as a prompt.txt has it")
        self._check_match()
        self._check_image()
        if sum(bool(given) for given in (self.data, self.like, self.image, self.replay)) > 1:
            raise UsageError("--data, --like, --image and --replay exclude each other")
        self._check_replay()
        self.check_paths()
        if self.like and (self.variants > 1 or self.choose):
            raise UsageError("--like makes the same images again; --variants and --choose do not go with it")
        for name in ("tries", "judge"):
            if getattr(self, name) is not None and not self.check:
                raise UsageError(f"--{name} belongs to --check")
        if self.init == "paste" and (self.prompt is not None or self.image):
            given = "--image" if self.image else "--prompt"
            raise UsageError(f"--init paste pastes the lesion that a prompt was written about; {given} has none")
        if self.exact and self.batch_size not in (None, 1):
            raise UsageError("--exact takes one image at a time; --batch_size does not go with it")
        if self.exact and self.compile:
            raise UsageError(
                "--exact gives equal files on every run; --compile rounds otherwise and does not go with it"
            )

    def _check_image(self) -> None:
        if self.image and not (self.mask and self.prompt):
            raise UsageError("--image needs --mask and --prompt as well")
        for name in ("mask", "plane", "slice", "window", "spacing"):
            if getattr(self, name) is not None and not self.image:
                raise UsageError(f"--{name} belongs to --image; a dataset says it in its sample folders")
        if self.spacing is not None and len(self.spacing) > 2:
            raise UsageError(f"--spacing: expected one or two numbers, found {' '.join(map(str, self.spacing))}")

    def _check_match(self) -> None:
        keys = Match.read(self.match).keys
        given = next((name for name in ("prompt", "image", "like") if getattr(self, name)), None)
        if keys and given:
            text = f"--match {keys[0]} chooses among the prompts of diseased samples; --{given} takes none of them"
            raise UsageError(text)

    def _check_replay(self) -> None:
        if self.replay:
            for option in dataclasses.fields(self):
                if option.name not in FREE_IN_REPLAY and getattr(self, option.name) not in (option.default, []):
                    raise UsageError(f"--replay makes the same image again; {option.name} does not go with it")
            return
        for name in ("ckpt", "config"):
            if getattr(self, name) is None:
                raise UsageError(f"--{name} is needed (only --replay does without)")

    def check_paths(self) -> None:
        """UsageError for an input that is not there, or lies where results are to be written."""
        for name in ("image", "mask", "data", "like", "replay", "ckpt", "judge"):
            path = getattr(self, name)
            if path and not path.exists():
                raise UsageError(f"--{name} {path}: does not exist")
            if path and path.resolve().is_relative_to(self.output_dir.resolve()):
                raise UsageError(
                    f"--output_dir {self.output_dir}: holds the input --{name} {path}; give another folder"
                )

    def as_overrides(self) -> list[str]:
        """The configuration keys that the flags set, as KEY=VALUE; dotted overrides come after them, so they win."""
        exact = ["sampling.batch_size=1", "sampling.compile=false"] if self.exact else []
        return [*self.spelled(), *self.overrides, *exact]

    def spelled(self) -> dict[str, str]:
        """The configuration keys that the flags set, as KEY=VALUE, each with its flag as in "--strength 0.5"."""
        names = ("batch_size", "sampler", "steps", "guidance_scale", "guidance_interval", "precision")
        keys = {f"sampling.{name}": name for name in (*names, "init", "strength")}
        keys |= {"sampling.spacing": "step_spacing", "biomedclip.path": "biomedclip"}
        flags = {key: (name, getattr(self, name)) for key, name in keys.items() if getattr(self, name) is not None}
        if self.guidance_interval is not None:
            flags["sampling.guidance_interval"] = "guidance_interval", list(self.guidance_interval)  # as YAML spells it
        if self.biomedclip and not str(self.biomedclip).startswith("hf-hub:"):
            flags["biomedclip.path"] = "biomedclip", self.biomedclip.resolve()  # a replay from elsewhere has to find it
        if self.compile:
            flags["sampling.compile"] = "compile", "true"
        return {f"{key}={value}": f"--{name} {value}" for key, (name, value) in flags.items()}


@dataclass(frozen=True)
class PasteOptions:
    """The flags of tool/copy_paste.py, under their names; those of ``InferenceOptions`` mean the same."""

    output_dir: Path = flag("dataset folder to write", dataclasses.MISSING)
    train_json: Path = flag(
        "gives the lesions, the prompts and, without --data, the healthy images", Path("openimages_format_train.json")
    )
    data: Path | None = flag("dataset folder or annotation JSON with the healthy images")
    choose: str | None = flag("healthy, or a text file with one sample_id per line", "healthy", metavar="WHICH")
    limit: int | None = flag("at most so many samples that can be inpainted", type=COUNT)
    variants: int = flag("results per sample", 1, type=COUNT)
    match: Sequence[str] = flag(
        "how prompts agree with their images: level (the default), replace or none, and keys of meta.json",
        DEFAULT_MATCH,
        nargs="+",
        metavar="HOW|KEY",
    )
    seed: int = flag("seed of masks and prompts", 0, type=SEED)
    method: str = flag(
        "paste, or poisson: the lesion's gradients with the image's levels around", METHODS[0], choices=METHODS
    )
    overwrite: bool = flag("replace the results of another run", False)

    def as_inference(self) -> InferenceOptions:
        """What dataset_infer.py would be asked for. UsageError for paths that are not there."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "method"}
        made = InferenceOptions(**given, device="cpu")
        made.check_paths()
        return made
