"""What machine is this?  Device, precision, memory, processor: facts for the loop and for the first line of a log."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys

import torch

from .config import SettingError


def accelerator() -> torch.device | None:
    """The accelerator that torch sees here, or None."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """"auto": the accelerator if there is one, else the CPU.  Any other name is taken at its word.

    Under torchrun each process takes the accelerator of its local rank.  ValueError for a device that is unknown or not
    here.
    """
    found = accelerator()
    here = "cpu" if found is None else f"{found.type}, cpu"
    if name == "auto":
        device = found or torch.device("cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise SettingError(f"{{device}} {name!r} is not known; here there are {here} (or auto).") from None
    if device.type != "cpu" and (found is None or found.type != device.type):
        raise SettingError(f"{{device}} {name!r} is not here: torch {torch.__version__} sees {here}. Write {{device}} auto.")
    if device.type not in ("cpu", "mps"):
        index = device.index if device.index is not None else local_rank or 0
        if index >= torch.accelerator.device_count():
            raise SettingError(f"{{device}} {device.type}:{index} is not here; there are {torch.accelerator.device_count()}.")
        device = torch.device(device.type, index)
        torch.accelerator.set_device_index(index)
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32.

    "auto" takes bfloat16 where it pays: CUDA devices with bfloat16 units.  On CPUs without them and on MPS it is slower
    than float32, so there it must be asked for.  Weights stay float32 everywhere.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None


def autocast(device: torch.device, dtype: torch.dtype | None):
    """A context in which matrix products run in `dtype`; with None it does nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Begin `peak_memory_mb` anew, where that can be done: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory held so far, in MiB: by CUDA's allocator, or by the process since it began (resident).

    MPS keeps no peak: what its driver holds now.  None where nobody can tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_limit(device: torch.device) -> int | None:
    """Bytes of memory that a process can have there: the device's, or the least of the machine's, the container's and the
    process's own limit.  None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):                  # no sysconf on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError), open(path, encoding="ascii") as file:    # "max": no limit
            limits.append(int(file.read()))
    with contextlib.suppress(ImportError):
        import resource
        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [soft] if soft != resource.RLIM_INFINITY else []
    return min(limits, default=None)


def processor(device: torch.device) -> str:
    """The name of what does the work: the GPU's, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        if sys.platform == "darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True,
                                  timeout=5).stdout.strip() or name
        elif sys.platform.startswith("linux"):
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"
