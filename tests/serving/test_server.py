"""OpenAI's own client, and bare HTTP, against a server on this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bitbell.data import TextTokenizer
from bitbell.serving import engine_for, generate
from bitbell.serving.asking import Asker, chat_template_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from bitbell.serving.metrics import Metrics  # noqa: E402
from bitbell.serving.scheduler import Scheduler  # noqa: E402
from bitbell.serving.server import Limits, Server, build_app, listen  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


class Served:
    """A server in a thread of this process."""

    def __init__(self, port: int, scheduler: Scheduler, server: Server) -> None:
        self.port, self.scheduler, self.server = port, scheduler, server
        self.url = f"http://127.0.0.1:{port}/v1"

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60, **options)

    def send(
        self, method: str, path: str, body: Any = None, kind: str = "application/json"
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": kind})
        answer = connection.getresponse()
        out = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return out

    def refusal(self, body: Any, path: str = "/v1/completions", kind: str = "application/json") -> tuple[int, dict]:
        status, _, answer = self.send("POST", path, body, kind)
        return status, json.loads(answer)["error"]


@contextmanager
def served(
    model: Any,
    tokenizer: TextTokenizer,
    *,
    slots: int = 4,
    limits: Limits | None = None,
    template: Any = None,
    connections: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Served]:
    metrics, engine = Metrics(), engine_for(model, slots=slots)
    allowed, end = tokenizer.vocab_size, tokenizer.end_of_text
    scheduler = Scheduler(engine, tokenizer, end_token=end, allowed=allowed, observer=metrics, **options)
    metrics.watch(scheduler)
    app = build_app(scheduler, Asker("tiny", engine.positions, tokenizer, template), metrics, limits or Limits())
    sock = listen("127.0.0.1", 0)
    server = Server(app, scheduler, grace=0.3, **(connections or {}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield Served(sock.getsockname()[1], scheduler, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(packed: Any, tokenizer: TextTokenizer) -> Iterator[Served]:
    with served(packed, tokenizer, limits=Limits(body_bytes=4000)) as running:
        yield running


def until(true: Any) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_text_is_that_of_generate(server: Served, packed: Any, tokenizer: TextTokenizer) -> None:
    alone = generate(packed, tokenizer, "In the", max_new_tokens=30, temperature=0)
    client = server.client()
    answer = client.completions.create(model="tiny", prompt="In the", max_tokens=30, temperature=0)
    assert answer.choices[0].text == alone.text
    assert answer.choices[0].finish_reason == ("length" if alone.tokens == 30 else "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, alone.tokens)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="tiny", prompt="In the", max_tokens=30, temperature=0, **options))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == alone.text
    assert len(chunks) > 5
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        answer.choices[0].finish_reason
    ]
    assert chunks[-1].usage == answer.usage


def test_token_ids_several_prompts_and_n(server: Served, packed: Any, tokenizer: TextTokenizer) -> None:
    client = server.client()
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    texts = [generate(packed, tokenizer, p, max_new_tokens=12, temperature=0).text for p in ("one", "two")]
    assert [c.text for c in client.completions.create(prompt=["one", "two"], **how).choices] == texts
    assert client.completions.create(prompt=tokenizer.encode("one"), **how).choices[0].text == texts[0]
    drawn = client.completions.create(prompt="one", model="tiny", max_tokens=12, n=3, seed=7)
    again = client.completions.create(prompt="one", model="tiny", max_tokens=12, seed=8)
    assert len({c.text for c in drawn.choices}) == 3
    assert again.choices[0].text == drawn.choices[1].text
    assert drawn.usage.prompt_tokens == 3


def test_many_at_once_lose_nothing(server: Served, packed: Any, tokenizer: TextTokenizer) -> None:
    prompts = [f"{'x' * (i % 7)} {i}" for i in range(40)]
    alone = [generate(packed, tokenizer, p, max_new_tokens=24, temperature=0).text for p in prompts]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:

            async def ask(i: int) -> str:
                how: dict[str, Any] = {"model": "tiny", "prompt": prompts[i], "max_tokens": 24, "temperature": 0}
                if i % 2:
                    return (await client.completions.create(**how)).choices[0].text
                chunks = await client.completions.create(**how, stream=True)
                return "".join([c.choices[0].text async for c in chunks])

            return await asyncio.gather(*[ask(i) for i in range(40)])

    assert asyncio.run(ask_all()) == alone
    assert server.scheduler.running == server.scheduler.waiting == 0


def test_a_stop_string_ends_the_text(server: Served) -> None:
    client = server.client()
    how: dict[str, Any] = {"model": "tiny", "prompt": "In the", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**how).choices[0].text
    stop = whole[8:11]
    answer = client.completions.create(**how, stop=[stop])
    assert answer.choices[0].text == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "0 to 100, got -1"),
        ({"temperature": True}, "temperature", "got true"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "0 to 1, got 1.5"),
        ({"top_k": -1}, "top_k", "from 0 to"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"max_tokens": 60}, "max_tokens", "the prompt's 5 tokens and max_tokens=60 exceed the model's 64 positions"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": {"a": 1}}, "prompt", "must be a text"),
        ({"prompt": [1, 257]}, "prompt", "0 to 256, got 257"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a"] * 17}, "prompt", "17 texts, allowed are 16"),
        ({"n": 17}, "n", "at most 16"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"seed": 1.5}, "seed", "an integer"),
        ({"logprobs": 3}, "logprobs", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "must be 0"),
        ({"temprature": 1}, "temprature", "unknown argument"),
    ],
)
def test_what_cannot_be_done_is_refused(server: Served, change: dict[str, Any], param: str, message: str) -> None:
    status, error = server.refusal({"model": "tiny", "prompt": "hello", **change})
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_values_that_change_nothing_are_taken(server: Served) -> None:
    neutral = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "echo": False,
        "logit_bias": {},
        "user": "me",
        "suffix": None,
    }
    assert server.send("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2, **neutral})[0] == 200


def test_bodies_that_are_none(server: Served) -> None:
    assert server.refusal(b"{")[0] == 400
    assert server.refusal(b"[" * 3000)[0] == 400
    assert server.refusal(b'{"prompt": "a", "temperature": NaN}')[0] == 400
    assert server.refusal([])[0] == 400
    assert server.refusal({"prompt": "a" * 5000})[0] == 413
    assert server.refusal({"prompt": "a"}, kind="text/plain")[0] == 415
    assert server.refusal({"prompt": "a", "model": "huge"})[0] == 404
    assert server.refusal({"prompt": "a"}, "/v1/nothing")[0] == 404
    status, error = server.refusal({"messages": [{"role": "user", "content": "a"}]}, "/v1/chat/completions")
    assert (status, error["code"]) == (400, "no_chat_template")


def test_models_health_page_and_metrics(server: Served) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")
    client.completions.create(model="tiny", prompt="abc", max_tokens=4)
    assert json.loads(server.send("GET", "/health")[2])["status"] == "ok"
    counts = server.send("GET", "/metrics")[2].decode()
    assert 'bitbell_requests_total{endpoint="completions",status="200"}' in counts
    assert "bitbell_running 0.0" in counts
    status, headers, page = server.send("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"http://" not in page  # it needs nothing from elsewhere
    assert b"https://" not in page


def test_a_full_queue_is_429_and_who_leaves_frees_the_slot(packed_gpt: Any, tokenizer: TextTokenizer) -> None:
    gate = threading.Event()
    with served(packed_gpt, tokenizer, max_waiting=1) as server:
        run = server.scheduler.engine.run
        server.scheduler.engine.run = lambda rows: (gate.wait(30), run(rows))[1]  # type: ignore[method-assign]
        body = json.dumps({"prompt": "abc", "max_tokens": 50, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for number, sock in enumerate(sockets):  # the model has one slot
            sock.sendall(head.encode() + body)
            until(lambda number=number: server.scheduler.running + server.scheduler.waiting == number + 1)
        until(lambda: server.scheduler.running == server.scheduler.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting, allowed are 1") as raised:
            server.client().completions.create(model="tiny", prompt="abc")
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
        for sock in sockets:
            sock.close()
        time.sleep(0.2)  # until the server has noticed
        gate.set()
        until(lambda: server.scheduler.running == server.scheduler.waiting == 0)
        counts = server.send("GET", "/metrics")[2].decode()
        assert 'bitbell_texts_total{finish="cancelled"} 2.0' in counts
        assert server.client().completions.create(model="tiny", prompt="abc", max_tokens=3).usage.completion_tokens == 3


def test_a_request_that_takes_too_long_is_told_so(packed_gpt: Any, tokenizer: TextTokenizer) -> None:
    with served(packed_gpt, tokenizer, limits=Limits(timeout=0.2)) as server:
        run = server.scheduler.engine.run
        server.scheduler.engine.run = lambda rows: (time.sleep(0.05), run(rows))[1]  # type: ignore[method-assign]
        with pytest.raises(openai.APIStatusError) as raised:
            server.client().completions.create(model="tiny", prompt="abc", max_tokens=50)
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(server.client().completions.create(model="tiny", prompt="abc", max_tokens=50, stream=True))


def test_what_outlasts_the_grace_is_told_so(packed_gpt: Any, tokenizer: TextTokenizer) -> None:
    with served(packed_gpt, tokenizer) as server:
        run = server.scheduler.engine.run
        server.scheduler.engine.run = lambda rows: (time.sleep(0.05), run(rows))[1]  # type: ignore[method-assign]
        body = {"prompt": "abc", "max_tokens": 60}
        answers: dict[bool, tuple[int, bytes]] = {}

        def ask(stream: bool) -> None:
            status, _, answer = server.send("POST", "/v1/completions", {**body, "stream": stream})
            answers[stream] = status, answer

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: server.scheduler.running == server.scheduler.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        for thread in threads:
            thread.join(30)
    assert answers[False][0] == 503
    assert answers[True][0] == 200
    assert all(b"shutting down" in answer for _, answer in answers.values())


def test_chat_by_the_template_of_the_tokenizer(packed: Any, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert chat_template_of(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    alone = generate(packed, tokenizer, "<user>hello<a>", max_new_tokens=12, temperature=0).text
    with served(packed, tokenizer, template=chat_template_of(tmp_path)) as server:
        client, how = server.client(), {"model": "tiny", "temperature": 0, "messages": messages}
        answer = client.chat.completions.create(**how, max_completion_tokens=12)
        assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", alone)
        chunks = list(client.chat.completions.create(**how, max_tokens=12, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == alone
        assert client.chat.completions.create(**how).usage.total_tokens <= 64  # as much as there is room for
        for wrong in ([], [{"role": "user"}], [{"role": "user", "content": "x" * 80}]):
            assert server.refusal({"messages": wrong}, "/v1/chat/completions")[0] == 400


def test_the_command_serves_and_finishes_what_runs_at_sigterm(
    packed_gpt: Any, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    folder = packed_gpt.save(tmp_path / "gpt", tokenizer=tmp_path / "tokenizer")
    command = [sys.executable, "-m", "bitbell", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line.startswith("gpt on http://127.0.0.1:"), process.stderr.read()  # type: ignore[union-attr]
            port = int(line.split("127.0.0.1:")[1].split(" ")[0])
            asked = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
            how: dict[str, Any] = {
                "model": "gpt",
                "prompt": ["a"] * 10,
                "max_tokens": 60,
                "temperature": 1,
                "stream": True,
            }
            chunks = iter(asked.completions.create(**how))
            ends = [next(chunks).choices[0].finish_reason]
            process.send_signal(signal.SIGTERM)
            ends += [chunk.choices[0].finish_reason for chunk in chunks]
            assert sum(end is not None for end in ends) == 10
            with pytest.raises(openai.APIConnectionError):
                asked.models.list()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_wrong_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bitbell.cli.main import main

    assert main(["serve", str(tmp_path)]) == 1
    assert "is neither a run nor a packed model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="port must be 0"):
        listen("127.0.0.1", 70000)
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="cannot listen on 127"):
        listen("127.0.0.1", taken.getsockname()[1])
    for name in ("timeout", "body_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got -1"):
            Limits(**{name: -1})
