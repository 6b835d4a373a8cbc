"""Serve until interrupted."""

from __future__ import annotations

import uvicorn

from dmattn_jax.io.tokenizers import Tokenizer
from serve.app import create_app
from serve.engine import Engine

GRACE_SECONDS = 5


def serve(engine: Engine, tokenizer: Tokenizer, name: str, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGINT or SIGTERM; those under way then get a few seconds.

    Raises: KeyboardInterrupt after SIGINT; SystemExit when the address cannot be had.
    """
    app = create_app(engine, tokenizer, name)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
    )
    uvicorn.Server(config).run()
