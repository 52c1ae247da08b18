"""One training stage without a run: its loss, clipping, and frozen weights in half precision."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import CLIP, MODELS, squares

from ldm.checkpoints.checkpoint import read_checkpoint
from ldm.config import load_config
from ldm.core.devices import kernel_layout, on_host
from ldm.core.errors import UsageError
from ldm.data.annotations import load_samples
from ldm.data.preparation import prepare
from ldm.features.build import MASK_SEED, FeatureBuilder
from ldm.features.known import KnownFiles
from ldm.features.names import training_items
from ldm.inference.inpainter import Inpainter, Job
from ldm.networks.attention import Conditioning
from ldm.networks.model import MedSoftModel
from ldm.networks.msc import ControllerInputs
from ldm.networks.opening import open_model
from ldm.training.dataset import StageData, loader
from ldm.training.estimates import fake_batch
from ldm.training.loop import Requests
from ldm.training.previews import Previews
from ldm.training.stage import Stage
from ldm.training.steps import StepStats


@pytest.mark.parametrize("amx", [False, True])
def test_halved_kernels_lie_as_the_cpu_reads_them_fastest(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    config = load_config(MODELS / "phantom_unet_only.yaml", [])
    net = MedSoftModel(config.architecture, ["unet"])
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    stage = Stage(config.training, net, {}, torch.zeros(1, 77, config.text_encoder.width), half_frozen=True)
    layouts = set()
    for key, value in net.named_parameters():
        halved = key not in stage.trained and value.ndim > 1
        assert value.dtype == (torch.bfloat16 if halved else torch.float32)
        assert torch.equal(value, before[key].to(value.dtype))
        if halved and value.ndim == 4 and min(value.shape[1:]) > 1:  # of others both layouts are the same
            layouts.add(value.is_contiguous(memory_format=torch.channels_last))
    assert layouts == {amx}


@pytest.mark.parametrize(("most", "norm"), [(0.5, 0.5), (2.0, 1.0), (0.0, 1.0)])
def test_gradients_are_scaled_down_to_the_norm_of_the_yaml(most: float, norm: float) -> None:
    torch.manual_seed(0)
    config = load_config(MODELS / "phantom_stage1.yaml", [f"training.clip_norm={most}"])
    stage = Stage(config.training, MedSoftModel(config.architecture, ["msc"]), {}, None)
    count = sum(value.numel() for value in stage.trained.values())
    for value in stage.trained.values():
        value.grad = torch.where(torch.rand_like(value) > 0.5, 1.0, -1.0) / count**0.5
    before = {key: value.grad.clone() for key, value in stage.trained.items()}
    norms, total = stage.gradient_norms()
    assert float(total) == pytest.approx(1.0, rel=1e-4)
    assert float(norms["msc"]) == float(total)
    stage.clip(total)
    for key, value in stage.trained.items():
        torch.testing.assert_close(value.grad, before[key] * norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["bf16-true", "16-true", "64-true"])
def test_precision_in_which_weights_are_not_float32(name: str) -> None:
    with pytest.raises(UsageError, match=rf"training\.precision.*{name}"):
        load_config(MODELS / "phantom_stage1.yaml", [f"training.precision={name}"])


def test_kernel_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert kernel_layout(gpu, torch.float32) == kernel_layout(gpu, torch.bfloat16) == torch.channels_last
        assert kernel_layout(cpu, torch.float32) == torch.contiguous_format
        assert kernel_layout(cpu, torch.bfloat16) == (torch.channels_last if amx else torch.contiguous_format)


def test_diffusion_loss_of_a_batch() -> None:
    """By hand: latents from moments, one coin for sentence and tokens, the soft mask as channel, gate and weight."""
    torch.manual_seed(0)
    config = load_config(MODELS / "phantom_stage2_2.yaml", ["training.mask_weight=2"])
    net = MedSoftModel(config.architecture, ["unet", "msc"])
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.05)
    empty = torch.randn(1, 77, config.text_encoder.width)
    stage = Stage(config.training, net, {}, empty)
    batch = fake_batch(config.architecture, 3)
    batch["coin"] = torch.tensor([0.05, 0.5, 0.1])
    batch["t"] = torch.tensor([0.0, 0.5, 1.0 - 2**-25])  # which is 1 in float32
    with torch.no_grad():
        found, cosine, inside, published = stage(batch, dropout=0.1)
        assert torch.equal(found, published)
        latent = batch["latent_mean"] + (batch["latent_logvar"] / 2).exp() * batch["posterior_noise"]
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2, 0)
        alpha = alphas[[0, 500, 999]].float()[:, None, None, None]
        noisy = alpha.sqrt() * 0.18215 * latent + (1 - alpha).sqrt() * batch["noise"]
        mask = torch.nn.functional.max_pool2d(batch["mask"], config.data.image_size // config.architecture.latent_size)
        patches = torch.nn.functional.adaptive_max_pool2d(batch["mask"], config.biomedclip.grid).flatten(1)
        tokens, _ = net.msc(ControllerInputs.of(batch))
        mixed = patches[..., None] * tokens + (1 - patches[..., None]) * batch["context_tokens"]
        side = config.biomedclip.grid
        square = mixed.transpose(1, 2).reshape(3, -1, side, side)
        pooled = torch.nn.functional.avg_pool2d(square, 2).flatten(2).transpose(1, 2)
        text = torch.cat([empty, batch["text"][1:]])  # the first coin only is below 0.1
        pooled = torch.cat([torch.zeros_like(pooled[:1]), pooled[1:]])
        inputs = torch.cat([noisy, mask, batch["masked_latent"]], dim=1)
        predicted = net.unet(inputs, torch.tensor([0, 500, 999]), Conditioning(text, pooled, mask))
        weight = (1 + 2 * mask).expand_as(predicted)
        squares = (predicted - batch["noise"]) ** 2
        expected = (weight * squares).flatten(1).sum(1) / weight.flatten(1).sum(1)
        expected_inside = (mask * squares).flatten(1).sum(1) / mask.expand_as(squares).flatten(1).sum(1)
        similar = torch.nn.functional.cosine_similarity(tokens, batch["target_tokens"], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inside, expected_inside, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cosine, (similar * patches).sum(1) / patches.sum(1), rtol=1e-4, atol=1e-6)


def test_options_of_the_diffusion_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins of its own for text and tokens, min-SNR weights and the MSC's loss; the published loss has none of them."""
    torch.manual_seed(0)
    more = ["training.coins=separate", "training.min_snr=5", "training.msc_weight=0.25"]
    config = load_config(MODELS / "phantom_stage2_1.yaml", more)
    net = MedSoftModel(config.architecture, ["unet", "msc"])
    empty = torch.full((1, 77, config.text_encoder.width), 7.0)
    stage = Stage(config.training, net, {}, empty)
    batch = fake_batch(config.architecture, 4)
    batch["coin"], batch["t"] = torch.tensor([0.05, 0.15, 0.25, 0.35]), torch.tensor([0.0, 0.1, 0.5, 0.99])
    plain, given = MedSoftModel.predict_noise, {}

    def predict_noise(self: MedSoftModel, *inputs: torch.Tensor) -> torch.Tensor:
        given["text"], given["semantic"] = inputs[4:]
        return plain(self, *inputs)

    monkeypatch.setattr(MedSoftModel, "predict_noise", predict_noise)
    found = stage(batch, dropout=0.1)
    assert (given["text"] == 7).flatten(1).all(1).tolist() == [True, True, False, False]
    assert (given["semantic"] == 0).flatten(1).all(1).tolist() == [True, False, True, False]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2, 0)
    snr = (alphas / (1 - alphas))[[0, 100, 500, 990]]
    weights = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    soft = torch.nn.functional.adaptive_max_pool2d(batch["mask"], config.biomedclip.grid).flatten(1)
    tokens, global_token = net.msc(ControllerInputs.of(batch))
    errors = (tokens - batch["target_tokens"]).square().mean(2)
    own = (errors * soft).sum(1) / soft.sum(1) + (global_token - batch["target_global"]).square().mean(1)
    expected = weights.float() * found.published + 0.25 * own
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-6)
    found.loss.mean().backward()
    assert net.msc.global_head.weight.grad.abs().sum() > 0


