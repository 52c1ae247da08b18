"""Make soft masks for a dataset: from its lesion masks, anatomy labels or boxes, or lesion-shaped ones.

    python tool/make_soft_masks.py --data dataset --output_dir softened --source mask --feather 6 --feather_unit pixels
    python tool/make_soft_masks.py --data dataset --output_dir drawable --source lesion --size 0.3 0.5 --side left

The output is a dataset folder again: image, prompt and meta.json as they were, mask.png and soft_mask.png new.
dataset_infer.py draws in these masks, in healthy images too. The same command again finishes what is missing.
"""

import argparse
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from ldm.data.masks import Mask
    from ldm.data.samples import Sample

log = logging.getLogger("make_soft_masks")

SOURCES = ("mask", "anatomy", "box", "lesion")
SIDES = ("left", "right", "top", "bottom")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or annotation JSON")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="mask",
        help="mask: the lesion's mask; anatomy: labels of anatomy.png; box: the annotation's box or --boxes; lesion: a "
        "lesion-shaped mask inside the vertebra's label, mask or box (default: %(default)s)",
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[1], help="labels of anatomy.png (default: 1)")
    parser.add_argument(
        "--boxes", type=Path, help="JSON: sample_id -> box, or list of boxes, [x, y, w, h] as fractions of the image"
    )
    border = parser.add_argument_group("soft border")
    border.add_argument("--feather", type=float, default=0.25, help="its width (default: %(default)s)")
    border.add_argument(
        "--feather_unit",
        choices=["diameter", "pixels", "mm"],
        default="diameter",
        help="diameter: a fraction of the region's equivalent diameter (default); mm needs spacing_mm in meta.json",
    )
    shape = parser.add_argument_group("lesion-shaped masks")
    shape.add_argument(
        "--size",
        type=float,
        nargs=2,
        default=[0.35, 0.7],
        metavar=("FROM", "TO"),
        help="diameter, relative to the smaller side of the vertebra's bounding box (default: 0.35 0.7)",
    )
    shape.add_argument("--side", choices=SIDES, help="half of the vertebra, in the picture (default: anywhere)")
    shape.add_argument("--irregularity", type=float, help="0, an ellipse, to 1 (default: varies)")
    shape.add_argument("--seed", type=int, default=0, help="seed of the shapes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace masks made with other settings")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or are out of range."""
    if not args.data.exists():
        raise UsageError(f"--data {args.data}: does not exist")
    if args.boxes and args.source != "box":
        raise UsageError(f"--boxes goes with --source box, not with --source {args.source}")
    if not 0 < args.size[0] <= args.size[1] <= 1:
        raise UsageError(f"--size: expected two rising numbers above 0, at most 1, found {args.size}")
    if args.irregularity is not None and not 0 <= args.irregularity <= 1:
        raise UsageError(f"--irregularity: expected 0 to 1, found {args.irregularity}")
    source, output = args.data.resolve(), args.output_dir.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise UsageError(f"--output_dir {args.output_dir}: lies inside --data or holds it; give another folder")


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """sample_id -> boxes; MedSoftError naming the sample for anything that is not a box inside the image."""
    from ldm.core.files import read_json

    found = read_json(path, "list of boxes")
    if not isinstance(found, dict) or not found:
        raise MedSoftError(f"{path}: expected a JSON object from sample_id to box, found {type(found).__name__}")
    boxes = {name: value if value and isinstance(value[0], list) else [value] for name, value in found.items()}
    for name, some in boxes.items():
        for box in some:
            if not inside_image(box):
                raise MedSoftError(
                    f"{path}: {name}: {box} is no box inside the image; expected [x, y, w, h] as fractions"
                )
    return boxes


def inside_image(box: Any) -> bool:
    """True for [x, y, w, h], fractions of an image that hold something of it."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        return False
    x, y, w, h = box
    return x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 1 + 1e-6 and y + h <= 1 + 1e-6


def mask_of(sample: "Sample", shape: tuple[int, ...], args: argparse.Namespace, boxes: Mapping[str, Any]) -> "Mask":
    """The mask to soften; MedSoftError if the sample has nothing to make it from."""
    import numpy as np

    from ldm.core.files import named_seed
    from ldm.data.masks import Mask, box_region, lesion_shaped, read_anatomy, read_mask, region_for

    if args.source == "lesion":
        vertebra = region_for(sample, shape)
        if vertebra is None:
            raise MedSoftError("neither anatomy.png nor a mask nor a box says where the vertebra is")
        seed = named_seed("soft-mask", args.seed, sample.sample_id)
        hard = lesion_shaped(vertebra, seed, tuple(args.size), args.side, args.irregularity)
    elif args.source == "mask":
        if sample.mask is None:
            raise MedSoftError("has no mask")
        own = read_mask(sample.mask, shape)
        if own.soft:
            return own  # used as it is
        hard = own.hard
    elif args.source == "anatomy":
        if sample.anatomy is None:
            raise MedSoftError("has no anatomy.png")
        hard = np.isin(read_anatomy(sample.anatomy, shape), args.labels)
    else:
        some = boxes.get(sample.sample_id, []) if args.boxes else [sample.box]
        hard = np.zeros(shape[:2], bool)
        for box in some:
            hard |= box_region(box, shape)
    if not hard.any():
        raise MedSoftError(f"nothing is marked by its {args.source}")
    return Mask(hard.astype(np.float32))


