"""The production WSGI server: waitress, set up for many slow streams at once.

A streamed answer holds a thread for as long as it runs, so there are more threads than the engine admits requests:
those beyond get their 429 at once. One request is read ahead per connection, which is how a client that left while its
answer is being made is noticed. What waitress itself refuses is answered in the API's error shape too.
"""

import json
import logging
import signal
import socket
import threading

from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask

from loraserve.errors import LoraserveError
from loraserve.server.problems import problem
from loraserve.server.state import EXTENSION, State

SPARE_THREADS = 16
"""Beyond running and queued requests: for refusals, the page, and health checks under full load."""
MAX_CONNECTIONS = 4096


class _JsonErrorTask(ErrorTask):
    def execute(self) -> None:
        error = self.request.error
        code = error.reason.lower().replace(" ", "_")
        body = json.dumps(problem(error.code, f"{error.reason}: {error.body}", code=code)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):
    error_task_class = _JsonErrorTask


class Server:
    """An app listening on an address.

    Args:
        app: what `create_app` built.
        host, port: where to listen; port 0 takes a free one.
        threads: how many requests are handled at once; by default more than the engine runs and queues.

    Raises:
        LoraserveError: the address cannot be had.
    """

    def __init__(self, app: Flask, host: str, port: int, threads: int | None = None) -> None:
        self._state: State = app.extensions[EXTENSION]
        service = self._state.service
        self._closer: threading.Thread | None = None
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            reason = error.strerror or error
            raise LoraserveError(
                f"cannot listen on {host}:{port} ({reason}); choose another --host or --port"
            ) from None
        self._server = create_server(
            app,
            sockets=[listening],
            threads=threads or service.max_num_seqs + service.max_queue + SPARE_THREADS,
            channel_request_lookahead=1,
            connection_limit=MAX_CONNECTIONS,
            backlog=1024,
            asyncore_use_poll=True,
            max_request_body_size=max(app.config["MAX_UPLOAD_BYTES"], app.config["MAX_FILE_BYTES"]) + 2**20,
            clear_untrusted_proxy_headers=True,
            ident="loraserve",
        )
        self._server.channel_class = _Channel
        self.port: int = listening.getsockname()[1]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
        self.url = f"http://{shown}:{self.port}"

    def run(self) -> None:
        """Serve until `close`."""
        self._server.run()
        if self._closer is not None:
            self._closer.join()

    def close(self) -> None:
        """End all answers with an error the client can read, then stop listening. Callable from any thread, once."""
        self._state.closing.set()
        self._server.task_dispatcher.shutdown()
        trigger = self._server.trigger
        with trigger.lock:  # another thread's wake-up must not close the pipe before this one has written to it
            trigger.thunks.append(lambda: wasyncore.close_all(self._server._map))
            trigger.pull_trigger()

    def run_until_signal(self) -> None:
        """Serve until Ctrl-C or SIGTERM; a second one ends the process at once. For the main thread only."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def close(number: int, frame: object) -> None:
            restore()
            self._closer = threading.Thread(target=self.close, name="loraserve-close")
            self._closer.start()

        for number in before:
            signal.signal(number, close)
        try:
            self.run()
        finally:
            restore()


def serve(app: Flask, host: str, port: int, threads: int | None = None) -> None:
    """Serve `app` until Ctrl-C or SIGTERM. Raises LoraserveError if the address cannot be had."""
    Server(app, host, port, threads).run_until_signal()
