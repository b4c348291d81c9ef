"""Fill masks over HTTP.

POST /fill-mask takes {"inputs": TEXT or [TEXT, ...], "parameters": {"top_k": K}} and gives what Transformers' fill-mask
pipeline gives; GET /health says that all is well. Requests that come at the same time are predicted together.
"""

from __future__ import annotations

import argparse
import signal
import threading

from megatron_bert.bundled import MINI, NAME
from megatron_bert.cli.options import add_prediction_options, count
from megatron_bert.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert serve`."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s; 0.0.0.0: others' requests, too)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: one that is free")
    parser.add_argument(
        "--top-k", type=count, default=20, metavar="K", help="the most predictions for a mask that a request can ask "
        "for (default: %(default)s)",
    )  # fmt: skip
    add_prediction_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to end (SIGTERM, Ctrl-C); requests that have come are answered. Told twice, it ends."""
    from transformers.utils import logging as transformers_logging

    from megatron_bert.inference.fill_mask import load_encoder, load_mask_filler
    from megatron_bert.parallel.launch import is_launched
    from megatron_bert.serving.http import MaskServer

    if is_launched():
        raise UserError("serve is one process with a whole model; start one for each GPU, each with its --port")
    if not args.host:
        raise UserError("--host is empty, which would be all addresses; 0.0.0.0 says that")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} is not between 0 and 65535")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = load_encoder(args.model, truncate=args.truncate)
    filler = load_mask_filler(
        args.model, encoder, device=args.device, dtype=args.dtype, top_k=args.top_k, batch_tokens=args.batch_tokens
    )
    name = NAME if args.model == MINI else args.model  # where it is installed is nobody's business
    try:
        server = MaskServer((args.host, args.port), filler, name, args.top_k)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {args.host}, port {args.port}: {error}") from error
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        threading.Thread(target=server.serve_forever, name="accepting", daemon=True).start()
        where = f"[{args.host}]" if ":" in args.host else args.host
        of = server.health()
        print(f"{of['model']} on http://{where}:{server.server_port} ({of['device']}, {of['dtype']})", flush=True)
        while not told.wait(0.5):  # a signal that another thread got is handled when this one wakes
            pass
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # not an exception: Python would abort beside a thread that computes
        server.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
