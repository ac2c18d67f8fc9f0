"""Keys of what learns a teacher's ODE paths, and where the student's timesteps are on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.data.ode_cache import PathDtype
from megagen.methods.few_step import step_list
from megagen.methods.scores import UncondOptions
from megagen.models.base import ModelPlugin
from megagen.sampling import flow

SEEN_AS = 0.05
"""How far a timestep as people write it (833.3) may be from that of the grid (833.333...)."""


class PathOptions(StrictOptions):
    """What the teacher's paths are, and where they are kept.

    Attributes:
        teacher_path_cache: directory of the paths, made where it is not there; all ranks see it.
        t_list: the student's timesteps in 0..1000, going down, and a final 0; each is a timestep of
            the teacher (833.3 for 833.333, and FastVideo's 833, are understood).
        dmd_denoising_steps: another form of ``t_list``, without the 0.
        student_sample_steps: number of the student's steps, where given checked against the list.
        warp_denoising_step: the numbers of the list are places on the unshifted grid.
        snap: take the teacher's nearest timesteps in place of those in the list.
        teacher_inference_steps: Euler steps of a path.
        teacher_guidance_scale: 1 makes no unconditional pass.
        teacher_guidance_scale_2: of the second (low-noise) expert; None: the same.
        teacher_flow_shift: of the path's grid; None: the teacher's ``flow_shift``.
        cfg_uncond: what unconditional passes see.
        path_batch_size: paths that a data rank makes together.
        path_dtype: of the states on disk.
        keep_all_states: keep the states at all of the teacher's timesteps, for other lists later.
        verify_cache: compare every path's digest when the run starts, and make spoilt ones anew;
            false: look at sizes then, and at digests when a path is used.
    """

    teacher_path_cache: str
    t_list: list[float] | None = None
    dmd_denoising_steps: list[float] | None = None
    student_sample_steps: int | None = Field(None, ge=1)
    warp_denoising_step: bool = False
    snap: bool = False
    teacher_inference_steps: int = Field(48, ge=1)
    teacher_guidance_scale: float = Field(1.0, ge=0)
    teacher_guidance_scale_2: float | None = Field(None, ge=0)
    teacher_flow_shift: float | None = Field(None, gt=0)
    cfg_uncond: UncondOptions = UncondOptions()
    path_batch_size: int = Field(1, ge=1)
    path_dtype: PathDtype = "bf16"
    keep_all_states: bool = False
    verify_cache: bool = False

    def scales(self) -> tuple[float, float]:
        """Guidance of the first and of the second expert."""
        first, second = self.teacher_guidance_scale, self.teacher_guidance_scale_2
        return first, first if second is None else second

    def grid(self, plugins: Mapping[str, ModelPlugin]) -> list[float]:
        """Sigmas of a path, from 1 to 0."""
        return flow.shifted_sigmas(self.teacher_inference_steps, self.shift(plugins))

    def shift(self, plugins: Mapping[str, ModelPlugin]) -> float:
        """Of the path's grid."""
        plugin, own = plugins.get("teacher", plugins["student"]), self.teacher_flow_shift
        return plugin.flow_shift if own is None else own

    def places(self, plugins: Mapping[str, ModelPlugin]) -> list[int]:
        """Where on the teacher's grid the student's timesteps are.

        Raises:
            ConfigError: one is not there (and ``snap`` is false); names the nearest that are.
        """
        steps = step_list(
            self.t_list,
            self.dmd_denoising_steps,
            self.student_sample_steps,
            warp=self.warp_denoising_step,
            shift=plugins["student"].flow_shift,
        )
        grid = [1000 * sigma for sigma in self.grid(plugins)[:-1]]
        found = [min(range(len(grid)), key=lambda i: abs(grid[i] - t)) for t in steps]
        named = [_named(t, grid) for t in steps]
        where = "method.t_list" if self.t_list is not None else "method.dmd_denoising_steps"
        nearest = f"[{', '.join(f'{grid[i]:g}' for i in found)}]"
        wrong = [f"{t:g}" for t, place in zip(steps, named, strict=True) if place is None]
        if wrong and not self.snap:
            raise ConfigError(
                f"{', '.join(wrong)}: none of the teacher's {len(grid)} timesteps.",
                remedy=f"The nearest are {nearest}: take these, or set method.snap to true.",
                where=where,
            )
        exact = [near if p is None else p for p, near in zip(named, found, strict=True)]
        if len(set(exact)) < len(exact):
            raise ConfigError(
                f"two of its steps are nearest to the same timestep of the teacher: {nearest}.",
                remedy="Take fewer steps, or more teacher_inference_steps.",
                where=where,
            )
        return exact


def _named(timestep: float, grid: Sequence[float]) -> int | None:
    """The place that a number stands for: its value, or that without its fraction."""
    for place, own in enumerate(grid):
        if abs(own - timestep) <= SEEN_AS or timestep == int(own):
            return place
    return None
