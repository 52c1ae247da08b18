"""The third attention, and what sampling computes once: keys and values, and what two conditions share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_networks import UNET, noise, relative_error, scrambled
from torch import nn

from ldm.networks.attention import Conditioning, CrossAttention, TransformerBlock, attend
from ldm.networks.msc import patch_mask
from ldm.networks.unet import UNet


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_third_attention_starts_silent() -> None:
    unet = UNet(UNET).eval()
    for block in unet.modules():  # a residual block starts silent too; here only attn3 may be
        if isinstance(block, nn.Conv2d) and not block.weight.any():
            nn.init.normal_(block.weight, std=0.1)
    x, text, t = noise(1, 9, 8, 8), noise(1, 77, 24), torch.tensor([300])
    plain = unet(x, t, Conditioning(text))
    steered = unet(x, t, Conditioning(text, noise(1, 9, 16), torch.ones(1, 1, 8, 8)))
    assert torch.equal(plain, steered)
    assert plain.std() > 0


def test_gate_confines_the_third_attention() -> None:
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text, tokens = noise(2, 6, 32), noise(2, 5, 24), noise(2, 9, 16)
    gate = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.0, 1.0]).reshape(1, 6, 1).expand(2, -1, -1)
    plain = block(x, Conditioning(text), None)
    gated = block(x, Conditioning(text, tokens), gate)
    outside = gate[0, :, 0] == 0
    assert torch.equal(plain[:, outside], gated[:, outside])
    assert ((plain - gated).abs().amax(dim=-1)[:, ~outside] > 1e-3).all()
    ungated = block(x, Conditioning(text, tokens), None)
    assert torch.allclose(ungated[:, 2], gated[:, 2], atol=1e-6)


def test_any_number_of_zero_tokens_is_the_same_condition() -> None:
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text = noise(1, 6, 32), noise(1, 5, 24)
    one, many = (block(x, Conditioning(text, torch.zeros(1, count, 16)), None) for count in (1, 49))
    assert torch.allclose(one, many, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(row=st.integers(0, 127), column=st.integers(0, 127), value=st.floats(0.01, 1))
def test_one_pixel_lesion_survives_every_reduction(row: int, column: int, value: float) -> None:
    soft = torch.zeros(1, 1, 128, 128)
    soft[0, 0, row, column] = value
    value = float(soft.max())
    latent = nn.functional.adaptive_max_pool2d(soft, 16)
    cond = Conditioning(torch.zeros(1, 1, 1), None, latent)
    for side in (16, 8, 4, 2):
        gate = cond.gate(side, side)
        assert gate.shape == (1, side * side, 1)
        assert gate.max() == value
        assert gate.reshape(side, side)[row * side // 128, column * side // 128] == value
    for grid in (14, 10):
        assert patch_mask(soft, grid).max() == value


# ------------------------------------------------------------------------------------------- computed once in sampling


def test_keys_and_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = scrambled(UNet(UNET))
    computed: list[CrossAttention] = []
    plain = CrossAttention.keys_values
    monkeypatch.setattr(CrossAttention, "keys_values", lambda self, c: computed.append(self) or plain(self, c))
    given = noise(2, 77, 24), noise(2, 9, 16), torch.rand(2, 1, 8, 8)
    kept = unet.precompute(Conditioning(*given), fixed_shapes=False)
    fixed = [module for name, module in unet.named_modules() if name.endswith(("attn2", "attn3"))]
    assert set(computed) == set(fixed)
    assert len(computed) == len(fixed)
    for t in (900, 500, 100):
        x = noise(2, 9, 8, 8, seed=t)
        computed.clear()
        reused = unet(x, torch.tensor([t]), kept)
        assert computed
        assert not set(computed) & set(fixed)
        assert torch.equal(reused, unet(x, torch.tensor([t]), Conditioning(*given)))


@pytest.mark.parametrize("gated", [True, False])
def test_third_attention_is_skipped_for_zero_tokens_with_exactly_equal_results(gated: bool) -> None:
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text, tokens = noise(4, 6, 32), noise(4, 5, 24), noise(2, 9, 16)
    gate = torch.rand(4, 6, 1, generator=torch.Generator().manual_seed(3)) if gated else None
    whole = block(x, Conditioning(text, torch.cat([tokens, torch.zeros_like(tokens)])), gate)
    skipped = block(x, Conditioning(text, tokens), gate)
    assert torch.equal(skipped[2:], whole[2:])
    assert torch.allclose(skipped[:2], whole[:2], atol=1e-6)  # the same numbers in a smaller matrix product
    assert not torch.allclose(whole, block(x, Conditioning(text), gate), atol=1e-3)


def test_third_attention_reads_no_token_behind_a_closed_gate() -> None:
    """Two pictures with lesions in different corners: what is closed in both is not computed, with equal results."""
    unet = scrambled(UNet(UNET))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, :2, :2], mask[1, 0, 6:, 5:] = 0.5, 1.0
    x, t, text, tokens = noise(2, 9, 8, 8), torch.tensor([300]), noise(4, 77, 24), noise(2, 9, 16)
    seen: list[tuple[int, ...]] = []
    for name, module in unet.named_modules():
        if name.endswith("norm4"):
            module.register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape[:2])))
    expected = unet(x, t, Conditioning(text, tokens, torch.cat([mask, mask])))
    assert {*seen} == {(2, 4 * 4)}
    seen.clear()
    found = unet(x, t, unet.precompute(Conditioning(text, tokens, torch.cat([mask, mask])), fixed_shapes=False))
    assert relative_error(found, expected) < 1e-6
    assert {*seen} == {(2, 1 + 2)}
    nowhere = Conditioning(text, tokens, torch.zeros(4, 1, 8, 8))
    closed = unet(x, t, unet.precompute(nowhere, fixed_shapes=False))
    assert torch.equal(closed, unet(x, t, Conditioning(text)))
    seen.clear()
    found = unet(x, t, unet.precompute(Conditioning(text, tokens, torch.cat([mask, mask])), fixed_shapes=True))
    assert relative_error(found, expected) < 1e-6
    assert {*seen} == {(2, 4 * 4)}


def test_half_precision_stays_half_behind_the_gate() -> None:
    """A float32 gate must not turn the residual stream, and all that follows in the block, back into float32."""
    block = scrambled(TransformerBlock(dim=32, heads=4, text_dim=24, semantic_dim=16))
    x, text, tokens = (each.bfloat16() for each in (noise(2, 6, 32), noise(2, 5, 24), noise(2, 9, 16)))
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x, Conditioning(text, tokens), torch.rand(2, 6, 1))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("levels", [[0, 1], [1], []])
def test_two_conditions_share_what_comes_before_the_first_of_them(levels: list[int]) -> None:
    from dataclasses import replace

    unet = scrambled(UNet(replace(UNET, attention_levels=levels)))
    x, text, tokens, mask = noise(2, 9, 8, 8), noise(4, 77, 24), noise(2, 9, 16), torch.rand(2, 1, 8, 8)
    both = Conditioning(text, torch.cat([tokens, torch.zeros_like(tokens)]), torch.cat([mask, mask]))
    expected = unet(torch.cat([x, x]), torch.full((4,), 300), both)
    cond = unet.precompute(Conditioning(text, tokens, torch.cat([mask, mask])), fixed_shapes=False)
    assert relative_error(unet(x, torch.tensor([300]), cond), expected) < 1e-6
    first = []
    unet.input_blocks[0][0].register_forward_hook(lambda module, given, result: first.append(len(result)))
    unet(x, torch.tensor([300]), cond)
    assert first == [2]
    assert relative_error(expected[:2], expected[2:]) > 1e-3


def test_channels_last_changes_nothing() -> None:
    unet = scrambled(UNet(UNET))
    x, t, cond = noise(2, 9, 8, 8), torch.tensor([40]), Conditioning(noise(2, 77, 24))
    expected = unet(x, t, cond)
    unet.to(memory_format=torch.channels_last)
    assert relative_error(unet(x.contiguous(memory_format=torch.channels_last), t, cond), expected) < 1e-5


def test_attention_of_narrow_heads_is_float32_on_a_cpu() -> None:
    """Also under autocast, which would run it in bfloat16; what goes in and comes out keeps its type."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16).bfloat16() for length in (20, 9, 9))
    exact = torch.softmax(q.double() @ k.double().mT / 4, dim=-1) @ v.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == torch.bfloat16
    rounded = (found == exact.bfloat16()).float().mean()  # but where a sum lies between two values
    assert rounded > 0.99
