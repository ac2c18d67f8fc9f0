"""What sampled digit clips are worth: a digit classifier, a motion check, a Frechet distance.

The classifier is a small convolutional net trained here on training digits at random places; it is
judged itself on held-out handwriting before it judges anything. Every frame counts: features and
logits are per frame, so that a clip that flickers or dissolves is seen.

Frechet distance: Heusel et al. 2017 (arXiv 1706.08500), eq. 6, on the classifier's features. Its
scale depends on this classifier: compare it with the value for real training clips only.

Legend: N clips, T frames, H W pixels (grey in [0, 1]), F features, M frames of all clips.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagen.core.streams import Streams
from megagen.demo import digits
from megagen.demo.digits import DIRECTIONS, Clips

NUM_FEATURES = 64
TOLERANCE = 0.35  # pixels a frame by which each component of the measured motion may be off
_INK = 0.3  # grey level above which a pixel counts as part of the digit
_BATCH, _PEAK_RATE = 64, 4e-3


class DigitNet(nn.Module):
    """Frame to digit, wherever it is: three convolutions, maximum over places, one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, NUM_FEATURES, 5, 1, 2),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, frames_MHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[M, F]`` and logits ``[M, 10]``."""
        features_MF = self.features(frames_MHW[:, None]).amax((-2, -1))
        return features_MF, self.head(features_MF)


@dataclass(frozen=True)
class Verdict:
    """Figures for a set of clips against held-out real ones.

    Args:
        digit_accuracy: share of clips whose digit (mean over frames) is the caption's.
        frame_accuracy: the same frame by frame.
        direction_accuracy: share of clips that move as the caption says, within ``TOLERANCE``.
        frechet: Frechet distance of frame features to those of held-out real clips.
        diversity: spread of clip features within a digit, relative to the held-out clips'.
        num_clips: how many clips were judged.
    """

    digit_accuracy: float
    frame_accuracy: float
    direction_accuracy: float
    frechet: float
    diversity: float
    num_clips: int

    def as_dict(self) -> dict[str, float]:
        """Names to values."""
        return asdict(self)


class Judge:
    """A trained classifier and the held-out clips it compares with.

    Args:
        net: classifier.
        reference: held-out real clips.
    """

    def __init__(self, net: DigitNet, reference: Clips) -> None:
        self.net = net.eval()
        self._reference_MF, _ = self._look(reference.frames_NTHW)
        self._reference_spread = self._spread(self._reference_MF, reference.digits_N)

    def judge(self, clips: Clips) -> Verdict:
        """Measure clips against what they should show; order and number are free (>= 2 a digit)."""
        features_MF, logits_M10 = self._look(clips.frames_NTHW)
        num_frames = clips.frames_NTHW.shape[1]
        logits_NT10 = logits_M10.unflatten(0, (-1, num_frames))
        by_clip = logits_NT10.mean(1).argmax(-1) == clips.digits_N
        by_frame = logits_NT10.argmax(-1) == clips.digits_N[:, None]
        moving = moves_as_told(clips.frames_NTHW, clips.directions_N)
        return Verdict(
            digit_accuracy=by_clip.float().mean().item(),
            frame_accuracy=by_frame.float().mean().item(),
            direction_accuracy=moving.float().mean().item(),
            frechet=frechet_distance(features_MF, self._reference_MF),
            diversity=self._spread(features_MF, clips.digits_N) / self._reference_spread,
            num_clips=len(clips),
        )

    @torch.no_grad()
    def _look(self, frames_NTHW: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.net(part) for part in frames_NTHW.flatten(0, 1).split(1024)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @staticmethod
    def _spread(features_MF: Tensor, digits_N: Tensor) -> float:
        """Mean over digits of the total variance of clip features within the digit."""
        clip_NF = features_MF.unflatten(0, (len(digits_N), -1)).mean(1)
        spreads = [clip_NF[digits_N == d].var(0).sum() for d in digits_N.unique()]
        return torch.stack(spreads).mean().item()


def train_judge(streams: Streams, *, reference: Clips, num_epochs: int = 24) -> Judge:
    """Train the classifier (seconds on one core); ``reference`` are held-out real clips."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small a net for more: threads would wait for each other
    net = DigitNet()
    _initialise(net, streams)
    images, _ = digits.load_images("train")
    steps_an_epoch = -(-len(images) // _BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), _PEAK_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PEAK_RATE, total_steps=num_epochs * steps_an_epoch
    )
    for epoch in range(num_epochs):
        clips = digits.make_clips("train", len(images), streams, epoch)
        generator = streams.generator("judge_frames", epoch)
        frames = torch.randint(digits.NUM_FRAMES, (len(clips),), generator=generator)
        stills = clips.frames_NTHW[torch.arange(len(clips)), frames]
        for part, labels in zip(stills.split(_BATCH), clips.digits_N.split(_BATCH), strict=True):
            loss = F.cross_entropy(net(part)[1], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return Judge(net, reference)


def _initialise(net: nn.Module, streams: Streams) -> None:
    """Kaiming-uniform weights from the run's streams rather than from the global generator."""
    generator = streams.generator("judge_init")
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)


def motion(frames_NTHW: Tensor) -> Tensor:
    """Least-squares speed of the ink's centre, ``[N, 2]`` in pixels a frame (rows, columns)."""
    ink = (frames_NTHW - _INK).clamp(min=0)
    mass = ink.sum((-2, -1)).clamp(min=1e-6)
    height, width = frames_NTHW.shape[-2:]
    row = (ink.sum(-1) * torch.arange(height)).sum(-1) / mass
    column = (ink.sum(-2) * torch.arange(width)).sum(-1) / mass
    time_T = torch.arange(frames_NTHW.shape[1], dtype=torch.float32)
    time_T -= time_T.mean()
    centre_NT2 = torch.stack([row, column], -1)
    return (centre_NT2 * time_T[:, None]).sum(1) / time_T.square().sum()


def moves_as_told(frames_NTHW: Tensor, directions_N: Tensor) -> Tensor:
    """Whether each clip moves one pixel a frame in its direction, ``[N]`` bool."""
    told_N2 = torch.tensor(list(DIRECTIONS.values()))[directions_N]
    return ((motion(frames_NTHW) - told_N2).abs() < TOLERANCE).all(-1)


def frechet_distance(a_MF: Tensor, b_MF: Tensor) -> float:
    """``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))``, A and B the covariances, in fp64.

    ``tr (A B)^(1/2)`` is the sum of the singular values of ``A^(1/2) B^(1/2)``.
    """
    a, b = a_MF.double(), b_MF.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding can leave a little less than nothing


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
