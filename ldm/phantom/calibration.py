"""How hard phantoms are: a ResNet-18 trained on few and on many diseased patients, tested on others."""

import os
import time
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from ldm.core.devices import autocast
from ldm.phantom.fit import Loss, fit
from ldm.phantom.spines import SEVERITIES, plan, render_phantom

# healthy and diseased patients, epochs, batch
FEW, MANY, TEST = (160, 35, 25, 32), (700, 700, 24, 32), (160, 160)
FEW_RUNS = 3  # one run on 35 diseased patients says little: the mean of three, each on its own patients
SIDE = 64
CPU = torch.device("cpu")


def calibrate(seed: int) -> str:
    """Train on few and on many patients, test on others (three worlds derived from ``seed``); the result in a line."""
    start = time.perf_counter()
    with tqdm(desc="steps", total=FEW_RUNS * _steps(*FEW) + _steps(*MANY)) as bar:
        test_x, test_y = _images(1000 + seed, *TEST)
        severities = np.array([severity or "healthy" for _, _, severity, _ in plan(*TEST)])
        few = []
        for run in range(FEW_RUNS):
            network = _train(*_images(2000 + FEW_RUNS * seed + run, *FEW[:2]), *FEW, seed=run, bar=bar)
            few.append(roc_auc_score(test_y, _scores(network, test_x)))
            bar.set_postfix(few=f"{few[-1]:.3f}")
        network = _train(*_images(1500 + seed, *MANY[:2]), *MANY, seed=seed, bar=bar)
        scores = _scores(network, test_x)
        many = roc_auc_score(test_y, scores)
    called = ", ".join(f"{(scores[severities == name] > 0.5).mean():.1%} {name}" for name in ("healthy", *SEVERITIES))
    return (
        f"test AUC {sum(few) / len(few):.3f} ({min(few):.3f}-{max(few):.3f}, {len(few)} runs) with {FEW[1]} diseased "
        f"and {FEW[0]} healthy patients; {many:.3f} with {MANY[1]} and {MANY[0]} (called diseased: {called}); "
        f"{len(test_y)} test patients; {(time.perf_counter() - start) / 60:.1f} minutes on {_hardware()}"
    )


def _steps(healthy: int, diseased: int, epochs: int, batch: int) -> int:
    return (healthy + diseased) * epochs // batch


def _images(seed: int, healthy: int, diseased: int) -> tuple[Tensor, np.ndarray]:
    """Whole phantoms resized to float32 Nx1x64x64, about zero mean, and whether each has a lesion."""
    phantoms = [render_phantom(seed, *each) for each in plan(healthy, diseased)]
    small = [cv2.resize(phantom.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for phantom in phantoms]
    pixels = torch.from_numpy(np.stack(small)).float()[:, None] / 255
    return (pixels - 0.35) / 0.2, np.array([not phantom.healthy for phantom in phantoms])


def _train(
    x: Tensor, y: np.ndarray, healthy: int, diseased: int, epochs: int, batch: int, *, seed: int, bar: tqdm
) -> torch.nn.Module:
    """A ResNet-18 from scratch: AdamW, one cycle, shifts of up to 3 pixels, changes of brightness and contrast."""
    torch.manual_seed(seed)
    network = timm.create_model("resnet18", in_chans=1, num_classes=2).train()
    steps = _steps(healthy, diseased, epochs, batch)
    target = torch.from_numpy(y).long()
    order = torch.cat([torch.randperm(len(x)) for _ in range(epochs)])[: steps * batch].view(steps, batch)

    def step(chosen: Tensor) -> Loss:
        shift = torch.randint(-3, 4, (2,)).tolist()
        contrast, brightness = 1 + 0.1 * torch.randn(batch, 1, 1, 1), 0.1 * torch.randn(batch, 1, 1, 1)
        augmented = torch.roll(x[chosen], shift, (2, 3)) * contrast + brightness
        with autocast(CPU):
            logits = network(augmented)
        loss = torch.nn.functional.cross_entropy(logits.float(), target[chosen])
        return loss, loss

    for _ in fit(network.parameters(), order, step, steps, 1e-3, decay=1e-2, warmup=0.3, clip=None):
        bar.update()
    return network.eval()


def _scores(network: torch.nn.Module, x: Tensor) -> np.ndarray:
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
