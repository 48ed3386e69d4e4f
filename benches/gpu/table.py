#!/usr/bin/env python3
"""Prints what `engine --json` measured as a table."""

import json
import pathlib
import statistics
import sys

told = json.loads(pathlib.Path(sys.argv[1]).read_text())
limits = told["limits"]
alone = limits["read_bytes_per_s"] / limits["step_bytes"]
print(f"{told['device_class']}: {limits['read_bytes_per_s'] / 1e12:.2f} TB/s, so at most {alone:.0f} tokens/s alone")
for part in ["prefill", "decode"]:
    for size, rates in told[part].items():
        rate = statistics.median(rates)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        share = f"  {100 * rate / alone:.0f} % of the bandwidth" if part == "decode" and size == "1" else ""
        print(f"{part:<8} {size:>6} {rate:>12.1f} tokens/s ({spread}){share}")
