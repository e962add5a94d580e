#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ask the server for a text and print it as it comes; needs Python's standard library only.

client.py "Once upon a time" --model NAME --max-tokens 64 --temperature 0.7
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def stream(url: str, model: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The responses of ``generate_stream``, one by one.

    Raises:
        SystemExit: with the server's message, where it refuses or fails.
    """
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/generate_stream",
        data=json.dumps({**body, "stream": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data:"):
                    event = json.loads(line.removeprefix(b"data:"))
                    if "error" in event:
                        sys.exit(event["error"])
                    yield event
    except urllib.error.HTTPError as error:
        sys.exit(json.loads(error.read().removeprefix(b"data:"))["error"])
    except urllib.error.URLError as error:
        sys.exit(f"{url}: {error.reason}; is the server running?")


def main() -> None:
    """Print the prompt and what follows it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="repeatable")
    options = parser.parse_args()
    body = {
        "text_input": options.prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        **({"seed": options.seed} if options.seed is not None else {}),
        **({"stop_words": options.stop} if options.stop else {}),
    }
    print(options.prompt, end="", flush=True)
    for event in stream(options.url, options.model, body):
        print(event["text_output"], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
