# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of the embedded model as more texts are served at once.

The claim: throughput grows with the streams. One row is the scheduler alone, by CPU time; one is a
real tritonserver over ``generate_stream``, by the clock. The server's Python is ``.venv-triton``
(`make test` makes it). Greedy, so every run generates the same tokens.
"""

import argparse
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from quarot_onnx.export.triton import triton_from_artifact
from quarot_onnx.pipeline import export
from quarot_onnx.recipe import load_recipe
from quarot_onnx.runtime import OnnxModel, load_tokenizer
from quarot_onnx.runtime.serving import Piece, Request, Scheduler, context_length

ROOT = Path(__file__).parents[1]
STREAMS = (1, 2, 4, 8, 16)
PROMPT = "Return the number of items in the list and"


class _Reply:
    """Waits for the last piece."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def send(self, piece: Piece) -> None:
        if piece.finish_reason:
            self.done.set()

    def fail(self, message: str) -> None:
        raise RuntimeError(message)

    def cancel(self) -> None:
        raise RuntimeError("cancelled")

    def is_cancelled(self) -> bool:
        return False


def _in_process(scheduler: Scheduler, streams: int, tokens: int) -> float:
    """Seconds of CPU, which other work on the machine hardly changes."""
    began = time.process_time()
    replies = [_Reply() for _ in range(streams)]
    for reply in replies:
        scheduler.submit(Request(PROMPT, tokens), reply)
    for reply in replies:
        reply.done.wait()
    return time.process_time() - began


def _over_http(port: int, streams: int, tokens: int) -> float:
    """Seconds; a client is a process, so that clients do not wait for one another."""
    url = f"http://127.0.0.1:{port}/v2/models/tiny/generate_stream"
    body = json.dumps({"text_input": PROMPT, "max_tokens": tokens, "stream": True})
    began = time.perf_counter()
    clients = [
        subprocess.Popen(
            ["curl", "--silent", "--no-buffer", "--data", body, url], stdout=subprocess.PIPE
        )
        for _ in range(streams)
    ]
    answers = [client.communicate()[0] for client in clients]
    seconds = time.perf_counter() - began
    for answer in answers:
        if b'"finish_reason":"length"' not in answer:
            raise RuntimeError(f"the server answered {answer[-300:]!r}")
    return seconds


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


def _start(repository: Path, python: Path, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    ports = {name: _free_port() for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")}
    environment = os.environ | {name: str(port) for name, port in ports.items()}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [repository / "run.sh"], env=environment, stdout=output, stderr=output
        )
    while server.poll() is None:
        try:
            url = f"http://127.0.0.1:{ports['HTTP_PORT']}/v2/health/ready"
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return server, ports["HTTP_PORT"]
    raise RuntimeError(log.read_text()[-2000:])


def _measured(run: Callable[[int, int], float], streams: int, tokens: int, repeats: int) -> float:
    """The best rate in tokens a second: the machine has other work, which only slows down."""
    return max(streams * tokens / run(streams, tokens) for _ in range(repeats))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-triton" / "bin" / "python")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        artifact, repository = Path(directory, "artifact"), Path(directory, "repository")
        model = ROOT / "examples" / "tiny_llama" / "model"
        export(model, artifact, load_recipe("w4a4kv4"), certify=False)
        triton_from_artifact(artifact, repository, name="tiny", threads=options.threads)
        scheduler = Scheduler(
            OnnxModel(artifact, threads=options.threads),
            load_tokenizer(artifact),
            eos_token_ids=[],
            context_length=context_length(artifact),
        )
        server, port = _start(repository, options.python, Path(directory, "log"))
        try:
            runs: dict[str, Callable[[int, int], float]] = {
                "scheduler, CPU": lambda streams, tokens: _in_process(scheduler, streams, tokens),
                "Triton, clock": lambda streams, tokens: _over_http(port, streams, tokens),
            }
            load = os.getloadavg()[0]
            print(
                f"{options.tokens} tokens each, {options.threads} threads of ONNX Runtime, "
                f"{os.cpu_count()} cores, load {load:.1f}"
            )
            print("tokens/s   streams " + "".join(f"{streams:>9}" for streams in STREAMS))
            rates = {
                name: [_measured(run, n, options.tokens, options.repeats) for n in STREAMS]
                for name, run in runs.items()
            }
            for name, found in rates.items():
                print(f"{name:<18} " + "".join(f"{rate:9.0f}" for rate in found))
                print(f"{'  against 1':<18} " + "".join(f"{r / found[0]:8.2f}x" for r in found))
        finally:
            server.terminate()
            server.wait()
            scheduler.close()


if __name__ == "__main__":
    main()
