"""The noise schedule and the samplers, step by step against diffusers; the differential mask; the guidance interval."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import noise
from tiny import MODELS
from torch import Tensor

from ldm import config
from ldm.bench.inference import FAST, REFERENCE
from ldm.config import DiffusionConfig
from ldm.diffusion import samplers
from ldm.diffusion.guidance import guided_steps, rescaled
from ldm.diffusion.noise import image_noise, step_noise
from ldm.diffusion.samplers import (
    DifferentialMask,
    ddim,
    dpmpp_2m,
    fitted,
    leading,
    polynomial,
    steps_left_out,
    time_passed,
    trailing,
)
from ldm.diffusion.schedule import NoiseSchedule
from ldm.networks.attention import Conditioning
from ldm.networks.sampling import GuidanceConditions, sample_latent

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear"}
BOTH = pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])


def diffusers_ddim(steps: int, spacing: str = "leading") -> Any:
    from diffusers import DDIMScheduler

    about = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": spacing}
    made = DDIMScheduler(**about, **SCHEDULE)
    made.set_timesteps(steps)
    return made


def diffusers_dpm(steps: int, spacing: str = "leading") -> Any:
    """Its own defaults (2M, midpoint, lower order at the end); for leading our time steps, as its own differ."""
    from diffusers import DPMSolverMultistepScheduler

    made = DPMSolverMultistepScheduler(timestep_spacing=spacing, **SCHEDULE)
    made.set_timesteps(
        **({"timesteps": leading(1000, steps)} if spacing == "leading" else {"num_inference_steps": steps})
    )
    return made


def network(x: Tensor, t: int, index: int = 0) -> Tensor:
    """Mixes neighbouring cells and depends on the time step."""
    return torch.tanh(x.roll(1, dims=-1) + t / 1000)


def cellwise(x: Tensor, t: int, index: int) -> Tensor:
    """Each cell on its own, so that cells can be compared."""
    return torch.tanh(x)


def test_every_sampler_of_the_configuration_exists() -> None:
    assert set(samplers.SAMPLERS) == set(config.SAMPLERS)
    assert set(samplers.SPACINGS) == set(config.SPACINGS)


def test_benches_measure_the_shipped_default() -> None:
    sampling = config.load_config(MODELS / "mldm_v15.yaml").sampling
    assert dataclasses.replace(sampling, **FAST) == sampling
    assert dataclasses.replace(sampling, **REFERENCE) != sampling


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_time_steps_are_those_of_diffusers(spacing: str) -> None:
    theirs = diffusers_ddim(50, spacing)
    for steps in (*range(1, 101), 128, 200, 250, 333, 500, 999):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if expected[-1] == -1:  # of 61 trailing steps, and a few more numbers, diffusers makes one too many by rounding
            expected.pop()
        assert samplers.SPACINGS[spacing](1000, steps) == expected, steps


def test_time_steps_denser_at_the_clean_end() -> None:
    assert polynomial(1000, 6) == [999, 760, 544, 353, 192, 68]  # 999 times (k / 6) to the power of 1.5
    assert polynomial(1000, 4) == [999, 649, 353, 125]
    assert fitted(1000, 5) == [999, 741, 469, 226, 59]  # 999 times u to the power of 1.9 - 0.7 u, with u = k / 5
    assert fitted(1000, 4) == [999, 673, 341, 91]


@pytest.mark.parametrize("spacing", [polynomial, fitted])
def test_no_time_step_is_visited_twice(spacing: Any) -> None:
    for steps in range(1, 1000):
        times = spacing(1000, steps)
        assert len(times) == steps
        assert times[0] == 999
        assert times[-1] >= 0
        assert all(after < before for before, after in itertools.pairwise(times)), steps


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 999])
def test_time_passes_evenly_where_the_steps_are_even(steps: int) -> None:
    """Exactly with leading spacing, as in all earlier results; to the rounding of the time steps with trailing."""
    for index in range(steps):
        assert time_passed(leading(1000, steps), index) == index / steps
        assert time_passed(trailing(1000, steps), index) == pytest.approx(index / steps, abs=1e-3)


def test_cells_are_released_by_time_where_the_steps_are_uneven() -> None:
    """Of the steps 900, 800, 100 the last begins when most of the time has passed, though it is the third of three."""
    assert time_passed([900, 800, 100], 1) == pytest.approx(1 / 12)  # of 900 to -300: the mean step takes 400
    assert time_passed([900, 800, 100], 2) == pytest.approx(8 / 12)
    soft = torch.tensor([0.3, 0.35, 0.9, 0.95]).reshape(1, 1, 1, 4)
    original, start = noise(1, 4, 1, 4, seed=3), noise(1, 4, 1, 4, seed=4)
    held, schedule = [], NoiseSchedule(DiffusionConfig())

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        alpha = float(schedule.alphas_cumprod[t])
        path = alpha**0.5 * original + (1 - alpha) ** 0.5 * start
        held.append([torch.allclose(a, b, atol=1e-5) for a, b in zip(x.unbind(3), path.unbind(3), strict=True)])
        return cellwise(x, t, index)

    ddim(predict, start, schedule, [900, 800, 100], differential=DifferentialMask(soft, original, start))
    assert held[1:] == [[True, True, True, False], [True, False, False, False]]


def test_noise_schedule_agrees_with_diffusers() -> None:
    ours, theirs = NoiseSchedule(DiffusionConfig()), diffusers_ddim(50)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6)
    z, e, t = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(z, e, t), theirs.add_noise(z, e, t), atol=1e-6)


STEP_BY_STEP = [(50, 0.0, "leading"), (50, 1.0, "leading"), (7, 0.5, "leading"), (250, 0.0, "leading")]
# Between trailing steps diffusers always goes 1000 // steps back, which is the next one only where steps divide 1000.
STEP_BY_STEP += [(10, 0.0, "trailing"), (20, 1.0, "trailing"), (50, 0.0, "trailing")]


@pytest.mark.parametrize(("steps", "eta", "spacing"), STEP_BY_STEP)
def test_ddim_agrees_with_diffusers_step_by_step(steps: int, eta: float, spacing: str) -> None:
    theirs, times = diffusers_ddim(steps, spacing), samplers.SPACINGS[spacing](1000, steps)
    visited: list[tuple[int, Tensor]] = []

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        visited.append((t, x.clone()))
        return network(x, t)

    def step_noise(index: int) -> Tensor:
        return noise(2, 4, 2, 2, seed=100 + index)

    last = ddim(predict, noise(2, 4, 2, 2), NoiseSchedule(DiffusionConfig()), times, eta, step_noise=step_noise)
    x = noise(2, 4, 2, 2)
    assert [t for t, _ in visited] == theirs.timesteps.tolist()
    for index, (t, ours) in enumerate(visited):
        assert torch.allclose(ours, x, atol=1e-4), f"step {index}"
        added = step_noise(index) if eta > 0 else None
        x = theirs.step(network(x, t), t, x, eta=eta, variance_noise=added).prev_sample
    assert torch.allclose(last, x, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 15, 20, 50])
def test_dpm_solver_agrees_with_diffusers_step_by_step(steps: int, spacing: str) -> None:
    theirs, times = diffusers_dpm(steps, spacing), samplers.SPACINGS[spacing](1000, steps)
    after: list[Tensor] = []
    last = dpmpp_2m(
        network, noise(2, 4, 2, 2), NoiseSchedule(DiffusionConfig()), times, on_step=lambda _, x: after.append(x)
    )
    x = noise(2, 4, 2, 2)
    assert len(theirs.timesteps) == len(after) == steps
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(network(x, int(t)), t, x).prev_sample
        assert torch.allclose(after[index], x, atol=1e-4), f"step {index}"
    assert torch.equal(last, after[-1])


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_the_steps_of_a_strength_are_those_of_diffusers(strength: float) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    for steps in (1, 7, 8, 10, 50, 100):
        pipeline = SimpleNamespace(scheduler=diffusers_ddim(steps))
        times, _ = StableDiffusionInpaintPipeline.get_timesteps(pipeline, steps, strength, "cpu")
        assert leading(1000, steps)[steps_left_out(steps, strength) :] == times.tolist()


@BOTH
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.9])
def test_beginning_with_an_image_agrees_with_diffusers_step_by_step(sampler: Any, strength: float) -> None:
    steps, schedule = 10, NoiseSchedule(DiffusionConfig())
    times, first = trailing(1000, steps), steps_left_out(steps, strength)
    theirs = (diffusers_ddim if sampler is ddim else diffusers_dpm)(steps, "trailing")
    assert theirs.timesteps.tolist() == times
    if sampler is dpmpp_2m:
        theirs.set_begin_index(first)
    image, start = noise(2, 4, 2, 2, seed=5), noise(2, 4, 2, 2)
    x = theirs.add_noise(image, start, theirs.timesteps[first : first + 1].repeat(2))
    ours, visited = schedule.add_noise(image, start, torch.tensor([times[first]] * 2)), []

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        visited.append((index, t))
        return network(x, t)

    found = sampler(predict, ours, schedule, times, first=first)
    for t in theirs.timesteps[first:]:
        x = theirs.step(network(x, int(t)), t, x).prev_sample
    assert torch.allclose(found, x, atol=1e-4)
    assert visited == [*enumerate(times)][first:]  # an index counts the steps that are left out, too


@BOTH
def test_of_a_shorter_schedule_the_mask_is_released_by_the_time_of_the_whole_one(sampler: Any) -> None:
    """With strength 0.5 a cell of 0.5 is free from the first step on, one of 0.25 for the last quarter of the time."""
    steps, schedule = 8, NoiseSchedule(DiffusionConfig())
    soft = torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 4)
    original, start, image = (noise(1, 4, 1, 4, seed=seed) for seed in (3, 4, 5))
    times, on_path = trailing(1000, steps), []

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        alpha = float(schedule.alphas_cumprod[t])
        path = alpha**0.5 * original + (1 - alpha) ** 0.5 * start
        on_path.append([torch.allclose(a, b, atol=1e-5) for a, b in zip(x.unbind(3), path.unbind(3), strict=True)])
        return cellwise(x, t, index)

    x = schedule.add_noise(image, start, torch.tensor([times[4]]))
    mask = DifferentialMask(soft, original, start)
    found = sampler(predict, x, schedule, times, differential=mask, first=4)
    held, free = [True, True, False, False], [True, False, False, False]
    last = held if sampler is dpmpp_2m else free  # the step before a cell's release still ends on the path
    assert on_path == [held, held, last, free]
    assert torch.equal(found[..., 0], original[..., 0])


@BOTH
@pytest.mark.parametrize("spacing", config.SPACINGS)
def test_takes_every_number_of_steps_the_configuration_allows(sampler: Any, spacing: str) -> None:
    short = DiffusionConfig(timesteps=10)
    for steps in range(1, 10):
        times = samplers.SPACINGS[spacing](10, steps)
        drawn = sampler(lambda x, t, index: 0.1 * x, noise(1, 4, 2, 2), NoiseSchedule(short), times)
        assert torch.isfinite(drawn).all(), steps


def test_eta_asks_for_noise_and_is_not_for_dpm_solver() -> None:
    with pytest.raises(ValueError, match="step_noise"):
        ddim(cellwise, noise(1, 4, 2, 2), NoiseSchedule(DiffusionConfig()), [501, 1], eta=1.0)
    with pytest.raises(ValueError, match="deterministic"):
        dpmpp_2m(cellwise, noise(1, 4, 2, 2), NoiseSchedule(DiffusionConfig()), [501, 1], eta=0.5)


@BOTH
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_differential_mask_releases_cells_by_their_soft_value(sampler: Any, spacing: str) -> None:
    steps, schedule = 10, NoiseSchedule(DiffusionConfig())
    soft = torch.tensor([0.0, 0.05, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 5)
    original, start = noise(1, 4, 1, 5, seed=3), noise(1, 4, 1, 5, seed=4)
    seen: list[tuple[int, Tensor]] = []

    def predict(x: Tensor, t: int, index: int) -> Tensor:
        seen.append((t, x.clone()))
        return cellwise(x, t, index)

    times = samplers.SPACINGS[spacing](1000, steps)
    free = sampler(predict, start, schedule, times)
    seen.clear()
    held = sampler(predict, start, schedule, times, differential=DifferentialMask(soft, original, start))

    for index, (t, x) in enumerate(seen):
        alpha = float(schedule.alphas_cumprod[t])
        path = alpha**0.5 * original + (1 - alpha) ** 0.5 * start
        for cell, value in enumerate(soft.flatten().tolist()):
            on_path = torch.allclose(x[..., cell], path[..., cell], atol=1e-5)
            # DPM-Solver++ takes a held cell for the input, so the step before its release still ends on the path.
            last = index / steps if sampler is ddim else max(index - 1, 0) / steps
            assert on_path == (last < 1 - value - 1e-6), (index, value)
    assert torch.equal(held[..., :2], original[..., :2])  # never released: exactly the input
    assert torch.allclose(held[..., 4], free[..., 4], atol=1e-6)  # free from the start
    assert not torch.allclose(held[..., 2:4], original[..., 2:4], atol=1e-2)


def test_dpm_solver_history_of_a_held_cell_is_the_input() -> None:
    """The first free step of a cell is diffusers' second-order step from a history of x_0 = z_0."""
    schedule, steps = NoiseSchedule(DiffusionConfig()), 4
    soft = torch.full((1, 1, 1, 1), 0.5)  # free from the third of four steps on
    original, start = noise(1, 4, 1, 1, seed=3), noise(1, 4, 1, 1, seed=4)
    after: list[Tensor] = []
    differential = DifferentialMask(soft, original, start)
    times = leading(1000, steps)
    dpmpp_2m(cellwise, start, schedule, times, differential=differential, on_step=lambda _, x: after.append(x))
    theirs = diffusers_dpm(steps)
    for index in range(3):
        alpha = float(schedule.alphas_cumprod[times[index]])
        x = alpha**0.5 * original + (1 - alpha) ** 0.5 * start
        eps = start if index < 2 else cellwise(x, times[index], index)  # exactly the noise: x_0 is the input
        expected = theirs.step(eps, times[index], x).prev_sample
    assert torch.allclose(after[2], expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted))
