"""A headless Chromium for tests, spoken to over two pipes in its DevTools protocol: no driver, no package, no port.

    with Chromium(find()) as browser:
        page = browser.open(path.as_uri(), width=390)
        page.run("document.title"), page.problems, page.asked

Every name resolves to nothing, so a page that wants something from a network does not get it, and `asked` says what.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOCAL = ("file:", "data:", "blob:", "about:", "chrome:", "chrome-error:")
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, " ": 32}


def find() -> str | None:
    """A browser on this machine: $CHROME, or the first one found."""
    return next((found for name in (os.environ.get("CHROME", ""), *NAMES) if name and (found := shutil.which(name))), None)


class Chromium:
    """A running browser; a `with` block ends it."""

    def __init__(self, binary: str):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                 "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.profile.name}", "about:blank"]
        start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'             # Chromium reads from 3 and writes to 4
        self.process = subprocess.Popen(["bash", "-c", start, "bash", binary, *flags], pass_fds=(theirs_in, theirs_out),
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.into, self.rest, self.number, self.pages = ours_out, ours_in, b"", 0, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close", within=5)
        except (OSError, TimeoutError):
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.into)
        self.profile.cleanup()

    def message(self, until: float) -> dict:
        """The next message.  TimeoutError when none has come until then, OSError when the browser has ended."""
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.into, 1 << 16)
            if not part:
                raise OSError("the browser has ended")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        page = self.pages.get(message.get("sessionId"))
        if page and "method" in message:
            page.heard(message["method"], message["params"])
        return message

    def call(self, method: str, session: str | None = None, within: float = 60, **parameters) -> dict:
        """One command and its result.  RuntimeError with the browser's words when it refuses."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + within
        while True:
            answer = self.message(until)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url: str, width: int = 1400, height: int = 900, dark: bool = False, scripts: bool = True) -> "Page":
        """A page, loaded, its mathematics set."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        page.call("Page.navigate", url=url)
        page.until_loaded()
        if scripts:
            page.run("(async () => { if (window.MathJax && MathJax.startup) await MathJax.startup.promise; })()")
        return page


class Page:
    """One tab.  problems: errors that scripts threw or wrote; asked: addresses that the page wanted from elsewhere."""

    def __init__(self, browser: Chromium, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target
        self.problems, self.asked, self.loaded = [], [], False

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.session, **parameters)

    def heard(self, method: str, params: dict) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(" ".join(str(part.get("value", part.get("description"))) for part in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(LOCAL):
            self.asked.append(params["request"]["url"])

    def until_loaded(self, within: float = 60) -> None:
        until = time.monotonic() + within
        while not self.loaded:
            self.browser.message(until)

    def run(self, script: str):
        """The value of an expression, a promise awaited.  RuntimeError with the script's error."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def until(self, script: str, within: float = 20):
        """Wait until an expression is true -> its value.  TimeoutError names it."""
        until = time.monotonic() + within
        while True:
            value = self.run(script)
            if value:
                return value
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {script}")
            time.sleep(0.05)

    def size(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def press(self, key: str) -> None:
        """One key, down and up, to whatever has the focus."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else None)
        code = KEYS.get(key, ord(key[0].upper()))
        down = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """The mouse, on the middle of the first element that fits; scrolled into sight first."""
        place = self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView("
                         "{block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
                         " return [b.x + b.width / 2, b.y + b.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def picture(self, path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]
