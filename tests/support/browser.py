"""A headless Chromium, driven through its own debugging protocol: what a page shows, shadow roots included."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1500,1100"
# Texts and pictures of a page and of all shadow roots in it.
CONTENT = """(() => {
  const texts = [], pictures = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) texts.push(node.textContent.trim());
    if (node.tagName === 'IMG' && node.naturalWidth > 0) pictures.push([node.naturalWidth, node.naturalHeight]);
    if (['STYLE', 'SCRIPT'].includes(node.tagName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return JSON.stringify({text: texts.join('\\n'), pictures});
})()"""


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[int]:
    """A browser with a new profile; its debugging port. Ended afterwards."""
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().strip()):
            assert process.poll() is None and time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.1)
        yield int(port.read_text().split()[0])
    finally:
        process.kill()
        process.wait()


def look(port: int, url: str, wanted: list[str], screenshot: Path | None = None, pictures: int = 0) -> dict:
    """Opens a page and waits until its text has all `wanted` words and it shows so many pictures.

    Returns {"text", "pictures": [[width, height]]}. Fails with what was there after 90 seconds.
    """
    opening = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
    with urllib.request.urlopen(opening) as answer:
        target = json.loads(answer.read())["webSocketDebuggerUrl"]
    page = websocket.create_connection(target, timeout=90, suppress_origin=True)
    try:
        call(page, "Page.navigate", url=url)
        deadline = time.monotonic() + 90
        while True:
            time.sleep(0.5)
            result = call(page, "Runtime.evaluate", expression=CONTENT)["result"]
            found = json.loads(result.get("value") or '{"text": "", "pictures": []}')
            missing = [word for word in wanted if word not in found["text"]]
            late = time.monotonic() > deadline
            if late or not (missing or len(found["pictures"]) < pictures):
                break
        if screenshot is not None:
            shot = call(page, "Page.captureScreenshot", format="png")
            screenshot.write_bytes(base64.b64decode(shot["data"]))
        assert not late, f"{missing} and {pictures} pictures are not on {url}: {found}"
        return found
    finally:
        page.close()


def call(page: websocket.WebSocket, method: str, **params) -> dict:
    """One command of the protocol, and its result; events in between are passed over."""
    page.send(json.dumps({"id": 1, "method": method, "params": params}))
    while True:
        answer = json.loads(page.recv())
        if answer.get("id") == 1:
            return answer.get("result", {})
