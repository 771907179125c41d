"""What the benchmarks say of the machine."""

import platform
from pathlib import Path


def cpu_model() -> str:
    """The processor's name; where the system does not give one, its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
