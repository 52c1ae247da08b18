"""Draw lesions over a dataset folder; only the soft-masked region may change.

    python dataset_infer.py --ckpt stage2_2/last.ckpt --output_dir results --config ./models/mldm_v15.yaml

Without --data it draws on the healthy samples of openimages_format_train.json, with prompts drawn from its diseased
ones. The output is a dataset folder again: one sample folder <sample_id>__v<k> per picture. The same command again
finishes what is missing; --replay makes one picture again from its meta.json.
"""

import argparse
from pathlib import Path

from ldm.config import SAMPLERS, SAMPLING_PRECISIONS
from ldm.core import cli
from ldm.inference.options import InferenceOptions


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", type=Path, help="a final checkpoint, such as stage2_2/last.ckpt")
    parser.add_argument("--config", type=Path, help="model YAML")
    parser.add_argument("--output_dir", type=Path, required=True, help="dataset folder to write")
    what = parser.add_argument_group("what to draw on (default: healthy samples of --train_json)")
    what.add_argument("--data", type=Path, help="dataset folder or annotation JSON")
    text = (
        "all, healthy, diseased, or a file with a sample_id per line (default: healthy, or diseased if there are none)"
    )
    what.add_argument("--choose", metavar="WHICH", help=text)
    what.add_argument("--like", type=Path, metavar="RESULTS", help="the same pictures and masks as in these results")
    what.add_argument("--replay", type=Path, metavar="META.json", help="the picture this meta.json belongs to, again")
    what.add_argument("--image", type=Path, help="one picture, with --mask and --prompt")
    what.add_argument("--mask", type=Path, help="its lesion mask")
    what.add_argument("--limit", type=int, help="at most so many samples")
    what.add_argument("--variants", type=int, default=1, help="pictures per sample")
    how = parser.add_argument_group("how")
    how.add_argument("--prompt", help="one sentence for all (default: the sample's own, or drawn from --train_json)")
    text, default = "whose diseased samples give the prompts for healthy ones", Path("openimages_format_train.json")
    how.add_argument("--train_json", type=Path, default=default, help=text)
    how.add_argument("--seed", type=int, default=0, help="seed of masks, prompts and noise")
    how.add_argument("--batch_size", type=int, help="pictures at a time (default: sampling.batch_size)")
    how.add_argument("--sampler", help=f"{' or '.join(SAMPLERS)} (default: sampling.sampler)")
    how.add_argument("--steps", type=int, help="sampling steps (default: sampling.steps)")
    how.add_argument("--guidance_scale", type=float, help="1 = no guidance (default: sampling.guidance_scale)")
    text = "shares of the steps between which guidance acts (default: sampling.guidance_interval)"
    how.add_argument("--guidance_interval", type=float, nargs=2, metavar=("FROM", "TO"), help=text)
    how.add_argument("--precision", help=f"{' or '.join(SAMPLING_PRECISIONS)} (default: sampling.precision)")
    how.add_argument("--exact", action="store_true", help="one picture at a time, one thread: equal files every time")
    how.add_argument("--biomedclip", type=Path, help="BiomedCLIP folder, or hf-hub:OWNER/NAME (default: the YAML's)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    how.add_argument("--devices", type=int, default=1, help="processes on this node")
    how.add_argument("--num_nodes", type=int, default=1, help="nodes, each with --devices")
    how.add_argument("--overwrite", action="store_true", help="replace the results of another run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any key of the YAML")
    return parser


def main(args: argparse.Namespace) -> int:
    options = cli.options(InferenceOptions, args)
    options.check()
    from ldm.inference.run import run

    return run(options)


if __name__ == "__main__":
    cli.run(build_parser(), main)
