"""Makes the README's pictures of the widgets: ``python tests/browser/pictures.py docs``.

The picker and the monitor show endpoints that echo at a set speed; the comparison is measured on the small real model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from lab import laboratory
from PIL import Image

MOST_BYTES = 80_000
WIDTH = 860
SETUP = """
import swarmkit as sk, pandas as pd
fault = "http_401:address=127.0.0.4"
swarm = sk.local(1, engine="echo", addresses=9, tokens_per_s=14, max_num_seqs=24,
                 speeds={"127.0.0.6": {"tokens_per_s": 5, "max_num_seqs": 12}}, faults=[fault])
ends = [sk.AgentEndpoint(e.host, e.port, {"rack": "abc"[i // 3]}, api_key=e.api_key)
        for i, e in enumerate(swarm.endpoints)]
genes = pd.DataFrame({"gene": [f"b{i:04}" for i in range(1, 4000)]})
"""


def shoot(what: Any, path: Path) -> None:
    """A picture with few colours, since README pages are opened often."""
    what.screenshot(path=str(path))
    picture = Image.open(path).convert("RGB")
    picture = picture.crop((0, 0, picture.width, picture.height - 4))  # the edge of the cell below
    picture.quantize(160).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} is larger than {MOST_BYTES:,} bytes")


def main(folder: Path) -> None:
    """Write picker.png, monitor.png and comparison.png."""
    cells = [
        SETUP,
        "picker = sk.EndpointPicker([('127.0.0.1', 9), *ends], model=swarm.model)\npicker",
        "picker.probe().result(); picker.selected = [e for e in ends if e.tags['rack'] != 'c']",
        "pool = picker.use()",
        "run = genes.swarm.submit('What does the gene {gene} do in E. coli?', max_tokens=64, progress=False)\n"
        "sk.RunMonitor(run)",
        "run.cancel()",
        "real = sk.local(2, engine='openvino')\n"
        "found = genes.swarm.compare('What is the gene {gene}?', pool=sk.connect(real), sample=64, max_tokens=24)\n"
        "found.plot()",
    ]
    with tempfile.TemporaryDirectory() as scratch, laboratory(Path(scratch)) as lab:
        lab.write("pictures", cells)
        with lab.open("pictures", width=WIDTH + 100, height=1000, scale=2) as page:
            for cell in (0, 1, 2):
                page.run(cell)
            page.area(1).get_by_text("9 up").wait_for()
            shoot(page.area(1).locator(".jp-OutputArea-output").first, folder / "picker.png")
            page.run(3)
            page.run(4)
            page.tab.wait_for_timeout(6000)
            shoot(page.area(4).locator(".jp-OutputArea-output").first, folder / "monitor.png")
            page.run(5)
            page.run(6)
            shoot(page.area(6).locator("img"), folder / "comparison.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
