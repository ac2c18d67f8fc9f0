"""A dataset of texts alone: a file with a prompt a line to parquet files of embeddings.

Few-step distillation from the student's own rollouts needs no video. The files are FastVideo's
``text_only`` ones, with ``unconditional.safetensors`` beside; they are read with
``training.data.preprocessed_data_type: text_only``.

Legend: L text tokens, D features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from megagen.core.errors import ConfigError, DataError
from megagen.core.options import StrictOptions, parse_options
from megagen.data.codecs import check_spec
from megagen.data.manifest import UNCONDITIONAL, write_json
from megagen.data.preprocess import write_unconditional
from megagen.data.schema import TEXT, pack_tensor, write_rows
from megagen.data.text import TEXT_ENCODERS, TextEncoder, build_text_encoder

BATCH = 16
"""Prompts encoded together."""


class PromptOptions(StrictOptions):
    """Options of ``megagen preprocess --prompts``.

    Attributes:
        prompts: text file with a prompt a line; empty lines do not count.
        output_dir: the dataset; parts that an earlier run with the same options wrote are kept.
        text_encoder: name, or mapping ``{name, options...}``: hashed, umt5.
        negative_prompt: its embedding is stored beside the empty prompt's.
        samples_per_file: prompts per parquet file.
    """

    prompts: str
    output_dir: str
    text_encoder: dict[str, Any]
    negative_prompt: str = ""
    samples_per_file: int = Field(256, ge=1)

    @field_validator("text_encoder", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def prompt_options(data: dict[str, Any], where: str = "") -> PromptOptions:
    """Checked options from a mapping.

    Raises:
        ConfigError: unknown or missing keys, wrong values.
    """
    options = parse_options(PromptOptions, data, where)
    check_spec(options.text_encoder, TEXT_ENCODERS, "text_encoder")
    return options


def encode_prompts(
    options: PromptOptions, on_prompts: Callable[[int], None] = lambda count: None
) -> int:
    """Write what is missing of the dataset.

    Args:
        options: what to do.
        on_prompts: called with the number of prompts of each part that is done.

    Returns:
        How many prompts the dataset has.

    Raises:
        ConfigError: the text file cannot be read.
        DataError: it is empty, or the directory was begun with other options or prompts.
    """
    prompts, output = read_prompts(options.prompts), Path(options.output_dir)
    mark = output / ".progress"
    _begin(mark, options, prompts)
    encoder: TextEncoder | None = None
    size = options.samples_per_file
    for start in range(0, len(prompts), size):
        path = output / f"prompts-{start // size:05d}.parquet"
        part = prompts[start : start + size]
        if not path.is_file():
            encoder = encoder or build_text_encoder(options.text_encoder)
            write_rows(path, _rows(encoder, part, start), [TEXT])
        on_prompts(len(part))
    if not (output / UNCONDITIONAL).is_file():
        encoder = encoder or build_text_encoder(options.text_encoder)
        write_unconditional(output / UNCONDITIONAL, encoder, options.negative_prompt)
    shutil.rmtree(mark)  # the loader refuses a dataset that has it
    return len(prompts)


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ConfigError: it cannot be read.
        DataError: no line is left.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file!r} cannot be read ({error}).",
            remedy="Give a UTF-8 text file with a prompt a line.",
            where="prompts",
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError("has no prompt.", remedy="Write one a line.", where=file)
    return prompts


def _begin(mark: Path, options: PromptOptions, prompts: Sequence[str]) -> None:
    """Note what the directory is begun with; compare where it has been."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    plan = {**options.model_dump(mode="json", exclude={"prompts", "output_dir"}), "prompts": digest}
    file = mark / "plan.json"
    begun = json.loads(file.read_text()) if file.is_file() else None
    holds_data = any(mark.parent.glob("*.parquet"))
    if (begun is None and holds_data) or (begun is not None and begun != plan):
        raise DataError(
            "holds a dataset, or was begun with other prompts or options.",
            remedy="Choose another output_dir, or remove this one.",
            where=str(mark.parent),
        )
    write_json(file, plan)


def _rows(encoder: TextEncoder, prompts: Sequence[str], first: int) -> list[dict[str, Any]]:
    rows = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        embeds_BLD, mask_BL = encoder.encode(part)
        for i, prompt in enumerate(part):
            own_LD = embeds_BLD[i, : int(mask_BL[i].sum())]
            number = first + start + i
            rows.append({"id": f"prompt-{number}", "caption": prompt, **pack_tensor(TEXT, own_LD)})
    return rows
