"""The compiled part, built from ``src/native``."""

_Tensor = tuple[int, tuple[int, ...]]

def variants() -> list[str]: ...
def variant() -> str: ...
def choose(name: str) -> None: ...
def peak(pairs: bool, rounds: int, threads: int) -> float: ...
def tile_kinds(
    partial: tuple[int, int, int],
    whole: tuple[int, int, int],
    outer: int,
    lists: int,
    rows: int,
    tiles: int,
    kinds: int,
) -> bool: ...
def pack_keys(keys: int, count: int, dim: int, to: int, threads: int) -> None: ...
def softmax_rows(
    x: int,
    q: int,
    keys: int,
    dim: int,
    first: int,
    heads: int,
    rows: int,
    width: int,
    lo: int,
    hi: int,
    sink: int,
    hidden: float,
    own: int,
    facts: int,
    each: int,
    sums: int,
    threads: int,
) -> None: ...
def forward(
    sizes: tuple[int, ...],
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: int,
    lse: int,
    entropy: int,
    scale: float,
    softcap: float,
    bias: tuple[int, int, int] | None,
    bounds: tuple[int, int, int],
    valid: tuple[int, int] | None,
    kinds: tuple[int, ...] | None,
    slots: tuple[int, ...] | None,
    lists: tuple[int, ...] | None,
    groups: tuple[int, ...] | None,
    threads: int,
) -> None: ...
def backward(
    sizes: tuple[int, ...],
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    dout: _Tensor,
    out: int,
    lse: int,
    dlse: int,
    dq: int,
    dk: int,
    dv: int,
    dbias: int,
    scale: float,
    softcap: float,
    bias: tuple[int, int, int] | None,
    bounds: tuple[int, int, int],
    valid: tuple[int, int] | None,
    kinds: tuple[int, ...] | None,
    slots: tuple[int, ...] | None,
    lists: tuple[int, ...] | None,
    groups: tuple[int, ...] | None,
    threads: int,
) -> None: ...
def linear(
    sizes: tuple[int, ...],
    q: tuple[int, int, tuple[int, ...]],
    k: tuple[int, int, tuple[int, ...]],
    v: tuple[int, int, tuple[int, ...]],
    q_extra: _Tensor | None,
    k_extra: _Tensor | None,
    start: _Tensor,
    cu: int,
    out: _Tensor,
    divisor: _Tensor | None,
    end: int,
    eps: float,
    causal: bool,
    reverse: bool,
    threads: int,
) -> None: ...
