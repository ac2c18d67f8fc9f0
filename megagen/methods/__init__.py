"""Training methods: pure algorithms over roles, one file each. They know no parallel layout."""

METHODS: dict[str, str] = {
    "dmd2": "megagen.methods.dmd2:DMD2Method",
    "finetune": "megagen.methods.finetune:FineTuneMethod",
}
"""Short names that ``method._target_`` takes besides dotted paths."""
