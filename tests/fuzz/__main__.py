"""Damage valid files of every format and see what decoding makes of them.

    python -m tests.fuzz [--count 20000] [--seed 0] [--processes 2]

Prints a table of the formats; ends with 1 if a file crashed its process, took more than 10 s, or raised what is no
reject, and leaves those files in the folder fuzz-findings/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.decoding import LIMIT_MB, LIMIT_S, MAX_PIXELS, Outcome, fuzz
from tests.fuzz.mutations import corpus, mutated

_FINDINGS = Path("fuzz-findings")


def main() -> int:
    """Run all mutations; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    files, started = corpus(), time.monotonic()

    def share(first: int) -> list[Outcome]:
        return list(fuzz(files, range(first, options.count, options.processes), options.seed))

    with ThreadPoolExecutor(options.processes) as pool:
        outcomes = [outcome for few in pool.map(share, range(options.processes)) for outcome in few]
    bad = [outcome for outcome in outcomes if not outcome.good]
    seconds = time.monotonic() - started
    print(f"{len(outcomes)} mutations of {len(files)} files, seed {options.seed}, in {seconds:.0f} s; bad: {len(bad)}")
    print(f"limits: {MAX_PIXELS:,} pixels, {LIMIT_S:g} s, {LIMIT_MB} MB\n")
    print(_table(outcomes))
    for outcome in bad:
        _FINDINGS.mkdir(exist_ok=True)
        place = _FINDINGS / f"{options.seed}-{outcome.number}"
        place.write_bytes(mutated(files, outcome.number, options.seed)[1])
        print(f"\n{place}: {outcome.name}: {outcome.what}\n{outcome.message}")
    return 1 if bad else 0


def _table(outcomes: list[Outcome]) -> str:
    kinds = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.name.split()[0]].append(outcome)
    lines = [
        "| format | mutations | pictures | rejects | worst ms | worst MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in sorted(kinds.items()):
        reasons = Counter(outcome.what for outcome in found)
        pictures = reasons.pop("picture", 0)
        rejects = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        slowest, largest = max(o.seconds for o in found), max(o.megabytes for o in found)
        lines.append(f"| {kind} | {len(found)} | {pictures} | {rejects} | {slowest * 1000:.0f} | {largest:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
