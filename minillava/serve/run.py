"""What `python -m minillava.serve` does: it opens a model, and then a port."""

import argparse
import os
import socket
import sys
from pathlib import Path

from minillava.cli.messages import Messages
from minillava.cli.opening import find_weights, open_assistant

EXTRA = ("starlette", "uvicorn", "h11", "anyio", "msgspec", "prometheus_client")
"""The packages of the extra [serve], as they are imported."""

KEY_VARIABLE = "MINILLAVA_API_KEY"


def run(args: argparse.Namespace) -> int:
    """Run `serve` with its flags; returns the exit status."""
    try:
        from minillava.serve import server
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA:
            raise
        told = f"serve needs packages that are not installed ({error.name})"
        raise ValueError(f"{told}; pip install 'minillava[serve]'") from None
    keys = read_keys(args)
    if not keys and not args.no_key and not is_local(args.host):
        told = f"--host {args.host} lets others in: give --api-key-file or ${KEY_VARIABLE}"
        print(f"error: {told}, or --no-key if that is meant", file=sys.stderr)
        return 2
    messages = Messages(args.verbose, args.quiet)
    try:
        listener = listen(args.host, args.port)
    except OSError as error:
        told = (
            f"{args.host}:{args.port}: {error.strerror}; choose another --port, or 0 for a free one"
        )
        print(f"error: {told}", file=sys.stderr)
        return 2
    with listener:
        weights = find_weights(args.weights, messages)
        assistant = open_assistant(args, weights, messages)
        return server.serve(args, assistant, weights, listener, keys, messages)


def is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def read_keys(args: argparse.Namespace) -> list[bytes]:
    """The keys of --api-key-file, one a line, and of the environment: a flag would show them to
    everybody who lists processes. Raises OSError."""
    if args.no_key:
        return []
    lines = args.api_key_file.read_bytes().splitlines() if args.api_key_file else []
    lines.append(os.environ.get(KEY_VARIABLE, "").encode())
    keys = [line.strip() for line in lines if line.strip()]
    if args.api_key_file and not keys:
        raise ValueError(f"{args.api_key_file}: has no key; write one, a line each")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to a port that no other program has; it listens once the model is open. Raises
    OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once, and not after 40 ms, if the socket says that it is TCP's
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # on Windows it lets two programs have one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def model_name(weights: str | Path) -> str:
    """What clients call the model: its folder's name, or its id."""
    path = Path(weights)
    return path.resolve().name if path.exists() else str(weights)
