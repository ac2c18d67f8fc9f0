"""Knowledge distillation in double precision: paths, losses and updates from their formulas.

Nothing of megagen's methods is used here but the names under which random numbers are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.methods.base import RunFacts
from megagen.methods.kd import KDMethod
from megagen.methods.kd_causal import KDCausalMethod
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from megagen.trainer import agree_on_main
from tests.engine import cases
from tests.methods import causal_cases
from tests.methods import dmd2_cases as dmd2
from tests.models import wan_causal_cases
from tests.models.wan_causal_cases import Rule

NUM_SAMPLES = 6
NUM_BATCHES = 2
SHIFT = 5.0


@dataclass(frozen=True)
class TextSamples:
    """A dataset of texts in memory."""

    shape: tuple[int, int, int, int]
    num_samples: int = NUM_SAMPLES

    def key_groups(self) -> list[list[int]]:
        return [list(range(self.num_samples))]

    def batch_of(self, keys: Sequence[int], positions: Sequence[int] | None = None) -> Batch:
        texts = [
            torch.randn(5, 6, generator=torch.Generator().manual_seed(700 + key)) for key in keys
        ]
        names = tuple(f"sample{key}" for key in keys)
        return Batch(
            None,
            {"text_embeds_BLD": torch.stack(texts)},
            tuple(keys if positions is None else positions),
            names,
            names,
            self.shape,
            tuple(keys),
        )

    def provenance(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples, "latent_shapes": [list(self.shape)]}

    def batches(self, step: int) -> list[Batch]:
        """All micro-batches of a step."""
        found = []
        for number in range(NUM_BATCHES):
            first = (step * NUM_BATCHES + number) * cases.BATCH
            positions = range(first, first + cases.BATCH)
            keys = [(5 * position + 2) % self.num_samples for position in positions]
            found.append(self.batch_of(keys, positions))
        return found


def facts(samples: TextSamples, mesh: Mesh | None = None, name: str = "one") -> RunFacts:
    """Of a run whose teacher is called ``name``."""
    found = replace(dmd2.facts(), samples=samples, identity=lambda role: {"weights": name})
    if mesh is None:
        return found
    first = mesh.tp_rank == mesh.cp_rank == mesh.pp_rank == 0
    return replace(found, data_place=(mesh.dp_rank, mesh.dp_size), is_writer=first)


def shape_of(rule: Rule | None) -> tuple[int, int, int, int]:
    return dmd2.LATENTS if rule is None else causal_cases.SHAPE


def make_method(
    weights: Sequence[cases.Weights],
    data: ParallelDims,
    layouts: Sequence[ParallelDims],
    options: Mapping[str, Any],
    rule: Rule | None = None,
    hook: Callable[[KDMethod], None] | None = None,
) -> KDMethod:
    """In a rank: as a run builds it, with the paths made."""
    mesh, streams = Mesh.build(data), Streams(dmd2.SEED)
    own = facts(TextSamples(shape_of(rule)), mesh)
    student, teacher = layouts
    if rule is None:
        role = cases.make_role(weights[0], student, data=data, optimizer=dmd2.ADAMW)
    else:
        role = causal_cases.make_student(weights[0], rule, student, data)
    roles = {
        "student": role,
        "teacher": cases.make_role(weights[1], teacher, data=data, name="teacher", trainable=False),
    }
    for built in roles.values():
        built.plugin.flow_shift = SHIFT
    plugins = {name: built.plugin for name, built in roles.items()}
    cls = KDMethod if rule is None else KDCausalMethod
    parsed = parse_options(cls.Options, options, "method")
    cls.check(parsed, plugins)
    found = agree_on_main(lambda: cls.survey(parsed, plugins, streams, own))
    method = cls(roles, parsed, streams, replace(own, preparation=found))
    if hook is not None:
        hook(method)
    assert set(method.prepare()) == {"student"}
    torch.distributed.barrier()
    return method


# -- the reference -------------------------------------------------------------------------------
class Reference:
    """Teacher's paths and the student's regression to their ends.

    Args:
        weights: of student and teacher.
        options: of the method.
        places: of the student's timesteps on the teacher's grid.
        rule: blocks of a causal student.
    """

    def __init__(
        self,
        weights: Sequence[cases.Weights],
        options: Mapping[str, Any],
        places: Sequence[int],
        rule: Rule | None,
    ) -> None:
        self.student, self.teacher = (cases.PlainModel(w, dmd2.ADAMW) for w in weights[:2])
        self.student.model.double()
        self.teacher.model.double()
        self.o, self.rule = {"teacher_guidance_scale": 1.0, **options}, rule
        self.samples, self.streams = TextSamples(shape_of(rule)), Streams(dmd2.SEED)
        self.causal = rule and wan_causal_cases.Reference(weights[0], rule)
        if self.causal:
            self.causal.model = self.student.model
        count = self.o["teacher_inference_steps"]
        even = [1 - i / count for i in range(count + 1)]
        self.grid = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in even]
        self.places = places
        with torch.no_grad(), dmd2.true_double():
            self.paths = [self.path(key) for key in range(NUM_SAMPLES)]

    def path(self, key: int) -> tuple[Tensor, Tensor]:
        """States at the student's timesteps and the end."""
        text = self.samples.batch_of([key]).condition["text_embeds_BLD"]
        negative = torch.zeros_like(text)
        negative[:, :4] = dmd2.facts().unconditional["negative"]
        generator = self.streams.generator("ode_path/noise", 0, key)
        x = torch.randn(self.samples.shape, generator=generator)[None].double()
        states, scale = [], self.o["teacher_guidance_scale"]
        for sigma, below in zip(self.grid, self.grid[1:], strict=False):
            states.append(x)
            t = torch.tensor([1000 * sigma])
            v, u = (
                self.teacher.model(x, t, c.double(), return_dict=False)[0] for c in (text, negative)
            )
            x = x + (below - sigma) * (u + scale * (v - u))
        return torch.cat([states[place] for place in self.places]), x[0]

    def drawn(self, step: int, batch: Batch) -> Tensor:
        """Place in the list of each frame of each sample."""
        share, frames = self.o.get("student_step_per", "sample"), self.samples.shape[1]
        one = {"step": -1, "micro_batch": batch.positions[0]}
        blocks = [self.rule.block(f) if self.rule else 0 for f in range(frames)]
        shape = (len(set(blocks)),) if self.rule else ()
        rows = []
        for position in batch.positions:
            key = one.get(share, position)
            generator = self.streams.generator("kd/step", step, key)
            found = torch.randint(0, len(self.places), shape, generator=generator)
            rows.append(found.view(-1)[torch.tensor(blocks)])
        return torch.stack(rows)

    def loss(self, step: int, batch: Batch) -> Tensor:
        place_BT, rows = self.drawn(step, batch), []
        for row, key in enumerate(batch.keys):
            states, _ = self.paths[key]
            frames = [states[k, :, f] for f, k in enumerate(place_BT[row].tolist())]
            rows.append(torch.stack(frames, dim=1))
        x = torch.stack(rows)
        # the networks see float32
        timestep_BT = torch.tensor([1000 * self.grid[p] for p in self.places])[place_BT]
        text = batch.condition["text_embeds_BLD"].double()
        if self.causal:
            v = self.causal(Request(x, timestep_BT, {"text_embeds_BLD": text}))
        else:
            v = self.student.model(x, timestep_BT[:, 0], text, return_dict=False)[0]
        x0 = x - timestep_BT.double()[:, None, :, None, None] / 1000 * v
        target = torch.stack([self.paths[key][1] for key in batch.keys])
        return 0.5 * (x0 - target).square().mean()

    def step(self, step: int) -> dict[str, Any]:
        """One update."""
        total = 0.0
        with dmd2.true_double():
            for batch in self.samples.batches(step):
                loss = self.loss(step, batch) / NUM_BATCHES
                loss.backward()
                total += loss.item()
        gradients = self.student.gradients()
        return {
            "loss/total": total,
            "student": gradients,
            "grad_norm/student": self.student.step(),
        }


def cached(folder: Path) -> list[str]:
    """Names of the samples in a cache."""
    return sorted(file.name for file in (folder / "samples").glob("*.safetensors"))
