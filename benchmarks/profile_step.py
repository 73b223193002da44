#!/usr/bin/env python3
"""Where the time of our training step goes on the CPU: shares by part, and how fast the large matrix products are.

usage: profile_step.py MODEL --data hh.jsonl[.gz] [--n 2] [--prompts 8] [--budget 512] [--threads 2]
       as train_step.py, whose step it is; one step warms up, one is profiled.
"""

import time
from collections import Counter
from typing import Any

from peak import peak_of_own_shapes
from train_step import arguments
from ways import ours

# Parts by the function that an operation is called in, the outermost first.
_INSIDE = {
    "attention": ("_Tiled", "_TiledBackward"),
    "vocabulary: log-softmax and its gradient": ("_TokenLogprobs", "_TokenLogprobsBackward"),
    "RMSNorm": ("RmsNorm", "RmsNormBackward"),
    "gated activations": ("SwigluProjected", "SwigluProjectedBackward", "Swiglu", "SwigluBackward"),
    "clipping": ("clipping",),
    "AdamW": ("Optimizer.step#AdamW.step", "aten::_fused_adamw_"),
}
_PRODUCTS, _REST = "products with weight matrices", "rotary positions, residuals and the rest"
_MATRIX = ("aten::mm", "aten::addmm", "aten::addmm_")


def part_of(event: Any) -> str:
    """The part that an operation of the profile belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    inside = [part for name in names for part, functions in _INSIDE.items() if name in functions]
    if "attention" not in inside and names[0] in _MATRIX:
        return _PRODUCTS
    return inside[-1] if inside else _REST


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.set_defaults(n=2, budget=512)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("--device: this profile is of the CPU")
    import torch
    from torch.profiler import ProfilerActivity, profile

    step, work = ours(args)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    shares: Counter[str] = Counter()
    for event in found.events():
        shares[part_of(event)] += event.self_cpu_time_total / 1e6
    share = min(1.0, args.budget / work["tokens"])
    rows = (max(1, int(work[name] * share)) for name in ("tokens", "positions"))
    peak = peak_of_own_shapes(args.model, *rows, args.device, args.cpu_time)
    print(
        f"{args.prompts} prompts, {args.n} candidates, {args.threads} threads, PyTorch {torch.__version__}: "
        f"{seconds:.2f} s, {work['flops'] / 1e9:.0f} GFLOP, {work['flops'] / seconds / peak:.2f} of the peak of "
        f"{peak / 1e9:.0f} GFLOP/s"
    )
    for part, taken in shares.most_common():
        print(f"{taken / seconds:6.1%}  {part}")
    print(f"{1 - sum(shares.values()) / seconds:6.1%}  between operations")
    products = work["flops"] - work["attention"]
    print(
        f"products with weight matrices: {products / work['flops']:.1%} of the operations, at "
        f"{products / shares[_PRODUCTS] / 1e9:.0f} GFLOP/s; attention: {work['attention'] / work['flops']:.1%}, at "
        f"{work['attention'] / shares['attention'] / 1e9:.0f} GFLOP/s of what tokens have to see"
    )


if __name__ == "__main__":
    main()
