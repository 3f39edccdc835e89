"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.harness import wait_until

DEADLINE = 30.0
"""Seconds until what a page is waited for has come."""
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip


@contextmanager
def chromium(program: str, folder: Path) -> Iterator[str]:
    """A browser with a profile of its own; where it is driven from."""
    with (folder / "chromium.log").open("wb") as log:
        words = [program, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            said = folder / "profile" / "DevToolsActivePort"
            port, path = wait_until(lambda: said.read_text().split(), "Chromium", DEADLINE)
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.terminate()
            process.wait(20)


class Page:
    """One page, in a context of its own: no cookie and nothing stored is shared with another."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str) -> None:
        self._socket, self._session = socket, session
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []
        """What the browser logged as an error: exceptions, and whatever the page's policy did not let through."""

    async def call(self, method: str, **params: object) -> Any:
        """A command of the protocol; its result."""
        number = len(self._answers) + 1
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params, "sessionId": self._session})
        async with asyncio.timeout(DEADLINE):
            return await self._answers[number]

    async def listen(self) -> None:
        """Take what the browser sends."""
        async for message in self._socket:
            said = message.json()
            if "id" in said and said["id"] in self._answers and said.get("sessionId") == self._session:
                waiting = self._answers[said["id"]]
                if "error" in said:
                    waiting.set_exception(AssertionError(said["error"]))
                else:
                    waiting.set_result(said["result"])
            elif said.get("method") == "Page.loadEventFired":
                self._loaded.set()
            elif said.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(said["params"]["exceptionDetails"]))
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append(said["params"]["entry"]["text"])

    async def eval(self, expression: str) -> Any:
        """The value of an expression in the page, once it is settled."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Once an expression in the page is true, its value; looked at with each frame that is drawn."""
        script = f"""new Promise((done, fail) => {{
            const look = () => {{ const value = ({expression}); value ? done(value) : setTimeout(look, 20); }};
            setTimeout(() => fail(new Error("never: " + {expression!r})), {DEADLINE * 900}); look(); }})"""
        return await self.eval(script)

    async def open(self, url: str) -> None:
        """Go there, and wait until the page is drawn."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(DEADLINE):
            await self._loaded.wait()  # what is asked before is asked of the page before
        await self.until("document.documentElement.dataset.ready")

    async def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        code = {"Tab": 9, "Enter": 13}.get(key, ord(key[0]))
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def screenshot(self, file: Path) -> None:
        """The whole page, for people."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def new_page(
    browser: str, *, width: int = 1280, height: int = 900, dark: bool = False, language: str = "en"
) -> AsyncIterator[Page]:
    """A page of this size, for a reader of this language."""
    async with aiohttp.ClientSession() as session, session.ws_connect(browser, max_msg_size=0) as socket:

        async def call(method: str, **params: object) -> Any:
            await socket.send_json({"id": 0, "method": method, "params": params})
            while "result" not in (said := await socket.receive_json()) or said.get("id") != 0:
                pass
            return said["result"]

        context = (await call("Target.createBrowserContext"))["browserContextId"]
        target = (await call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        attached = await call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(socket, attached["sessionId"])
        listening = asyncio.create_task(page.listen())
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        agent = await page.eval("navigator.userAgent")
        await page.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await page.call("Emulation.setEmulatedMedia", features=[scheme])
        yield page
        listening.cancel()
        gone = {"id": -1, "method": "Target.disposeBrowserContext", "params": {"browserContextId": context}}
        await socket.send_json(gone)
