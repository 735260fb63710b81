"""The two text formats of Prometheus: the core writes OpenMetrics, and this is the way to the older one."""

from __future__ import annotations


def classic(openmetrics: str) -> str:
    """The same in the older text format, which names counters with their `_total` and knows no units and no end."""
    lines = openmetrics.splitlines()
    counters = {
        words[2]
        for words in (line.split(" ", 3) for line in lines if line.startswith("# TYPE "))
        if words[3] == "counter"
    }
    text = []
    for line in lines:
        if not line.startswith("#"):
            text.append(line)
        elif line.startswith(("# HELP ", "# TYPE ")):
            mark, kind, name, rest = line.split(" ", 3)
            text.append(f"{mark} {kind} {name}{'_total' if name in counters else ''} {rest}")
    return "\n".join(text) + "\n"
