"""What a server must outlive: broken bodies and heads, clients that vanish, crowds that say nothing, foreign files."""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bitbell.data import TextTokenizer
from bitbell.serving.asking import chat_template_of
from bitbell.serving.model_files import check_links

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

spec = importlib.util.spec_from_file_location("server_of_tests", Path(__file__).parent / "test_server.py")
assert spec is not None and spec.loader is not None  # noqa: PT018
test_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_server)
test_server.__test__ = False

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(packed: Any, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(test_server.TEMPLATE)
    limits = test_server.Limits(body_bytes=100_000, body_timeout=1)
    with test_server.served(packed, tokenizer, limits=limits, template=chat_template_of(folder)) as running:
        yield running


@pytest.fixture(autouse=True)
def _answers_afterwards_and_no_traceback(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Any:
    uvicorn = logging.getLogger("uvicorn.error")  # which does not hand on what it is told
    uvicorn.addHandler(caplog.handler)
    yield
    uvicorn.removeHandler(caplog.handler)
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        test_server.until(lambda: running.scheduler.running == running.scheduler.waiting == 0)
        assert running.send("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def talk(server: Any, data: bytes, seconds: float = 20) -> bytes:
    """Send bytes; what comes back until the server closes, or says no more for 0.3 s after it has answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as sock:
        with suppress(ConnectionError):  # it may answer, and close, before it has seen everything
            sock.sendall(data)
        answer = b""
        with suppress(TimeoutError, ConnectionError):
            while more := sock.recv(1 << 16):
                answer += more
                sock.settimeout(0.3)
        return answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'{"prompt": "a"',
        b'{"prompt": "a\xff"}',
        b'{"prompt": "a\xed\xa0\x80"}',
        b'\xff\xfe{"prompt"',
        b'{"\\ud800": 1}',
        b'{"prompt": "\\udfff"}',
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 9000 + b"}",
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 49_000,
        b'{"prompt": [[], []]}',
        b'{"prompt": "a", "stream_options": {"\\ud800": 1}}',
        b"\x00" * 1000,
    ],
)
def test_a_broken_body_is_a_400(server: Any, body: bytes) -> None:
    status, error = server.refusal(body)
    assert status == 400
    assert error["type"] == "invalid_request_error"


def test_half_a_surrogate_in_a_role(server: Any) -> None:
    body = b'{"messages": [{"role": "\\ud800", "content": "a"}]}'
    status, error = server.refusal(body, "/v1/chat/completions")
    assert (status, error["param"]) == (400, "messages")


def test_huge_bodies_are_refused_before_they_are_read(server: Any) -> None:
    begun = time.monotonic()
    for length in (b"100001", b"99999999999999999999"):
        assert b" 413 " in talk(server, HEAD + b"Content-Length: " + length + b"\r\n\r\n{").partition(b"\r\n")[0]
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert b" 413 " in talk(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20).partition(b"\r\n")[0]
    assert time.monotonic() - begun < 10


def test_a_body_that_does_not_come_is_a_408(server: Any) -> None:
    assert b" 408 " in talk(server, HEAD + b"Content-Length: 50\r\n\r\n{").partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a client that speaks TLS
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_a_400(server: Any, data: bytes) -> None:
    assert talk(server, data).startswith(b"HTTP/1.1 400 ")


def test_a_head_without_end_is_broken_off(server: Any) -> None:
    answer = talk(server, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 200_000)
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer  # what is closed on may lose its last words


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models/%ff%fe",
        "/%00",
        "/config.json",
        "/model.safetensors",
        "/chat.html",
        "/" + "a" * 50_000,
    ],
)
def test_no_path_leads_to_a_file(server: Any, path: str) -> None:
    answer = talk(server, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert len(answer) < 1000
    assert b"root:" not in answer


def break_off(sock: socket.socket) -> None:
    """Close with a reset, as a crashed client's machine does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_clients_that_vanish(server: Any) -> None:
    body = json.dumps({"prompt": "abc", "max_tokens": 60, "stream": True}).encode()
    whole = HEAD + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    for number in range(30):
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        if number % 3 == 0:  # in the middle of the body
            sock.sendall(whole[:-5])
        elif number % 3 == 1:  # at once
            sock.sendall(whole)
        else:  # in the middle of the stream
            sock.sendall(whole)
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
        break_off(sock)


def crowd(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(count)]


def test_a_thousand_connections_that_say_nothing(server: Any) -> None:
    """A thousand, or as many as the limit of open files has room for: each is two files here, a client's and ours."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # which the server has raised
    used = len(list(Path("/proc/self/fd").iterdir()))
    count = min(1000, (limit - used - 100) // 2)
    print(f"{count} idle connections")
    assert count > 100
    idle = crowd(server.port, count)
    try:
        test_server.until(lambda: len(server.server.server_state.connections) >= count)
        begun = time.monotonic()
        for path in ("/health", "/metrics", "/v1/models", "/"):
            assert server.send("GET", path)[0] == 200
        assert server.send("POST", "/v1/completions", {"prompt": "a", "max_tokens": 20})[0] == 200
        assert time.monotonic() - begun < 20
    finally:
        for sock in idle:
            sock.close()
    test_server.until(lambda: len(server.server.server_state.connections) < 50)


def test_health_and_metrics_answer_under_load(server: Any) -> None:
    def ask() -> None:
        server.send("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 60, "n": 2})

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    test_server.until(lambda: server.scheduler.waiting)
    looks, longest, most_running = 0, 0.0, 0
    while any(thread.is_alive() for thread in threads):
        begun = time.monotonic()
        state = json.loads(server.send("GET", "/health")[2])
        counts = server.send("GET", "/metrics")[2].decode()
        longest = max(longest, time.monotonic() - begun)
        assert state["status"] == "ok"
        assert 0 <= state["running"] <= state["slots"]
        assert "\nbitbell_running " in counts
        looks, most_running = looks + 1, max(most_running, state["running"])
    assert looks > 0
    assert most_running == state["slots"]
    assert longest < 10
    assert "bitbell_running 0.0" in server.send("GET", "/metrics")[2].decode()


@pytest.fixture
def small_server(packed: Any, tokenizer: TextTokenizer) -> Iterator[Any]:
    with test_server.served(packed, tokenizer, connections={"head_timeout": 0.5, "most_connections": 8}) as running:
        yield running


def test_who_says_nothing_is_closed(small_server: Any) -> None:
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=20) as silent:
        assert silent.recv(1) == b""
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=20) as slow:  # a letter now and then
        begun = time.monotonic()
        with suppress(ConnectionError):
            for letter in b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 1000:
                slow.sendall(bytes([letter]))
                time.sleep(0.05)
                if time.monotonic() - begun > 15:
                    break
        assert time.monotonic() - begun < 10
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=20) as sock:  # a head in time, twice
        for _ in range(2):
            time.sleep(0.2)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK")


def test_a_newcomer_takes_the_place_of_the_longest_silence(packed: Any, tokenizer: TextTokenizer) -> None:
    with test_server.served(packed, tokenizer, connections={"most_connections": 8}) as server:
        idle = crowd(server.port, 8)
        test_server.until(lambda: len(server.server.server_state.connections) == 8)
        assert server.send("GET", "/health")[0] == 200
        assert idle[0].recv(1) == b""  # the first to come had to go, and nobody else
        idle[1].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert idle[1].recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        for sock in idle:
            sock.close()


# The model's directory ----------------------------------------------------------------------------------------------


def test_links_out_of_the_directory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bitbell.cli.main import main

    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").write_text("{}")
    (folder / "again.json").symlink_to("config.json")
    check_links(folder)
    for place in ("tokenizer.json", "inner/state.json"):
        (folder / place).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=f"{place} is a link to .*secret, outside of"):
            check_links(folder)
        assert main(["serve", str(folder)]) == 1
        assert "is a link to" in capsys.readouterr().err
        (folder / place).unlink()
    (folder / "inner").rmdir()
    (folder / "inner").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="inner is a link"):
        check_links(folder)


def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    model = tmp_path / "models--someone--model"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs" / "ab12").write_text("{}")
    snapshot = model / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    check_links(snapshot)
    (snapshot / "tokenizer.json").symlink_to("../../../elsewhere")
    with pytest.raises(ValueError, match="outside of"):
        check_links(snapshot)


def test_a_tokenizer_opens_no_file_that_it_names(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer.save(folder)
    (tmp_path / "outside.json").write_text("not JSON")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= dict.fromkeys(("tokenizer_file", "vocab_file", "fast_tokenizer_file", "name_or_path"), "../outside.json")
    config |= {"auto_map": {"AutoTokenizer": ["../outside.Tokenizer", None]}, "tokenizer_class": "Outside"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": test_server.TEMPLATE}))
    template = chat_template_of(folder)
    messages = [{"role": "user", "content": "hello"}]
    assert template.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "<user>hello<a>"
    assert template("hello", add_special_tokens=False)["input_ids"] == tokenizer.encode("hello")
    for wrong in ({"default": "../outside.json"}, [{"name": "other", "template": "x"}], 3):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": wrong}))
        with pytest.raises(ValueError, match="chat_template must be a text"):
            chat_template_of(folder)
    (folder / "chat_template.jinja").write_text(test_server.TEMPLATE)  # which comes before what the configuration says
    (folder / "tokenizer_config.json").write_text("[]")
    assert chat_template_of(folder).apply_chat_template(messages, tokenize=False) == "<user>hello"
