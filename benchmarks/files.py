"""Where the figures of the benchmarks are kept, and what is noted beside them."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT / "benchmarks" / "results"


def write(path: Path, data: Any) -> None:
    """The file appears whole or not at all."""
    from structmat.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Where a figure was measured: processor, versions, commit."""
    from structmat.compression.report import environment as machine

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {**machine(), "system": platform.system(), "commit": commit}
