"""Random programs: values that describe a loss, its parameters and the step's options, and a strategy for them."""

from dataclasses import dataclass, fields
from typing import Literal

from hypothesis import strategies as st

DIM, ROWS = 4, 4
RULES = ("adalomo", "lomo", "adamw", "sgd with momentum")
OPERATIONS = {
    "matrix": ("tanh", "gated", "relu", "norm", "stop", "cond on weight", "inner scan", "dropout", "bfloat16 inside"),
    "vector": ("scale", "shift", "norm"),
    "scalar": ("scale", "stop"),
}
OF_THE_WHOLE_BATCH = ("cond on carry",)
"""Operations with a matrix whose result on microbatches differs from that on the whole batch."""
KEPT_LAYERWISE = ("bfloat16", "float32", "negate", "scale", "square", "tanh", "gain", "gain of a layer")
NOT_LAYERWISE = ("flip", "cumsum", "temperature", "scale of each layer")
SHAPES = ("none", "reshape", "reshape before", "slice", "slice before", "first layers", "group")


@dataclass(frozen=True, repr=False)
class Described:
    """Prints the fields that differ from their defaults."""

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


@dataclass(frozen=True, repr=False)
class Stack(Described):
    """A parameter, and the operations on it until the scan uses a layer."""

    kind: str
    """The kind of one layer: matrix, vector or scalar."""
    use: str
    """One of `OPERATIONS`."""
    axis: int = 0
    """Its layer axis: the first, second or last."""
    dtype: str = "float32"
    shape: str = "none"
    """One of `SHAPES`: how its stored shape differs from the used one."""
    before: tuple[str, ...] = ()
    """The operations on it before the scan."""
    moved_after: int = 0
    """How many of these operations come before its layer axis moves to the front."""
    trained: bool = True
    beside: bool = False
    """Whether it is also read outside of the scan."""
    twice: bool = False
    """Whether the scan reads it twice."""


@dataclass(frozen=True, repr=False)
class Scan(Described):
    """A scan over stacks."""

    length: int
    stacks: tuple[Stack, ...]
    carry_dtype: str = "float32"
    carry: frozenset[str] = frozenset()
    """Any of counter, accumulator, key."""
    xs: frozenset[str] = frozenset()
    """Any of index, keys, leaf, flags: what else it runs over."""
    constant: str = "none"
    """none, bias or tied: a whole leaf that each iteration reads."""
    ys: str = "none"
    """none, carry, weights, unused."""
    group: str = "none"
    """none, unrolled, scan: a layer is two layers."""
    remat: str = "none"
    """none, checkpoint, policy: around the body."""
    around: str = "none"
    """none, jit, checkpoint, policy: around the scan."""
    prepared: str = "outside"
    """inside, outside: where the operations before the scan are, relative to ``around``."""
    reverse: bool = False
    unroll: int = 1
    again: bool = False
    """Whether it is run a second time."""


@dataclass(frozen=True, repr=False)
class Unrolled(Described):
    """Layers unrolled in Python, each a matrix of its own."""

    layers: int
    remat: str = "none"
    """none, checkpoint, policy, all at once: around each layer, or around all."""
    jit: bool = False
    trained: bool = True


@dataclass(frozen=True, repr=False)
class Options(Described):
    """The options of the step."""

    rule: str = "sgd with momentum"
    max_grad_norm: float | None = None
    microbatches: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    loss_scale: float | None = None
    dynamic_loss_scale: bool = False
    rms_metrics: bool = False
    has_aux: bool = False
    stochastic_rounding: bool | None = None


@dataclass(frozen=True, repr=False)
class RandomProgram(Described):
    """A loss, its parameters, and a step."""

    parts: tuple[Scan | Unrolled, ...]
    begin: str = "x"
    """x, x times a leaf, embedding: the first carry."""
    end: str = "head"
    """head, tied, or none."""
    whole_dtype: str = "float32"
    """The dtype of parameters that are not stacks."""
    whole_trained: bool = True
    integers: bool = False
    """Whether there is a parameter of integers."""
    vmapped: bool = False
    """Whether the loss takes one example and is mapped over the batch."""
    options: Options = Options()

    @property
    def rounds_to_bfloat16(self) -> bool:
        return "bfloat16" in repr(self)


def is_layered(scan: Scan, stack: Stack) -> bool | None:
    """Whether the stack must be updated layer by layer; None if the plan may do either."""
    if not stack.trained:
        return False
    across_layers = not set(stack.before).isdisjoint(("flip", "cumsum"))
    if scan.again or across_layers or (stack.shape == "group" and scan.group != "none"):
        return False if scan.length > 1 else None
    if stack.beside:  # the scan computes whatever reads one layer at a time
        return None
    if scan.around in ("checkpoint", "policy") and any(s.before or s.shape != "none" or s.axis for s in scan.stacks):
        return None
    if not set(stack.before).isdisjoint(NOT_LAYERWISE) or stack.shape == "first layers":
        return None
    if scan.length == 1 and "gain of a layer" in stack.before:
        return None
    return True


