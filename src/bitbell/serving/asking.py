"""Bodies in OpenAI's shape -> what is asked of the model. What cannot be done is refused, never left out in silence."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitbell.data import TextTokenizer
from bitbell.serving.engines import Sampling

MOST_CHOICES = 16  # of one request: prompts times n
MOST_STOPS = 4
WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # arguments of OpenAI's that only these values, or null, are taken of
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "parallel_tool_calls": (False, True),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
TAKEN = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "stream_options"}


class Refused(ValueError):
    """An answer in OpenAI's shape of errors. param: the argument it is about."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request. prompts: token ids; each gets n texts, whose seeds go up by one from sampling.seed."""

    prompts: list[list[int]]
    n: int
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


class Asker:
    """Reads bodies for one model. name: what it is called; positions: prompt and text together at most.

    template: a tokenizer of transformers that has a chat template, or None.
    """

    def __init__(self, name: str, positions: int, tokenizer: TextTokenizer, template: Any = None) -> None:
        self.name, self.positions, self.tokenizer, self.template = name, positions, tokenizer, template

    def completion(self, body: bytes) -> Asked:
        """A body of /v1/completions. Raises Refused."""
        values = self._fields(body, {"prompt"})
        if values.get("prompt") is None:
            raise Refused("prompt is missing; give a text, token ids, or a list of either", param="prompt")
        prompts = self._prompts(values["prompt"])
        return self._asked(values, prompts, _integer(values, "max_tokens", 16, 1))

    def chat(self, body: bytes) -> Asked:
        """A body of /v1/chat/completions. Raises Refused, also where the tokenizer has no chat template."""
        values = self._fields(body, {"messages", "max_completion_tokens"})
        if self.template is None:
            raise Refused(
                f"{self.name} has no chat template (its tokenizer_config.json names none, and there is no "
                "chat_template.jinja), so messages cannot be made a prompt; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        prompt = self._template(values.get("messages"))
        rest = self.positions - len(prompt)
        if rest < 1:
            raise Refused(self._too_long(len(prompt), 1), param="messages", code="context_length_exceeded")
        name = "max_tokens" if values.get("max_tokens") is not None else "max_completion_tokens"
        return self._asked(values, [prompt], _integer(values, name, rest, 1))

    def _fields(self, body: bytes, more: set[str]) -> dict[str, Any]:
        try:
            values = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise Refused(f"the body must be a JSON object, got {type(values).__name__}")
        for key, value in values.items():
            if key in NEUTRAL:
                if value is not None and not any(value == v and type(value) is type(v) for v in _numbers(NEUTRAL[key])):
                    only = " or ".join(map(json.dumps, NEUTRAL[key]))
                    raise Refused(
                        f"{key} is not supported: it must be {only}, or left out, got {_short(value)}", param=key
                    )
            elif key not in TAKEN | more | WITHOUT_EFFECT:
                allowed = ", ".join(sorted(TAKEN | more))
                raise Refused(f"unknown argument {_short(key)}; allowed are {allowed}", param=_short(key).strip('"'))
        if (model := values.get("model", self.name)) != self.name:
            message = f"model must be {self.name!r}, the one that is served here, got {_short(model)}"
            raise Refused(message, param="model", status=404, code="model_not_found")
        return values

    def _asked(self, values: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> Asked:
        n = _integer(values, "n", 1, 1)
        if n * len(prompts) > MOST_CHOICES:
            raise Refused(f"n={n} of {len(prompts)} prompts are too many: at most {MOST_CHOICES} in all", param="n")
        longest = max(map(len, prompts))
        if longest + max_tokens > self.positions:
            message = self._too_long(longest, max_tokens)
            raise Refused(message, param="max_tokens", code="context_length_exceeded")
        options = values.get("stream_options") or {}
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refused(f"stream_options must hold include_usage only, got {_short(options)}", param="stream_options")
        sampling = Sampling(
            _number(values, "temperature", 1.0, lowest=0.0, highest=100.0),
            _integer(values, "top_k", 0, 0) or None,
            _top_p(values),
            _integer(values, "seed", secrets.randbits(62), -(2**63), 2**64 - 1),
        )
        include_usage = _flag(options, "include_usage")
        return Asked(
            prompts, n, max_tokens, sampling, _stops(values.get("stop")), _flag(values, "stream"), include_usage
        )

    def _too_long(self, prompt: int, new: int) -> str:
        return f"the prompt's {prompt} tokens and max_tokens={new} exceed the model's {self.positions} positions"

    def _prompts(self, given: Any) -> list[list[int]]:
        several = isinstance(given, list) and given and isinstance(given[0], str | list)
        prompts = [self._prompt(one) for one in (given if several else [given])]
        if len(prompts) > MOST_CHOICES:
            raise Refused(f"prompt has {len(prompts)} texts, allowed are {MOST_CHOICES}", param="prompt")
        return prompts

    def _prompt(self, given: Any) -> list[int]:
        if isinstance(given, str):
            ids = self.tokenizer.encode(_text(given, "prompt"))
        elif isinstance(given, list) and all(type(token) is int for token in given):
            ids = given
            if wrong := [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]:
                limit = self.tokenizer.vocab_size - 1
                raise Refused(f"token ids of prompt must be 0 to {limit}, got {wrong[0]}", param="prompt")
        else:
            raise Refused(f"prompt must be a text, token ids, or a list of either, got {_short(given)}", param="prompt")
        if not ids:
            raise Refused("the prompt is empty; give at least one character", param="prompt")
        return ids

    def _template(self, messages: Any) -> list[int]:
        ok = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not ok:
            raise Refused(f"messages must be a list of at least one object, got {_short(messages)}", param="messages")
        plain = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(role, str) or not isinstance(content, str):
                raise Refused(
                    f"every message must have a role and a text as content, got {_short(message)}", param="messages"
                )
            plain.append({"role": _text(role, "messages"), "content": _text(content, "messages")})
        try:
            text = self.template.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template raises what it likes, for roles out of order for instance
            raise Refused(f"the chat template refuses these messages: {error}", param="messages") from None
        ids: list[int] = self.template(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise Refused("the chat template makes an empty prompt of these messages", param="messages")
        return ids


def chat_template_of(directory: str | Path) -> Any:
    """A tokenizer of transformers with the chat template of a directory, if it has one; else None.

    It is made of the text of three files of the directory. What its tokenizer_config.json names beyond the template and
    special tokens (other files, classes, code) is not opened. Raises ValueError for a template that is no text.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    config = config if isinstance(config, dict) else {}
    template = config.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    if not template:
        return None
    if isinstance(template, list):  # named ones, of which requests cannot choose
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or a list with a default")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    backend = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {name: token for name, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def _content(token: Any) -> str | None:
    """Of a special token, which may be written with its options."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _number(values: dict[str, Any], name: str, default: float, lowest: float, highest: float) -> float:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise Refused(f"{name} must be {lowest:g} to {highest:g}, got {_short(value)}", param=name)
    return float(value)


def _top_p(values: dict[str, Any]) -> float | None:
    value = _number(values, "top_p", 1.0, 0.0, 1.0)
    if value == 0:
        raise Refused("top_p must be above 0 and at most 1, got 0", param="top_p")
    return None if value == 1 else value


def _integer(values: dict[str, Any], name: str, default: int, lowest: int, highest: int = 2**31) -> int:
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not int or not lowest <= value <= highest:
        raise Refused(f"{name} must be an integer from {lowest} to {highest}, got {_short(value)}", param=name)
    return value


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, got {_short(value)}", param=name)
    return bool(value)


def _stops(given: Any) -> tuple[str, ...]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    ok = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)
    if not ok:
        raise Refused(
            f"stop must be a text, or a list of up to {MOST_STOPS}, none empty, got {_short(given)}", param="stop"
        )
    return tuple(_text(stop, "stop") for stop in stops)


def _text(value: str, param: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{param} holds half of a surrogate pair, which is no character", param=param) from None
    return value


def _numbers(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """An integer's float is as good."""
    return (*values, *(float(v) for v in values if type(v) is int))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
