"""Serve the studio: a page on which people paint a mask, generate a volume of it, compare, and take it home.

    medvolume studio --pipeline weights/hippocampus
    medvolume studio --pipeline shipped:hippocampus --mask_pipeline shipped:hippocampus-masks --port 8000
    medvolume studio --pipeline weights/hippocampus weights/hippocampus-fast

Several pipelines are compared on one mask: one is in memory at a time, and another is loaded when a volume of it is
asked for. They must agree in labels, channels and intensity windows.

Open the address that it prints: it holds a token, without which nothing is served. Only this machine can reach the
page, unless --host says otherwise. Each browser has a session of its own. Its files lie in a temporary folder, and are
removed when the session ends, or the studio. docs/studio.md shows the page.
"""

import argparse
from collections.abc import Sequence

from cli.command import ArgumentParser, console_program, run_command
from cli.generation import PRECISIONS
from cli.settings import NonNegativeInt, Number, PositiveInt

PORT = 7860


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(prog=console_program(), description=__doc__)
    pipeline_help = "pipeline folder, shipped:NAME or Hub repository; the first of several is loaded at the start"
    parser.add_argument("--pipeline", required=True, nargs="+", help=pipeline_help)
    parser.add_argument(
        "--mask_pipeline", help="pipeline of label maps, for masks to start from; it is loaded when it is used"
    )
    parser.add_argument("--port", type=Number(NonNegativeInt), default=PORT, help=f"0 takes a free one ({PORT})")
    host_help = "address to listen at; any other than 127.0.0.1 lets others reach the page (127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    upload_help = "what the uploads of one session may hold, in MiB (1024)"
    parser.add_argument("--upload_mb", type=Number(PositiveInt), default=1024, help=upload_help)
    parser.add_argument("--device", help="such as cuda or cpu (cuda if there is one)")
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="no is float32 (no)")
    return parser.parse_args(args)


if __name__ == "__main__":  # arguments first: the other imports take seconds
    run_command(lambda: parse(None))

from files.shipped import expand_path
from studio.server import ServerSettings, serve


def main(args: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    options = parse(args)
    serve(
        ServerSettings(
            pipeline=[expand_path(name) for name in options.pipeline],
            mask_pipeline=None if options.mask_pipeline is None else expand_path(options.mask_pipeline),
            host=options.host,
            port=options.port,
            upload_mb=options.upload_mb,
            device=options.device,
            precision=options.precision,
        )
    )
