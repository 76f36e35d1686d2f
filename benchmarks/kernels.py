"""Structured layers against dense ones on the clock: how much faster, and how close to what the machine can do.

    python -m benchmarks.kernels            settings that end within 20 minutes
    python -m benchmarks.kernels --full     all of them (hours)
    python -m benchmarks.kernels table      the tables again, from what is there

How it is measured, and what efficiency is: :mod:`structmat.benchmark`, which ``structmat bench`` uses too. Every
setting is written when it ends; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.files import RESULTS

STUDY = RESULTS / "kernels"


def write_table() -> None:
    """``kernels.md`` from every setting that is done."""
    from structmat.benchmark import Setting, every_setting, read_result

    done = [read_result(path) for path in sorted(STUDY.glob("*.json"))]
    by_key = {Setting.from_json(result["setting"]): result for result in done}
    lines = [
        "# Structured layers on the clock",
        "",
        "Written by `python -m benchmarks.kernels`. *Times faster* is the median over turns of the time of dense "
        "`F.linear` by that of the layer, as it chooses its backend by itself; *reference* and *native* are the "
        "backends alone (a dash: it can't run there), all for calls in a row. *First* is the ratio of first calls, "
        "right after the other layers filled the caches. *Operations* is the same ratio of operations. Forward is "
        "without gradients, of the frozen layer; training is forward and all gradients; reused writes into memory that "
        "is there, `sm.matmul(S, x, out=y)` beside `torch.mm(x, W.T, out=y)`; tuned is forward after "
        "`sm.tune(..., allow_dense=True)`. *Efficiency* is the least time that the machine could need (see "
        "`structmat.benchmark`) by the time that was needed.",
    ]
    order = {setting: number for number, setting in enumerate(every_setting())}
    for setting in sorted(by_key, key=lambda s: order.get(s, len(order))):
        result = by_key[setting]
        facts = result["environment"]
        lines += [
            "",
            f"## {setting}",
            "",
            f"{facts['processor']} ({facts['native']}), torch {facts['torch']}; dense takes "
            f"{statistics.median(r['microseconds']['dense'] for r in result['layers']):.0f} microseconds.",
            "",
            "| layer | microseconds | times faster | first | operations | reference | native | efficiency |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["layers"]:
            by = row["dense_by"]
            operations = "—" if row["operations_ratio"] is None else f"{row['operations_ratio']:.1f}"
            alone = [f"{by[name]:.2f}" if name in by else "—" for name in ("reference", "native")]
            lines.append(
                f"| `{row['structure']}` | {row['microseconds']['auto']:.1f} | {by['auto']:.2f} | "
                f"{row['dense_by_first']['auto']:.2f} | "
                f"{operations} | {alone[0]} | {alone[1]} | {row['efficiency']:.2f} |"
            )
    STUDY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    from structmat.benchmark import every_member, every_setting, run_settings, telling_settings, typical_members
    from structmat.compression.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--full", action="store_true", help="all shapes, batches, dtypes, works and families")
    parser.add_argument("--again", action="store_true", help="settings that are done, too")
    parser.add_argument("--key", action="append", help="this setting only, by the name of its file; may be repeated")
    options = parser.parse_args()
    chosen = every_setting() if options.full or options.key else telling_settings()
    chosen = [setting for setting in chosen if not options.key or setting.key in options.key]
    if options.action == "run":
        members = every_member if options.full else typical_members
        with Progress(True) as bar:
            found = run_settings(chosen, members, folder=STUDY, again=options.again)
            for _ in bar.track(found, "kernels", total=len(chosen)):
                write_table()
    write_table()


if __name__ == "__main__":
    main()
