"""Paths of a teacher's ODE: which states are wanted, how they are made, how a batch reads them.

A path begins with noise, a function of (seed, sample), and is Euler's solution of the guided
teacher's ODE on a shifted grid of ``teacher_inference_steps``. A student of K steps is shown the K
states at its timesteps, which must lie on that grid, and the path's end. Making paths is dealt out
over the data ranks; every other parallel degree works together on each one.

Legend: B batch, C channels, T latent frames, H W latent size, K states of a path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError, DataError
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.data.ode_cache import OdeCache, PathSample, open_cache
from megagen.engine.role import Role
from megagen.methods.base import RunFacts, Samples
from megagen.methods.path_options import PathOptions
from megagen.methods.scores import Unconditional
from megagen.models.base import ModelPlugin, Request
from megagen.sampling import flow
from megagen.sampling.pipeline import batches

log = get_logger(__name__)

TEACHERS = ("teacher", "teacher_2")
"""The network whose paths are learned; the second expert where it has two."""
REPORTS = 20
"""Lines of the log while paths are made."""


@dataclass(frozen=True)
class PathPlan:
    """What rank 0 found in a cache.

    Args:
        cached: timesteps of the states in it, in 0..1000.
        wanted: the student's.
        missing: keys of the paths that are to be made, by shape of latents.
    """

    cached: tuple[float, ...]
    wanted: tuple[float, ...]
    missing: tuple[tuple[int, ...], ...]


def survey(
    options: PathOptions, plugins: Mapping[str, ModelPlugin], streams: Streams, facts: RunFacts
) -> PathPlan:
    """Open or begin the cache and look what is missing. One process calls this.

    Raises:
        ConfigError: paths are missing, and there is no teacher.
        DataError: the paths there are others.
    """
    assert facts.samples is not None, "paths are made of a dataset's prompts"
    grid, places = options.grid(plugins), options.places(plugins)
    wanted = tuple(1000 * grid[place] for place in places)
    kept = tuple(1000 * s for s in grid[:-1]) if options.keep_all_states else wanted
    folder = Path(options.teacher_path_cache)
    provenance = _provenance(options, plugins, streams, facts)
    notes = {name: str(getattr(p, "directory", None)) for name, p in plugins.items()}
    cache = open_cache(folder, provenance, kept, notes)
    missing = tuple(
        tuple(cache.missing(keys, verify=options.verify_cache))
        for keys in facts.samples.key_groups()
    )
    count, total = sum(map(len, missing)), sum(map(len, facts.samples.key_groups()))
    log.info("%s: %d of %d paths are there", folder, total - count, total)
    if count and "teacher" not in plugins:
        raise ConfigError(
            f"{count} of {total} paths are missing in {folder}, and no teacher is given.",
            remedy="Add models.teacher, which makes them.",
            where="models",
        )
    return PathPlan(cache.timesteps, wanted, missing)


def _provenance(
    options: PathOptions, plugins: Mapping[str, ModelPlugin], streams: Streams, facts: RunFacts
) -> dict[str, Any]:
    """All that decides the paths' numbers; without a teacher, what is known without it."""
    assert facts.samples is not None
    first, second = options.scales()
    found: dict[str, Any] = {
        "teacher_inference_steps": options.teacher_inference_steps,
        "sampler": "euler",
        "shift": options.shift(plugins),
        "teacher_guidance_scale": [first, second],
        "dtype": options.path_dtype,
        "seed": streams.seed,
        "dataset": facts.samples.provenance(),
    }
    if (first, second) != (1, 1):
        embeddings = {n: _digest(t) for n, t in sorted(facts.unconditional.items())}
        found["unconditional"] = {**options.cfg_uncond.model_dump(), "embeddings": embeddings}
    for name in TEACHERS:
        if name in plugins and facts.identity is not None:
            found[name] = facts.identity(name)
    return found


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().float().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest()


