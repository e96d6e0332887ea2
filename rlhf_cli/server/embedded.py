"""The flow server inside the training process: a free loopback port, a thread of its own, and simulated raters."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from types import TracebackType

from rlhf_cli.errors import FlowUnavailable
from rlhf_cli.server.app import create_app
from rlhf_cli.server.crowd import Crowd, CrowdSettings
from rlhf_cli.server.protocol import listen, server_of
from rlhf_cli.server.store import LEASE_S, Store
from rlhf_cli.server.tastes import taste

CLIENT_ID = "client_embedded"


class EmbeddedFlow:
    """A running server for the time of a `with` block; everything it learns is in `store_path` and goes on from there.

    Args:
        store_path: SQLite file, created where it is not.
        crowd: Raters to simulate; None leaves the voting to others.
        seed: Of the raters' decisions and of the choice of pairs.

    Attributes:
        url, client_id, client_secret: For a client; the secret is in memory alone and is revoked at the end.
        store: The server's memory, to read votes from.
    """

    url: str
    client_secret: str
    store: Store

    def __init__(self, store_path: Path, crowd: CrowdSettings | None = None, seed: int = 0) -> None:
        self.client_id = CLIENT_ID
        self._path = store_path
        self._crowd = crowd
        self._seed = seed
        if crowd is not None:
            taste(crowd.taste)  # an unknown taste is found here, not in a thread

    def __enter__(self) -> EmbeddedFlow:
        lease_s = self._crowd.patience_s if self._crowd else LEASE_S
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.store = Store(self._path, rng=random.Random(self._seed), lease_s=lease_s)
        try:
            _, self.client_secret = self.store.tokens.add("client", "embedded", token_id=CLIENT_ID)
            raters = self.store.tokens.add_simulated("embedded", self._crowd.raters if self._crowd else 0)
            self._rater_tokens = [secret for _, secret in raters]
            self._socket = listen("127.0.0.1", 0)
        except BaseException:
            self.store.close()
            raise
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rlhf-flow-server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self.__exit__(None, None, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._socket.close()
        self.store.tokens.revoke(CLIENT_ID)
        self.store.close()
        if self._failure is not None and (error is None or isinstance(error, FlowUnavailable)):
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # it belongs to the thread that opened us
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = server_of(create_app(self.store))
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.002)
        tasks = [serving, asyncio.create_task(self._end.wait())]
        if self._crowd is not None:
            crowd = Crowd(self.url, self._rater_tokens, self._crowd, self._seed)
            tasks.append(asyncio.create_task(crowd.run()))
        self._ready.set()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        server.should_exit = True
        await serving
        for task in done:
            task.result()  # a crowd that died is not silence, it is a failure
