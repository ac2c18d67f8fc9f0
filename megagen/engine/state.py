"""A role's state for megatron-core's distributed checkpoints: it can be read under any layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megagen.core.errors import CheckpointError
from megagen.engine import lora

if TYPE_CHECKING:
    from megagen.engine.role import Role


def sharded_state(role: Role, *, is_loading: bool) -> dict[str, Any]:
    """Sharded tensors under keys ``<role>.<parameter>`` and plain numbers.

    Of a role with adapters only these are in it: its base does not change.

    Args:
        role: its weights are current.
        is_loading: the state is to be filled rather than saved.
    """
    prefix = f"{role.name}."
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": role.mesh.pg.dp_cp,
    }
    model: dict[str, Any] = {
        f"chunk{number}": _own_state(role, chunk, prefix, metadata)
        for number, chunk in enumerate(role.chunks)
    }
    found: dict[str, Any] = {"model": model}
    if role.optimizer is not None:
        found["optimizer"] = role.optimizer.sharded_state(model, metadata, is_loading)
        found["num_updates"] = role.optimizer.num_updates
    if role.ema is not None:
        found["ema"] = {
            f"chunk{number}": role.ema.sharded_state(
                number, model[f"chunk{number}"], prefix, is_loading=is_loading
            )
            for number in range(len(role.chunks))
        }
    return found


def _own_state(role: Role, chunk: Any, prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    found = chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
    return found if role.settings.lora is None else lora.own_part(found)


def load_state(role: Role, loaded: dict[str, Any]) -> None:
    """Put a filled ``sharded_state`` into the role.

    Raises:
        CheckpointError: a parameter is missing, or there is one too many.
    """
    prefix = f"{role.name}."
    for number, chunk in enumerate(role.chunks):
        tensors = loaded["model"][f"chunk{number}"]
        named = {name.removeprefix(prefix): value for name, value in tensors.items()}
        result = chunk.load_state_dict(named, strict=False)
        missing = [k for k in result.missing_keys if not k.endswith("_extra_state")]
        if role.settings.lora is not None:
            missing = list(lora.own_part(dict.fromkeys(missing)))
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{role.name}: missing {missing}, unexpected {result.unexpected_keys}.",
                remedy="Resume with the architecture that the checkpoint was made with.",
            )
    if role.optimizer is not None:
        role.optimizer.load_state(loaded["optimizer"])
        role.optimizer.num_updates = int(loaded["num_updates"])
    if role.ema is not None:
        for number in range(len(role.chunks)):
            role.ema.load_state(number, loaded["ema"][f"chunk{number}"])
