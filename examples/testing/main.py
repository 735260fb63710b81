"""A small application, to be tested: headlines for articles, from a fleet.

python examples/testing/main.py cluster.yaml < article.txt
"""

from __future__ import annotations

import sys

import mlx_serving_router as msr

MODEL = "headlines"
LONGEST = 60


def headline(controller: msr.ControllerNode, article: str) -> str:
    """One line for an article, never longer than 60 characters: the article's own beginning where no model answers."""
    request = msr.InferenceRequest(
        model_id=MODEL, messages=[{"role": "user", "content": f"One headline for this article:\n{article}"}]
    )
    line = ""
    try:
        with controller.generate_stream(request) as events:
            for event in events:
                line += event.text
                if len(line) > LONGEST:
                    break  # leaving the stream ends the work on the worker
    except msr.ControllerError as error:
        if error.code is msr.ControllerErrorCode.STREAM_INTERRUPTED:
            return shortened(f"{line}…")
        return shortened(article)
    return shortened(line)


def shortened(line: str) -> str:
    """At most 60 characters, in one line."""
    line = " ".join(line.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


if __name__ == "__main__":
    with msr.ControllerNode(sys.argv[1]) as fleet:
        fleet.wait_for_workers_blocking(1, timeout=30)
        print(headline(fleet, sys.stdin.read()))
