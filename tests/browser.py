"""Pages in a real browser: Chromium without a window. Tests that need one are skipped where there is none."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The page is put into a frame, because a window is never narrower than 500 pixels.
_AROUND = """<!doctype html>
<style>
:root { color-scheme: light dark } body { margin: 0 }
iframe { border: 0; width: WIDTHpx; height: 2000px }
</style>
<iframe srcdoc="PAGE"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  document.querySelector("#found").textContent = JSON.stringify((() => { SCRIPT })());
});
</script>
"""


def in_browser(page: str, script: str, folder: Path, *, width: int = 1280, dark: bool = False) -> Any:
    """What `script` returns in the opened page; there it has the document `page` and the window `view`.

    Fails if anything is written to the browser's console, as every error of a page is.
    """
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    around = _AROUND.replace("WIDTH", str(width)).replace("SCRIPT", script).replace("PAGE", html.escape(page))
    (folder / "around.html").write_text(around, encoding="utf-8")
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--window-size={max(width, 500)},2000", "--virtual-time-budget=5000", "--enable-logging=stderr"),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}"),
            *("--dump-dom", (folder / "around.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not said, "\n".join(said)
    returned = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert returned is not None and returned[1], done.stderr[-2000:]
    return json.loads(html.unescape(returned[1]))
