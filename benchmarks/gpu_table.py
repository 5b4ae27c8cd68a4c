"""The tables of docs/performance.md between its markers, from benchmarks/results/gpu-*.jsonl.

python benchmarks/gpu_table.py [--out docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def how(row: dict) -> str:
    """What was run beside the work, in words of the command line."""
    said = [row["mesh"]]
    said += [f"roles {row['roles']}"] if row.get("roles") else []
    said += [f"zero={row['zero']}"] if row.get("zero") else []
    said += ["no sequence parallelism"] if row.get("sequence_parallel") == 0 else []
    said += [row["mode"]] if row.get("mode", "single") != "single" else []
    return ", ".join(said)


def speeds(rows: list[dict]) -> str:
    lines = [
        (
            row["work"],
            row["system"],
            how(row),
            row["states"],
            f"{row['tokens_per_s']:,}",
            row["step_ms"],
            row["tflops"],
            row["of_gemm_rate"],
            row["peak_gib"],
        )
        for row in sorted(rows, key=lambda row: (row["work"], row["mesh"], -row["tokens_per_s"]))
    ]
    heads = ["work", "system", "mesh", "states", "tokens/s", "step, ms", "TFLOP/s a GPU"]
    return tabulate(lines, [*heads, "of the GEMM rate", "peak GiB"], tablefmt="github", disable_numparse=True)


def breakdown(rows: list[dict]) -> str:
    profiled = [row for row in rows if "profile" in row and row["system"].startswith("tedfx")]
    kinds = list(dict.fromkeys(kind for row in profiled for kind in row["profile"]["kinds"]))
    lines = [
        (kind, *(row["profile"]["kinds"].get(kind, 0) for row in profiled))
        for kind in kinds
        if kind != "other"
    ]
    lines.append(("other", *(row["profile"]["kinds"].get("other", 0) for row in profiled)))
    for key, name in (("exposed", "communication not hidden"), ("idle", "no kernel runs")):
        lines.append((name, *(row["profile"][key] for row in profiled)))
    for part in ("forward", "backward", "optimizer"):
        lines.append((f"host, {part}", *(row.get("host_ms", {}).get(part, "") for row in profiled)))
    return tabulate(
        lines,
        ["ms a step", *(f"{row['work']} {how(row)} {row['states']}" for row in profiled)],
        tablefmt="github",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    args = parser.parse_args()
    text = ""
    for file in sorted((HERE / "results").glob("gpu-*.jsonl")):
        rows = rows_of(file)
        if rows:
            text += f"\n### {rows[0]['device']}, {max(row['world'] for row in rows)} at most, torch {rows[0]['torch']}\n"
            text += f"\n{speeds(rows)}\n\n{breakdown(rows)}\n"
    if not args.out:
        print(text)
        return 0
    page = Path(args.out)
    page.write_text(
        re.sub(
            f"{re.escape(BEGIN)}.*{re.escape(END)}",
            lambda _: f"{BEGIN}\n{text}\n{END}",
            page.read_text(),
            flags=re.S,
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
