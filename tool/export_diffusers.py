"""Write a checkpoint as a diffusers folder, for programs that know Stable Diffusion but not this method.

    python ./tool/export_diffusers.py --ckpt stage2_2/last.ckpt --output_dir exported

diffusers' StableDiffusionInpaintPipeline.from_pretrained("exported") loads U-Net, autoencoder, text encoder, tokenizer
and scheduler, offline. What it does not know, the third attention and the Medical Semantic Controller, lies in
exported/medsoft/. tool/model_convert.py --input_path exported makes the checkpoint again, bit for bit.
"""

import argparse
import logging
from pathlib import Path

from ldm.core import cli
from ldm.core.errors import MedSoftError, UsageError

log = logging.getLogger("export_diffusers")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, raw=True)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint made by this repository")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder exported from something else")
    return parser


def main(args: argparse.Namespace) -> int:
    from ldm.checkpoints.checkpoint import NAMES, parameter_table, parts_of, read_checkpoint, summary
    from ldm.checkpoints.files import verify
    from ldm.conversion.diffusers_folder import write_folder
    from ldm.core.files import atomic_folder, check_target, sha256_file
    from ldm.networks.model import skeleton

    checkpoint = read_checkpoint(args.ckpt)
    config, parts = checkpoint.config, checkpoint.parts()
    if config is None:
        raise MedSoftError(
            f"{args.ckpt}: does not say which configuration it has; convert it with tool/model_convert.py"
        )
    missing = [NAMES[part] for part in ("unet", "autoencoder", "text") if part not in parts]
    if missing:
        raise MedSoftError(f"{args.ckpt}: holds no {', '.join(missing)}; a pipeline needs them. Merge it first")
    size = sum(row["bytes"] for row in summary(checkpoint.state).values())
    known = exported_from(args.output_dir)
    check_target(args.output_dir, size if args.overwrite or not known else 0, args.ckpt)
    digest = sha256_file(args.ckpt)
    if known and not args.overwrite:
        if known != digest:
            raise UsageError(
                f"{args.output_dir}: holds the export of another file; give another path, or --overwrite to replace it"
            )
        log.info("%s: already complete", args.output_dir)
        return cli.DONE
    log.info("checked: %s, %s", args.ckpt, verify(args.ckpt))
    state = parts_of(checkpoint, parts, config, skeleton(config, parts))
    origin = {"file": args.ckpt.name, "sha256": digest}
    ours = {"about": checkpoint.about, "parts": parts, "exported_from": origin}
    with atomic_folder(args.output_dir.absolute()) as partial:
        write_folder(partial, state, ours, config)
    for line in parameter_table(state):
        log.info("%s", line)
    log.info("written: %s", args.output_dir)
    return cli.DONE


def exported_from(folder: Path) -> str | None:
    """SHA-256 of the checkpoint that ``folder`` is the export of; None where there is no folder.

    UsageError if it is something else: ``--overwrite`` replaces only what this command has written.
    """
    from ldm.conversion.diffusers_folder import OURS
    from ldm.core.files import read_json

    if not folder.exists():
        return None
    try:
        return read_json(folder / OURS / "config.json")["exported_from"]["sha256"]
    except (MedSoftError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: already exists and was not exported by this command; give another path") from error


if __name__ == "__main__":
    cli.run(build_parser(), main)
