"""Right arms are timed and the others named; peers are called by their interfaces."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import arms, clock, fused, gather, peers, suite, table, trial
from benchmarks.kernels.arms import Arm, Call
from benchmarks.kernels.clock import NOT_MEASURED, Options
from benchmarks.kernels.problem import Problem, make
from benchmarks.kernels.rows import Row
from benchmarks.measure import Timing
from tests.benchmarks import fakes

CPU = torch.device("cpu")
ONE_THREAD = pytest.mark.skipif(
    torch.get_num_threads() != 1, reason="with more threads the wall counts and nothing forks"
)
TINY = Row("tiny", (5, 6, 10), 2, 3, also_all=True)


def options(skip: dict[str, str] | None = None) -> Options:
    return Options(0.0, skip or {}, lambda name: None)


def sparse(problem: Problem) -> Call:
    return arms.sparse(problem, backend="reference")


def slightly_off(problem: Problem) -> Call:
    right = sparse(problem)
    return Call(lambda: 1.001 * right.run(), right.leaves)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def breaks(problem: Problem) -> Call:
    raise RuntimeError("no kernel image\nis available")


def bad_gradient(problem: Problem) -> Call:
    right = sparse(problem)
    return Call(lambda: _Scaled.apply(right.run()), right.leaves)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Any]]:
    """A row with arms of every fate; the ceilings are small, to be quick."""
    given = (
        *arms.ours("cpu", TINY),
        Arm("SDPA", "dense", "bhsd", arms.sdpa),
        Arm("right", "sparse", "slots", sparse, no_backward="it has none"),
        Arm("off", "sparse", "slots", slightly_off),
        Arm("bad gradient", "sparse", "slots", bad_gradient),
        Arm("breaks", "sparse", "slots", breaks),
        Arm("absent", "sparse", "slots", breaks, needs=("no_such_package.part",)),
        Arm("unfit", "sparse", "slots", breaks, lacks=lambda row, device: "it is Tuesday"),
        Arm("skipped", "sparse", "slots", breaks),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "arms_of", lambda row, device: given)
        patch.setitem(clock._COPY, "cpu", 1 << 20)
        patch.setitem(clock._PRODUCT, "cpu", 64)
        yield suite.measure(TINY, "random", CPU, options({"skipped": "not measured: it hung"}))


@pytest.fixture
def record(measured: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(measured)


def test_every_arm_has_its_fate(record: dict[str, Any]) -> None:
    found = {name: arm["status"] for name, arm in record["arms"].items()}
    measured = {"cpu", "cpu, all blocks", "cpu, whole layer", "SDPA", "right"}
    assert {name for name, status in found.items() if status == "measured"} == measured
    assert found["absent"] == "not installed: no_such_package.part"
    assert found["unfit"] == "not measured: it is Tuesday"
    assert found["breaks"] == "not measured: RuntimeError: no kernel image"
    assert found["skipped"] == "not measured: it hung"
    assert found["off"].startswith("wrong, so not measured: out 1.0e-03")
    assert found["bad gradient"].startswith("wrong, so not measured: dq 1.0e-02")
    assert "out" not in found["bad gradient"]
    for name, arm in record["arms"].items():
        assert ("forward" in arm) == (found[name] == "measured")


def test_figures_follow_from_the_times(record: dict[str, Any]) -> None:
    row, found = TINY, record["arms"]
    ours, dense, layer = (found[n]["forward"] for n in ("cpu", "SDPA", "cpu, whole layer"))
    assert ours["flop_per_s_blocks"] == pytest.approx(row.flop / ours["ms"] * 1e3)
    assert dense["flop_per_s_tokens"] == pytest.approx(row.dense_flop / dense["ms"] * 1e3)
    back = found["cpu"]["backward"]
    assert back["flop_per_s_blocks"] == pytest.approx(2.5 * row.flop / back["ms"] * 1e3)
    ceiling = record["ceiling"]["flop_per_s"]
    assert ours["share_of_ceiling"] == pytest.approx(ours["flop_per_s_tokens"] / ceiling)
    assert ours["times"]["SDPA"] == pytest.approx(dense["ms"] / ours["ms"])
    assert layer["over_fine"] == pytest.approx(layer["ms"] / record["parts"]["forward_ms"]["fine"])
    assert found["cpu, whole layer"]["backward"]["over_fine"] > 0
    assert "over_fine" not in ours
    assert set(ours["times"]) == {"SDPA", "right"}
    assert set(layer["times"]) == {"SDPA"}
    assert found["right"]["backward"] == NOT_MEASURED
    assert "times" not in dense


def test_a_layer_is_taken_apart(record: dict[str, Any]) -> None:
    known, found = record["parts"], record["arms"]
    assert known["backend"] == "cpu"
    told = known["forward_ms"]
    assert set(told) == {"tiling", "means", "coarse", "untiling", "fine", "whole"}
    assert told["whole"] == found["cpu, whole layer"]["forward"]["ms"]
    assert "Forward of a layer on cpu, ms: " in table.attention([record], "cpu")
    record["parts"] = None
    assert "Parts of a layer: not measured." in table.attention([record], "cpu")


@ONE_THREAD
def test_memory_is_that_of_the_arm(record: dict[str, Any]) -> None:
    assert record["clock"] == "process"
    for name in ("cpu", "SDPA"):
        peak = record["arms"][name]["peak_mb"]
        assert 0 < peak["forward"] <= peak["both"] < 500


def test_a_table_says_it_all(record: dict[str, Any]) -> None:
    text = table.attention([record], "cpu")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    for words in (
        "not installed: no_such_package.part",
        "not measured: it is Tuesday",
        "not measured: it has none",
        "wrong, so not measured",
        "SDPA takes",
    ):
        assert words in text
    assert suite.wrong([record]) == []
    record["arms"]["cpu"]["status"] = "wrong, so not measured: out 1 > 2"
    assert suite.wrong([record]) == ["tiny: cpu: wrong, so not measured: out 1 > 2"]


def test_rows_that_were_not_measured_say_so() -> None:
    record = suite.describe(TINY, "random") | {"status": NOT_MEASURED}
    assert "\n\nnot measured\n" in table.attention([record], "cuda")


def peer(name: str) -> Arm:
    return next(arm for arm in peers.for_gpu(TINY) if arm.name == name)


def install_all(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {"block_sparse_attn_triton": fakes.fastvideo_operator}
    operators["block_sparse_attn_sm90"] = fakes.fastvideo_operator
    fakes.install(monkeypatch, "fastvideo_kernel", video_sparse_attn=fakes.video_sparse_attn)
    fakes.install(monkeypatch, "fastvideo_kernel.block_sparse_attn", **operators)
    fakes.install(
        monkeypatch,
        "fastvideo_kernel.triton_kernels.fused_compress_topk",
        fused_block_mean=fakes.fused_block_mean,
        fused_topk_mask=fakes.fused_topk_mask,
    )
    fakes.install(monkeypatch, "cudnn", BSA=fakes.BSA)
    for name in ("flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"):
        fakes.install(monkeypatch, name, flash_attn_func=fakes.flash_attn_func)


@pytest.mark.parametrize(
    "name",
    [
        "fastvideo Triton",
        "fastvideo TK",
        "fastvideo, whole layer",
        "cuDNN BSA",
        "flash-attn 2",
        "flash-attn 3",
        "flash-attn 4",
    ],
)
def test_a_peer_is_called_as_it_is_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_all(monkeypatch)
    problem = make(TINY, "random", CPU, torch.float32)
    arm = peer(name)
    told = trial.attempt(arm, arm.build(problem), problem, trial.Judge(problem))
    assert told.complaint is None, told.errors
    assert {"out", "dq", "dk", "dv"} <= set(told.errors)


def test_peers_that_are_not_here_are_named() -> None:
    found = {arm.name: arm.absence(TINY, CPU) for arm in peers.for_gpu(TINY)}
    assert found["cuda"] is not None and found["cuda"].startswith("not measured: ")
    for name, module in {"fastvideo TK": "fastvideo_kernel", "cuDNN BSA": "cudnn"}.items():
        if arms.why_not_there(module) is not None:
            assert found[name] == f"not installed: {module}"
    assert set(found) >= {
        *("cuda", "cuda, fast", "cuda, all blocks", "cuda, whole layer"),
        *("triton", "triton, all blocks", "triton, whole layer"),
        *("SDPA cuDNN", "SDPA flash", "FlexAttention", "flash-attn 2", "flash-attn 3"),
    }


def test_the_mask_of_tokens_is_only_for_short_rows() -> None:
    by_name = {arm.name: arm for arm in peers.for_cpu(TINY)}
    assert by_name["SDPA, mask"].absence(TINY, CPU) is None
    long = Row("long", (8, 32, 32), 1, 16)
    assert "8192 x 8192" in str(by_name["SDPA, mask"].absence(long, CPU))


def test_the_gather_probe_says_why_it_does_not_run() -> None:
    found = gather.measure(256, "random", CPU)
    assert found["status"].startswith("not measured: ")
    assert "| 8 MiB | random | not measured: " in table.gathered([found])


def test_a_fork_tells_its_error() -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("what happened")

    with pytest.raises(RuntimeError, match="ValueError: what happened"):
        trial.in_own_process(fails)
    assert trial.in_own_process(lambda: {"a": [1, 2.5]}) == {"a": [1, 2.5]}


def test_fused_operations_are_measured_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    base = dict(fused.cases("gated_residual", CPU)["1,024 tokens"])
    small = {"small": {**base, "S": 8, "D": 16}}
    monkeypatch.setattr(fused, "cases", lambda name, device: small)
    found = fused.measure("gated_residual", "small", CPU, options())
    cell = found["arms"]["megagen"]["backward"]
    ceiling = found["ceiling"]["copy_bytes_per_s"]
    assert cell["share_of_copy"] == pytest.approx(cell["bytes_per_s"] / ceiling)
    assert cell["times_ours"] == 1
    assert found["arms"]["compiled"]["status"].startswith("not measured")
    rows = [line for line in table.fused([found]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1

    monkeypatch.setattr(fused, "functions", lambda spec, device: {"megagen": _off(spec.function)})
    found = fused.measure("gated_residual", "small", CPU, options())
    assert found["arms"]["megagen"]["status"].startswith("wrong, so not measured")
    assert suite.wrong([found])[0].startswith("gated_residual, small: megagen: wrong")


def _off(function: Any) -> Any:
    def called(**given: Any) -> Tensor:
        return partial(torch.mul, 1.001)(function(**given))

    return called


@ONE_THREAD
def test_timings_are_best_on_a_cpu() -> None:
    its = clock.clock_of(CPU)
    best = its.of([Timing(3.0, 5.0), Timing(2.0, 9.0)])
    assert (best.process, best.wall) == (2.0, 5.0)
    assert its.seconds(best) == 2.0


def test_arms_take_turns() -> None:
    ran: list[str] = []
    calls = {name: partial(ran.append, name) for name in "ab"}
    _, rounds = clock.take_turns(calls, clock.CpuClock(), least=3, most=9, seconds=0)
    assert (rounds, ran) == (3, list("aaabbb" * 3))
    announced: list[str] = []
    limits: dict[str, Any] = {"least": 1, "most": 2, "seconds": 1e9}
    _, rounds = clock.take_turns(calls, clock.CpuClock(), announce=announced.append, **limits)
    assert (rounds, announced) == (2, list("abab"))


def test_an_error_is_one_line_with_its_kind_once() -> None:
    assert arms.first_line(ValueError("a\nb")) == "ValueError: a"
    assert arms.first_line(RuntimeError("ValueError: a")) == "ValueError: a"
    assert arms.first_line(AssertionError()) == "AssertionError"
