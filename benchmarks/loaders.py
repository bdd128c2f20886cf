"""Time and memory of loading a large annotation file, against reading the same file with `json.load`.

    python benchmarks/loaders.py [--quick] [--repeats 3]

A synthetic file in the layout of COCO's instances (500 MB, or 50 MB with ``--quick``; boxes and outlines of realistic size, 7
objects per image) and an image file for each entry are written to a temporary folder. `loaders.coco` streams the file, makes
questions about every image and reads every image's header. The baseline parses the whole file with `json.load`, which is the
first step of a loader that does not stream. Each repetition runs in a separate process. Figures:

megabytes, images, questions
    size of the input and of the result;
seconds, processor_seconds, peak_gib
    wall-clock time, processor time and peak memory of the loader, medians over repetitions;
json_load_seconds, json_load_peak_gib
    the same of the baseline, measured once.
"""

from __future__ import annotations

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
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress, wide_console

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = 80
OBJECTS = 7
"""Objects per image, about as in COCO."""
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


def write_annotations(folder: Path, size: int) -> tuple[Path, int]:
    """Write an annotation file of about `size` bytes and its images; return the file and the number of images."""
    rng = random.Random(0)
    images = folder / "images"
    images.mkdir()
    path = folder / "instances.json"
    # Outlines with as many points as in COCO, from a pool: generating each one would take longer than reading it.
    pool = [json.dumps([[round(rng.uniform(0, 600), 2) for _ in range(2 * rng.randint(10, 50))]]) for _ in range(997)]
    entries = []
    number = written = 0
    with path.open("w") as file:
        written += file.write('{"info": {"description": "synthetic"}, "annotations": [')
        while written < size:
            name = f"{len(entries) + 1:012d}.png"
            # Images are hard links to a few files; a file system limits the number of links of a file.
            image_path = folder / f"{len(entries) // 10_000}.png"
            if not image_path.exists():
                Image.new("RGB", (640, 480), "red").save(image_path)
            os.link(image_path, images / name)
            entries.append({"id": len(entries) + 1, "file_name": name, "width": 640, "height": 480, "license": 1})
            for _ in range(OBJECTS):
                number += 1
                x, y, w, h = (round(rng.uniform(0, 300), 2) for _ in range(4))
                written += file.write(
                    f'{", " if number > 1 else ""}{{"segmentation": {pool[number % len(pool)]}, "area": {w * h:.4f}, '
                    f'"iscrowd": 0, "image_id": {len(entries)}, "bbox": [{x}, {y}, {w}, {h}], '
                    f'"category_id": {rng.randint(1, CATEGORIES)}, "id": {number}}}'
                )
        file.write('], "images": ' + json.dumps(entries))
        categories = [{"supercategory": "thing", "id": i, "name": f"thing{i}"} for i in range(1, CATEGORIES + 1)]
        file.write(', "categories": ' + json.dumps(categories) + "}")
    return path, len(entries)


def run_in_process(work: str, **names: str) -> tuple[float, float, float, int]:
    """Run code of `WORK` in a separate process; return wall-clock seconds, processor seconds, peak MiB, and its count."""
    code = COMMON.format(root=str(ROOT), work=WORK[work].format(**names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, processor, peak, count = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor, peak, count


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="a file of 50 MB, one repetition")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of the loader")
    options = parser.parse_args()
    size, n = (50_000_000, 1) if options.quick else (500_000_000, options.repeats)
    results: dict[str, list[tuple[float, float, float, int]]] = {work: [] for work in WORK}
    with tempfile.TemporaryDirectory() as name:
        with progress("writing the annotation file"):
            path, images = write_annotations(Path(name), size)
        megabytes = path.stat().st_size / 1e6
        names = {"file": str(path), "images": str(path.parent / "images")}
        for repetition in range(n):
            for work in list(WORK) if repetition % 2 == 0 else list(WORK)[::-1]:
                if work == "loader" or repetition == 0:  # the baseline is measured once
                    with progress(f"repetition {repetition + 1} of {n}, {work}"):
                        results[work].append(run_in_process(work, **names))
    table = Table("", "seconds", "processor seconds", "peak MiB", title=f"file of {megabytes:.0f} MB, {images} images")
    for work, rows in results.items():
        table.add_row(work, *(f"{statistics.median(row[i] for row in rows):.{1 - i // 2}f}" for i in range(3)))
    wide_console().print(table)
    seconds, processor, peak = (statistics.median(row[i] for row in results["loader"]) for i in range(3))
    figures = {
        "megabytes": figure(round(megabytes)),
        "images": figure(images),
        "questions": figure(results["loader"][0][3]),
        "seconds": figure(seconds, "<= 60", n),
        "processor_seconds": figure(processor, "", n),
        "peak_gib": figure(peak / 1024, "<= 1", n),
        "json_load_seconds": figure(results["json.load"][0][0]),
        "json_load_peak_gib": figure(results["json.load"][0][2] / 1024),
    }
    print_figures(figures, "with --quick, the goals apply to a tenth of the size" if options.quick else "")
    finish("loaders", f"{describe_device()}, Python {platform.python_version()}", figures)


if __name__ == "__main__":
    main()
