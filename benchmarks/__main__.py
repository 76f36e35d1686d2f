"""``python -m benchmarks`` lists the studies; ``python -m benchmarks.compress_real --help`` explains one."""

from __future__ import annotations

STUDIES = {
    "compress_real": "trained models compressed at several budgets, beside baselines",
    "kernels": "structured layers against dense ones on the clock",
}


def main() -> None:
    for name, purpose in STUDIES.items():
        print(f"python -m benchmarks.{name:15} {purpose}")


if __name__ == "__main__":
    main()
