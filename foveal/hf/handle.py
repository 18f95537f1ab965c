"""``foveal.attach``: give an unmodified transformers model another attention, and take it away again."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.density import Density
from ..core.errors import ConfigError, UnsupportedError
from ..kernels.dispatch import IMPLEMENTATIONS
from ..patterns import Pattern
from ..patterns.flux import Decisions, decisions
from ..policies.policy import Policy
from . import families, interface, recompute
from .fingerprint import fingerprint
from .forward import OUTPUT_ATTENTIONS, AttentionEvent, Forward, Surroundings
from .interventions import Act, Intervention
from .queries import tap
from .requests import RequestStates, cache_keys

Probe = Callable[[AttentionEvent], None]
HostAttention = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]], Tensor]


class Live(threading.local):
    """What a handle knows about the forward that is running; every thread has its own."""

    def __init__(self) -> None:
        self.forward = Forward()
        self.surroundings: dict[nn.Module, Surroundings] = {}
        self.reached: set[nn.Module] = set()
        self.queries: dict[nn.Module, Tensor] = {}
        self.depth = 0


class Handle:
    """A model with foveal's attention: a context manager, and an object with :meth:`detach`.

    Attributes:
        model: the attached model. policy: what runs. num_layers: its self-attention layers. impl: kernel choice.
        probes: functions called with every :class:`AttentionEvent`.
        acts: running interventions, in order.
        shared: whether layers share a module, so that they are told apart only by the order of calls.
        host: the attention that runs instead of a policy: the model's own, so that probes see it and change nothing.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, impl: str, measuring: bool, probes: Sequence[Probe], interventions: Sequence[Intervention] = ()
    ) -> None:  # fmt: skip
        self.model, self.policy, self.impl, self.measuring = model, policy, impl, measuring
        self.probes = list(probes)
        found = families.sites(model)
        self.sites: dict[nn.Module, families.AttentionSite] = {s.module: s for s in found}
        self.num_layers = families.depth(model, found)
        self.shared = self.num_layers > sum(s.index >= 0 for s in found)
        policy.check_fits(self.num_layers, type(model).__name__)
        self.host: HostAttention | None = None
        digest = functools.cache(lambda: fingerprint(model))
        for pattern in policy.patterns():
            pattern.check_model(digest, self.num_layers)
        self.across: Callable[..., Tensor] | None = None  # attends over ranks, in place of a policy
        self.requests = RequestStates()
        self.live = Live()
        self.measured: dict[str, dict[int, Density]] = {}
        self._recomputable: set[nn.Module] = set()
        self._hooks: list[Any] = []
        self._configs: list[Any] = []
        self.active = False
        self.acts: list[Act] = []
        try:
            for intervention in interventions:
                self.acts.append(intervention.on(self))
        except BaseException:
            self._close_acts()
            raise

    # --- life -------------------------------------------------------------------------------------------------------

    def _enter(self) -> Self:
        from transformers import PreTrainedModel

        interface.register()
        owners = [m for m in self.model.modules() if isinstance(m, PreTrainedModel)]
        try:
            for config in families.configs(self.sites, owners):
                interface.switch(config)
                self._configs.append(config)
            for site in self.sites.values():
                interface.stacks.setdefault(site.module, []).append(weakref.ref(self))
                self._hooks.append(
                    site.module.register_forward_pre_hook(self._before_attention, with_kwargs=True, prepend=True)
                )
                self._hooks.append(site.module.register_forward_hook(self._after_attention))
                if any("pre_rope_q" in pattern.needs for pattern in self.policy.patterns()):
                    self._hooks += tap(site.module, self._keep_queries)
            for owner in owners:
                self._hooks.append(owner.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True))
                self._hooks.append(owner.register_forward_hook(self._after_model, always_call=True))
        except BaseException:
            self.detach()
            raise
        self.active = True
        return self

    def detach(self) -> None:
        """Give the model back exactly as it was; calling it twice is harmless."""
        self._close_acts()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for site in self.sites.values():
            left = [ref for ref in interface.stacks.get(site.module, []) if ref() not in (self, None)]
            if left:
                interface.stacks[site.module] = left
            else:
                interface.stacks.pop(site.module, None)
        for config in self._configs:
            interface.restore(config)
        self._configs.clear()
        for module in self._recomputable:
            recompute.guard(module, self.sites[module].name)
        self._recomputable.clear()
        if self in interface.running():  # detached in the middle of a forward
            interface.running().remove(self)
        self.live = Live()
        self.active = False

    def _close_acts(self) -> None:
        for act in self.acts:
            act.close()

    def __enter__(self) -> Self:
        if not self.active:
            raise ConfigError("this handle was detached; call foveal.attach(model, policy) again.")
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a copy of an attached model is not attached, and says so when it runs."""
        return self

    # --- hooks ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._top():
            return
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise UnsupportedError(OUTPUT_ATTENTIONS)
        live = self.live
        if live.depth == 0:
            if self.acts and any(m in self.sites for m in module.modules()):  # not a vision tower that runs alone
                for act in self.acts:
                    act.prepare(module, args, kwargs)
                for act in self.acts:
                    act.begin(module, args, kwargs)
            live.forward = Forward(checkpointed=recompute.checkpoints_layers(self.model))
            live.surroundings.clear()
            interface.running().append(self)
        live.depth += 1
        if isinstance(kwargs.get("position_ids"), Tensor):
            live.forward.positions = kwargs["position_ids"]

    @torch.compiler.disable
    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        live = self.live
        if live.depth == 0:
            return
        live.depth -= 1
        if live.depth == 0:
            interface.running().remove(self)
            live.forward.tensors.clear()

    @torch.compiler.disable
    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._top(module):
            return
        from transformers import Cache

        values = [*args, *kwargs.values()]
        cache = next((x for x in values if isinstance(x, Cache)), None)
        both = next((x for x in values if hasattr(x, "self_attention_cache")), None)
        if both is not None:
            cache = both.self_attention_cache
        hidden = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("hidden_states")
        cross = any(isinstance(kwargs.get(n), Tensor) for n in ("key_value_states", "encoder_hidden_states"))
        layer = getattr(module, "layer_idx", None)
        keys = cache_keys(cache, layer)
        positions = kwargs.get("position_ids")
        if positions is None and not recompute.in_backward():
            positions = self.live.forward.positions
        self.live.surroundings[module] = Surroundings(None if cross else cache, layer, keys, hidden, positions, cross)
        self.live.reached.discard(module)

    @torch.compiler.disable
    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.live.surroundings.pop(module, None)
        if self._top(module) and module not in self.live.reached:
            name = self.sites[module].name
            raise UnsupportedError(
                f"{type(self.model).__name__} is not supported: its layer {name!r} ({type(module).__name__}) ran without reaching foveal's attention. "
                "Run this model without foveal."
            )

    @torch.compiler.disable
    def _keep_queries(self, module: nn.Module, q: Tensor) -> None:
        if self._top(module):
            self.live.queries[module] = q

    def _top(self, module: nn.Module | None = None) -> bool:
        """Whether this handle is the innermost one on the model."""
        module = next(iter(self.sites)) if module is None else module
        stack = interface.attached(module)
        return bool(stack) and stack[-1] is self

    def next_index(self, site: families.AttentionSite) -> int:
        """Number of the self-attention layer that runs now; layers that share a module are counted as they come."""
        if not self.shared:
            return site.index
        if self.policy.layers and recompute.in_backward():
            raise UnsupportedError(
                "layers of this model share one module, so a checkpointed backward cannot tell them apart; use one rule for all layers."
            )
        index = self.live.forward.calls % self.num_layers
        self.live.forward.calls += 1
        return index

    def watch_recompute(self, module: nn.Module) -> None:
        """Remember modules that backward may run again, and refuse when it does so under another handle than the forward's."""
        if not recompute.in_backward():
            if self.live.forward.checkpointed or (module.training and recompute.inside_checkpoint()):
                self._recomputable.add(module)
        elif module not in self._recomputable and any(
            module in other._recomputable for other in interface.attached(module)
        ):
            raise recompute.refuse(
                self.sites[module].name, "under another foveal.attach(...) than the one its forward ran in"
            )

    # --- results ----------------------------------------------------------------------------------------------------

    def densities(self, phase: str = "prefill") -> dict[int, Density]:
        """What each layer kept so far in a phase ("prefill" or "decode"); needs ``attach(..., measure=True)``."""
        if not self.measuring:
            raise ConfigError("densities were not measured; use foveal.attach(model, policy, measure=True).")
        return dict(sorted(self.measured.get(phase, {}).items()))

    def density(self, phase: str = "prefill") -> Density:
        """The sum of :meth:`densities` over layers."""
        return sum(self.densities(phase).values(), Density(0, 0, 0.0, 0.0))

    def decisions(self) -> Decisions | None:
        """What the routers of a Flux policy decided for the request of the last forward in this thread; None without a router."""
        return decisions(self.live.forward.selections)

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[Self]:
        """Call ``probe`` with every attention event inside the block."""
        self.probes.append(probe)
        try:
            yield self
        finally:
            self.probes.remove(probe)


