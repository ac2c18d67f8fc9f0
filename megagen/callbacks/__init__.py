"""Hooks that observe a run, and the sections that set the engine under FastVideo's callback names."""

CALLBACKS: dict[str, str] = {
    "validation": "megagen.callbacks.validation:ValidationCallback",
}
"""Short names that ``callbacks.<name>`` takes without a ``_target_``."""