def test_guidance_interval_is_a_share_of_the_steps(steps: int, interval: list[float]) -> None:
    chosen = guided_steps(steps, tuple(interval))
    assert list(guided_steps(steps, (0.0, 1.0))) == list(range(steps))
    for index in range(steps):
        share = index / steps
        if min(abs(share - edge) for edge in interval) > 1e-6:
            assert (index in chosen) == (interval[0] <= share < interval[1])


def test_rescaled_guidance_has_the_contrast_of_the_prompt_alone() -> None:
    """NumPy's weighted deviation of x_0 inside the mask; what lies outside the mask does not count."""
    x, prompted, plain, mask = (torch.randn(2, 4, 8, 8), *torch.randn(2, 2, 4, 8, 8), torch.rand(2, 1, 8, 8))
    mask[:, :, :3] = 0
    guided, alpha = plain + 7.5 * (prompted - plain), 0.3

    def contrast(eps: torch.Tensor) -> list[float]:
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        weights = mask.expand_as(clean).double().numpy()
        means = [np.average(a, weights=w) for a, w in zip(clean.double().numpy(), weights, strict=True)]
        spreads = zip(clean.double().numpy(), means, weights, strict=True)
        return [float(np.average((a - m) ** 2, weights=w) ** 0.5) for a, m, w in spreads]

    assert torch.allclose(rescaled(guided, prompted, x, alpha, mask, 0.0), guided, atol=1e-5)
    assert contrast(guided)[0] > 2 * contrast(prompted)[0]
    assert contrast(rescaled(guided, prompted, x, alpha, mask, 1.0)) == pytest.approx(contrast(prompted), rel=1e-4)
    half = [(a + b) / 2 for a, b in zip(contrast(guided), contrast(prompted), strict=True)]
    assert contrast(rescaled(guided, prompted, x, alpha, mask, 0.5)) == pytest.approx(half, rel=1e-4)
    one = rescaled(guided[1:], prompted[1:], x[1:], alpha, mask[1:], 0.7)
    assert torch.allclose(one, rescaled(guided, prompted, x, alpha, mask, 0.7)[1:], atol=1e-5)


