"""What Stable Diffusion's text encoder has no token for: read byte by byte, and said."""

import pytest

from ldm.config import TextEncoderConfig
from ldm.core.errors import say_the_rest
from ldm.networks.text_encoder import TextEncoder


@pytest.fixture
def text_encoder() -> TextEncoder:
    return TextEncoder(TextEncoderConfig(width=24, layers=1, heads=2))


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("脊椎", "6 of the 6 tokens (100 %)"),
        ("L3椎体中度溶骨性病变", "24 of the 26 tokens (92 %)"),
        ("αβγ", "6 of the 6 tokens (100 %)"),
        ("🩻 bone", "3 of the 4 tokens (75 %)"),
    ],
)
def test_letters_without_a_token_are_said_once(
    text_encoder: TextEncoder, caplog: pytest.LogCaptureFixture, prompt: str, share: str
) -> None:
    for _ in range(2):
        text_encoder.tokenize([prompt])
    (said,) = caplog.messages
    assert said.startswith(f'prompt unknown: Stable Diffusion\'s text encoder reads {share} of "{prompt}" as bytes')


WRITTEN = [
    "",
    "healthy",
    "Métastase ostéoblastique — vertèbre T11",
    "café naïve — 12mm²",
    "lytic lesion of L3, ≥ 12 mm",
]


@pytest.mark.parametrize("prompt", WRITTEN)
def test_written_with_known_tokens(text_encoder: TextEncoder, caplog: pytest.LogCaptureFixture, prompt: str) -> None:
    text_encoder.tokenize([prompt])
    assert not caplog.messages


def test_of_many_prompts_the_first_are_named_and_all_counted(
    text_encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [f"lesion {number} " * 80 for number in range(49)]
    say_the_rest()  # of what ran before in this process
    caplog.clear()
    for _ in range(2):
        text_encoder.tokenize(prompts)
    say_the_rest()
    *named, last = caplog.messages
    assert [f'of the 240 tokens of "lesion {number} ' in text for number, text in enumerate(named)] == [True] * 3
    assert last == "prompts cut by Stable Diffusion's text encoder: 49 in all, of which the first 3 are named above"
