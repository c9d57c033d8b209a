"""Load on `bitbell serve`, on this machine only: how fast, how late, and whether anything is lost.

    python benchmarks/serve.py packed/bbq --clients 1 8 32 --requests 200 --max-tokens 64

Starts a server for the model, asks it greedy texts from so many clients at a time (streamed, each client one request
after the other), and compares every text with the one that the same server gave when it was asked alone. Then a burst
of more requests than it holds: each must be answered in full or with 429. Prints a Markdown table; exits with 1 where
a text is wrong or an answer missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

PROMPTS = [f"{text} {number}" for number in range(4) for text in ("In the beginning", "And God said", "The LORD", "He")]


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. first, whole: seconds until the first token and the last."""

    status: int
    text: str
    tokens: int
    first: float
    whole: float


async def ask(port: int, prompt: str, max_tokens: int) -> Answer:
    """One streamed request over HTTP/1.0, whose answer ends where the connection does."""
    values = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body = json.dumps(values | {"stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    status = int((await reader.readline()).split()[1])
    text, tokens, first, finished = "", 0, 0.0, False
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        finished = line.startswith(b"data: [DONE]")
        event = {} if finished else json.loads(line[6:])
        for choice in event.get("choices", ()):
            first = first or time.perf_counter() - begun
            text += choice["text"]
        tokens = event.get("usage", {}).get("completion_tokens", tokens)
    writer.close()
    if status == 200 and not finished:
        raise RuntimeError("a stream broke off")
    return Answer(status, text, tokens, first, time.perf_counter() - begun)


async def load(port: int, clients: int, requests: int, max_tokens: int) -> tuple[list[tuple[str, Answer]], float]:
    """So many requests by so many clients: (prompt, answer) of each, and seconds of all."""
    left, answers = iter(range(requests)), list[tuple[str, Answer]]()

    async def client() -> None:
        for number in left:
            prompt = PROMPTS[number % len(PROMPTS)]
            answers.append((prompt, await ask(port, prompt, max_tokens)))

    begun = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    return answers, time.perf_counter() - begun


def percentile(values: list[float], percent: int) -> float:
    """In milliseconds, of seconds."""
    return 1000 * (
        statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
    )


async def measure(port: int, options: argparse.Namespace) -> bool:
    """Print the table; whether everything was as it must be."""
    alone = {prompt: (await ask(port, prompt, options.max_tokens)).text for prompt in PROMPTS}
    good = True
    print("| clients | requests | tokens/s | first token p50 / p99, ms | whole text p50 / p99, ms | lost or wrong |")
    print("|---|---|---|---|---|---|")
    for clients in options.clients:
        answers, seconds = await load(port, clients, options.requests, options.max_tokens)
        wrong = options.requests - sum(a.status == 200 and a.text == alone[prompt] for prompt, a in answers)
        times = [
            f"{percentile(values, 50):.0f} / {percentile(values, 99):.0f}"
            for values in ([a.first for _, a in answers], [a.whole for _, a in answers])
        ]
        rate = sum(a.tokens for _, a in answers) / seconds
        print(f"| {clients} | {options.requests} | {rate:.0f} | {times[0]} | {times[1]} | {wrong} |", flush=True)
        good = good and wrong == 0
    burst = options.slots + options.max_waiting + options.burst
    answers, _ = await load(port, burst, burst, options.max_tokens)
    right = sum(a.status == 200 and a.text == alone[prompt] for prompt, a in answers)
    refused = sum(a.status == 429 for _, a in answers)
    held = options.slots + options.max_waiting
    print(f"\nburst of {burst} on {held} places: {right} answered in full, {refused} refused (429), ", end="")
    print(f"{burst - right - refused} lost")
    return good and right + refused == burst


def main() -> int:
    """Start a server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packed directory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-waiting", type=int, default=64)
    parser.add_argument("--burst", type=int, default=100, help="requests beyond what the server holds")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    flags = {"port": 0, "slots": options.slots, "max-waiting": options.max_waiting, "threads": options.threads}
    command = [sys.executable, "-m", "bitbell", "serve", options.model]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            found = re.search(r":(\d+) ", line)
            if found is None:
                raise RuntimeError("the server did not start")
            print(f"{line.strip()}\n")
            return 0 if asyncio.run(measure(int(found[1]), options)) else 1
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