class PathMaker:
    """Makes the paths of a cache with the teacher, under the layouts that its roles have.

    Args:
        options: of the paths.
        teachers: the network, or the experts.
        streams: of the run.
        facts: of the run.
        plan: what is to be made.
    """

    def __init__(
        self,
        options: PathOptions,
        teachers: Sequence[Role],
        streams: Streams,
        facts: RunFacts,
        plan: PathPlan,
    ) -> None:
        self.options, self.streams, self.facts, self.plan = options, streams, facts, plan
        self.teachers = teachers
        self.unconditional = Unconditional(
            options.cfg_uncond, facts.unconditional, needed=options.scales() != (1, 1)
        )
        self.cache = OdeCache(Path(options.teacher_path_cache), plan.cached)

    def make_missing(self) -> None:
        """All of them. Collective."""
        rank, size = self.facts.data_place
        for keys in self.plan.missing:
            if not keys:
                continue
            shares = batches(len(keys), rank, size, self.options.path_batch_size)
            for number, share in enumerate(shares, 1):
                self.make([keys[place] for place in share])
                if number == len(shares) or number % max(1, len(shares) // REPORTS) == 0:
                    log.info("paths: %d of %d batches of this rank", number, len(shares))

    def make(self, keys: Sequence[int]) -> None:
        """The paths of some samples, solved together; a key may come up twice."""
        samples: Samples | None = self.facts.samples
        assert samples is not None
        batch = samples.batch_of(keys)
        states, x0_BCTHW = self.solve(batch)
        if not self.facts.is_writer:
            return
        for row, key in enumerate(keys):
            if key not in keys[:row]:
                own = torch.stack([state[row] for state in states])
                ids = batch.ids[row], batch.captions[row]
                sample = PathSample(key, *ids, states_KCTHW=own, x0_CTHW=x0_BCTHW[row])
                self.cache.write(sample, self.options.path_dtype)

    def solve(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The states of the cache's timesteps, each ``[B, C, T, H, W]``, and the path's end."""
        noise = self.streams.normal("ode_path/noise", 0, batch.keys, batch.latent_shape)
        experts = [
            flow.Expert(self._velocity(role, batch, scale), *role.plugin.timestep_range)
            for role, scale in zip(self.teachers, self.options.scales(), strict=False)
        ]
        velocity, seen = flow.by_timestep(experts), []

        def watched(x: Tensor, sigma: float) -> Tensor:
            if self.cache.has(1000 * sigma):
                seen.append(x)
            return velocity(x, sigma)

        grid = self.options.grid({"student": self.teachers[0].plugin})
        x0_BCTHW = flow.euler(watched, noise.to(process.device()), grid)
        assert len(seen) == len(self.cache.timesteps), "the grid is not the cache's"
        return seen, x0_BCTHW

    def _velocity(self, role: Role, batch: Batch, scale: float) -> flow.Velocity:
        """The guided velocity; both branches go through the pipeline in one call."""

        def predict(x: Tensor, sigma: float) -> Tensor:
            timestep_B = torch.full((len(x),), 1000 * sigma, device=x.device)
            request = Request(x, timestep_B, batch.condition)
            if scale == 1:
                return role.predict([request])[0]
            cond, uncond = role.predict([request, self.unconditional(request)])
            return flow.guide(cond, uncond, scale)

        return predict


class PathReader:
    """The paths of micro-batches.

    Args:
        options: of the paths.
        plan: of the run.
    """

    def __init__(self, options: PathOptions, plan: PathPlan) -> None:
        self.cache = OdeCache(Path(options.teacher_path_cache), plan.cached)
        self.timesteps = plan.wanted

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States ``[B, K, C, T, H, W]`` and ends ``[B, C, T, H, W]`` on the run's device, fp32.

        Raises:
            DataError: a path is missing, corrupt, or of another sample.
        """
        found = [self.cache.read(key, self.timesteps) for key in batch.keys]
        given = zip(found, batch.ids, batch.captions, strict=True)
        for sample, name, caption in given:
            # a caption is empty where it was dropped
            if sample.id != name or (caption and sample.caption != caption):
                raise DataError(
                    f"is of {sample.id!r} ({sample.caption!r}), sample {sample.key} of the dataset "
                    f"is {name!r} ({caption!r}).",
                    remedy="Name the dataset that the paths were made of, or another cache.",
                    where=str(self.cache.path(sample.key)),
                )
        device = process.device()
        states = torch.stack([sample.states_KCTHW for sample in found]).to(device)
        return states, torch.stack([sample.x0_CTHW for sample in found]).to(device)
