"""dataset_infer.py at scale: lists, drawn prompts, processes, precision, samplers, bad input."""

import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import torch
from tiny import CLIP, PHANTOM, ROOT, TRAIN, call, dataset_infer, infer, metas, record, whole

import ldm.inference.preparing
from ldm.core.errors import MedSoftError, UsageError
from ldm.core.files import content_id
from ldm.data.annotations import load_samples, write_annotations
from ldm.data.images import read_image
from ldm.data.png import write_png
from ldm.data.samples import Sample
from ldm.inference.inpainter import Inpainter
from ldm.inference.options import InferenceOptions
from ldm.inference.tasks import plan_tasks


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def command(ckpt: Path, output: Path, *more: Any) -> list[str]:
    flags = ["--ckpt", ckpt, "--config", PHANTOM, "--output_dir", output, "--biomedclip", CLIP, "--steps", 2]
    return [str(word) for word in [ROOT / "dataset_infer.py", *flags, "--device", "cpu", *more]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*__v*/*"))}


def images_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: read_image(folder / name / "image.png").astype(int) for name in metas(folder)}


# ------------------------------------------------------------------------------------------------- what is drawn on


def test_list_file_chooses_and_orders(final: Path, world: Path, tmp_path: Path) -> None:
    names = [sample.sample_id for sample in load_samples(world / TRAIN)[0]]
    (tmp_path / "list.txt").write_text(f"{names[3]}\n\n  {names[0]}\n")
    given = ["--data", world / TRAIN, "--train_json", world / TRAIN, "--choose", tmp_path / "list.txt"]
    assert infer(final, tmp_path / "out", *given) == 0
    assert {meta["parent_id"] for meta in metas(tmp_path / "out").values()} == {names[3], names[0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody\n", r"line 1: no sample has the sample_id 'nobody'; they look like"),
        ("../{0}\n", r"line 1: no sample has the sample_id '\.\./"),
        ("{0}\n{1}\n{0}\n", r"lines 1 and 3 name the same sample"),
        ("\n \n", r"lists no sample"),
    ],
)
def test_bad_list_file(final: Path, world: Path, tmp_path: Path, text: str, message: str) -> None:
    names = [sample.sample_id for sample in load_samples(world / TRAIN)[0]]
    (tmp_path / "list.txt").write_text(text.format(*names))
    with pytest.raises(MedSoftError, match=message):
        infer(final, tmp_path / "out", "--data", world / TRAIN, "--choose", tmp_path / "list.txt")
    assert not (tmp_path / "out").exists()


def test_list_file_that_is_not_there(final: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--choose helthy: expected all, healthy, diseased or a text file"):
        infer(final, tmp_path / "out", "--data", world / TRAIN, "--choose", "helthy")


def test_drawn_prompts_have_the_frequencies_of_the_lesion_types(tmp_path: Path, write_sample: Any) -> None:
    """700 prompts for healthy samples from 10 diseased ones, 7 of one type; a function of the seed."""
    image = write_sample(tmp_path / "one") / "image.png"
    kinds = ["osteolytic"] * 7 + ["haemangioma"] * 3
    box = (0.2, 0.2, 0.5, 0.5)
    sick = [
        Sample(f"sick{k}", image, image.with_name("mask.png"), f"{kind} {k}", box, "p", lesion_type=kind)
        for k, kind in enumerate(kinds)
    ]
    well = [Sample(f"well{k}", image, None, "healthy", box, "p") for k in range(100)]
    write_annotations(tmp_path / "all.json", [*sick, *well])

    def drawn(seed: int) -> list[str]:
        options = InferenceOptions(tmp_path, train_json=tmp_path / "all.json", seed=seed, choose="healthy", variants=7)
        return [task.source.lesion_type for task in plan_tasks(options, content_id)[0]]

    first = drawn(0)
    assert len(first) == 700
    assert Counter(first)["osteolytic"] / 700 == pytest.approx(0.7, abs=0.05)
    assert first == drawn(0) != drawn(1)


def test_soft_mask_of_a_healthy_sample_says_where_to_draw(final: Path, world: Path, tmp_path: Path) -> None:
    healthy = next(sample for sample in load_samples(world / "val")[0] if sample.healthy)
    folder = Path(shutil.copytree(healthy.image.parent, tmp_path / "data" / "x"))
    soft = np.zeros(read_image(healthy.image).shape[:2], np.uint8)
    soft[40:52, 30:41], soft[43:49, 33:38] = 90, 255
    write_png(folder / "soft_mask.png", soft)
    assert infer(final, tmp_path / "out", "--data", tmp_path / "data", "--prompt", "lytic lesion") == 0
    assert np.array_equal(read_image(tmp_path / "out" / "x__v0" / "soft_mask.png"), soft)
    assert np.array_equal(read_image(tmp_path / "out" / "x__v0" / "mask.png"), np.where(soft > 127, 255, 0))


# ------------------------------------------------------------------------------------------------- processes


def test_two_processes_draw_each_picture_once_and_the_same(final: Path, world: Path, tmp_path: Path) -> None:
    given = ["--train_json", world / TRAIN, "--variants", 2, "--exact"]
    done = children.run(*command(final, tmp_path / "out", *given, "--devices", 2), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("inpainting 5 healthy samples") == 1  # one process speaks
    assert "process 1 of 2" in done.stderr
    assert "5/5 images" in done.stderr  # its own share
    assert "left, " in done.stderr
    assert "10 images, 0 pixels changed" in done.stdout
    whole(tmp_path / "out")
    assert infer(final, tmp_path / "alone", *given) == 0
    first, second = files_of(tmp_path / "out"), files_of(tmp_path / "alone")
    assert len(first) == 60  # image, mask, soft mask, label map, prompt and meta.json of each
    assert set(first) == set(second)
    for file, content in first.items():
        if not file.endswith("meta.json"):  # which holds the command
            assert content == second[file], file
    for gone in sorted(metas(tmp_path / "out"))[2:9:3]:  # what is missing is drawn again, by another number of them
        shutil.rmtree(tmp_path / "out" / gone)
    assert infer(final, tmp_path / "out", *given) == 0
    images = {file: content for file, content in files_of(tmp_path / "out").items() if file.endswith("png")}
    assert images == {file: content for file, content in first.items() if file.endswith("png")}


@pytest.mark.slow
def test_fault_in_one_of_two_processes_is_one_line(final: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "val", tmp_path / "data")
    for mask in (tmp_path / "data").glob("*/mask.png"):
        write_png(mask, np.zeros_like(read_image(mask)))
    write_annotations(tmp_path / "data.json", load_samples(world / "val")[0])
    records = json.loads((tmp_path / "data.json").read_text().replace(str(world / "val"), str(tmp_path / "data")))
    (tmp_path / "data.json").write_text(json.dumps(records))
    given = ["--data", "data.json", "--choose", "diseased", "--devices", 2]
    done = children.run(*command(final, Path("out"), *given), folder=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no image could be inpainted" in errors[0]
    assert len(json.loads((tmp_path / "out" / "rejects.json").read_text())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0"], "--devices: expected a whole number from 1 to 1024, found 0"),
        (["--exact", "--batch_size", "8"], "--exact takes one image at a time; --batch_size does not go with it"),
        (["--sampler", "euler"], r'sampling\.sampler: expected one of ddim, dpmpp_2m, found "euler"'),
        (["--step_spacing", "even"], r'spacing: expected one of leading, trailing, polynomial, fitted, found "even"'),
        (["--precision", "fp8"], r"sampling\.precision: expected one of 32-true, bf16-true"),
        (
            ["--guidance_interval", "0.8", "0.2"],
            r"guidance_interval: expected two shares.* found \[0\.8, 0\.2\]",
        ),
        (
            ["--sampler", "dpmpp_2m", "sampling.eta=1"],
            r"sampling\.eta: expected 0 with sampling\.sampler=dpmpp_2m, found 1\.0",
        ),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        infer(tmp_path / "some.ckpt", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_checkpoint_and_configuration_are_needed(tmp_path: Path) -> None:
    for flag in ("--ckpt", "--config"):
        flags = {"--ckpt": tmp_path, "--config": PHANTOM}
        flags.pop(flag)
        with pytest.raises(UsageError, match=f"{flag} is needed"):
            call(dataset_infer, "--output_dir", tmp_path / "out", *[w for pair in flags.items() for w in pair])


# ------------------------------------------------------------------------------------------------- how it is drawn


def test_bf16_draws_nearly_the_same_and_leaves_the_outside_alone(
    final: Path, world: Path, results: Path, tmp_path: Path
) -> None:
    assert infer(final, tmp_path / "out", "--train_json", world / TRAIN, "--limit", 2, "--precision", "bf16-true") == 0
    again = ("--train_json", world / TRAIN, "--limit", 2, "--precision", "bf16-true", "--batch_size", 1)
    assert infer(final, tmp_path / "alone", *again) == 0
    alone = images_of(tmp_path / "alone")
    for name, half in images_of(tmp_path / "out").items():
        full = read_image(results / name / "image.png").astype(int)
        lesion = read_image(results / name / "mask.png") > 0
        assert np.abs(half - full).max() > 0
        assert np.abs(half - full)[lesion].mean() < 12  # of 255 levels
        # In bf16 another batch size may round otherwise: by no more than bf16 itself differs from float32.
        assert np.abs(half - alone[name])[lesion].mean() <= 2 * np.abs(half - full)[lesion].mean()
        assert metas(tmp_path / "out")[name]["changed_outside_pixels"] == 0


def test_samplers_steps_scale_and_interval_all_matter(final: Path, one: Path, tmp_path: Path) -> None:
    kinds = {
        "plain": [],
        "ddim": ["--sampler", "ddim"],
        "steps": ["--steps", 3],
        "spacing": ["--step_spacing", "leading"],
        "scale": ["--guidance_scale", 2],
        "early": ["--guidance_interval", 0, 0.5],
        "never": ["--guidance_interval", 1, 1],
        "rescale": ["sampling.guidance_rescale=0"],
        "eta": ["--sampler", "ddim", "sampling.eta=1"],
    }
    found = {}
    for name, flags in kinds.items():
        assert infer(final, tmp_path / name, "--data", one, "--steps", 2, *flags) == 0
        (found[name],) = images_of(tmp_path / name).values()
    for first in kinds:
        for second in kinds:
            assert first == second or not np.array_equal(found[first], found[second]), (first, second)
    assert infer(final, tmp_path / "unguided", "--data", one, "--steps", 2, "--guidance_scale", 1) == 0
    (unguided,) = images_of(tmp_path / "unguided").values()
    assert np.array_equal(unguided, found["never"])


def test_deep_alpha_rotated_and_jpeg_pictures(final: Path, tmp_path: Path) -> None:
    """End to end: the result's size, depth and alpha as other programs read them."""
    from PIL import Image

    rng = np.random.default_rng(3)
    mask = np.zeros((70, 90), np.uint8)
    mask[30:40, 50:62] = 255
    write_png(tmp_path / "mask.png", mask)
    rgba = rng.integers(0, 256, (70, 90, 4), dtype=np.uint8)
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba[..., 0].swapaxes(0, 1).copy()).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in ("rgba.png", "turned.jpg"):
        given = ["--image", tmp_path / name, "--mask", tmp_path / "mask.png", "--prompt", "lytic lesion"]
        assert infer(final, tmp_path / Path(name).stem, *given) == 0
    with Image.open(tmp_path / "rgba" / "rgba__v0" / "image.png") as opened:
        found = np.asarray(opened)
    soft = read_image(tmp_path / "rgba" / "rgba__v0" / "soft_mask.png")
    assert np.array_equal(found[..., 3], rgba[..., 3])
    assert np.array_equal(found[soft == 0], rgba[soft == 0])
    assert not np.array_equal(found, rgba)
    with Image.open(tmp_path / "turned" / "turned__v0" / "image.png") as opened:
        assert (opened.format, opened.size, opened.mode, len(opened.getexif())) == ("PNG", (90, 70), "L", 0)


# ------------------------------------------------------------------------------------------------- bad input


def test_long_thin_picture(final: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (17, 3000), dtype=np.uint8)
    mask = np.zeros((17, 3000), np.uint8)
    mask[4:12, 1500:1512] = 255
    write_png(tmp_path / "i.png", picture)
    write_png(tmp_path / "m.png", mask)
    given = ["--image", tmp_path / "i.png", "--mask", tmp_path / "m.png", "--prompt", "lesion"]
    assert infer(final, tmp_path / "out", *given) == 0
    found, soft = (read_image(tmp_path / "out" / "i__v0" / f"{name}.png") for name in ("image", "soft_mask"))
    assert found.shape == (17, 3000)
    assert np.array_equal(found[soft == 0], picture[soft == 0])
    assert not np.array_equal(found[mask > 0], picture[mask > 0])


def test_inverted_mask_is_drawn_with_a_warning(final: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_png(tmp_path / "i.png", np.full((40, 40), 90, np.uint8))
    for name, value in (("right", 0), ("inverted", 255)):
        mask = np.full((40, 40), value, np.uint8)
        mask[10:20, 10:20] = 255 - value
        write_png(tmp_path / f"{name}.png", mask)
        caplog.clear()
        given = ["--image", tmp_path / "i.png", "--mask", tmp_path / f"{name}.png", "--prompt", "lesion"]
        assert infer(final, tmp_path / name, *given) == 0
        warned = [line for line in caplog.messages if "invert it" in line]
        assert len(warned) == (name == "inverted")
    assert "inverted.png: 94 % of the image is marked; white (1) is the lesion" in warned[0]


def test_prompt_of_300_words_is_cut_with_a_warning(
    final: Path, one: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = "severe osteolytic lesion " * 100
    assert infer(final, tmp_path / "out", "--data", one, "--prompt", words) == 0
    assert any("prompt cut: Stable Diffusion's text encoder reads 75 of the" in line for line in caplog.messages)
    (name,) = metas(tmp_path / "out")
    assert (tmp_path / "out" / name / "prompt.txt").read_text().strip() == words.strip()  # what was asked for is kept


def test_names_that_repeat_are_refused(final: Path, one: Path, tmp_path: Path) -> None:
    write_annotations(tmp_path / "data.json", load_samples(one)[0] * 2)
    with pytest.raises(MedSoftError, match="record 0 and record 1 have the same sample_id"):
        infer(final, tmp_path / "out", "--data", tmp_path / "data.json")


def test_output_folder_that_cannot_be_written(final: Path, one: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(UsageError, match=r"expected a folder, found a file \(.*file\); give another"):
            infer(final, out, "--data", one)
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="locked may not be written to"):
            infer(final, tmp_path / "locked" / "out", "--data", one)


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_file_size_limit_stops_with_one_line_and_the_rest_is_drawn_later(
    final: Path, world: Path, tmp_path: Path
) -> None:
    """A disk that takes no more: every write beyond 4 kB fails in the operating system, not in a mock."""
    given = ["--data", world / "val", "--choose", "diseased", "--exact"]
    done = children.run("-c", LIMITED, *command(final, tmp_path / "out", *given), folder=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written (File too large)" in line
    assert "Traceback" not in done.stderr
    whole(tmp_path / "out")
    assert infer(final, tmp_path / "out", *given) == 0
    whole(tmp_path / "out")
    assert record(tmp_path / "out")["pictures"] == 2


def test_nan_in_one_picture_names_step_and_sample_and_the_rest_goes_on(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.networks.model import MedSoftModel

    plain, calls = MedSoftModel.denoise, []

    def denoise(self: MedSoftModel, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(noisy))
        eps = plain(self, noisy, *rest)
        if len(calls) == 2:
            eps[1] = torch.nan
        return eps

    monkeypatch.setattr(MedSoftModel, "denoise", denoise)
    given = ["--train_json", world / TRAIN, "--limit", 3, "--steps", 4, "--batch_size", 3]
    assert infer(final, tmp_path / "out", *given) == 3
    (reject,) = json.loads((tmp_path / "out" / "rejects.json").read_text())
    assert "at sampling step 2 of 4" in reject["reason"]
    names = sorted({sample.sample_id for sample in load_samples(world / TRAIN)[0] if sample.healthy})[:3]
    assert reject["sample_id"] == names[1]
    assert set(metas(tmp_path / "out")) == {f"{names[0]}__v0", f"{names[2]}__v0"}


def test_pictures_are_read_and_written_while_the_model_works(
    final: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a batch is drawn, the next one is already being read."""
    read, drawn, arrived = [], [], threading.Condition()
    plain_prepare, plain_draw = ldm.data.preparation.prepare, Inpainter.begin

    def prepare(sample: Sample, *rest: Any, **more: Any) -> Any:
        with arrived:
            read.append(sample)
            arrived.notify_all()
        return plain_prepare(sample, *rest, **more)

    monkeypatch.setattr(ldm.inference.preparing, "prepare", prepare)

    def draw(self: Inpainter, pictures: Any, jobs: Any) -> Any:
        expected = min(len(drawn) + 2, 3)
        with arrived:  # wakes when the next picture is read; where nothing reads ahead it gives up
            arrived.wait_for(lambda: len(read) >= expected, timeout=20)
        drawn.append(len(read))
        return plain_draw(self, pictures, jobs)

    monkeypatch.setattr(Inpainter, "begin", draw)
    given = ["--train_json", world / TRAIN, "--masks", "blob", "--limit", 3, "--batch_size", 1]
    assert infer(final, tmp_path / "out", *given) == 0
    assert drawn == [2, 3, 3]


def test_large_16_bit_picture_with_a_small_lesion(final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 x 2048, a lesion of 40 pixels: drawn in one model-sized square, all else bit for bit as it was."""
    from ldm.networks.model import MedSoftModel

    rng = np.random.default_rng(1)
    picture = rng.integers(200, 3000, (2048, 2048), dtype=np.uint16)
    mask = np.zeros((2048, 2048), np.uint8)
    mask[1500:1540, 700:740] = 255
    write_png(tmp_path / "big.png", picture)
    write_png(tmp_path / "big_mask.png", mask)
    seen: dict[str, list[tuple[int, ...]]] = {"encode": [], "denoise": [], "decode": []}
    for part, shapes in seen.items():
        plain = getattr(MedSoftModel, part)
        monkeypatch.setattr(
            MedSoftModel,
            part,
            lambda net, x, *rest, plain=plain, shapes=shapes: shapes.append(tuple(x.shape)) or plain(net, x, *rest),
        )
    flags = ["--image", tmp_path / "big.png", "--mask", tmp_path / "big_mask.png", "--prompt", "lesion"]
    assert infer(final, tmp_path / "big", *flags) == 0
    # All the networks ever see of 4 million pixels is one square of the model's size, twice: as it is, and hidden.
    assert seen == {"encode": [(1, 3, 64, 64)] * 2, "denoise": [(1, 4, 16, 16)] * 2, "decode": [(1, 4, 16, 16)]}
    found, soft = (read_image(tmp_path / "big" / "big__v0" / f"{file}.png") for file in ("image", "soft_mask"))
    assert found.dtype == np.uint16
    assert np.array_equal(found[soft == 0], picture[soft == 0])
    assert (found[mask > 0] != picture[mask > 0]).mean() > 0.9
    assert 0 < np.count_nonzero(soft) < 80 * 80
