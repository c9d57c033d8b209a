"""The command `bitbell`: a table of verbs, each a typed function whose arguments are its flags.

Heavy packages are imported by the verb that needs them, so that `bitbell --help` answers at once.
"""

from __future__ import annotations

import difflib
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

# Verb -> where it lives, and what it does in one line.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("demo:demo", "train full precision, BBQ, QuEST and LSQ side by side, pack, generate, report"),
    "tokenize": ("commands:tokenize", "text -> a token data set"),
    "images": ("images:images", "labelled images -> an image set"),
    "train": ("commands:train", "a data set -> a run: train, or continue, a model"),
    "evaluate": ("commands:evaluate", "loss, perplexity, bits per byte and code entropy of a run or a packed model"),
    "classify": ("classify:classify", "the classes that a packed classifier or a run gives to pictures"),
    "pack": ("commands:pack", "a run -> a packed model in its true bits"),
    "export": ("export:export", "a packed model -> files for another runtime (ONNX, GGUF, compressed-tensors)"),
    "verify": ("commands:verify", "prove that a run and its packed model compute the same"),
    "generate": ("commands:generate", "text from a packed model or a run"),
    "serve": ("serve:serve", "an OpenAI-compatible endpoint with a web page"),
    "bench": ("bench:bench", "speed and memory of a model on this machine"),
    "compare": ("compare:compare", "methods x bits x seeds x learning rates -> one fair table"),
    "plan": ("plan:plan", "memory, bytes moved and time of a training on many GPUs"),
    "report": ("commands:report", "runs -> one HTML page with pictures"),
    "inspect": ("inspect:inspect", "a page about the codes, scales and weights of every layer"),
    "info": ("commands:info", "versions, hardware and the kernels in use"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `bitbell VERB ...`; return the exit status.

    1: it failed, 2: wrong usage, 130: interrupted, 141: whoever read the output has gone (as with SIGPIPE).
    """
    try:
        try:
            return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        finally:  # also on argparse's way out, SystemExit
            sys.stdout.flush()
    except BrokenPipeError as error:
        return _without_reader(error)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        import bitbell

        print(f"bitbell {bitbell.__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"bitbell: unknown command {verb!r}.{f' Did you mean {close[0]!r}?' if close else ''}", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    return _run(verb, rest)


def usage() -> str:
    """The help screen."""
    lines = [f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "bitbell trains neural networks in 1 to 4 bits, and runs them in those bits.",
            "",
            "usage: bitbell COMMAND [arguments]        bitbell COMMAND --help tells more",
            "",
            *lines,
        ]
    )


def _run(verb: str, arguments: list[str]) -> int:
    module, function = VERBS[verb][0].split(":")
    import tyro

    from bitbell.cli.configuration import take_config_file

    try:
        command = getattr(import_module(f"bitbell.cli.{module}"), function)
        if verb == "train":
            status = command(take_config_file(arguments))
        else:
            status = tyro.cli(command, prog=f"bitbell {verb}", args=arguments)
    except KeyboardInterrupt:
        print("bitbell: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError) as error:
        if not _is_for_the_user(error) or os.environ.get("BITBELL_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")  # of this process, under torchrun
        if rank == "0" or type(error).__name__ not in ("RankFailed", "TrainingDiverged"):  # the first says it for all
            print(f"bitbell {verb}{f' (process {rank})' * (rank != '0')}: {error}", file=sys.stderr)
        return 1
    return int(status or 0)


def _without_reader(error: BrokenPipeError) -> int:
    """The status where nobody reads our output any more (`bitbell ... | head -1`); what is left of it is dropped.

    Another pipe that broke, such as one between processes, is an error like any other.
    """
    stdout = select.poll()
    stdout.register(sys.stdout)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        print(f"bitbell: {error}", file=sys.stderr)
        return 1
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message alone says what to do. BITBELL_DEBUG=1 shows every traceback."""
    if isinstance(error, (ValueError, OSError)):
        return True
    if isinstance(error, ImportError):  # of ours, which names the extra to install; Python's own name a module
        return error.name is None
    return type(error).__name__ in ("TrainingDiverged", "VerificationError", "RankFailed")
