"""A headless Chromium, driven over its DevTools protocol through two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60


def find_chromium():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. ``requests`` are the addresses that it has asked for, ``errors`` what its console says."""

    def __init__(self, program, folder):
        ends = [os.pipe(), os.pipe()]
        reads, writes = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (ends[0][0], ends[1][1]))

        def connect():
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                     "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile")  # fmt: skip
        self._process = subprocess.Popen(
            [program, *arguments],
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (ends[0][0], ends[1][1], reads, writes):
            os.close(fd)
        self._out, self._in, self._rest, self._number = ends[0][1], ends[1][0], b"", 0
        self.requests, self.errors, self._session = [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method, **parameters):
        """The result of a command of the protocol."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _read(self):
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            self._rest += os.read(self._in, 1 << 20)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(parameters["entry"]["text"])

    def open(self, path, width=1400, scheme="light", fragment=""):
        """Loads a file in a window of this width."""
        self.requests, self.errors = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=1000,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{Path(path).resolve().as_uri()}{fragment}")
        self.run("new Promise(done => document.readyState === 'complete' ? done() : "
                 "addEventListener('load', () => done()))")  # fmt: skip

    def run(self, script):
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path):
        """Saves the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def download(self, folder, selector, name):
        """The text of the file that a click saves."""
        session, self._session = self._session, None
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = session
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        end = time.monotonic() + SECONDS
        while not (Path(folder) / name).exists() and time.monotonic() < end:
            time.sleep(0.05)
            self.run("0")
        time.sleep(0.1)
        return (Path(folder) / name).read_text("utf-8")
