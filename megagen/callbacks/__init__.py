"""Hooks that observe a run, and FastVideo's callback names for what the engine does."""

CALLBACKS: dict[str, str] = {
    "validation": "megagen.callbacks.validation:ValidationCallback",
}
"""Short names that ``callbacks.<name>`` takes without a ``_target_``."""
