"""What several tests need: this tree in child processes too, a writer of sample folders, a tiny trained pipeline.

The tests run on the CPU, also where there is a GPU: what is promised bit for bit holds there. With
CUDA_VISIBLE_DEVICES=0 in front of pytest they run on that GPU, those marked ``on_cpu`` left out.
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from ldm.data.png import write_png


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What collecting imports stays until the end: it is no garbage, and is not searched for any again and again.

    Nor is what the tests make, but once in many objects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; CUDA_VISIBLE_DEVICES=0 in front of pytest shows it the first one")


@pytest.fixture
def write_sample() -> Callable[..., Path]:
    """``write_sample(folder, prompt="...", image=..., mask=..., meta={...})`` writes one valid sample folder.

    ``None`` for image, mask or prompt leaves that file out; by default a 24 x 20 grey image with a small lesion.
    """

    def write(folder: Path, prompt: str | None = "lytic lesion", **given: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(len(str(folder))).integers(0, 256, (20, 24), dtype=np.uint8)
        mask = np.zeros((20, 24), np.uint8)
        mask[5:10, 8:16] = 255
        for name, pixels in ({"image": image, "mask": mask} | given).items():
            if name != "meta" and pixels is not None:
                write_png(folder / f"{name}.png", pixels)
        if prompt is not None:
            (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
        if "meta" in given:
            (folder / "meta.json").write_text(json.dumps(given["meta"]), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """``--exact`` leaves one thread behind: the tests of the next file have all of them again."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> None:
    """See tests/quick.py. The workers of a run share the folder of what is computed once."""
    import quick

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    folder.mkdir(exist_ok=True)
    os.environ[quick.FOLDER] = str(folder)
    quick.install(folder)


@pytest.fixture(scope="module")
def one_thread(_threads: None) -> None:
    """For files that compare, bit for bit, with what another process computes in one thread."""
    import torch

    torch.set_num_threads(1)


# ------------------------------------------------------------------------- the commands on phantoms, each stage once


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in ``data``, prepared by ver_openImagesDatasets.py under its default file names.

    5 healthy and 4 diseased ones to train on, 1 and 2 to validate, 2 and 2 to test; each split's sample folders lie in
    ``train``, ``val`` and ``test`` once more, for tests that damage copies of them.
    """
    import tiny

    import ver_openImagesDatasets
    from ldm.data.annotations import load_samples
    from ldm.phantom.dataset import write_dataset

    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", 5, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tiny.call(ver_openImagesDatasets, "--root_dir", "data", "--fractions", 0.55, 0.2, 0.25) == 0
    for name in (tiny.TRAIN, tiny.VAL, tiny.TEST):
        for sample in load_samples(folder / name)[0]:
            split = name.removesuffix(".json").split("_")[-1]
            shutil.copytree(sample.image.parent, folder / split / sample.sample_id)
    return folder


@pytest.fixture(scope="session")
def converted(world: Path) -> Path:
    """The phantom base after tool/model_convert.py."""
    import tiny

    assert tiny.convert(tiny.SD, world / "ckpt_for_stage1.ckpt") == 0
    return world / "ckpt_for_stage1.ckpt"


@dataclass
class Trained:
    """One stage's run: where it started, its folder, the parameters that ever had a gradient, its starting step."""

    source: Path
    folder: Path
    graded: set[str] = field(default_factory=set)
    first_steps: list[int] = field(default_factory=list)

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"


@pytest.fixture(scope="session")
def trained(world: Path, converted: Path) -> dict[str, Trained]:
    """The published order with the shipped phantom YAMLs, three steps a stage: convert, 1, 2.1, merge, 2.3, 2.4."""
    import tiny

    from ldm.training.loop import Training

    runs: dict[str, Trained] = {}

    def run(stage: str, source: Path, **rates: float) -> Path:
        made = runs[stage] = Trained(source, world / stage)

        begin, take_step = Training.run, Training.optimizer_step

        def started(self: Training) -> None:
            made.first_steps.append(self.progress.step)
            begin(self)

        def stepped(self: Training) -> None:
            made.graded |= {key for key, value in self.stage.net.named_parameters() if value.grad is not None}
            take_step(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "run", started)
            patch.setattr(Training, "optimizer_step", stepped)
            given = {"pictures": 1, **rates}
            assert tiny.train(stage, source, made.folder, world, "sampling.steps=2", **given) == 0
        return made.last

    stage1 = run("stage1", converted)
    unet_only = run("unet_only", converted, **{"rates.attn3": 0.02})  # fast: attn3 is far from zero afterwards
    merged = world / "ckpt_for_stage2.ckpt"
    assert tiny.merge(stage1, unet_only, merged) == 0
    run("stage2_2", run("stage2_1", merged))
    return runs


@pytest.fixture(scope="session")
def final(trained: dict[str, Trained]) -> Path:
    """The checkpoint that draws."""
    return trained["stage2_2"].last


@pytest.fixture(scope="session")
def small(final: Path, world: Path) -> Any:
    """``tiny.Small``: ``final`` in small, with random weights where sizes differ: for tests that compile networks."""
    import tiny
    import torch

    from ldm.config import load_config
    from ldm.networks.model import MedSoftModel

    made = tiny.Small(world / "small.ckpt")
    torch.manual_seed(0)
    config = load_config(tiny.PHANTOM, made.sizes)
    fresh = MedSoftModel(config.architecture).state_dict()
    content = torch.load(final, weights_only=True)
    theirs = content["state_dict"]
    same = {key for key, value in fresh.items() if key in theirs and theirs[key].shape == value.shape}
    content["state_dict"] = {key: theirs[key] if key in same else tiny.awake(key, fresh[key]) for key in fresh}
    content["medsoft"]["config"] |= {"unet": asdict(config.unet), "msc": asdict(config.msc)}
    torch.save(content, made.last)
    return made


@pytest.fixture(scope="session")
def results(final: Path, world: Path) -> Path:
    """The default run of dataset_infer.py: healthy training images, prompts of diseased ones; batches of two."""
    import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert tiny.infer(final, Path("results"), "--batch_size", 2) == 0
    return world / "results"


@pytest.fixture(scope="session")
def judge(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of lesion types after one epoch."""
    from ldm.classifier.data import ClassifierConfig
    from ldm.classifier.run import train_classifier

    folder = tmp_path_factory.mktemp("judge")
    given = {"train_json": str(world / "train"), "val_json": str(world / "val"), "test_json": None, "task": "type"}
    config = ClassifierConfig(img_size=32, Batch_Size=4, EPOCHS=1, GPU="cpu", output_dir=str(folder), **given)
    train_classifier(config)
    return folder / "classifier.safetensors"


@pytest.fixture
def one(world: Path, tmp_path: Path) -> Path:
    """A data folder with one diseased phantom."""
    folder = next(path.parent for path in sorted((world / "train").glob("*/mask.png")))
    shutil.copytree(folder, tmp_path / "data" / folder.name)
    return tmp_path / "data"
