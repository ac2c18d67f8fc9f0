"""What plans need to know of heads that a method trains beside its networks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadsLoad:
    """Heads that judge features of a network; they are whole on every rank, in fp32.

    Args:
        source: role whose features they judge.
        num_features: blocks whose outputs they see.
        num_inputs: of each micro-batch, inputs of the source whose features are there at once.
        parameters: of all heads.
        kept_per_token: numbers that a head keeps of each token beside the feature.
    """

    source: str
    num_features: int
    num_inputs: int
    parameters: int
    kept_per_token: int
