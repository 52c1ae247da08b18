"""What one run of inference is asked for. Its contradictions are refused before anything heavy is imported."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ldm.core.errors import UsageError

# What --replay takes from the meta.json of the image that it makes again.
FIXED_BY_REPLAY = (
    *("choose", "limit", "variants", "prompt", "seed", "batch_size", "sampler", "steps", "guidance_scale"),
    *("guidance_interval", "precision", "exact", "devices", "num_nodes", "overrides"),
)


@dataclass(frozen=True)
class InferenceOptions:
    """The flags of dataset_infer.py, under their names; None stands for the configuration's own value."""

    output_dir: Path
    ckpt: Path | None = None
    config: Path | None = None
    # What to inpaint: healthy samples of train_json, or what one of these names.
    data: Path | None = None  # dataset folder or annotation JSON
    like: Path | None = None  # earlier results, whose images and masks are used again
    replay: Path | None = None  # the meta.json of one earlier result, which is made again
    image: Path | None = None  # one image, with mask and prompt
    mask: Path | None = None
    choose: str | None = None  # a class, or a text file with one sample_id per line
    limit: int | None = None
    variants: int = 1  # results per sample
    prompt: str | None = None  # one for all
    train_json: Path = Path("openimages_format_train.json")  # its diseased samples give the prompts for healthy ones
    seed: int = 0
    batch_size: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    precision: str | None = None
    exact: bool = False  # one image at a time in one thread: equal files on every run
    biomedclip: Path | None = None
    device: str = "auto"
    devices: int = 1  # processes on each node
    num_nodes: int = 1
    overwrite: bool = False
    overrides: tuple[str, ...] = ()  # KEY=VALUE of the YAML

    def check(self) -> None:
        """UsageError for flags that contradict each other, and for paths that are not there."""
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt: expected a sentence, found nothing")
        if self.image and not (self.mask and self.prompt):
            raise UsageError("--image needs --mask and --prompt as well")
        if self.mask and not self.image:
            raise UsageError("--mask belongs to --image; a dataset's masks are in its sample folders")
        if sum(bool(given) for given in (self.data, self.like, self.image, self.replay)) > 1:
            raise UsageError("--data, --like, --image and --replay exclude each other")
        self._check_replay()
        self._check_paths()
        if self.like and (self.variants > 1 or self.choose):
            raise UsageError("--like draws the same pictures again; --variants and --choose do not go with it")
        if self.variants < 1 or (self.limit is not None and self.limit < 1):
            raise UsageError("--variants and --limit: expected at least 1")
        if self.exact and self.batch_size not in (None, 1):
            raise UsageError("--exact draws one picture at a time; --batch_size does not go with it")
        if self.devices < 1 or self.num_nodes < 1:
            raise UsageError("--devices and --num_nodes: expected at least 1")

    def _check_replay(self) -> None:
        if self.replay:
            for option in dataclasses.fields(self):
                if option.name in FIXED_BY_REPLAY and getattr(self, option.name) != option.default:
                    raise UsageError(f"--replay makes the same picture again; {option.name} does not go with it")
            return
        for flag in ("ckpt", "config"):
            if getattr(self, flag) is None:
                raise UsageError(f"--{flag} is needed (only --replay does without)")

    def _check_paths(self) -> None:
        for flag in ("image", "mask", "data", "like", "replay", "ckpt"):
            path = getattr(self, flag)
            if path and not path.exists():
                raise UsageError(f"--{flag} {path}: does not exist")
            if path and path.resolve().is_relative_to(self.output_dir.resolve()):
                raise UsageError(
                    f"--output_dir {self.output_dir}: holds the input --{flag} {path}; give another folder"
                )

    def as_overrides(self) -> list[str]:
        """The configuration keys that the flags set, as KEY=VALUE; dotted overrides come after them, so they win."""
        names = ("batch_size", "sampler", "steps", "guidance_scale", "guidance_interval", "precision")
        flags = {f"sampling.{name}": getattr(self, name) for name in names}
        if self.guidance_interval is not None:
            flags["sampling.guidance_interval"] = list(self.guidance_interval)  # as YAML spells it
        flags["biomedclip.path"] = self._biomedclip_path()
        exact = ["sampling.batch_size=1"] if self.exact else []
        return [*(f"{key}={value}" for key, value in flags.items() if value is not None), *self.overrides, *exact]

    def _biomedclip_path(self) -> Path | None:
        """An absolute folder, so that a replay from elsewhere finds it; a hub id stays as it is."""
        if self.biomedclip is None or str(self.biomedclip).startswith("hf-hub:"):
            return self.biomedclip
        return self.biomedclip.resolve()
