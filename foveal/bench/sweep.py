"""The benchmark of kernels: masks × lengths × head layouts × dtypes × directions, every implementation in turns with the others.

Conventions of LongCA-bench (arXiv 2510.17896): batch 1, self-attention, throughput from the exact number of visible pairs. What differs:
implementations take turns (so that whatever else the machine does hits all alike) instead of running one after the other, and every
output is compared with float64 before its time counts.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .implementations import Implementation, Prepared, choose
from .masks import SEED, MaskSpec
from .memory import PeakMemory
from .records import Records, Row
from .results import load_average, rounded
from .timing import Spread, interleaved
from .workload import BACKWARD, FORWARD, Heads, Truth, Work, tolerance, truth

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OK, WRONG, UNSUPPORTED, OOM = "ok", "wrong", "unsupported", "oom"
"""What became of an implementation in a case; only ``ok`` has a rate."""
FEWEST = 3
"""Turns at least, where as many are asked for."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        masks, lengths, heads, dtypes, directions: every combination is a case. impls: names; see ``implementations.choose``.
        device: where. draws: masks drawn of each family with chance in it. seed: of the masks and tensors.
        repeats: turns of each case at most. seconds: a case takes fewer turns (at least three) rather than longer than this.
        warmup: turns before these, beside the two calls that check the result and the memory.
    """

    masks: tuple[MaskSpec, ...]
    lengths: tuple[int, ...]
    heads: tuple[Heads, ...]
    dtypes: tuple[str, ...] = ("float32",)
    directions: tuple[str, ...] = (FORWARD,)
    impls: tuple[str, ...] = ("auto",)
    device: str = "cpu"
    draws: int = 1
    seed: int = SEED
    repeats: int = 5
    seconds: float = 20.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("masks", "lengths", "heads", "dtypes", "directions", "impls"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; expected at least one.")
        for name, low in (("draws", 1), ("repeats", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if not self.seconds > 0:
            raise ConfigError(f"seconds is {self.seconds}; expected a number above 0.")
        if min(self.lengths) < 1:
            raise ConfigError(f"lengths holds {min(self.lengths)}; expected at least 1 token.")
        for one in self.heads:
            if min(one.heads, one.kv_heads, one.dim) < 1 or one.heads % one.kv_heads:
                raise ConfigError(
                    f"a head layout is {one.heads} query heads, {one.kv_heads} key heads of {one.dim}; expected numbers of at least 1, "
                    "and query heads a multiple of key heads."
                )
        for name in self.dtypes:
            if name not in DTYPES:
                raise ConfigError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ConfigError(f"device is {self.device!r}; expected cpu, cuda or cuda:1.") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {self.device!r}, and torch sees no CUDA GPU here; use cpu.")

    def cases(self) -> Iterator[Case]:
        """Every case, the short ones first."""
        for length in self.lengths:
            for heads in self.heads:
                for dtype in self.dtypes:
                    for spec in self.masks:
                        for direction in self.directions:
                            for draw in range(self.draws if spec.random else 1):
                                yield Case(spec, length, heads, dtype, direction, draw)

    def settings(self) -> dict[str, Any]:
        """What all lines of a result file share."""
        fixed = {name: getattr(self, name) for name in ("device", "seed", "repeats", "seconds", "warmup")}
        return {**fixed, "batch": 1}


@dataclass(frozen=True)
class Case:
    """One problem that all implementations get."""

    spec: MaskSpec
    length: int
    heads: Heads
    dtype: str
    direction: str
    draw: int

    def row(self, impl: str) -> Row:
        """The identity of a line."""
        return {
            "mask": str(self.spec), "length": self.length, "heads": self.heads.heads, "kv_heads": self.heads.kv_heads,
            "head_dim": self.heads.dim, "dtype": self.dtype, "direction": self.direction, "draw": self.draw, "impl": impl,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.spec}, {self.length} tokens, heads {self.heads}, {self.dtype}, {self.direction}"


def run_sweep(sweep: Sweep, folder: Path | str, report: Report = lambda *_: None) -> tuple[Records, dict[str, str]]:
    """Measure what the folder's result file does not have yet.

    Args:
        sweep: what. folder: where the result file is; made with the first finished case. report: called with what happens now.

    Returns:
        The file, and for every implementation asked for that cannot run on this machine the reason.

    Raises:
        ConfigError: an unknown implementation. DataError: a file that does not fit; see :class:`~foveal.bench.records.Records`.
    """
    chosen, absent = choose(sweep.impls, sweep.device)
    records = Records(Path(folder), sweep.settings())
    cases = list(sweep.cases())
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before every measurement of memory
    try:
        for number, case in enumerate(cases):
            todo = [one for one in chosen if not records.has(case.row(one.name))]
            if todo:
                report(str(case), number, len(cases))
                records.put(measure_case(case, todo, sweep))
    finally:
        gc.unfreeze()
    report("done", len(cases), len(cases))
    return records, absent


def measure_case(case: Case, implementations: list[Implementation], sweep: Sweep) -> list[Row]:
    """The lines of one case: each implementation is asked, checked against float64, and timed in turns with the others that are right."""
    device = torch.device(sweep.device)
    try:
        mask = case.spec.draw(case.length, case.heads.kv_heads, sweep.seed, case.draw)
    except ConfigError as error:
        return [{**case.row(one.name), "status": UNSUPPORTED, "why": str(error)} for one in implementations]
    work = Work.make(mask, case.heads, DTYPES[case.dtype], case.direction, device, sweep.seed)
    right = truth(work, sweep.seed)
    facts = {
        "area": work.area,
        "density": work.area / (case.heads.heads * case.length**2),
        "flops": work.flops,
        "drawn": mask.facts(),
        "load": load_average(),
    }
    lines: dict[str, Row] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for one in implementations:
        lines[one.name] = {**case.row(one.name), **facts}
        found, job = _tried(one, work, right)
        lines[one.name].update(found)
        if job is not None:
            jobs[one.name] = job
    if jobs:
        turn = sum(lines[name]["first_s"] for name in jobs)
        repeats = min(sweep.repeats, max(FEWEST, int(sweep.seconds / max(turn, 1e-9))))
        try:
            timed = interleaved(jobs, repeats, warmup=sweep.warmup, device=device)
        except Exception as error:  # together they may need more memory than each by itself
            for name in jobs:
                lines[name].update(_failure(error))
            timed = {}
        for name, seconds in timed.items():
            lines[name]["seconds"] = Spread.of(seconds).json()
            lines[name]["tflops"] = work.flops / statistics.median(seconds) / 1e12
            lines[name]["beside"] = sorted(jobs)
    return [rounded(line, 6) for line in lines.values()]


def _tried(one: Implementation, work: Work, right: Truth) -> tuple[Row, Callable[[], Any] | None]:
    """What a first and a second call tell, and the call to time when the result is right."""
    why = one.refusal(work)
    if why is not None:
        return {"status": UNSUPPORTED, "why": why}, None
    try:
        return _checked(one, work, right)
    except Exception as error:
        return _failure(error), None


def _failure(error: Exception) -> Row:
    """What a line says of an implementation that broke off: out of memory, or not able to run this."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"status": OOM, "why": text or "out of memory"}
    return {"status": UNSUPPORTED, "why": f"{type(error).__name__}: {text}"}


