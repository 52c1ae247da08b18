"""The gradient across a mask's border: by hand, and of a soft composite against a hard one."""

import numpy as np
import pytest

from ldm.data.images import border_gradient


def test_border_gradient_by_hand() -> None:
    unit = np.zeros((5, 6), np.float32)
    unit[:, 3:] = 0.5
    hard = np.zeros((5, 6), np.float32)
    hard[1:4, 1:3] = 1
    # 3 x 2 cells: 2 + 2 vertical steps of 0, 3 on the left of 0, 3 on the right of 0.5
    assert border_gradient(unit, hard) == pytest.approx(3 * 0.5 / 10)
    assert border_gradient(np.repeat(unit[..., None], 3, axis=2), hard) == pytest.approx(0.15)
    soft = hard.copy()
    soft[2, 2] = 0.5  # its two neighbours above and below, and the one on the left, are steps too
    assert border_gradient(unit, soft) == pytest.approx(3 * 0.5 / 13)
    assert np.isnan(border_gradient(unit, np.ones((5, 6))))


def test_a_hard_composite_shows_at_the_border_and_a_soft_one_does_not() -> None:
    rng = np.random.default_rng(0)
    original = 0.5 + 0.01 * rng.standard_normal((64, 64))
    generated = original + 0.2
    axis = np.linspace(-1, 1, 64)
    soft = np.clip(1.6 - 2 * np.hypot(*np.meshgrid(axis, axis)), 0, 1).round(2)
    smooth = soft * generated + (1 - soft) * original
    pasted = np.where(soft >= 0.5, generated, original)
    real = border_gradient(original, soft)
    assert border_gradient(smooth, soft) < 1.2 * real
    assert border_gradient(pasted, soft) > 1.3 * border_gradient(smooth, soft)
