"""What reading a large annotation file takes: time, and the memory of the process at its peak.

    python benchmarks/loaders.py [--quick]

Writes a synthetic file in the layout of COCO's instances (500 MB, or 50 MB with --quick: boxes and outlines as the real
one has them, 7 objects an image), with an image on disk for each entry, into a temporary folder that is removed. The
loader reads all of it, makes questions about every image and reads every image's header; for comparison the whole file is
read with `json.load`, which is what a loader without streaming begins with. Each run is a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = 80
OBJECTS = 7
"""Objects an image, as in COCO."""
COMMON = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(json.dumps([seconds, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, count]))
"""
WORK = {
    "loader": """
from concepts import loaders
data = loaders.coco({file!r}, {images!r})
count = len(data)
""",
    "json.load": """
with open({file!r}) as file:
    count = len(json.load(file)["annotations"])
""",
}


def write(folder: Path, size: int) -> tuple[Path, int]:
    """Write a file of about so many bytes, and an image for each entry; return it and the number of images."""
    chance = random.Random(0)
    images = folder / "images"
    images.mkdir()
    path = folder / "instances.json"
    # Outlines of as many points as in COCO, from a pool: generating each separately would take longer than reading it.
    pool = [
        json.dumps([[round(chance.uniform(0, 600), 2) for _ in range(2 * chance.randint(10, 50))]]) for _ in range(997)
    ]
    entries = []
    number = written = 0
    with path.open("w") as file:
        written += file.write('{"info": {"description": "synthetic"}, "annotations": [')
        while written < size:
            name = f"{len(entries) + 1:012d}.png"
            # A file may have some ten thousand names, not more.
            image_path = folder / f"{len(entries) // 10_000}.png"
            if not image_path.exists():
                Image.new("RGB", (640, 480), "red").save(image_path)
            os.link(image_path, images / name)
            entries.append({"id": len(entries) + 1, "file_name": name, "width": 640, "height": 480, "license": 1})
            for _ in range(OBJECTS):
                number += 1
                x, y, w, h = (round(chance.uniform(0, 300), 2) for _ in range(4))
                written += file.write(
                    f'{", " if number > 1 else ""}{{"segmentation": {pool[number % len(pool)]}, "area": {w * h:.4f}, '
                    f'"iscrowd": 0, "image_id": {len(entries)}, "bbox": [{x}, {y}, {w}, {h}], '
                    f'"category_id": {chance.randint(1, CATEGORIES)}, "id": {number}}}'
                )
        file.write('], "images": ' + json.dumps(entries))
        categories = [{"supercategory": "thing", "id": i, "name": f"thing{i}"} for i in range(1, CATEGORIES + 1)]
        file.write(', "categories": ' + json.dumps(categories) + "}")
    return path, len(entries)


def measured(work: str, **names: str) -> tuple[float, float, float, int]:
    """Run in a separate process; return wall-clock seconds, processor seconds, peak MiB, and the count."""
    code = COMMON.format(root=str(ROOT), work=WORK[work].format(**names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, processor, peak, count = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor, peak, count


def main() -> None:
    """Run, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    quick = options.quick
    size, repeats = (50_000_000, 1) if quick else (500_000_000, options.repeats)
    with tempfile.TemporaryDirectory() as place:
        file, images = write(Path(place), size)
        names = {"file": str(file), "images": str(file.parent / "images")}
        length = file.stat().st_size
        measurements: dict[str, list[tuple[float, float, float, int]]] = {work: [] for work in WORK}
        for i in range(repeats):
            for work in list(WORK) if i % 2 == 0 else list(WORK)[::-1]:
                if work == "loader" or i == 0:  # once is enough for what is only there for comparison
                    measurements[work].append(measured(work, **names))
    seconds, processor, peak = (statistics.median(row[i] for row in measurements["loader"]) for i in range(3))
    table = Table(
        "", "seconds", "of the processor", "peak MiB", title=f"synthetic file of {length / 1e6:.0f} MB, {images} images"
    )
    for work, rows in measurements.items():
        table.add_row(work, *(f"{statistics.median(r[i] for r in rows):.{1 - i // 2}f}" for i in range(3)))
    Console().print(table)
    small = " (of a tenth of the size)" if quick else ""
    figures = {
        "megabytes": {"value": round(length / 1e6), "goal": "", "holds": True, "n": 1},
        "images": {"value": images, "goal": "", "holds": True, "n": 1},
        "questions": {"value": measurements["loader"][0][3], "goal": "", "holds": True, "n": 1},
        "seconds": {"value": round(seconds, 1), "goal": f"<= 60{small}", "holds": seconds <= 60, "n": repeats},
        "processor_seconds": {"value": round(processor, 1), "goal": "", "holds": True, "n": repeats},
        "peak_gib": {"value": round(peak / 1024, 3), "goal": f"<= 1{small}", "holds": peak <= 1024, "n": repeats},
        "json_load_seconds": {"value": round(measurements["json.load"][0][0], 1), "goal": "", "holds": True, "n": 1},
        "json_load_peak_gib": {
            "value": round(measurements["json.load"][0][2] / 1024, 2),
            "goal": "",
            "holds": True,
            "n": 1,
        },
    }
    versions = {"device": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "loaders", **versions, "figures": figures}))


if __name__ == "__main__":
    main()
