"""Make the pictures of README and docs: the demo is trained, and its report is photographed by Chromium.

uv run python docs/pictures.py [RUN_FOLDER]
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Write a PNG of an HTML file as it looks in a window of this size."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
    subprocess.run([chromium, *flags, f"--screenshot={picture}", page.resolve().as_uri()], check=True, timeout=120)


def main() -> None:
    """Train the demo, unless a run folder is given, and photograph its report."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "demo"
        if len(sys.argv) == 1:
            command = [sys.executable, "-m", "phoque", "train", "--preset", "demo", "--output-dir", str(run)]
            subprocess.run(command, check=True)
        photograph(run / "report.html", PICTURES / "train-report.png", 1100, 760)


main()
