# SPDX-License-Identifier: Apache-2.0
"""Send requests to a Triton server over one gRPC stream, all at once; runs in the server's Python.

triton_client.py HOST:PORT MODEL: standard input is a JSON list of requests, each an object of
tensors (name -> value) and, where it is to be cancelled, ``cancel_after``: pieces. Standard output
is a JSON list with, for each request, its ``pieces``, ``finish_reason`` and ``error``.
"""

import json
import queue
import sys
import uuid
from typing import Any

import numpy as np
import tritonclient.grpc as triton

TYPES = {
    "text_input": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "stream": ("BOOL", np.bool_),
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
}


def tensor(name: str, value: Any) -> triton.InferInput:
    kind, dtype = TYPES[name]
    values = value if isinstance(value, list) else [value]
    if kind == "BYTES":
        values = [text.encode("utf-8", "surrogateescape") for text in values]
    array = np.array([values], dtype)
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def main() -> None:
    url, model = sys.argv[1:]
    requests = json.load(sys.stdin)
    answers = [{"pieces": [], "finish_reason": None, "error": None} for _ in requests]
    results: queue.Queue[Any] = queue.Queue()
    client = triton.InferenceServerClient(url)
    client.start_stream(lambda result, error: results.put((result, error)))
    numbers = {}
    for number, request in enumerate(requests):
        identity = uuid.uuid4().hex
        numbers[identity] = number
        tensors = [tensor(n, v) for n, v in request.items() if n != "cancel_after"]
        client.async_stream_infer(model, tensors, request_id=identity)
    open_answers = set(range(len(requests)))
    while open_answers:
        result, error = results.get(timeout=60)
        if error is not None:  # an error does not say whose it is: such requests come alone
            (number,) = open_answers
            answers[number]["error"] = error.message()
            open_answers.clear()
            continue
        number = numbers[result.get_response().id]
        answer = answers[number]
        answer["pieces"].append(result.as_numpy("text_output")[0, 0].decode())
        if (reason := result.as_numpy("finish_reason")) is not None:
            answer["finish_reason"] = reason[0, 0].decode()
            open_answers.discard(number)
        if requests[number].get("cancel_after") == len(answer["pieces"]):
            open_answers.discard(number)
    client.stop_stream(cancel_requests=True)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
