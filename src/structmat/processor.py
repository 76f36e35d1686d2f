"""What the processor of this machine is called."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """As people call it."""
    return _facts().get("model name") or _unknown()


@cache
def processor_generation() -> str:
    """Its name with family, model and stepping: cloud machines of several generations may share a name."""
    return " ".join(_facts().values()) or _unknown()


def _facts() -> dict[str, str]:
    """Of the first core, in the order of the system's table; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.partition("\n\n")[0]
    pairs = (line.partition(":")[::2] for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, value in pairs}
    return {key: value for key, value in facts.items() if key in ("model name", "model", "cpu family", "stepping")}


def _unknown() -> str:
    return platform.processor() or platform.machine()