def test_picture_noise_depends_on_names_only() -> None:
    first = image_noise(0, "patient/a", 0, (4, 8, 8))
    assert torch.equal(first, image_noise(0, "patient/a", 0, (4, 8, 8)))
    for other in ((1, "patient/a", 0), (0, "patient/b", 0), (0, "patient/a", 1)):
        assert not torch.equal(first, image_noise(*other, (4, 8, 8)))


def test_noise_takes_all_bits_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (5, 5 + 2**32, 5 + 2**62):
        monkeypatch.setattr("ldm.diffusion.noise.named_seed", lambda *names, seed=seed: seed)
        noise, name = image_noise(0, "a", 0, (4, 64, 64)), (0, "a", 0)
        assert abs(float(noise.mean())) < 0.04
        assert abs(float(noise.std()) - 1) < 0.03
        assert torch.equal(step_noise(1, [name, name], torch.zeros(2, 4, 64, 64))[1], noise)  # of the same seed here
        found.append(noise)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))


def test_another_sampler_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets guided predictions, whoever samples."""

    def one_step(predict: samplers.Predict, noise: Tensor, schedule: NoiseSchedule, *rest: Any) -> Tensor:
        return noise - predict(noise, 500, 0)

    class Net:
        schedule = NoiseSchedule(DiffusionConfig())

        def denoise(self, noisy: Tensor, t: Tensor, mask: Tensor, masked: Tensor, condition: Conditioning) -> Tensor:
            return condition.text.mean() * condition.text[:, :1, :1, None].expand(-1, 4, 2, 2)

    monkeypatch.setitem(samplers.SAMPLERS, "one_step", one_step)
    sampling = dataclasses.replace(
        config.SamplingConfig(), guidance_scale=3.0, guidance_rescale=0.0, differential=False
    )
    object.__setattr__(sampling, "sampler", "one_step")
    both = Conditioning(torch.tensor([2.0, 0.0])[:, None, None])  # with the prompt, and without it
    conditions = GuidanceConditions(Conditioning(torch.ones(1, 1, 1)), both)
    latent, mask = torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 2, 2)
    found = sample_latent(Net(), sampling, latent, mask, latent, None, conditions)  # type: ignore[arg-type]
    assert torch.equal(found, torch.full((1, 4, 2, 2), -6.0))  # 0 - (0 + 3 * (2 - 0))
