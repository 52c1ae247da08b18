"""Make a dataset folder of sagittal spine phantoms, healthy and with lesions.

    python tool/make_phantoms.py --output_dir phantoms --healthy 160 --diseased 40 --seed 7

Each picture is a sample folder (image.png, anatomy.png, prompt.txt, meta.json and, when diseased, mask.png).
``--calibrate`` measures how hard the pictures are: a ResNet-18 with few and with many diseased patients.
"""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.core import cli
from ldm.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

# healthy and diseased patients, epochs, batch
FEW, MANY, TEST = (160, 35, 25, 32), (700, 700, 24, 32), (160, 160)
FEW_RUNS = 3  # one run on 35 diseased patients says little: the mean of three, each on its own patients
SIDE = 64


def build_parser() -> argparse.ArgumentParser:
    made = cli.parser(__doc__.split("\n")[0])
    made.add_argument("--output_dir", type=Path, help="dataset folder to write")
    made.add_argument("--healthy", type=int, default=160, help="healthy pictures")
    made.add_argument(
        "--diseased", type=int, default=40, help="pictures with a lesion; types and severities take turns"
    )
    made.add_argument("--seed", type=int, default=0, help="the world: two seeds share no patient")
    made.add_argument("--per_patient", type=int, default=1, help="pictures of each patient")
    made.add_argument(
        "--seen_by_biomedclip",
        action="store_true",
        help="write the pictures that the BiomedCLIP stand-in was trained on instead",
    )
    made.add_argument("--overwrite", action="store_true", help="replace a phantom dataset made with other arguments")
    made.add_argument("--sheet", type=Path, metavar="PNG", help="also write a contact sheet to look at")
    made.add_argument(
        "--calibrate", action="store_true", help="train a ResNet-18 on few and on many patients, print AUCs"
    )
    return made


def main(args: argparse.Namespace) -> int:
    if args.output_dir is None and args.sheet is None and not args.calibrate:
        raise UsageError("nothing to do; give --output_dir DIR, --sheet PNG or --calibrate")
    if args.output_dir is not None:
        from ldm.phantom.spines import write_biomedclip_pairs, write_dataset

        if args.seen_by_biomedclip:
            made = write_biomedclip_pairs(args.output_dir, args.overwrite, progress=True)
            count = "all that the BiomedCLIP stand-in has seen"
        else:
            counts = (args.healthy, args.diseased, args.per_patient)
            made = write_dataset(args.output_dir, args.seed, *counts, args.overwrite, progress=True)
            count = f"{args.healthy} healthy and {args.diseased} diseased pictures, seed {args.seed}"
        print(f"{args.output_dir}: {count}" if made else f"{args.output_dir}: already complete ({count})")
    if args.sheet is not None:
        write_sheet(args.sheet, args.seed)
        print(f"{args.sheet}: contact sheet")
    if args.calibrate:
        print(calibrate(args.seed))
    return cli.DONE


