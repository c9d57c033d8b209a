"""`bitbell serve`: an OpenAI-compatible endpoint for a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro


def serve(
    model: tyro.conf.Positional[str],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    max_waiting: int = 64,
    prefill_tokens: int = 64,
    timeout: float = 300.0,
    max_body: int = 1 << 20,
    grace: int = 30,
    device: str = "auto",
    native: Literal["auto", "always", "never"] = "auto",
    head_bits: Literal[8, 16] | None = None,
    threads: int | None = None,
) -> int:
    """Serve a model over HTTP in OpenAI's shape, with a web page at /.

    Args:
        model: A packed directory or a run.
        host: Address to listen on. There is no authentication: put a proxy in front of anything but this machine.
        port: Port to listen on; 0 takes a free one.
        name: What the model is called in requests; by default the directory's name.
        slots: Texts made at a time (1 where the model runs by its modules).
        max_waiting: Texts that may wait for a slot; further requests are answered 429.
        prefill_tokens: Tokens of prompts in a step; more start texts sooner, fewer hold up running ones less.
        timeout: Seconds of a request, waiting included.
        max_body: Bytes of a request.
        grace: Seconds that running requests have to end after SIGTERM or Ctrl-C.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        native: Run the C++ step (always), the model's modules (never), or C++ where it can run the model (auto).
        head_bits: Keep the output head and the embedding in 8 bits, or bfloat16 (16). Changes the numbers; native only.
        threads: Threads of the C++ step; by default as many as torch uses.
    """
    try:
        from bitbell.serving.metrics import Metrics
        from bitbell.serving.server import Limits, Server, build_app, listen, run
    except ImportError as error:
        raise ValueError(
            f"bitbell serve needs the packages of the extra serve: pip install 'bitbell[serve]' ({error})"
        ) from None
    from bitbell.cli.commands import NATIVE_STEP, open_model
    from bitbell.serving import engine_for, load_tokenizer_of
    from bitbell.serving.asking import Asker, chat_template_of
    from bitbell.serving.generate import check_makes_text, check_vocabulary
    from bitbell.serving.model_files import check_links
    from bitbell.serving.native_llama import inner_model
    from bitbell.serving.scheduler import Scheduler

    if grace < 0:
        raise ValueError(f"grace must be 0 or more, got {grace}")
    limits = Limits(body_bytes=max_body, timeout=timeout)
    check_links(model)
    loaded, _ = open_model(model, device)
    check_makes_text(loaded)
    tokenizer = load_tokenizer_of(model)
    check_vocabulary(inner_model(loaded).config, tokenizer)
    engine = engine_for(loaded, slots=slots, native_step=NATIVE_STEP[native], head_bits=head_bits, threads=threads)
    metrics = Metrics()
    bounds = {"max_waiting": max_waiting, "prefill_tokens": prefill_tokens, "allowed": tokenizer.vocab_size}
    scheduler = Scheduler(engine, tokenizer, end_token=tokenizer.end_of_text, **bounds, observer=metrics)
    metrics.watch(scheduler)
    asker = Asker(name or Path(model).resolve().name, engine.positions, tokenizer, chat_template_of(model))
    sock = listen(host, port)
    where = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    print(f"{asker.name} on {where} ({engine.name}; {engine.slots} at a time); Ctrl-C stops", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print("bitbell serve: other machines reach this address, and there is no authentication", file=sys.stderr)
    run(Server(build_app(scheduler, asker, metrics, limits), scheduler, grace=grace), sock)
    return 0
