"""Run by benchmarks/trace.py in a separate process: trace some examples and print the peak resident memory in MiB.

python benchmarks/_trace_memory.py EXAMPLES
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from activation_store import trace
from benchmarks._medium_llava import make_questions
from lvlm import wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor


def main() -> None:
    """Trace the number of examples in the first argument."""
    model = wrap_lvlm(build_model(), build_processor(), validate=False)
    data = make_questions(int(sys.argv[1]), "Is there a cat in the image?")
    with tempfile.TemporaryDirectory() as folder:
        trace(
            model,
            data,
            ["resid_post", "z"],
            ["last", "image:mean"],
            folder,
            batch_size=8,
            shard_size=64,
            progress=False,
        )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