def attach(
    model: nn.Module,
    policy: Policy | Pattern,
    *,
    impl: str = "auto",
    measure: bool = False,
    probes: Sequence[Probe] = (),
    interventions: Sequence[Intervention] = (),
) -> Handle:
    """Run a transformers model with another attention, without changing the model.

    Args:
        model: any ``PreTrainedModel`` whose attention goes through transformers' interface: decoders, encoders,
            encoder-decoders (cross-attention stays dense), vision transformers, or the text stack of a larger model.
        policy: a :class:`foveal.Policy`, or one pattern for every layer.
        impl: kernel implementation; an explicit name never falls back.
        measure: count what is kept (``handle.density()``); costs a pass over the kept tiles.
        probes: functions called with an :class:`AttentionEvent` after every attention.
        interventions: changes to the attention, see ``foveal.steer``.

    Returns:
        A handle. ``with foveal.attach(model, policy): ...`` or ``handle.detach()``. After leaving, also after an
        exception or nested, the model is bit-identical to before.

    Raises:
        UnsupportedError: a family or option that cannot be honoured, by name.
        ConfigError: a policy that does not fit the model, or an unknown ``impl``.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ConfigError(f"impl={impl!r} is unknown; expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}.")
    chosen = Policy.of(policy)
    handle = Handle(model, chosen, impl, measure, probes, interventions)
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    if chosen.dtype and dtype and chosen.dtype != dtype:
        warnings.warn(
            f"foveal: the policy was measured in {chosen.dtype} and the model runs in {dtype}; its figures may not hold.",
            stacklevel=2,
        )
    return handle._enter()
