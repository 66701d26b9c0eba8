"""The same comparison by one process and by two workers of a Ray cluster: the same answers.

    pip install 'powermc[ray]'
    python examples/08_ray_cluster.py

It starts a cluster of two workers on this machine and ends it again; --address host:port takes one that runs (powermc
and the model have to be there on every node). In float64 the paths are equal token for token; in float32 a tie between
two tokens may fall otherwise in another batch, and answers that differ are counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import powermc
from powermc.evaluation import tasks
from powermc.evaluation.comparison import Executor, InProcess, Plan, Source, compare, differences, load, write
from powermc.evaluation.comparison.plan import specs_of
from powermc.evaluation.comparison.ray_executor import LOCAL, RayExecutor
from powermc.evaluation.comparison.table import markdown
from powermc.evaluation.methods import Terms


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner", help="folder, .gguf file, hub id (default tiny-reasoner)")
    parser.add_argument("--dtype", default="float64", help="of the model's weights (default float64)")
    parser.add_argument("--limit", type=int, default=20, help="sums in a row to answer (default 20)")
    parser.add_argument("--workers", type=int, default=2, help="(default 2)")
    parser.add_argument("--address", default=LOCAL, help="of the cluster (default local: begun here)")
    parser.add_argument("--methods", default="greedy,temperature,power:steps=2:block_size=16", help="specs")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default 48)")
    options = parser.parse_args()

    cluster = RayExecutor(options.workers, options.address)
    task = tasks.get("arithmetic")
    plan = Plan(
        task=task,
        items=tasks.load(task, limit=options.limit),
        specs=specs_of(options.methods),
        terms=Terms(max_new_tokens=options.max_new_tokens),
        group=5,
    )
    source = Source(options.model, {"dtype": options.dtype})
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "alone", Path(folder) / "together"
        for out, executor in ((alone, InProcess()), (together, cluster)):
            timed(plan, source, out, executor)
        print(markdown(write(together)[0]))
        differ, total = differences(load(alone), load(together))
    print(f"{total - len(differ)} of {total} answers of the two runs are equal, token for token")
    for one in differ:
        print(f"  {one.spec}, question {one.question}: another path from token {one.token + 1} on")


def timed(plan: Plan, source: Source, out: Path, executor: Executor) -> None:
    """Run it, and say how long that took."""
    begun = time.monotonic()
    compare(plan, source, out, executor=executor)
    print(f"{type(executor).__name__}: {time.monotonic() - begun:.0f} s")


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