def test_alignment_of_the_middle_block_by_hand() -> None:
    """Projected, enlarged to BiomedCLIP's grid, compared with the true tokens; gradients reach the middle block."""
    torch.manual_seed(0)
    config = load_config(MODELS / "phantom_stage2_2.yaml", ["training.alignment_weight=0.25"])
    net = MedSoftModel(config.architecture, ["unet", "msc"])
    stage = Stage(config.training, net, {}, torch.zeros(1, 77, config.text_encoder.width))
    batch, seen = fake_batch(config.architecture, 3), []
    net.unet.middle_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = stage(batch, dropout=0.1)
    first, _, second = net.alignment.layers
    tokens = second(torch.nn.functional.silu(first(seen[0].permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
    side = config.biomedclip.grid
    tokens = torch.nn.functional.interpolate(tokens, size=side, mode="bilinear").flatten(2).transpose(1, 2)
    weights = 1 + 2 * torch.nn.functional.adaptive_max_pool2d(batch["mask"], side).flatten(1)
    similar = torch.nn.functional.cosine_similarity(tokens, batch["target_tokens"], dim=2)
    expected = found.published + 0.25 * (1 - (weights * similar).sum(1) / weights.sum(1))
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-6)
    (found.loss - found.published).mean().backward()
    reached = {key for key, value in net.unet.named_parameters() if value.grad is not None and value.grad.any()}
    assert any(key.startswith("middle_block.2.") for key in reached)
    assert any(key.startswith("input_blocks.") for key in reached)
    assert not any(key.startswith(("output_blocks.", "out.")) for key in reached)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize(("asked", "gpu", "workers"), [(-1, False, 0), (-1, True, 2), (0, True, 0), (1, False, 1)])
def test_processes_that_read_features(monkeypatch: pytest.MonkeyPatch, asked: int, gpu: bool, workers: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = load_config(MODELS / "phantom_stage1.yaml", [f"training.workers={asked}", "training.balance=false"])
    made = loader(StageData([], None, config.training, fixed=False), config.training, shuffle=True)
    assert (made.num_workers, made.persistent_workers, made.pin_memory) == (workers, workers > 0, gpu)
    made = loader(StageData([], None, config.training, fixed=True), config.training, shuffle=False)
    assert (made.num_workers, made.persistent_workers) == (workers, False)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_numbers_on_their_way_to_the_host(device: str) -> None:
    values = torch.arange(4.0, device=device, requires_grad=True)
    found = on_host(values * 3)
    assert found().tolist() == [0, 3, 6, 9]
    assert not found().requires_grad


@pytest.mark.parametrize(("batches", "groups"), [(1, 1), (3, 2)])
def test_numbers_of_a_step_survive_the_way_to_the_host(batches: int, groups: int) -> None:
    rows = torch.rand(batches, 4, dtype=torch.float64)
    stats = StepStats(rows, torch.rand(groups), torch.tensor(2.5))
    packed = stats.pack()
    assert packed.shape == (4 * batches + groups + 1,)
    found = StepStats.unpack(packed, groups)
    assert torch.equal(found.batches, rows)
    assert torch.equal(found.norms, stats.norms.double())
    assert float(found.total_norm) == 2.5


def test_a_control_c_is_noted_and_a_second_one_ends_the_process() -> None:
    """Nothing is raised where a lock may just have been taken; the second Ctrl-C is the system's, which cannot wait."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Requests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.interrupted
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            with pytest.raises(KeyboardInterrupt):
                requests.raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "more", ["sampling.sampler=ddim", "sampling.sampler=dpmpp_2m", "sampling.sampler=ddim sampling.eta=1"]
)
def test_previews_are_what_inference_generates(trained: dict, world: Path, more: str) -> None:
    """The same items, noise, sampler, guidance and differential mask, from images and prompts instead of features."""
    overrides = [
        *more.split(),
        "sampling.steps=3",
        "sampling.guidance_interval=[0.3,1]",
        "sampling.guidance_rescale=0.5",
    ]
    config = load_config(MODELS / "phantom_stage2_2.yaml", [*overrides, f"biomedclip.path={CLIP}"])
    net, clip = open_model(config, read_checkpoint(trained["stage2_2"].last))
    items, _ = training_items(load_samples(world / "val")[0], config.data)
    digests = KnownFiles().read(item.sample for item in items)
    builder = FeatureBuilder(world / "features", config.data, net, clip, digests)
    assert not builder.build(items)
    stage = Stage(config.training, net, {}, builder.store.empty_text())
    data = StageData(items, builder.store, config.training, fixed=True)
    previews = Previews(world / "unused", stage, config.sampling, data, None)
    rows = previews.rows().unflatten(0, (-1, config.data.image_size))
    chosen = [previews.data.sample(number) for number in previews.numbers]
    jobs = [Job(0, sample.sample_id, 0, sample.prompt) for sample in chosen]
    prepared = [prepare(sample, config.data, MASK_SEED, 0, training=True) for sample in chosen]
    image, mask = (torch.stack([getattr(one, name) for one in prepared]) for name in ("image", "mask"))
    generated = squares(Inpainter(net, clip, config.sampling), image, mask, jobs)
    torch.testing.assert_close(rows[:, :, -config.data.image_size :], generated.permute(0, 2, 3, 1), atol=2e-3, rtol=0)
