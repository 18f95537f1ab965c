"""What recording attention costs: time beside one dense prefill, extra memory, and how exact it is.

Usage: python benchmarks/probes.py [--model smollm2] [--context 8192] [--repeats 3] [--out benchmarks/results/probes.json]

Time: the model's dense prefill by transformers' own sdpa (no language-model head, no cache), and the same prefill with all probes
recording, in turns; the ratio of each pair is taken and the median reported. The prefill is part of both.
Memory: in two fresh processes the peaks that the two add to the loaded model; the difference is what recording adds. Beside it
stands what ``output_attentions=True`` would have to hold.
Exactness: at 1024 tokens, every figure against its dense definition on the weights of the model's eager attention in float64.
Page: with Chromium, how long the report of ``foveal inspect`` takes from navigation to its load event, all its drawing done.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.memory import PeakMemory
from foveal.bench.results import load_average, write_result
from foveal.data import text
from foveal.hf.load import LoadedModel, load_model
from foveal.lens import record
from foveal.lens.probes import (
    Atlas,
    ChosenRows,
    Entropy,
    Influence,
    KeyValueNorms,
    LookBack,
    Mass,
    Received,
    SinkScore,
    TopEdges,
    WindowedDistance,
)
from foveal.lens.report import report_data, token_texts, write_report
from foveal.lens.survey import survey

MOST_TIME, MOST_MB, EXACT_TOKENS, MOST_ERROR, MOST_SECONDS = 2.0, 300.0, 1024, 1e-5, 2.0


def probes(context: int) -> dict[str, Any]:
    """Every probe of one dense text, with its default settings."""
    return {
        "entropy": Entropy(), "mass": Mass({"first": (0,), "four": (0, 1, 2, 3)}), "received": Received(), "sink_score": SinkScore(),
        "influence": Influence(), "influence_10_50": Influence(10, 50), "lookback": LookBack(), "windowed": WindowedDistance(),
        "edges": TopEdges(), "rows": ChosenRows((context // 2,)), "atlas": Atlas(), "norms": KeyValueNorms(),
    }  # fmt: skip


def loaded(name: str, context: int) -> tuple[LoadedModel, Tensor]:
    model = load_model(name, dtype="float32", device="cpu")
    ids = text.tokens(model.tokenizer, text.load_text()).flatten()
    text.need(ids, context)
    return model, ids[None, :context]


def jobs(model: LoadedModel, ids: Tensor) -> dict[str, Callable[[], Any]]:
    body = model.model.base_model

    def dense() -> Any:
        with torch.inference_mode():
            return body(input_ids=ids, use_cache=False)

    def recorded() -> Any:
        with torch.inference_mode(), record(model.model, probes(ids.shape[1])) as rec:
            body(input_ids=ids, use_cache=False)
        return rec

    return {"dense": dense, "recorded": recorded}


def measure_time(model: LoadedModel, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Both in turns, after one small warm-up of each."""
    for job in jobs(model, ids[:, :256]).values():
        job()
    seconds: dict[str, list[float]] = {"dense": [], "recorded": []}
    todo = jobs(model, ids)
    for turn in range(repeats):
        for name in list(todo)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            todo[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{turn + 1}/{repeats} {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    ratios = [r / d for r, d in zip(seconds["recorded"], seconds["dense"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        **{f"{n}_s": s for n, s in seconds.items()},
        "ratios": ratios,
        "ratio": ratio,
        "target": MOST_TIME,
        "met": ratio <= MOST_TIME,
    }


def measure_memory(name: str, context: int) -> dict[str, Any]:
    """Peaks of both in processes of their own."""
    added = {}
    for job in ("dense", "recorded"):
        command = [sys.executable, __file__, "--child", job, "--model", name, "--context", str(context)]
        added[f"{job}_mb"] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    extra = added["recorded_mb"] - added["dense_mb"]
    return {**added, "extra_mb": extra, "target_mb": MOST_MB, "met": extra <= MOST_MB}


def measure_errors(model: LoadedModel, ids: Tensor) -> dict[str, float]:
    """Largest absolute difference from the dense definitions; distances relative to the largest distance."""
    n = ids.shape[1]
    net, found = model.model, dict[str, float]()
    with torch.inference_mode():
        before = net.config._attn_implementation
        net.set_attn_implementation("eager")
        with record(net, probes(n)) as rec:
            net.base_model(input_ids=ids, use_cache=False)
        names = ("entropy", "received", "lookback", "windowed", "influence", "mass")
        dense: dict[str, list[Tensor]] = {k: [] for k in names}
        away = (torch.arange(n)[:, None] - torch.arange(n)).double()
        out = net.base_model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        for w in out:
            w = w[0].double()
            dense["entropy"].append(-torch.special.xlogy(w, w).sum(-1))
            dense["received"].append(w.sum(-2))
            dense["lookback"].append((w * away).sum(-1))
            dense["windowed"].append((w * away.clamp(max=10)).sum(-1))
            later = w * (away >= 10)
            dense["influence"].append(later.sum(-2) / (n - torch.arange(n) - 10).clamp(min=1))
            dense["mass"].append(w[..., :1])
        net.set_attn_implementation(before)
        for name, parts in dense.items():
            want = torch.stack(parts)
            got = rec[name].values[..., :1] if name == "mass" else rec[name].values
            found[name] = float((got.double() - want).abs().max() / max(1.0, float(want.abs().max())))
    return found


def measure_page(model: LoadedModel, ids: Tensor) -> dict[str, Any] | None:
    """Seconds from navigation to the load event in headless Chromium; None without one."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        return None
    found = survey(model.model, ids)
    data = report_data(found, token_texts(model.tokenizer, ids[0]), {"model": model.name, "text": text.text_name()})
    tell = '<script>addEventListener("load", () => { document.title = "took " + performance.now(); });</script></body>'
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(data, page)
        size = page.stat().st_size
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", tell), encoding="utf-8")
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=5000",
        ]
        command = [chromium, *switches, f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri()]
        ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    took = re.search(r"<title>took ([\d.]+)</title>", ran.stdout)
    assert took, "the page never finished loading"
    seconds = float(took[1]) / 1000
    return {"seconds": seconds, "bytes": size, "target_s": MOST_SECONDS, "met": seconds <= MOST_SECONDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    parser.add_argument("--child", choices=("dense", "recorded"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, ids = loaded(args.model, args.context)
    if args.child:
        for job in jobs(model, ids[:, :256]).values():
            job()
        with PeakMemory() as peak:
            jobs(model, ids)[args.child]()
        print(json.dumps(peak.extra_mb))
        return
    before = load_average()
    config = model.model.config
    scores = config.num_hidden_layers * config.num_attention_heads * args.context**2 * 4 / 1e9
    measured = {"time": measure_time(model, ids, args.repeats)}
    errors = measure_errors(model, ids[:, : min(EXACT_TOKENS, args.context)])
    page = measure_page(model, ids)
    facts = {"name": model.name, "source": model.source, "fingerprint": model.fingerprint, "dtype": model.dtype}
    del model
    result = {
        "what": "all probes of foveal.lens.record together beside one dense prefill by transformers' sdpa",
        "model": facts, "text": text.text_name(), "context": args.context, "threads": torch.get_num_threads(), "load_before": before,
        "probes": list(probes(args.context)), **measured, "memory": measure_memory(args.model, args.context),
        "output_attentions_gb": scores,
        "errors": {"tokens": min(EXACT_TOKENS, args.context), "largest": errors, "target": MOST_ERROR, "met": max(errors.values()) <= MOST_ERROR},
        "page": page,
    }  # fmt: skip
    write_result(args.out, result)
    print(f"recorded / dense prefill: {measured['time']['ratio']:.2f} (target at most {MOST_TIME})")
    print(
        f"extra memory: {result['memory']['extra_mb']:.0f} MB (target at most {MOST_MB:.0f}); output_attentions: {scores:.0f} GB"
    )
    print(
        f"largest error at {EXACT_TOKENS} tokens: {max(errors.values()):.1e}; the report opens in {page and page['seconds']} s"
    )


if __name__ == "__main__":
    main()
