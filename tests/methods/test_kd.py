"""Knowledge distillation against its formulas in double precision, and under every layout."""

from __future__ import annotations

import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.errors import ConfigError, DataError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.ode_cache import OdeCache, PathSample, read_manifest
from megagen.methods import ode_paths
from megagen.methods.diffusion_forcing import frame_chunks
from megagen.methods.kd import KDMethod, states_at
from megagen.methods.kd_causal import KDCausalMethod
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.methods import dmd2_cases as dmd2
from tests.methods import kd_cases as kd
from tests.methods.test_dmd2 import LAYOUTS, SINGLE, average, check, weights
from tests.models import wan_causal_cases
from tests.models.wan_causal_cases import Rule

NUM_STEPS = 5
OPTIONS: dict[str, Any] = {
    # of 6 steps at shift 5: 1000, 961.5, 909.1, 833.3, 714.3, 500
    "t_list": [1000, 909, 500, 0],
    "teacher_inference_steps": 6,
    "teacher_guidance_scale": 3.0,
    "path_dtype": "fp32",
    "path_batch_size": 2,
}
# blocks of a causal student, options, places of its timesteps on the teacher's grid
VARIANTS: dict[str, tuple[Rule | None, dict[str, Any], list[int]]] = {
    "guided": (None, OPTIONS, [0, 2, 5]),
    "fastvideo": (
        None,
        {
            **OPTIONS,
            "t_list": None,
            "dmd_denoising_steps": [980, 840],
            "snap": True,
            "teacher_guidance_scale": 1.0,
            "student_step_per": "micro_batch",
            "keep_all_states": True,
        },
        [1, 3],
    ),
    "causal": (Rule(2, window=4, sink=1), OPTIONS, [0, 2, 5]),
}


@functools.cache
def reference(variant: str) -> dmd2.Curve:
    rule, options, places = VARIANTS[variant]
    return dmd2.Curve(kd.Reference(weights(), options, places, rule))


def expected(variant: str, num_steps: int) -> list[dict[str, Any]]:
    return reference(variant).first(num_steps)


