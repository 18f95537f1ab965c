"""How the ranks stand to each other: U for heads (Ulysses) times R for the ring, the ring in W windows of S."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ...core.errors import ConfigError, FovealError, ShapeError
from .transport import Line, Meter, RankError

_FACTS = 4096  # bytes in which a rank states its facts


@dataclass(eq=False)
class RankMesh:
    """This process's place among ``size = ulysses · ring`` ranks, made by :func:`rank_mesh`.

    Attributes:
        everyone, heads, sequence: all ranks; those that share a ring shard (U); those of one ring (R).
        inner, outer: neighbours in the ring's window (S) and the same place in all windows (W).
        order: place in ``everyone`` of each (ring rank, Ulysses rank), the Ulysses rank running fastest.
        meter: what this rank sent and computed.
    """

    everyone: Line
    heads: Line
    sequence: Line
    inner: Line
    outer: Line
    order: tuple[int, ...]
    meter: Meter
    _agreed: set[str] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.everyone.size

    @property
    def ulysses(self) -> int:
        return self.heads.size

    @property
    def ring(self) -> int:
        return self.sequence.size

    @property
    def windows(self) -> int:
        return self.outer.size

    @property
    def place(self) -> tuple[int, int]:
        """This rank's ring rank and Ulysses rank."""
        return self.sequence.rank, self.heads.rank

    def agree(self, facts: dict[str, Any], error: FovealError | None = None) -> None:
        """Compare JSON facts over all ranks, once for each set of facts; a local ``error`` becomes everyone's.

        Raises:
            RankError: on every rank, with the first fact that differs or the error of the first rank that has one.
        """
        from ... import __version__

        facts = {"foveal": __version__, "torch": torch.__version__, **facts}
        text = json.dumps(facts, sort_keys=True, default=str)
        if error is None and text in self._agreed:
            return
        if self.size == 1:
            if error is not None:
                raise error
            self._agreed.add(text)
            return
        said = [
            json.loads(line) for line in self._tell(json.dumps({"error": str(error)[: _FACTS // 2]}) if error else text)
        ]
        wrong = next((i for i, other in enumerate(said) if "error" in other), None)
        if wrong is not None:
            raise RankError(f"rank {wrong} of {self.size}: {said[wrong]['error']}") from error
        for name in facts:
            values = [json.dumps(other.get(name)) for other in said]
            if len(set(values)) > 1:
                other = next(i for i, value in enumerate(values) if value != values[0])
                raise RankError(
                    f"the ranks differ in {name}: rank 0 has {values[0]}, rank {other} has {values[other]}; expected the same "
                    "on all ranks. Start every rank with the same versions and arguments."
                )
        self._agreed.add(text)

    def _tell(self, text: str) -> list[str]:
        data = text.encode()
        if len(data) > _FACTS:
            raise ConfigError(f"the facts to compare take {len(data)} bytes; expected at most {_FACTS}.")
        device = "cuda" if dist.get_backend(self.everyone.group) == "nccl" else "cpu"
        line = torch.tensor(list(data.ljust(_FACTS)), dtype=torch.uint8, device=device)
        quiet = replace(self.everyone, meter=Meter())
        return [bytes(row).decode().strip() for row in quiet.all_gather(line).tolist()]


def rank_mesh(
    group: Any = None,
    *,
    ulysses: int = 1,
    windows: int = 1,
    innermost: str = "ulysses",
    timeout: float = 300.0,
) -> RankMesh:
    """Divide a group of ranks; every rank of the group calls this alike (torch.distributed must be initialised).

    Where several groups share the job (data parallel × context parallel), every rank must make as many meshes in the same
    order: torch.distributed names groups by their count.

    Args:
        group: a ``ProcessGroup``, a 1-D ``DeviceMesh``, a 2-D one of (ring, Ulysses), or None for all ranks. Without
            torch.distributed, None is a mesh of this process alone.
        ulysses: U, ranks that share heads among them. windows: W, windows of the ring (double ring).
        innermost: which neighbours have consecutive ranks, ``"ulysses"`` or ``"ring"``.
        timeout: seconds after which a silent rank ends the run.

    Raises:
        ConfigError: sizes that do not divide. RankError: ranks that disagree, or that do not answer.
    """
    meter = Meter()
    if innermost not in ("ulysses", "ring"):
        raise ConfigError(f"innermost is {innermost!r}; expected 'ulysses' or 'ring'.")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh
        if group.ndim == 2:
            return _from_device_mesh(group, ulysses, windows, meter, timeout)
        group = group.get_group()
    if group is None and not dist.is_initialized():
        if ulysses * windows > 1:
            raise ConfigError(
                f"ulysses={ulysses} and windows={windows} need ranks, but torch.distributed is not initialised. "
                "Start with torchrun and call torch.distributed.init_process_group first."
            )
        alone = Line(None, (0,), 0, meter)
        return RankMesh(alone, alone, alone, alone, alone, (0,), meter)
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    size = len(ranks)
    if ulysses < 1 or windows < 1 or size % ulysses or size // ulysses % windows:
        raise ConfigError(
            f"{size} ranks do not divide into ulysses={ulysses} and a ring of windows={windows}; expected divisors: "
            f"ulysses of {size}, windows of the ring that remains."
        )
    ring = size // ulysses
    grid = torch.tensor(ranks)
    grid = grid.view(ring, ulysses) if innermost == "ulysses" else grid.view(ulysses, ring).T
    return _mesh(grid, windows, meter, timeout)


def _from_device_mesh(mesh: Any, ulysses: int, windows: int, meter: Meter, timeout: float) -> RankMesh:
    ring, heads = mesh.mesh.shape
    if ulysses not in (1, heads) or ring % windows:
        raise ConfigError(
            f"the DeviceMesh is {ring} × {heads} (ring × Ulysses); expected ulysses={heads} and windows that divide {ring}, "
            f"received {ulysses} and {windows}."
        )
    return _mesh(mesh.mesh, windows, meter, timeout)


def _mesh(grid: torch.Tensor, windows: int, meter: Meter, timeout: float) -> RankMesh:
    """Lines of a ``(R, U)`` grid of ranks; all ranks make the same groups in the same order."""
    me = dist.get_rank()
    if not bool((grid == me).any()):
        raise ConfigError(f"rank {me} is not in the group {grid.flatten().tolist()}; call this on its members only.")
    r, u = (int(x) for x in (grid == me).nonzero()[0])
    limit = datetime.timedelta(seconds=timeout)

    def line(ranks: torch.Tensor) -> Line:
        members = tuple(sorted(ranks.flatten().tolist()))  # a group's own order, whatever order one asks for
        if len(members) == 1:
            return Line(None, members, 0, meter)
        try:
            group = dist.new_group(list(members), timeout=limit, use_local_synchronization=True)
        except RuntimeError as error:
            raise RankError(f"rank {me} cannot reach the ranks {list(members)}: {str(error)[:160]}") from error
        return Line(group, members, members.index(me), meter)

    ring = grid.shape[0]
    wide = ring // windows
    for ranks in (grid[r], grid[:, u]):
        if not bool((ranks.diff() > 0).all()):
            raise ConfigError(
                f"the mesh lists the ranks {ranks.tolist()}; expected rising ranks along each of its dimensions."
            )
    sequence = line(grid[:, u])
    inner, outer = sequence, Line(None, (me,), 0, meter)
    if windows > 1:
        places = grid[:, u].view(windows, wide)
        inner, outer = line(places[r // wide]), line(places[:, r % wide])
    everyone = line(grid)
    order = tuple(everyone.ranks.index(rank) for rank in grid.flatten().tolist())
    mesh = RankMesh(everyone, line(grid[r]), sequence, inner, outer, order, meter)
    mesh.agree({"mesh": [ring, grid.shape[1], windows], "ranks": grid.flatten().tolist()})
    return mesh


def check_fits(mesh: RankMesh, heads: int, kv_heads: int) -> None:
    """Raise :class:`ShapeError` unless Ulysses can share these heads."""
    u = mesh.ulysses
    if heads % u:
        raise ShapeError(
            f"{heads} query heads do not divide over {u} Ulysses ranks; expected a multiple. Use ulysses that divides {heads}, or a ring."
        )
    if kv_heads % u and u % kv_heads:
        raise ShapeError(
            f"{kv_heads} key heads and {u} Ulysses ranks: expected one to divide the other. Use another ulysses, or a ring."
        )
