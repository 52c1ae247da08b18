"""Train one stage of MedSoft-Diffusion: the YAML decides which.

    python ver_train.py --ckpt ckpt_for_stage1.ckpt --config ./models/mldm_v15_stage1.yaml --save_path stage1

The same command again resumes from SAVE_PATH/last.ckpt, or says that the stage is complete. --ckpt only gives the
first weights. Any key of the YAML can be set at the end of the command: training.mask_weight=4 training.warmup_steps=50
"""

import argparse
from pathlib import Path

from ldm.config import Config, load_config
from ldm.core import cli
from ldm.core.errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint that gives the first weights")
    parser.add_argument("--config", type=Path, required=True, help="stage YAML in models/")
    parser.add_argument("--save_path", type=Path, required=True, help="folder for last.ckpt, config.yaml, metrics.csv")
    for split, use in (("train", "train"), ("val", "validate")):
        default = Path(f"openimages_format_{split}.json")
        parser.add_argument(f"--{split}_json", type=Path, default=default, help=f"annotations to {use} on")
    parser.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    parser.add_argument("--cache_dir", type=Path, help="cached features (default: feature_cache beside SAVE_PATH)")
    parser.add_argument("--devices", type=cli.devices, default="auto", help="number of devices, or auto")
    parser.add_argument("--num_nodes", type=cli.PROCESSES, default=1, help="number of machines")
    parser.add_argument("--precision", help="auto, 32-true, bf16-mixed, ... (default: training.precision)")
    parser.add_argument("--batch_size", type=cli.COUNT, help="global batch (default: training.batch_size)")
    parser.add_argument("--max_epochs", type=cli.COUNT, help="epochs (default: training.max_epochs)")
    parser.add_argument("--seed", type=cli.SEED, help="seed (default: training.seed)")
    parser.add_argument("--overwrite", action="store_true", help="start again where another run was saved")
    parser.add_argument(
        "--dry_run", action="store_true", help="show what would be trained and what it takes, then stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def resolve(args: argparse.Namespace) -> Config:
    """The configuration of this run: YAML, then flags, then dotted overrides."""
    flags = {
        "training.precision": args.precision,
        "training.batch_size": args.batch_size,
        "training.max_epochs": args.max_epochs,
        "training.seed": args.seed,
        "biomedclip.path": args.biomedclip,
    }
    overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = load_config(args.config, [*overrides, *args.overrides])
    if not config.training.stage:
        raise UsageError(f"{args.config}: names no stage; use one of the YAMLs built on it, such as *_stage1.yaml")
    return config


def main(args: argparse.Namespace) -> int:
    config = resolve(args)
    from ldm.training.run import TrainingOptions, run_stage

    return run_stage(cli.options(TrainingOptions, args), config)


if __name__ == "__main__":
    cli.run(build_parser(), main)
