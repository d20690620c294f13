"""A headless Chromium, and what its pages ask for and complain about."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class Browser:
    """A headless Chromium that records what its pages ask for and complain about."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--hide-scrollbars", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        self.driver.set_page_load_timeout(60)

    def show(self, address: str, *, width: int = 1280, dark: bool = False) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(address)

    def until(self, script: str, *, seconds: float = 40) -> Any:
        """What the script returns, once that is true."""
        return WebDriverWait(self.driver, seconds, 0.1).until(lambda driver: driver.execute_script(f"return {script}"))

    def later(self, promise: str) -> Any:
        """What the script's promise comes to."""
        script = f"const done = arguments[arguments.length - 1]; ({promise}).then(done, (error) => done(String(error)))"
        return self.driver.execute_async_script(script)

    def allow_clipboard(self, origin: str) -> None:
        allowed = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self.driver.execute_cdp_cmd("Browser.grantPermissions", {"origin": origin, "permissions": allowed})

    def texts(self, selector: str) -> list[str]:
        # In one go: the page may swap its parts at any moment.
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent.trim())"
        found: list[str] = self.driver.execute_script(script, selector)
        return found

    def count(self, selector: str) -> int:
        return len(self.texts(selector))

    def picture(self, path: Path) -> None:
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(taken["data"]))

    def forget(self) -> None:
        """Leave the page, its cookies, and what was asked for and complained about so far."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.complaints()
        self.hosts()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._log("browser")]

    def hosts(self) -> set[str]:
        """Every host that something was asked of, other than data and blob URLs."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "blob", "chrome", "about")}

    def _log(self, name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.execute("getLog", {"type": name})["value"]
        return entries
