"""The `spikingformer` command: one module per subcommand, imported only when it is used."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# command -> (module, what it does); the module has add_parser(subparsers) and run(args) -> exit status
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train a model from a recipe"),
    "evaluate": ("evaluate", "measure accuracy and loss of a model"),
    "predict": ("predict", "classify pictures or recordings"),
    "energy": ("energy", "count operations and estimate energy"),
    "report": ("report", "write an HTML page about a run"),
    "bench": ("bench", "time a model on this machine"),
    "convert": ("convert", "convert a published .pth into a checkpoint"),
    "export": ("export", "write a checkpoint in another format"),
    "data": ("data", "download, unpack and check data sets"),
    "reproduce": ("reproduce", "rerun a published table or row, or one of our comparisons"),
    "models": ("models", "list the models"),
    "doctor": ("doctor", "show what this machine can do and what is missing"),
}
BAD_INPUT = 2


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The whole parser. Only the module of `command` is imported; the other commands have a name and a summary."""
    parser = argparse.ArgumentParser(
        prog="spikingformer",
        description="Train, measure and deploy spiking vision transformers.",
        epilog="`spikingformer COMMAND --help` shows its options. Set SPIKINGFORMER_TRACEBACK=1 to see tracebacks.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, help_text) in COMMANDS.items():
        if name == command:
            importlib.import_module(f"{__name__}.{module}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=help_text, add_help=False)
    return parser


def _first_command(arguments: Sequence[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (0 done, 2 bad input, 75 saved and stopped by a signal)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(_first_command(arguments))
    args, late = parser.parse_known_args(arguments)
    # argparse takes a list of arguments only where it begins: what comes behind a later option is added here
    for name, belongs in (("overrides", lambda a: "=" in a), ("paths", lambda a: True)):
        if hasattr(args, name):
            found = [a for a in late if belongs(a) and not a.startswith("-")]
            getattr(args, name).extend(found)
            late = [a for a in late if a not in found]
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if args.version:
        from spikingformer import __version__

        print(f"spikingformer {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of our output has closed it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        known = isinstance(error, (ValueError, OSError)) or _is_out_of_memory(error)
        if os.environ.get("SPIKINGFORMER_TRACEBACK") or not known:
            raise
        sys.stdout.flush()
        print(f"spikingformer {args.command}: {_one_screen(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for GPUs only; on the CPU its words have to do."""
    words = ("can't allocate memory", "out of memory", "std::bad_alloc", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def _one_screen(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if _is_out_of_memory(error) and not isinstance(error, (ValueError, OSError)):
        reason = text.splitlines()[0]
        return f"not enough memory: use a smaller batch, smaller pictures or fewer time steps ({reason})"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    lines = text.splitlines()
    return "\n".join(lines if len(lines) <= 24 else [*lines[:22], f"... and {len(lines) - 22} more lines"])
