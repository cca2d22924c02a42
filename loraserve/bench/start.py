"""How long a newcomer waits: `--help`, the server's start, the first token. Measured from outside, real processes."""

import http.client
import json
import statistics
import subprocess
import sys
import time

from loraserve.bench.contestants import free_port
from loraserve.bench.over_http import wait_until_ready
from loraserve.errors import LoraserveError

QUESTION = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0, "max_tokens": 16}


def run(*, repeats: int = 5, base: str = "bundled") -> dict[str, float]:
    """Return medians: seconds of `--help`, seconds from launch to ready, milliseconds to the first streamed token."""
    helps, starts, firsts = [], [], []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "loraserve", "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - began)
        port = free_port()
        began = time.perf_counter()
        command = [sys.executable, "-m", "loraserve", "serve", "--base", base, "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(server, port, "/ready", timeout=120.0)
            starts.append(time.perf_counter() - began)
            _first_token(port)  # warm-up
            firsts += [_first_token(port) for _ in range(5)]
        finally:
            server.terminate()
            server.wait()
    return {
        "help_s": round(statistics.median(helps), 3),
        "start_s": round(statistics.median(starts), 2),
        "ttft_ms": round(statistics.median(firsts) * 1e3, 1),
    }


def _first_token(port: int) -> float:
    """Seconds from sending a streamed chat request to its first text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(QUESTION), {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    return time.perf_counter() - began
    finally:
        connection.close()
    raise LoraserveError("the server's answer had no text")
