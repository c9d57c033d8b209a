"""The server's page in a real browser, wide and narrow, light and dark: it writes, stops, and says what is wrong.

BITBELL_PICTURES=DIR keeps what it looked like.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitbell.data import TextTokenizer
from bitbell.serving import generate

pytest.importorskip("fastapi")
pytest.importorskip("openai")


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


browser = load("browser", Path(__file__).parents[1] / "browser.py")
test_server = load("server_of_tests", Path(__file__).parent / "test_server.py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def port(packed: Any, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(test_server.TEMPLATE)
    template = test_server.chat_template_of(folder)
    with test_server.served(packed, tokenizer, template=template) as running:
        run = running.scheduler.engine.run
        running.scheduler.engine.run = lambda rows: (test_server.time.sleep(0.01), run(rows))[1]
        yield running.port


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (420, False), (420, True)])
def test_it_continues_a_text(
    port: int, width: int, dark: bool, packed: Any, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    pictures = Path(os.environ.get("BITBELL_PICTURES", tmp_path))
    with browser.Page(tmp_path / "profile", width=width, dark=dark) as page:
        page.open(f"http://127.0.0.1:{port}/#prompt=In%20the&temperature=0&max_tokens=30&go=1")
        page.wait("document.body && document.body.dataset.state === 'done'")
        page.photograph(pictures / f"chat-{width}-{'dark' if dark else 'light'}.png")
        alone = generate(packed, tokenizer, "In the", max_new_tokens=30, temperature=0)
        shown = page.run("document.getElementById('out').textContent")
        assert shown.replace("\r", "") == ("In the" + alone.text).replace("\r", "")
        assert page.run("Number(document.getElementById('count').textContent)") == alone.tokens
        assert page.run("Number(document.getElementById('rate').textContent)") > 0
        assert not page.overflows()
        assert not page.problems


def test_it_chats_stops_and_complains(port: int, tmp_path: Path) -> None:
    with browser.Page(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.getElementById('about') && document.getElementById('about').textContent !== ''")
        page.run("document.getElementById('as-chat').click()")
        page.run("document.getElementById('prompt').value = 'hello'; document.getElementById('max_tokens').value = 8")
        for turns in (2, 4):
            page.run("delete document.body.dataset.state; document.getElementById('go').click()")
            page.wait("document.body.dataset.state === 'done'")
            assert page.run("document.querySelectorAll('#out .turn').length") == turns
        page.run("delete document.body.dataset.state; document.getElementById('max_tokens').value = 63")
        page.run("document.getElementById('go').click()")
        page.wait("!document.getElementById('error').hidden")
        assert "64 positions" in page.run("document.getElementById('error').textContent")
        page.run("document.getElementById('as-text').click(); document.getElementById('max_tokens').value = 55")
        page.run("delete document.body.dataset.state; document.getElementById('go').click()")
        page.wait("Number(document.getElementById('count').textContent) > 2")
        page.run("document.getElementById('stop').click()")
        page.wait("document.body.dataset.state === 'done'")
        assert page.run("document.getElementById('finish').textContent") == "stopped"
        assert page.run("Number(document.getElementById('count').textContent)") < 55
        assert not page.problems
