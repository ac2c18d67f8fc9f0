"""Networks: one folder a family, each a plugin, a transformer and a name map to diffusers."""

MODELS: dict[str, str] = {
    "wan": "megagen.models.wan:WanModel",
    "wan_causal": "megagen.models.wan_causal:WanCausalModel",
}
"""Short names that ``models.<role>._target_`` takes besides dotted paths."""
