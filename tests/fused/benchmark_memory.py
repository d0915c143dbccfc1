"""Prints the memory that steps of found models and of lists need: unfused, fused, and fused with placed lists.

    python tests/fused/benchmark_memory.py [--json] [--dim 1024] tpu-v5e [name ...]

Targets are those of `adalomo_jax.memory`. Only a model's own arrays are allocated, and nothing is run. A row that ends
in "MORE" is a model whose fused step needs more than the unfused one; there should be no such row.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import lists_as_found
import lists_of_layers
import models_as_found
from compiled import tree_bytes
from found_model import Model, Sizes

from adalomo_jax import adalomo, fuse
from adalomo_jax.fused.plan.placed_tree import is_stacked
from adalomo_jax.memory import TARGETS, Target, compile_usage, prepare

LAYERS, LAYERS_OF_LIST = 32, 4
"""Enough that the weights of each model are larger than a TPU's vector memory, which is not counted."""


class Row(NamedTuple):
    """Bytes of a model on a target."""

    target: str
    model: str
    weights: int
    unfused: int
    fused: int
    placed: int | None
    """The fused step with lists of layers stacked; None if there are no such lists."""

    @property
    def excess(self) -> int:
        """The bytes that the fused step, placed or not, needs beyond the unfused one; negative if it needs fewer."""
        return max(self.fused, self.fused if self.placed is None else self.placed) - self.unfused


def models(dim: int, length: int) -> dict[str, Callable[[], Model]]:
    """All models, by name: the found ones, the found ones with lists, and the lists that test reroll."""
    scanned = Sizes(layers=LAYERS, dim=dim, batch=1, length=length)
    # Lists are twice as wide because they have fewer layers: each further layer takes seconds to compile.
    listed = Sizes(layers=LAYERS_OF_LIST, dim=2 * dim, batch=1, length=length)
    lists_of_layers.DIM, lists_of_layers.LENGTH, lists_of_layers.BATCH = 2 * dim, length, 1
    found = {name: partial(make, scanned) for name, make in models_as_found.MODELS.items()}
    found["nnx list"] = partial(models_as_found.MODELS["nnx list"], listed)
    found |= {f"list: {name}": partial(make, listed) for name, make in lists_as_found.MODELS.items()}
    return found | {f"list: {name}": partial(of_list, make) for name, make in lists_of_layers.MODELS.items()}


def of_list(make: Callable[[], lists_of_layers.ListModel]) -> Model:
    """A list model in the form of the other models."""
    model = make()
    return Model(model.loss_fn, model.params, lists_of_layers.data, {})


def abstract(make: Callable[[], Model]) -> Model:
    """A model with shapes as parameters. It is made with arrays: its loss may hold some, such as running means."""
    model = make()
    return model._replace(params=jax.eval_shape(lambda: model.params))


def measure(name: str, model: Model, target: Target) -> Row:
    """Compiles a model's steps."""
    step, args = fuse(model.loss_fn, adalomo(1e-2), has_aux=model.has_aux), model.batch(0)
    placed = step.place(model.params, *args)
    of = lambda params, **options: compile_usage(step, params, *args, target=target, **options).peak_bytes
    return Row(
        target.name,
        name,
        tree_bytes(model.params),
        unfused=of(model.params, fused=False),
        fused=of(model.params),
        placed=of(placed) if is_stacked(placed) else None,
    )


def rows(target: Target, names: list[str], dim: int, length: int) -> Iterator[Row]:
    """Yields a row for each model."""
    makers = models(dim, length)
    for name in names or makers:
        try:
            yield measure(name, abstract(makers[name]), target)
        except Exception as error:  # one model's compiler error does not stop the others
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)


def line(row: Row) -> str:
    """A row in MB; the mark goes by bytes."""
    in_mb = lambda x: f"{x / 1e6:12.2f}" if x is not None else f"{'-':>12}"
    numbers = "".join(map(in_mb, (row.weights, row.unfused, row.fused, row.placed)))
    return f"{row.target:10}{row.model:32}{numbers}" + (f"  MORE, {row.excess:,} bytes" if row.excess > 0 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("names", nargs="*", metavar="name", help="of models; all by default")
    parser.add_argument("--dim", type=int, default=1024, help="width where layers are scanned; lists are twice as wide")
    parser.add_argument("--length", type=int, default=512, help="tokens")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    prepare(TARGETS[options.target])
    if not options.json:
        print(f"JAX {jax.__version__}, MB\n{'target':10}{'model':32}" + "".join(f"{x:>12}" for x in Row._fields[2:]))
    for row in rows(TARGETS[options.target], options.names, options.dim, options.length):
        print(json.dumps(row._asdict() | {"excess": row.excess}) if options.json else line(row), flush=True)


if __name__ == "__main__":
    main()