def write_sample(folder: Path, sample: "Sample", hard: "np.ndarray", soft: "np.ndarray") -> None:
    """The sample with its new masks, whole or not at all."""
    import numpy as np

    from ldm.core.files import atomic_folder, write_json, write_text
    from ldm.data.png import write_png

    known = {key: getattr(sample, key) for key in ("patient_id", "parent_id", "lesion_type", "level", "severity")}
    meta = {key: value for key, value in known.items() if value is not None} | sample.meta
    with atomic_folder(folder) as partial:
        for file, stem in ((sample.image, "image"), (sample.anatomy, "anatomy")):
            if file is not None:
                shutil.copyfile(file, partial / f"{stem}{file.suffix}")
        write_png(partial / "mask.png", hard.astype(np.uint8) * 255)
        write_png(partial / "soft_mask.png", np.rint(soft * 255).astype(np.uint8))
        write_text(partial / "prompt.txt", sample.prompt + "\n")
        write_json(partial / "meta.json", meta | ({"synthetic": True} if sample.synthetic else {}))


def main(args: argparse.Namespace) -> int:
    check(args)
    from tqdm import tqdm

    from ldm.data.annotations import load_samples, write_rejects
    from ldm.data.images import read_image
    from ldm.data.masks import Feather, soft_mask_for
    from ldm.data.samples import Reject

    boxes = read_boxes(args.boxes) if args.boxes else {}
    samples, rejects = load_samples(args.data)
    unknown = sorted(set(boxes) - {sample.sample_id for sample in samples})
    if unknown:
        raise MedSoftError(f"{args.boxes}: {unknown[0]!r} is no sample of {args.data}")
    record = begin(args, samples, boxes)
    feather = Feather(args.feather, args.feather_unit)
    written = 0
    for sample in tqdm(samples, "soft masks", unit=" samples"):
        folder = args.output_dir / sample.sample_id
        if (folder / "soft_mask.png").is_file():
            written += 1
            continue
        try:
            shape = read_image(sample.image).shape
            mask = mask_of(sample, shape, args, boxes)
            soft = soft_mask_for(mask, feather, sample.meta.get("spacing_mm"))
        except MedSoftError as error:
            rejects.append(Reject(sample.sample_id, sample.image, str(error)))
            continue
        write_sample(folder, sample, mask.hard, soft)
        written += 1
    write_rejects(args.output_dir / "rejects.json", rejects)
    if not written:
        raise MedSoftError(f"{args.data}: no mask could be made; first: {rejects[0]}")
    finish(args, record, written, len(rejects))
    return cli.SOME_REJECTED if rejects else cli.DONE


def begin(args: argparse.Namespace, samples: "list[Sample]", boxes: Mapping[str, Any]) -> str:
    """The fingerprint of this run; results of another one are refused, or removed with --overwrite."""
    from ldm.core.files import PARTIAL_PREFIX, fingerprint, read_json, write_json
    from ldm.data.preparation import sample_identity

    record = args.output_dir / "soft_masks.json"
    flags = {key: value for key, value in vars(args).items() if key not in ("output_dir", "overwrite", "debug")}
    run = fingerprint([flags, boxes, [sample_identity(sample) for sample in samples]])
    before = read_json(record).get("run") if record.exists() else None
    if before is None and args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise UsageError(f"--output_dir {args.output_dir}: is not empty and holds no masks of this command")
    if before not in (None, run):
        if not args.overwrite:
            raise UsageError(
                f"--output_dir {args.output_dir}: holds masks made with other settings; give another folder, or "
                "--overwrite to replace them"
            )
        for mask in list(args.output_dir.rglob("soft_mask.png")):
            shutil.rmtree(mask.parent)
    write_json(record, {"run": run, "complete": False})
    for orphan in list(args.output_dir.rglob(PARTIAL_PREFIX + "*")):
        shutil.rmtree(orphan, ignore_errors=True)
    return run


def finish(args: argparse.Namespace, run: str, written: int, rejected: int) -> None:
    """Record and say how many masks there are."""
    from ldm.core.files import write_json

    write_json(
        args.output_dir / "soft_masks.json",
        {"run": run, "complete": True, "masks": written, "rejected": rejected, "source": args.source},
    )
    log.info("%s: %d soft masks, %d samples rejected", args.output_dir, written, rejected)
    if rejected:
        log.warning("%d samples were rejected; all of them are in %s", rejected, args.output_dir / "rejects.json")


if __name__ == "__main__":
    cli.run(build_parser(), main)
