"""Print the peak memory of a trace in a separate process, in mebibytes. Used by benchmarks/trace.py."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from activation_store import trace
from benchmarks.trace import questions
from lvlm import wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor


def main() -> None:
    """Trace as many examples as the first argument says."""
    model = wrap_lvlm(build_model(), build_processor(), validate=False)
    data = questions(int(sys.argv[1]), "Is there a cat in the image?")
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