def _checked(one: Implementation, work: Work, right: Truth) -> tuple[Row, Callable[[], Any] | None]:
    began = time.perf_counter()
    prepared = one.prepare(work)
    row: Row = {"metadata_mb": prepared.metadata / 2**20, "prepare_s": time.perf_counter() - began}
    if prepared.note:
        row["note"] = prepared.note
    own = work.heads_last() if prepared.heads_last else work
    backward = work.direction == BACKWARD
    with torch.set_grad_enabled(backward):
        out = prepared.run(own.q, own.k, own.v)
        row["error"] = right.error(out)
        worst = row["error"]
        if backward:
            assert right.upstream is not None
            row["grad_error"] = right.grad_error(torch.autograd.grad(out, (own.q, own.k, own.v), right.upstream))
            worst = max(worst, row["grad_error"])
        del out
        limit = tolerance(work.q)
        if not worst <= limit:
            why = f"differs from float64 by {worst:.2g} of the largest value; at most {limit:g} counts as right"
            finite = {k: v if math.isfinite(v) else None for k, v in row.items() if k.endswith("error")}
            return {**row, **finite, "status": WRONG, "why": why}, None
        began = time.perf_counter()
        with PeakMemory(work.q.device) as memory:
            _once(prepared, own)
        row.update(status=OK, peak_mb=memory.extra_mb, first_s=time.perf_counter() - began)
        return row, _job(prepared, own)


def _once(prepared: Prepared, work: Work) -> None:
    """One call, with its backward pass where that is asked for; nothing of it is kept."""
    out = prepared.run(work.q, work.k, work.v)
    if work.direction == BACKWARD:
        torch.autograd.grad(out, (work.q, work.k, work.v), work.upstream)


def _job(prepared: Prepared, work: Work) -> Callable[[], Any]:
    """What is timed: the forward pass without gradients, or the backward pass alone over a graph that is kept."""
    leaves = (work.q, work.k, work.v)
    if work.direction == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return prepared.run(*leaves)

        return forward
    out = prepared.run(*leaves)
    return lambda: torch.autograd.grad(out, leaves, work.upstream, retain_graph=True)
