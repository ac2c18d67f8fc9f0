"""The first run of an arm on a row: is it right, and how much memory does it take?

Nothing is timed that was not held to ``exact`` here, outputs and gradients. On a CPU with one
thread the run has a process of its own, whose resident memory tells the peak; a GPU's allocator
counts its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import exact
from benchmarks.kernels.arms import Arm, Call
from benchmarks.kernels.problem import Problem
from benchmarks.measure import reset_peak, resident_mb

_LONGEST = 600
_MIB = 1 << 20


@dataclass(frozen=True)
class Trial:
    """What the first run told.

    Args:
        errors: of ``out`` and gradients, the largest of the sampled heads; a layer's also
            ``selection``.
        complaint: what is beyond its tolerance; None: nothing.
        peak_mb: memory beyond the inputs, of a forward that keeps what its backward needs, and of
            both; None: not measured.
    """

    errors: dict[str, float]
    complaint: str | None
    peak_mb: dict[str, float] | None


class Judge:
    """The exact results of one row, each computed when an arm first needs it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._known: dict[tuple[str, int], exact.Result] = {}
        self._samples: dict[str, exact.Sample] = {}

    def sample(self, kind: str) -> exact.Sample:
        """The part that an arm of this kind is judged by."""
        kind = _rule(kind)
        if kind not in self._samples:
            width = (self._problem.every if kind == "dense" else self._problem.index).idx_BHqM
            self._samples[kind] = exact.sample(self._problem, 64 * width.size(-1))
        return self._samples[kind]

    def wanted(self, kind: str, head: int) -> exact.Result:
        """What comes out of the fine stage, or of dense attention."""
        kind = _rule(kind)
        if (kind, head) not in self._known:
            index = self._problem.every if kind == "dense" else self._problem.index
            self._known[kind, head] = exact.fine(self._problem, index, self.sample(kind), head)
        return self._known[kind, head]

    def errors(self, arm: Arm, call: Call, found: dict[str, Tensor]) -> dict[str, float]:
        """The largest of each over the sampled heads."""
        some, worst = self.sample(arm.kind), dict[str, float]()
        for head in some.heads:
            if arm.kind == "layer":
                assert call.index is not None
                wanted = exact.layer(self._problem, call.index, some, head)
                one = {"selection": exact.selection_error(self._problem, call.index, head)}
            else:
                wanted, one = self.wanted(arm.kind, head), {}
            one |= exact.errors(self._problem, arm.order, found, wanted, some, head)
            worst = {name: max(worst.get(name, 0.0), error) for name, error in one.items()}
        return worst


def _rule(kind: str) -> str:
    """All blocks is dense attention, and layers have lists as long as the row's."""
    return {"all": "dense", "layer": "sparse"}.get(kind, kind)


def attempt(arm: Arm, call: Call, problem: Problem, judge: Judge) -> Trial:
    """Run an arm once, forward and backward, and judge it."""
    grad = problem.ordered(judge.sample(arm.kind).grad, arm.order)
    if arm.kind != "layer":
        for head in judge.sample(arm.kind).heads:
            judge.wanted(arm.kind, head)  # here, so that a process of its own inherits it

    def run() -> dict[str, Any]:
        peaks = _Peaks(problem.device)
        found = _once(arm, call, grad, peaks)
        return {"errors": judge.errors(arm, call, found), "peak_mb": peaks.found or None}

    is_alone = problem.device.type == "cpu" and torch.get_num_threads() == 1
    found = in_own_process(run) if is_alone else run()
    peak_mb = found["peak_mb"] if is_alone or problem.device.type == "cuda" else None
    problem_dtype = problem.q.dtype
    return Trial(found["errors"], exact.complaint(found["errors"], problem_dtype), peak_mb)


def _once(arm: Arm, call: Call, grad: Tensor, peaks: _Peaks) -> dict[str, Tensor]:
    with torch.set_grad_enabled(arm.no_backward is None):
        peaks.begin()
        out = call.run()
        peaks.note("forward")
        if arm.no_backward is not None:
            return {"out": out}
        grads = torch.autograd.grad(out, call.leaves, grad)
        peaks.note("both")
    return {"out": out.detach(), **dict(zip(call.names, grads, strict=True))}


class _Peaks:
    """Memory beyond what there was at ``begin``, in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, float] = {}
        self._device, self._before = device, 0.0

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device) / _MIB
            return
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not be found again
        reset_peak()
        self._before = resident_mb("VmRSS")

    def note(self, name: str) -> None:
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device) / _MIB
        else:
            now = resident_mb("VmHWM")
        self.found[name] = now - self._before


def in_own_process(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` gives (JSON's types) in a fork of this process, which must have one thread.

    Raises:
        RuntimeError: it failed, or ran longer than ten minutes; the message says which.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(_LONGEST)
        try:
            text = json.dumps({"found": run()})
        except BaseException as error:  # a child must end here whatever happens
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        with os.fdopen(writer, "w") as stream:
            stream.write(text)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if not said:
        raise RuntimeError(f"the process of its own ended with {os.waitstatus_to_exitcode(status)}")
    told = json.loads(said)
    if "error" in told:
        raise RuntimeError(told["error"])
    found: dict[str, Any] = told["found"]
    return found
