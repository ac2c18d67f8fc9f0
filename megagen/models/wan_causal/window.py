"""Which frames a block of frames attends to.

The video is cut into blocks of consecutive latent frames. A block attends to itself and to earlier
frames: all of them, or, with a window of ``local_attn_size`` frames, to at most so many, itself
included, of which the first ``sink_size`` are the video's first frames and the rest the latest.
Training (all blocks at once) and sampling (block by block on a cache) ask the same functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyRange:
    """Consecutive frames that queries see.

    Args:
        frames: their places in the timeline: cached frames, then the request's own.
        shift: frames by which their rotation is moved on; a sink that follows its window.
    """

    frames: range
    shift: int


@dataclass(frozen=True)
class BlockView:
    """One block's queries and what they see.

    Args:
        queries: places among the request's own frames.
        keys: in the order of the timeline.
        key_runs: of these, frames in a row that were made together.
    """

    queries: range
    keys: tuple[KeyRange, ...]
    key_runs: tuple[int, ...]

    @property
    def num_keys(self) -> int:
        """Frames seen."""
        return sum(len(part.frames) for part in self.keys)


@dataclass(frozen=True)
class Window:
    """Blocks and what they see; sizes in latent frames.

    Args:
        num_frames_per_block: of a block; the last one takes what is left.
        independent_first_frame: the video's first frame is a block of its own.
        local_attn_size: most frames that a block sees, itself included; -1: no limit.
        sink_size: of these, how many are the video's first.
        is_relative: the sink's rotation follows the window, as if its frames came right before the
            window's; else each frame keeps the rotation of its place in the video.
    """

    num_frames_per_block: int = 3
    independent_first_frame: bool = False
    local_attn_size: int = -1
    sink_size: int = 0
    is_relative: bool = False

    def blocks(self, num_frames: int, start: int = 0) -> list[range]:
        """Frames ``start`` to ``start + num_frames`` cut into blocks, the last maybe shorter."""
        size, end = self.num_frames_per_block, start + num_frames
        first = start + (1 if start == 0 and self.independent_first_frame else size)
        cuts = [start, *range(min(first, end), end, size), end]
        return [range(a, b) for a, b in itertools.pairwise(cuts) if b > a]

    def sees(self, end: int, frame: int) -> bool:
        """Whether a block that ends before frame ``end`` sees the earlier ``frame``."""
        return frame < self.sink_size or frame >= self._recent(end)

    def is_needed(self, frames: range, next_frame: int) -> bool:
        """Whether any frame from ``next_frame`` on can see any of ``frames``."""
        return any(self.sees(next_frame + 1, frame) for frame in frames)

    def views(
        self, num_frames: int, past: Sequence[int] = (), start: int = 0, *, has_clean: bool = False
    ) -> tuple[BlockView, ...]:
        """What each block of a request sees.

        Args:
            num_frames: of the request's video part, T.
            past: cached frames.
            start: frame of the video that the request begins with.
            has_clean: the request is teacher-forced: T clean frames, then the same T noisy. A clean
                block sees clean blocks up to itself, a noisy one itself and the clean blocks
                before.
        """
        blocks = self.blocks(num_frames, start)
        clean = [*past, *range(start, start + num_frames)]
        views = [
            self._view(block, clean, len(past) - start, block.start - start) for block in blocks
        ]
        if has_clean:
            offset = len(past) + num_frames - start
            views += [
                self._view(block, clean, offset, num_frames + block.start - start)
                for block in blocks
            ]
        return tuple(views)

    def _view(
        self, block: range, context: Sequence[int], offset: int, first_query: int
    ) -> BlockView:
        """``block``'s view; its own frame f has place ``offset + f`` in the timeline."""
        end = block.stop
        shift = self._recent(end) - self.sink_size if self.is_relative else 0
        seen = [
            (place, max(0, shift) if frame < self.sink_size else 0)
            for place, frame in enumerate(context)
            if frame < block.start and self.sees(end, frame)
        ]
        seen += [(offset + frame, 0) for frame in block]
        queries = range(first_query, first_query + len(block))
        past = [f for f in context if f < block.start and self.sees(end, f)]
        runs = [*self._made_together(past), len(block)]
        return BlockView(queries, tuple(_runs(seen)), tuple(runs))

    def _made_together(self, frames: Sequence[int]) -> list[int]:
        """Lengths of the runs of consecutive frames of one block."""
        first = int(self.independent_first_frame)

        def block(place_frame: tuple[int, int]) -> tuple[int, int]:
            place, frame = place_frame
            own = (frame - first) // self.num_frames_per_block  # the lone first frame: -1
            return own, frame - place

        return [len(list(run)) for _, run in itertools.groupby(enumerate(frames), key=block)]

    def _recent(self, end: int) -> int:
        """First frame of the window's moving part for a block that ends before ``end``."""
        if self.local_attn_size == -1:
            return 0
        return max(0, end - (self.local_attn_size - self.sink_size))


def _runs(places: Sequence[tuple[int, int]]) -> list[KeyRange]:
    """Neighbours of one shift joined."""
    runs: list[KeyRange] = []
    for place, shift in places:
        last = runs[-1] if runs else None
        if last is not None and last.shift == shift and last.frames.stop == place:
            runs[-1] = KeyRange(range(last.frames.start, place + 1), shift)
        else:
            runs.append(KeyRange(range(place, place + 1), shift))
    return runs
