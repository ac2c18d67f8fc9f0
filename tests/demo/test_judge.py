"""The judge is right about real clips and about spoilt ones; its formulas against scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from megagen.core.streams import Streams
from megagen.demo import digits
from megagen.demo.judge import Judge, frechet_distance, motion, train_judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    reference = digits.make_clips("held_out", 720, Streams(0))
    return train_judge(Streams(0), reference=reference, num_epochs=12)


@pytest.fixture(scope="module")
def real() -> digits.Clips:
    return digits.make_clips("held_out", 720, Streams(5))


def test_held_out_real_clips_are_judged_right(judge: Judge, real: digits.Clips) -> None:
    verdict = judge.judge(real)
    assert verdict.digit_accuracy > 0.97
    assert verdict.frame_accuracy > 0.95
    assert verdict.direction_accuracy == 1.0
    assert verdict.diversity == pytest.approx(1.0, abs=0.1)
    assert verdict.num_clips == 720


def test_wrong_captions_are_seen(judge: Judge, real: digits.Clips) -> None:
    wrong = replace(
        real, digits_N=(real.digits_N + 1) % 10, directions_N=(real.directions_N + 2) % 4
    )
    verdict = judge.judge(wrong)
    assert verdict.digit_accuracy < 0.05
    assert verdict.direction_accuracy == 0.0


def test_frechet_grows_with_blur_and_noise(judge: Judge, real: digits.Clips) -> None:
    noise = 0.3 * torch.randn(real.frames_NTHW.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(real.frames_NTHW, 5, 1, 2)
    clean = judge.judge(real).frechet
    for spoilt in ((real.frames_NTHW + noise).clamp(0, 1), blurred):
        assert judge.judge(replace(real, frames_NTHW=spoilt)).frechet > 10 * clean


def test_one_image_per_digit_has_no_diversity(judge: Judge, real: digits.Clips) -> None:
    first = torch.stack([real.frames_NTHW[real.digits_N == d][0] for d in real.digits_N.tolist()])
    assert judge.judge(replace(real, frames_NTHW=first)).diversity < 0.01


def test_frames_in_random_order_do_not_move_as_told(judge: Judge, real: digits.Clips) -> None:
    order = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(n)) for n in range(len(real))]
    )
    shuffled = real.frames_NTHW[torch.arange(len(real))[:, None], order]
    assert judge.judge(replace(real, frames_NTHW=shuffled)).direction_accuracy < 0.2


def test_motion_is_measured_in_pixels_a_frame() -> None:
    frames = torch.zeros(1, 8, 24, 24)
    for t in range(8):
        frames[0, t, 2 * t : 2 * t + 3, 20 - t : 23 - t] = 1.0
    torch.testing.assert_close(motion(frames), torch.tensor([[2.0, -1.0]]))


def test_frechet_equals_the_formula_with_scipys_matrix_root() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 1
    b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-8)