def write_sheet(path: Path, seed: int, columns: int = 9) -> None:
    """A PNG: one row of healthy pictures, one row for each lesion type from subtle (left) to severe (right)."""
    import cv2
    import numpy as np

    from ldm.core.files import atomic_file
    from ldm.phantom.spines import LESION_TYPES, SEVERITIES, render_phantom

    rows = []
    for row, kind in enumerate((None, *LESION_TYPES)):
        tiles = []
        for column in range(columns):
            severity = SEVERITIES[column * len(SEVERITIES) // columns] if kind else None
            image = render_phantom(seed, 2 * (row * columns + column) + (kind is not None), kind, severity).image
            tile = np.zeros((148, 148), np.uint8)
            top, left = (148 - image.shape[0]) // 2, (148 - image.shape[1]) // 2
            tile[top : top + image.shape[0], left : left + image.shape[1]] = image
            tiles.append(tile)
        rows.append(np.hstack(tiles))
    with atomic_file(path) as handle:
        handle.write(cv2.imencode(".png", np.vstack(rows))[1].tobytes())


def calibrate(seed: int) -> str:
    """Train on few and on many patients, test on others (three worlds derived from ``seed``); the result in a line."""
    import numpy as np
    from sklearn.metrics import roc_auc_score
    from tqdm import tqdm

    from ldm.phantom.spines import SEVERITIES, plan

    start = time.perf_counter()
    with tqdm(desc="steps", total=FEW_RUNS * _steps(*FEW) + _steps(*MANY)) as bar:
        test_x, test_y = _pictures(1000 + seed, *TEST)
        severities = np.array([severity or "healthy" for *_, severity in plan(*TEST)])
        few = []
        for run in range(FEW_RUNS):
            network = _train(*_pictures(2000 + FEW_RUNS * seed + run, *FEW[:2]), *FEW, seed=run, bar=bar)
            few.append(roc_auc_score(test_y, _scores(network, test_x)))
            bar.set_postfix(few=f"{few[-1]:.3f}")
        network = _train(*_pictures(1500 + seed, *MANY[:2]), *MANY, seed=seed, bar=bar)
        scores = _scores(network, test_x)
        many = roc_auc_score(test_y, scores)
    called = ", ".join(f"{(scores[severities == name] > 0.5).mean():.1%} {name}" for name in ("healthy", *SEVERITIES))
    return (
        f"test AUC {sum(few) / len(few):.3f} ({min(few):.3f}-{max(few):.3f}, {len(few)} runs) with {FEW[1]} diseased "
        f"and {FEW[0]} healthy patients; {many:.3f} with {MANY[1]} and {MANY[0]} (called diseased: {called}); "
        f"{len(test_y)} test patients; "
        f"{(time.perf_counter() - start) / 60:.1f} minutes on {_hardware()}"
    )


def _steps(healthy: int, diseased: int, epochs: int, batch: int) -> int:
    return (healthy + diseased) * epochs // batch


def _pictures(seed: int, healthy: int, diseased: int) -> "tuple[torch.Tensor, np.ndarray]":
    """Whole pictures resized to float32 Nx1x64x64, about zero mean, and whether each has a lesion."""
    import cv2
    import numpy as np
    import torch

    from ldm.phantom.spines import plan, render_phantom

    shown = [render_phantom(seed, index, kind, severity, n) for index, n, kind, severity in plan(healthy, diseased)]
    small = [cv2.resize(phantom.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for phantom in shown]
    pixels = torch.from_numpy(np.stack(small)).float()[:, None] / 255
    return (pixels - 0.35) / 0.2, np.array([not phantom.healthy for phantom in shown])


def _train(
    x: "torch.Tensor", y: "np.ndarray", healthy: int, diseased: int, epochs: int, batch: int, *, seed: int, bar: object
) -> "torch.nn.Module":
    """A ResNet-18 from scratch: AdamW, one cycle, shifts of up to 3 pixels, changes of brightness and contrast."""
    import timm
    import torch

    from ldm.core.devices import autocast

    torch.manual_seed(seed)
    network = timm.create_model("resnet18", in_chans=1, num_classes=2).train()
    steps = _steps(healthy, diseased, epochs, batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    target = torch.from_numpy(y).long()
    order = torch.cat([torch.randperm(len(x)) for _ in range(epochs)])[: steps * batch].view(steps, batch)
    for chosen in order:
        shift = torch.randint(-3, 4, (2,)).tolist()
        contrast, brightness = 1 + 0.1 * torch.randn(batch, 1, 1, 1), 0.1 * torch.randn(batch, 1, 1, 1)
        seen = torch.roll(x[chosen], shift, (2, 3)) * contrast + brightness
        with autocast(torch.device("cpu")):
            logits = network(seen)
        loss = torch.nn.functional.cross_entropy(logits.float(), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return network.eval()


def _scores(network: "torch.nn.Module", x: "torch.Tensor") -> "np.ndarray":
    import torch

    with torch.no_grad():
        return torch.cat([network(part).softmax(1)[:, 1] for part in x.split(128)]).numpy()


def _hardware() -> str:
    """The processor in words, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of an {names[0]}" if names else f"{os.cpu_count()} cores"


if __name__ == "__main__":
    cli.run(build_parser(), main)
