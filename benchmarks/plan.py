"""Hours that ``groundscope plan`` estimates without weights, against a trace that is then made.

    python benchmarks/plan.py [--quick] [--save] [--dtype bfloat16] [--device cpu] [--layers 2] [--tower 2] [--examples 12]

The model is a random LLaVA of the width of LLaVA-1.5-7B with few layers; the plan sees its folder without weights. ``--quick``
uses width 1024. Plan and trace run one after the other, so on a busy machine the ratio follows the load. Figures:

ratio
    estimated seconds per example over those of the trace, or the inverse if it is larger; goal: at most 1.3.
plan_seconds
    time of the plan; goal: at most 60.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from activation_store import trace
from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures
from benchmarks.real_width import write_model
from concepts.schema import ConceptDataset
from experiments.cli.overrides import compose
from experiments.planning.estimate import estimate
from experiments.run.context import Context
from experiments.run.folder import RunFolder
from experiments.stages.trace import traced_examples, traced_tokens
from lvlm import load_lvlm


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(
        __doc__, quick="a narrow model", save=True, device=True, dtypes=("bfloat16", "float16", "float32")
    )
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default: 2)")
    parser.add_argument("--tower", type=int, default=2, help="layers of the vision tower (default: 2)")
    parser.add_argument("--examples", type=int, default=12, help="traced examples (default: 12)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "full", options.layers, options.dtype, options.tower, quick=options.quick)
        without = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(folder / "full", folder / "outline", ignore=without)
        described = [f"model.path={folder / 'outline'}", f"model.device={options.device}", "data.n_images=20"]
        config, _ = compose(
            ["model=hf", *described, f"root={folder}/runs", f"trace.batch_size={max(1, options.examples // 4)}"]
        )
        context = Context(config, RunFolder(folder / "runs" / "x"), Console(file=io.StringIO()))
        start = time.perf_counter()
        plan = estimate(context, examples=options.examples)
        spent = time.perf_counter() - start
        data = traced_examples(context)
        some = ConceptDataset(data.name, data.examples[: options.examples], {})
        model = load_lvlm(folder / "full", device=options.device, validate=False)
        tokens = traced_tokens(context)
        start = time.perf_counter()
        store, sites = folder / "store", config.trace.sites
        trace(model, some, sites, tokens, store, batch_size=config.trace.batch_size, progress=False)
        took = time.perf_counter() - start
    if plan.seconds is None:
        parser.error("the plan estimated no time")
    ratio = max(plan.seconds / took, took / plan.seconds)
    figures = {
        "ratio": figure(ratio, "<= 1.3", options.examples, estimated=plan.seconds, traced=took),
        "plan_seconds": figure(spent, "<= 60"),
    }
    print_figures(figures, "plan without weights against a trace")
    device = describe_device("torch", "transformers", device=options.device, dtype=options.dtype)
    finish("plan", device, figures, save=options.save and not options.quick)


if __name__ == "__main__":
    main()
