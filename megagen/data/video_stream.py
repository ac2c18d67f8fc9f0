"""A video file that grows while it is made.

Fragmented mp4: what has been written so far can be played, and stays playable if the writer dies.

Legend: T frames, H W height and width.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.error import FFmpegError
from torch import Tensor

from megagen.core.errors import DataError
from megagen.data.video import to_frames

_FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}


class VideoStream:
    """Writes H.264 (yuv420p) frame by frame; a context manager.

    Args:
        path: the ``.mp4`` file; its folder is made, a file there is replaced.
        fps: frames per second, > 0.
        crf: quality, 0 (lossless up to the colour conversion) to 51.
    """

    def __init__(self, path: str | Path, fps: float, *, crf: int = 18) -> None:
        if fps <= 0:
            raise ValueError(f"fps must be > 0, found {fps}")
        self.path, self.num_frames = Path(path), 0
        self._rate, self._crf = Fraction(fps).limit_denominator(100_000), crf
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def write(self, frames_THWC: Tensor | np.ndarray) -> None:
        """Append uint8 frames ``[T, H, W, 3]``, T >= 1; they are in the file on return.

        Raises:
            DataError: the folder cannot be written or the disk is full.
        """
        frames = to_frames(frames_THWC)
        try:
            container, stream = self._open(frames.shape[1], frames.shape[2])
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        except (OSError, FFmpegError) as error:
            raise self._failed(error) from error
        self.num_frames += len(frames)

    def close(self) -> None:
        """Finish the file; again: nothing."""
        container, self._container = self._container, None
        if container is None:
            return
        try:
            assert self._stream is not None
            container.mux(self._stream.encode(None))
            container.close()
        except (OSError, FFmpegError) as error:
            raise self._failed(error) from error

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, height: int, width: int) -> tuple[av.container.OutputContainer, av.VideoStream]:
        if self._container is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self.path), "w", container_options=_FRAGMENTS)
            # no frame waits in the encoder for later ones
            options = {"crf": str(self._crf), "tune": "zerolatency"}
            self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "yuv420p"
        assert self._stream is not None
        return self._container, self._stream

    def _failed(self, error: Exception) -> DataError:
        return DataError(
            f"cannot write the video: {error}.",
            remedy="Check the free space and the permissions of the folder.",
            where=str(self.path),
        )
