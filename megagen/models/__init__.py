"""Networks: one folder a family, each a plugin, a transformer and a name map to diffusers."""

MODELS: dict[str, str] = {
    "wan": "megagen.models.wan:WanModel",
}
"""Short names that ``models.<role>._target_`` takes besides dotted paths."""
