"""What the losses need to know of a model family: Wan (``wan22``) and Qwen-Image (``qwen_image``).

A family whose optional package is missing is left out, and any other trouble with one is a warning:
the losses can be imported without it. Both families export ``attach_feature_capture``; the name in
this package is Qwen-Image's, as in the released package, so take it from the family's module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _optional(family: str) -> Iterator[None]:
    """Let an import fail without harm; a module of ours that is missing is not such a failure."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megagen"):
            raise
    except Exception as error:
        warnings.warn(f"the {family} plugin could not be imported: {error!r}", stacklevel=3)


with _optional("wan22"):
    from megagen.fastgen.plugins import wan22 as wan22
with _optional("qwen_image"):
    from megagen.fastgen.plugins.qwen_image import *  # noqa: F403
