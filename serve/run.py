"""Serve until interrupted."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from dmattn_jax.io.tokenizers import Tokenizer
from serve.app import create_app
from serve.engine import Engine

GRACE_SECONDS = 5.0
"""What requests under way have to end after an interrupt; then they end with an error."""


def serve(engine: Engine, tokenizer: Tokenizer, name: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGINT or SIGTERM, and end by that signal once all is closed.

    Raises: KeyboardInterrupt after SIGINT; SystemExit when the address cannot be had.
    """
    app = create_app(engine, tokenizer, name)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=round(2 * GRACE_SECONDS),
    )
    _Server(config, engine).run()


class _Server(uvicorn.Server):
    """Ends requests itself after the grace, with a word to each, before uvicorn would cut their connections."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def end() -> None:
            await asyncio.sleep(GRACE_SECONDS)
            await asyncio.to_thread(self._engine.close)

        ending = asyncio.create_task(end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