def _maybe(rarely: st.SearchStrategy, usually: object) -> st.SearchStrategy:
    """The usual value two times out of three; it is also the simplest."""
    return st.one_of(st.just(usually), st.just(usually), rarely)


def _some(elements: st.SearchStrategy) -> st.SearchStrategy:
    """One element, less often two, rarely three."""
    return st.sampled_from((1, 1, 1, 2, 2, 3)).flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


def _subset(*names: str) -> st.SearchStrategy:
    return _maybe(st.frozensets(st.sampled_from(names), min_size=1, max_size=2), frozenset())


_DTYPES = _maybe(st.just("bfloat16"), "float32")
_RARELY = st.sampled_from((False, False, False, True))
_BEFORE = st.lists(st.sampled_from(KEPT_LAYERWISE * 3 + NOT_LAYERWISE), min_size=1, max_size=3).map(tuple)


@st.composite
def _stacks(draw: st.DrawFn, whole_batch: bool, wide: bool) -> Stack:
    kind = draw(st.sampled_from(("matrix", "matrix", "vector", "scalar")))
    uses = OPERATIONS[kind] + (OF_THE_WHOLE_BATCH if whole_batch and kind == "matrix" else ())
    before = tuple(op for op in draw(_maybe(_BEFORE, ())) if wide or op != "bfloat16")
    use = draw(st.sampled_from([use for use in uses if wide or use != "bfloat16 inside"]))
    return Stack(
        kind=kind,
        use=use,
        axis=draw(st.sampled_from((0, 0, 1, -1))),
        dtype=draw(_DTYPES) if wide else "float32",
        shape=draw(_maybe(st.sampled_from(SHAPES), "none")),
        before=before,
        moved_after=draw(st.integers(0, len(before))),
        trained=not draw(_RARELY),
        beside=draw(_RARELY),
        twice=draw(_RARELY),
    )


@st.composite
def _scans(draw: st.DrawFn, whole_batch: bool, wide: bool) -> Scan:
    return Scan(
        length=draw(st.integers(1, 4)),
        stacks=tuple(draw(_some(_stacks(whole_batch, wide)))),
        carry_dtype=draw(_DTYPES) if wide else "float32",
        carry=draw(_subset("counter", "accumulator", "key")),
        xs=draw(_subset("index", "keys", "leaf", "flags")),
        constant=draw(_maybe(st.sampled_from(("bias", "tied")), "none")),
        ys=draw(_maybe(st.sampled_from(("carry", "weights", "unused")), "none")),
        group=draw(_maybe(st.sampled_from(("none", "unrolled", "scan")), "none")),
        remat=draw(st.sampled_from(("none", "checkpoint", "policy"))),
        around=draw(_maybe(st.sampled_from(("jit", "checkpoint", "policy")), "none")),
        prepared=draw(st.sampled_from(("outside", "inside"))),
        reverse=draw(_RARELY),
        unroll=draw(_maybe(st.just(2), 1)),
        again=draw(_RARELY),
    )


_UNROLLED = st.builds(
    Unrolled,
    layers=st.integers(1, 2),
    remat=st.sampled_from(("none", "checkpoint", "policy", "all at once")),
    jit=_RARELY,
    trained=_RARELY.map(lambda x: not x),
)


@st.composite
def random_programs(draw: st.DrawFn) -> RandomProgram:
    """Programs of one to three scans, with unrolled layers between them."""
    microbatches = draw(_maybe(st.sampled_from((1, 2, 4)), None))
    wide, vmapped = draw(st.booleans()), draw(_RARELY)
    scans = draw(_some(_scans(microbatches is None and not vmapped, wide)))
    parts: list[Scan | Unrolled] = []
    for scan in scans:
        parts += draw(_maybe(_UNROLLED.map(lambda x: [x]), []))
        parts.append(scan)
    options = Options(
        rule=draw(st.sampled_from(RULES[::-1])),
        max_grad_norm=draw(_maybe(st.sampled_from((0.1, 100.0)), None)),
        microbatches=microbatches,
        reduction=draw(st.sampled_from(("mean", "sum"))),
        loss_scale=draw(_maybe(st.just(8.0), None)),
        dynamic_loss_scale=draw(_RARELY),
        rms_metrics=draw(_RARELY),
        has_aux=draw(_RARELY),
        stochastic_rounding=draw(st.sampled_from((None, False))),
    )
    return RandomProgram(
        parts=tuple(parts),
        begin=draw(st.sampled_from(("x", "x times a leaf", "embedding"))),
        end=draw(st.sampled_from(("head", "tied", "none"))),
        whole_dtype=draw(_DTYPES) if wide else "float32",
        whole_trained=not draw(_RARELY) or not any(stack.trained for scan in scans for stack in scan.stacks),
        integers=draw(_RARELY),
        vmapped=vmapped,
        options=options,
    )
