"""An HTTP server of OpenAI's routes over continuous batching. Imports dmattn_jax; nothing of the library imports it."""
