"""The real web server around the fake engine, for clients that want a process of their own.

    PYTHONPATH=tests/support python tests/support/fake_server.py --port 0 --api-key k

Prints its URL as the first line; ends at SIGTERM.
"""

import argparse
import asyncio
import signal
import socket
import sys

from chat_kit import HERMES, chatting
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app
from moestro.server.serving.lifecycle import WebServer


async def serve(settings: Settings) -> None:
    listener = socket.create_server(("127.0.0.1", settings.port))
    server = WebServer(create_app(chatting(HERMES), settings), settings)

    def end() -> None:
        server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--allow-origin", action="append", default=[])
    given = vars(parser.parse_args())
    asyncio.run(serve(Settings(model="demo", **given)))


if __name__ == "__main__":
    main()