def run(
    given: list[cases.Weights],
    data: ParallelDims,
    layouts: list[ParallelDims],
    variant: str,
    folder: Path,
    num_steps: int,
) -> list[dict[str, Any]]:
    """In a rank: metrics over all data ranks and, of the steps, the gradients."""
    rule, options, _ = VARIANTS[variant]
    options = {**options, "teacher_path_cache": str(folder)}
    method = kd.make_method(given, data, layouts, options, rule)
    mesh, found = Mesh.build(data), []
    share = kd.NUM_BATCHES // mesh.dp_size
    for step in range(num_steps):
        own = kd.TextSamples(kd.shape_of(rule)).batches(step)
        own = own[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
        result = method.train_step(own, step)
        assert not result.skipped
        metrics: dict[str, Any] = {k: average(v) for k, v in result.metrics.items()}
        metrics["student"] = dmd2.gradients_of(method.student)
        found.append(metrics)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_from_the_formulas(variant: str, tmp_path: Path) -> None:
    found = run_ranks(1, run, weights(), SINGLE, [SINGLE] * 2, variant, tmp_path, 2)
    check(found, expected(variant, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["guided", "causal"])
def test_five_steps_under_every_layout(variant: str, layout: str, tmp_path: Path) -> None:
    num_ranks, data, *layouts = LAYOUTS[layout]
    found = run_ranks(num_ranks, run, weights(), data, layouts[:2], variant, tmp_path, NUM_STEPS)
    check(found, expected(variant, NUM_STEPS))
    assert len(kd.cached(tmp_path)) == kd.NUM_SAMPLES
    assert not list(tmp_path.rglob("*.tmp"))


# -- the cache in a run --------------------------------------------------------------------------
class Killed(Exception):
    """Stands for a signal."""


def make_paths(
    given: list[cases.Weights], folder: Path, options: dict[str, Any], kill_after: int | None
) -> tuple[list[tuple[int, ...]], bool]:
    """In a rank: the batches of keys that were solved, and whether all was done."""
    solved: list[tuple[int, ...]] = []
    original = ode_paths.PathMaker.solve

    def counted(self: Any, batch: Any) -> Any:
        if len(solved) == kill_after:
            raise Killed
        solved.append(batch.keys)
        return original(self, batch)

    ode_paths.PathMaker.solve = counted  # type: ignore[method-assign]
    own = {**OPTIONS, **options, "teacher_path_cache": str(folder)}
    try:
        kd.make_method(given, SINGLE, [SINGLE] * 2, own)
    except Killed:
        return solved, False
    return solved, True


def paths(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    ((solved, done),) = run_ranks(1, make_paths, weights(), folder, options, None)
    assert done
    return solved


@functools.cache
def made(folder: Path) -> Path:
    """A whole cache, not to be changed."""
    assert paths(folder) == [(0, 1), (2, 3), (4, 5)]
    return folder


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of a whole cache."""
    source = made(tmp_path_factory.getbasetemp() / "kd_paths")
    return Path(shutil.copytree(source, tmp_path / "paths"))


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "samples").iterdir()}


def test_a_killed_run_goes_on_at_the_first_missing_path(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    ((solved, done),) = run_ranks(1, make_paths, weights(), folder, {}, 2)
    assert (solved, done) == ([(0, 1), (2, 3)], False)
    assert paths(folder) == [(4, 5)]
    assert content(folder) == content(whole)  # as if nothing had happened


def test_what_is_damaged_is_made_anew(whole: Path) -> None:
    wanted = survey(whole).work.wanted
    cache = OdeCache(whole, wanted)
    before = [cache.read(key, wanted) for key in range(kd.NUM_SAMPLES)]
    cut, flipped = cache.path(1), cache.path(4)
    cut.write_bytes(cut.read_bytes()[:-7])
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 4
    flipped.write_bytes(data)
    assert paths(whole) == [(1,)]
    with pytest.raises(DataError, match=r"00000004.*is corrupt.*digest.*Delete it"):
        cache.read(4, wanted)
    assert paths(whole, verify_cache=True) == [(4,)]
    for old in before:
        new = cache.read(old.key, wanted)
        assert cases.relative(new.states_KCTHW, old.states_KCTHW) < 1e-5
        assert cases.relative(new.x0_CTHW, old.x0_CTHW) < 1e-5


def survey(folder: Path, **changes: Any) -> Any:
    """Of a run on the caches above, in this process.

    Args:
        folder: of the cache.
        changes: ``name`` of the teacher's weights, ``has_teacher``, ``seed``, ``shift``, ``shape``
            of the samples; the rest are options.
    """
    shift, shape = changes.pop("shift", kd.SHIFT), changes.pop("shape", dmd2.LATENTS)
    name, seed = changes.pop("name", "one"), changes.pop("seed", dmd2.SEED)
    names = ["student", *["teacher"] * changes.pop("has_teacher", True)]
    plugins = {role: cases.make_plugin(flow_shift=shift) for role in names}
    given = {**OPTIONS, "teacher_path_cache": str(folder), **changes}
    parsed = parse_options(KDMethod.Options, given, "method")
    KDMethod.check(parsed, plugins)
    facts = kd.facts(kd.TextSamples(shape), name=name)
    return KDMethod.survey(parsed, plugins, Streams(seed), facts)


def test_other_paths_are_refused(whole: Path) -> None:
    assert survey(whole).idle == ("teacher",)
    assert survey(whole, path_batch_size=5, student_step_per="step").idle == ("teacher",)
    assert survey(whole, has_teacher=False).work.missing == ((),)

    def refused(key: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=rf"paths.json.*with {key}.*this run has"):
            survey(whole, **changes)

    refused(r"teacher\.weights 'one'", name="two")
    refused("teacher_inference_steps 6", teacher_inference_steps=12)
    refused("teacher_guidance_scale", teacher_guidance_scale=2.0)
    refused("shift 5.0", shift=3.0, snap=True)
    refused("shift 5.0", teacher_flow_shift=4.0, snap=True)
    refused("seed", seed=1)
    refused("dtype 'fp32'", path_dtype="bf16")
    refused(r"dataset\.latent_shapes", shape=(3, 2, 2, 10))
    refused(r"unconditional\.text", cfg_uncond={"text": "zero"})
    with pytest.raises(DataError, match=r"no state at timestep 714.286; it has 1000, 909.091, 500"):
        survey(whole, t_list=[1000, 714, 0])
    (whole / "paths.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be understood"):
        survey(whole)


def test_paths_that_are_missing_need_a_teacher(whole: Path) -> None:
    OdeCache(whole, ()).path(3).unlink()
    assert survey(whole).work.missing == ((3,),)
    with pytest.raises(ConfigError, match=r"1 of 6 paths are missing.*no teacher"):
        survey(whole, has_teacher=False)


def test_all_states_serve_other_lists(tmp_path: Path) -> None:
    survey(tmp_path, keep_all_states=True)
    assert len(read_manifest(tmp_path).timesteps) == 6
    found = survey(tmp_path, t_list=[961, 714, 500, 0]).work
    assert found.wanted == pytest.approx((961.538, 714.286, 500))
    assert len(found.cached) == 6


def places(**changes: Any) -> list[int]:
    given = {"teacher_path_cache": "none", **changes}
    options = parse_options(KDMethod.Options, given, "method")
    plugins = {name: cases.make_plugin(flow_shift=5.0) for name in ("student", "teacher")}
    KDMethod.check(options, plugins)
    return options.places(plugins)


def test_the_list_of_steps_is_on_the_teachers_grid(tmp_path: Path) -> None:
    """48 steps at shift 5, before anything is made."""
    assert places(t_list=[1000, 937, 833, 625, 0]) == [0, 12, 24, 36]
    assert places(t_list=[995, 937.5, 833.3, 625, 0]) == [1, 12, 24, 36]
    warped = {"dmd_denoising_steps": [1000, 750, 500, 250], "warp_denoising_step": True}
    assert places(**warped) == [0, 12, 24, 36]
    shipped = [999, 937, 833, 624, 0]
    with pytest.raises(ConfigError) as error:
        places(t_list=shipped)
    assert "method.t_list: 999, 624: none of the teacher's 48 timesteps" in str(error.value)
    assert "nearest are [1000, 937.5, 833.333, 625]" in str(error.value)
    assert places(t_list=shipped, snap=True) == [0, 12, 24, 36]
    with pytest.raises(ConfigError, match="nearest to the same timestep"):
        places(t_list=[1000, 999, 0], snap=True)
    with pytest.raises(ConfigError, match="4 steps"):
        places(t_list=[1000, 937, 833, 625, 0], student_sample_steps=5)


def test_experts(tmp_path: Path) -> None:
    def check(student: str, *teachers: str, t_list: list[float]) -> None:
        names = dict(zip(("teacher", "teacher_2"), teachers, strict=False))
        plugins = {
            role: cases.make_plugin(expert=expert, boundary_ratio=0.875, flow_shift=5.0)
            for role, expert in {"student": student, **names}.items()
        }
        given = {"teacher_path_cache": str(tmp_path), "t_list": t_list}
        KDMethod.check(parse_options(KDMethod.Options, given, "method"), plugins)

    check("high", "high", "low", t_list=[1000, 937, 0])
    check("low", "high", "low", t_list=[833, 625, 0])
    with pytest.raises(ConfigError, match="outside"):
        check("low", "high", "low", t_list=[1000, 625, 0])
    with pytest.raises(ConfigError, match="no teacher serves timestep 875 "):
        check("high", "high", t_list=[1000, 937, 0])


def solve_by_experts(given: list[cases.Weights], folder: Path) -> tuple[Tensor, Tensor]:
    """In a rank: a path of two networks, and the same by a plain loop over them."""
    roles = {}
    for name, expert, tensors in (("teacher", "high", given[0]), ("teacher_2", "low", given[1])):
        roles[name] = cases.make_role(tensors, SINGLE, name=name, trainable=False)
        roles[name].plugin = cases.make_plugin(
            expert=expert, boundary_ratio=0.875, flow_shift=kd.SHIFT
        )
    changes = {"teacher_guidance_scale_2": 2.0, "teacher_path_cache": str(folder)}
    options = parse_options(KDMethod.Options, {**OPTIONS, **changes}, "method")
    samples = kd.TextSamples(dmd2.LATENTS)
    plan = ode_paths.PathPlan((1000.0,), (1000.0,), ())
    maker = ode_paths.PathMaker(
        options, list(roles.values()), Streams(dmd2.SEED), kd.facts(samples), plan
    )
    batch = samples.batch_of([3, 4])
    (x,), end = maker.solve(batch)
    grid = options.grid({"student": roles["teacher"].plugin})
    for sigma, below in itertools.pairwise(grid):
        name, scale = ("teacher", 3.0) if sigma > 0.875 else ("teacher_2", 2.0)
        request = Request(x, torch.full((2,), 1000 * sigma), batch.condition)
        cond, uncond = roles[name].predict([request, maker.unconditional(request)])
        x = x + (below - sigma) * (uncond + scale * (cond - uncond))
    return end, x


def test_a_path_of_two_experts(tmp_path: Path) -> None:
    ((found, wanted),) = run_ranks(1, solve_by_experts, weights(), tmp_path)
    assert cases.relative(found, wanted) < 1e-6


def test_a_path_belongs_to_its_sample(whole: Path) -> None:
    method_options = {**OPTIONS, "teacher_path_cache": str(whole)}
    reader = ode_paths.PathReader(
        parse_options(KDMethod.Options, method_options, "method"), survey(whole).work
    )
    batch = kd.TextSamples(dmd2.LATENTS).batch_of([2, 5])
    states, ends = reader.read(batch)
    assert states.shape == (2, 3, *dmd2.LATENTS) and ends.shape == (2, *dmd2.LATENTS)
    dropped = replace(batch, captions=("", ""))
    assert torch.equal(reader.read(dropped)[0], states)
    with pytest.raises(DataError, match=r"is of 'sample2'.*is 'other'"):
        reader.read(replace(batch, ids=("other", "sample5")))
    with pytest.raises(DataError, match="another caption"):
        reader.read(replace(batch, captions=("another caption", "sample5")))
    with pytest.raises(DataError, match=r"00000077.*is missing"):
        reader.read(replace(batch, keys=(77, 5)))


def test_each_frame_comes_from_its_own_state() -> None:
    states: Tensor = torch.arange(2 * 3 * 4).view(2, 3, 1, 4, 1, 1).float()
    place = torch.tensor([[0, 0, 2, 2], [1, 2, 0, 1]])
    found = states_at(states, place)[:, 0, :, 0, 0]
    assert found.tolist() == [[0, 1, 10, 11], [16, 21, 14, 19]]
    assert torch.equal(states_at(states, torch.tensor([1, 2])), states[[0, 1], [1, 2]])


def test_chunks_of_a_bidirectional_student() -> None:
    assert frame_chunks(cases.make_plugin(), None, 7) == [range(3), range(3, 6), range(6, 7)]
    assert frame_chunks(cases.make_plugin(), 4, 4) == [range(4)]


def test_chunks_are_the_causal_networks_blocks(tmp_path: Path) -> None:
    plugins = {"student": wan_causal_cases.make_plugin(Rule(2))}
    given = {"teacher_path_cache": str(tmp_path), "t_list": [1000, 0], "chunk_size": 3}
    with pytest.raises(ConfigError, match="blocks of 2 frames"):
        KDCausalMethod.check(parse_options(KDCausalMethod.Options, given, "method"), plugins)


def test_samples_are_rounded_once(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    cache = OdeCache(tmp_path, [1000.0, 500.0])
    states, end = torch.randn(2, 3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    cache.write(PathSample(9, "id", "a \u2603 caption", states, end), "bf16")
    found = cache.read(9, [500.0])
    assert (found.id, found.caption) == ("id", "a \u2603 caption")
    assert torch.equal(found.states_KCTHW, states[1:].bfloat16().float())
    assert torch.equal(found.x0_CTHW, end.bfloat16().float())
    assert cache.missing([8, 9]) == [8] == cache.missing([8, 9], verify=True)
