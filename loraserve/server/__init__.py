"""The HTTP server: OpenAI's API with an adapter per request, the adapters' own routes, and the chat page."""

from loraserve.server.app import create_app
from loraserve.server.wsgi import Server, serve

__all__ = ["Server", "create_app", "serve"]
