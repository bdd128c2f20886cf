"""``groundscope plan …``: print the estimated bytes, forward passes and hours of a trace (`experiments.planning`)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from experiments.planning.estimate import SECONDS, TFLOPS, estimate
from experiments.run.context import Context
from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count


def show(arguments: Sequence[str]) -> int:
    """Print the estimate for a trace with these options.

    Raises
    ------
    ConfigError
        For invalid options, as for a run.
    """
    from rich.table import Table
    from rich.text import Text

    from experiments.cli.overrides import compose, read
    from experiments.run.folder import RunFolder
    from experiments.terminal_text import plain_console, size
    from experiments.validation import check

    numbers = {
        w.partition("=")[0]: w.partition("=")[2]
        for w in arguments
        if w.startswith(("examples=", "seconds=", "tflops="))
    }
    words = [w for w in arguments if w.partition("=")[0] not in numbers]
    try:
        examples = int(numbers["examples"]) if "examples" in numbers else None
        seconds = float(numbers.get("seconds", SECONDS))
        tflops = float(numbers.get("tflops", TFLOPS))
    except ValueError as error:
        msg = f"groundscope plan: {error}; write examples=100000, seconds=30 or tflops=100"
        raise ConfigError(msg) from error
    if (examples is not None and examples < 1) or not seconds > 0 or not tflops > 0:
        msg = "groundscope plan: examples, seconds and tflops must be above 0"
        raise ConfigError(msg)
    config, _ = compose(read(words).first())
    check(config)
    config.model.validate = False  # the estimate needs no verification of the model
    console = plain_console()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(config, RunFolder(Path(folder)), console)
        with console.status("measuring") if console.is_terminal else nullcontext():
            result = estimate(context, examples, seconds, tflops)
    how = {
        "measured": f"measured on {result.measured}",
        "thin": f"measured on {result.measured} with two layers of random weights",
        "operations": "operations counted, not measured",
    }
    measured = how[result.method] if result.seconds is not None else "sizes from the configuration only"
    console.print(
        f"model {config.model.path} on {config.model.device}, {size(result.weights)} of weights, "
        f"{format_count(result.examples, 'example')} to trace; {measured}",
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("array")
    table.add_column("bytes", justify="right")
    for name, count in result.sites.items():
        table.add_row(Text(name), size(count))
    table.add_row("total on disk", size(result.on_disk))
    console.print(table)
    if result.seconds is None or result.loading is None:
        console.print(
            f"{result.forwards} forward passes; hours are not estimated, because the weights of {config.model.path} are not "
            "on this machine, and a model of its width with two layers cannot be built or takes too much memory",
            markup=False,
        )
        return 0
    each = result.seconds / result.examples
    operations = f"{result.tera_operations:.3g} x 10^12 operations"
    passes = f"{result.forwards} forward passes, {operations}, {1000 * each:.1f} ms per example"
    loading = f", {result.loading:.0f} s to load the model" if result.method == "measured" else ""
    console.print(f"{passes}{loading}", markup=False)
    for parts in sorted({1, 4, config.trace.shards}):
        label = "one process" if parts == 1 else f"{parts} processes, trace.shards={parts}"
        console.print(f"{label}: {result.hours(parts):.2f} hours" + ("" if parts == 1 else " each"))
    console.print(_basis(result.method, config.model.device, tflops), markup=False)
    return 0


def _basis(method: str, device: str, tflops: float) -> str:
    """Return what the hours rest on."""
    if method == "operations":
        return (
            f"not checked: this machine has no device '{device}', so hours are operations (two per weight and token, and "
            f"attention) at {tflops:g} x 10^12 per second, without loading and writing; set tflops= to the speed of your GPU"
        )
    without = "; without the time to load the model and to write" if method == "thin" else ""
    return f"hours are for this machine; several processes need as many equal machines{without}"
