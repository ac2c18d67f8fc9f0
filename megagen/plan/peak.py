"""How the roles' memory meets on a rank in the course of a step.

Weights, gradients, optimizer states and EMA of all roles stay. Beside them, one after the other:

* while teacher and critic are asked: their passes, and what the student keeps for its backward
  pass, graphs under ``hold`` and caches of its rollout;
* while a role learns: its pass with gradients, and its caches;
* while the discriminator learns: its source's pass, the features and the heads' own graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megagen.models.base import ModelPlugin
from megagen.models.heads import HeadsLoad
from megagen.plan.activations import sample_tokens
from megagen.plan.estimate import Memory
from megagen.plan.load import Load

FP32 = 4


@dataclass(frozen=True)
class HeadsMemory:
    """Bytes of a discriminator on one rank.

    Args:
        stays: weights, gradients and moments.
        features: that are there at once while it learns.
        graph: of the heads on them.
    """

    stays: float
    features: float
    graph: float


def heads_memory(heads: HeadsLoad, plugin: ModelPlugin, load: Load) -> HeadsMemory:
    """Of heads on the features of a role; features are whole on every rank.

    Args:
        heads: what they are.
        plugin: of their source.
        load: of their source; caches and graphs do not matter.
    """
    tokens = sample_tokens(load, plugin.num_tokens(load.latent_shape)) * load.dims.cp_size
    seen = FP32 * tokens * heads.num_features * heads.num_inputs
    return HeadsMemory(
        stays=4 * FP32 * heads.parameters,
        features=seen * plugin.hidden_size,
        graph=seen * heads.kept_per_token,
    )


@dataclass(frozen=True)
class Peak:
    """Bytes on the fullest rank.

    Args:
        stays: all the time.
        comes: beside it at the highest moment.
        when: that is.
    """

    stays: float
    comes: float
    when: str

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.stays + self.comes


def peak(
    roles: Mapping[str, Memory], heads: HeadsLoad | None = None, judge: HeadsMemory | None = None
) -> Peak:
    """The highest moment of a step.

    Args:
        roles: of each role.
        heads: what is trained beside them.
        judge: its bytes.
    """
    moments: dict[str, float] = {}
    for name, role in roles.items():
        if role.training:
            moments[f"while {name} learns"] = role.training + role.caches
        asked = [other.forward for key, other in roles.items() if key != name]
        if heads is not None and heads.source != name:
            asked.append(roles[heads.source].of_inputs)
        if role.held or role.caches:
            moments[f"while others score {name}"] = role.held + role.caches + max(asked, default=0)
        moments[f"while {name} is asked"] = role.forward
    stays = sum(role.stays for role in roles.values())
    if heads is not None and judge is not None:
        source = roles[heads.source]
        moments[f"while {heads.source} is asked"] = source.of_inputs
        moments["while the discriminator learns"] = judge.features + max(
            source.forward, judge.graph
        )
        stays += judge.stays
    when = max(moments, key=lambda name: moments[name])
    return Peak(stays, moments[when], when)
