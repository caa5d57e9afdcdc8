"""The HTTP server: the OpenAI API for one model, with depth per token."""
