"""``foveal.attach``: give an unmodified transformers model another attention, and take it away again."""

from __future__ import annotations

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
from ..policies.policy import Policy
from . import families, masks, recompute
from .forward import OUTPUT_ATTENTIONS, AttentionEvent, Forward, Surroundings, attend, original_forward
from .requests import RequestStates, cache_keys

Probe = Callable[[AttentionEvent], None]

_stacks: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Handle]]] = weakref.WeakKeyDictionary()
_configs: dict[int, tuple[Any, str, int]] = {}  # id → (config, implementation before foveal, users)
_running = threading.local()


def _current() -> Handle | None:
    """The handle whose model is in its forward, in this thread."""
    stack = getattr(_running, "stack", None)
    return stack[-1] if stack else None


def _attached(module: nn.Module) -> list[Handle]:
    """The handles on an attention module, the innermost last."""
    return [handle for ref in _stacks.get(module, []) if (handle := ref()) is not None]


@torch.compiler.disable
def foveal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None] | Any:  # fmt: skip
    """The attention function registered as ``"foveal"`` in transformers."""
    stack = _attached(module)
    if not stack:
        kwargs = {
            "dropout": dropout,
            "scaling": scaling,
            **({} if is_causal is None else {"is_causal": is_causal}),
            **kwargs,
        }
        found = _configs.get(id(getattr(module, "config", None)))
        if found is None:
            raise UnsupportedError(
                f"{type(module).__name__} runs foveal's attention but no foveal.attach(...) is active; attach to the model that holds it."
            )
        return original_forward(module, found[1], query, key, value, attention_mask, kwargs)
    return attend(stack[-1], module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(masks.NAME, foveal_attention)
    AttentionMaskInterface.register(masks.NAME, masks.mask_function_for_host(_current))


class Handle:
    """A model with foveal's attention: a context manager, and an object with :meth:`detach`.

    Attributes:
        model: the attached model. policy: what runs. num_layers: its self-attention layers. impl: kernel choice.
        probes: functions called with every :class:`AttentionEvent`.
    """

    def __init__(self, model: nn.Module, policy: Policy, impl: str, measuring: bool, probes: Sequence[Probe]) -> None:
        self.model, self.policy, self.impl, self.measuring = model, policy, impl, measuring
        self.probes = list(probes)
        found = families.sites(model)
        self.sites: dict[nn.Module, families.AttentionSite] = {s.module: s for s in found}
        self.num_layers = families.depth(model, found)
        self._shared = self.num_layers > sum(s.index >= 0 for s in found)
        policy.check_fits(self.num_layers, type(model).__name__)
        self.requests = RequestStates()
        self.forward = Forward()
        self.surroundings: dict[nn.Module, Surroundings] = {}
        self.reached: set[nn.Module] = set()
        self.measured: dict[str, dict[int, Density]] = {}
        self._recomputable: set[nn.Module] = set()
        self._hooks: list[Any] = []
        self._configs: list[Any] = []
        self._depth = 0
        self.active = False

    # --- life -------------------------------------------------------------------------------------------------------

    def _enter(self) -> Self:
        from transformers import PreTrainedModel

        _register()
        model: Any = self.model
        owners = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        used = _configs_of(self.sites, owners)
        before = {i: c._attn_implementation for i, c in used.items()}
        try:
            for i, config in used.items():
                known = _configs.get(i)
                _configs[i] = (config, known[1], known[2] + 1) if known else (config, before[i], 1)
                config._attn_implementation_internal = (
                    masks.NAME
                )  # what set_attn_implementation writes, for this config alone
                self._configs.append(config)
            for site in self.sites.values():
                _stacks.setdefault(site.module, []).append(weakref.ref(self))
                self._hooks.append(
                    site.module.register_forward_pre_hook(self._before_attention, with_kwargs=True, prepend=True)
                )
                self._hooks.append(site.module.register_forward_hook(self._after_attention))
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
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for site in self.sites.values():
            left = [ref for ref in _stacks.get(site.module, []) if ref() not in (self, None)]
            if left:
                _stacks[site.module] = left
            else:
                _stacks.pop(site.module, None)
        for config in self._configs:
            _, original, users = _configs[id(config)]
            if users > 1:
                _configs[id(config)] = (config, original, users - 1)
            else:
                del _configs[id(config)]
                config._attn_implementation_internal = original
        self._configs.clear()
        self.surroundings.clear()
        self.forward = Forward()
        for module in self._recomputable:
            recompute.guard(module, self.sites[module].name)
        self._recomputable.clear()
        if self in (running := getattr(_running, "stack", [])):  # detached in the middle of a forward
            running.remove(self)
        self._depth = 0
        self.active = False

    def __enter__(self) -> Self:
        if not self.active:
            raise ConfigError("this handle was detached; call foveal.attach(model, policy) again.")
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # --- hooks ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._top():
            return
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise UnsupportedError(OUTPUT_ATTENTIONS)
        if self._depth == 0:
            self.forward = Forward(checkpointed=recompute.checkpoints_layers(self.model))
            self.surroundings.clear()
            if not hasattr(_running, "stack"):
                _running.stack = []
            _running.stack.append(self)
        self._depth += 1
        if isinstance(kwargs.get("position_ids"), Tensor):
            self.forward.positions = kwargs["position_ids"]

    @torch.compiler.disable
    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0 and getattr(_running, "stack", None) and _running.stack[-1] is self:
            _running.stack.pop()

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
            positions = self.forward.positions
        self.surroundings[module] = Surroundings(None if cross else cache, layer, keys, hidden, positions, cross)
        self.reached.discard(module)

    @torch.compiler.disable
    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.surroundings.pop(module, None)
        if self._top(module) and module not in self.reached:
            name = self.sites[module].name
            raise UnsupportedError(
                f"{type(self.model).__name__} is not supported: its layer {name!r} ({type(module).__name__}) ran without reaching foveal's attention. "
                "Run this model without foveal."
            )

    def _top(self, module: nn.Module | None = None) -> bool:
        """Whether this handle is the innermost one on the model."""
        module = next(iter(self.sites)) if module is None else module
        stack = _attached(module)
        return bool(stack) and stack[-1] is self

    def next_index(self, site: families.AttentionSite) -> int:
        """Number of the self-attention layer that runs now; layers that share a module are counted as they come."""
        if not self._shared:
            return site.index
        if self.policy.layers and recompute.in_backward():
            raise UnsupportedError(
                "layers of this model share one module, so a checkpointed backward cannot tell them apart; use one rule for all layers."
            )
        index = self.forward.calls % self.num_layers
        self.forward.calls += 1
        return index

    def watch_recompute(self, module: nn.Module) -> None:
        """Remember modules that backward may run again, and refuse when it does so under another handle than the forward's."""
        if not recompute.in_backward():
            if self.forward.checkpointed or (module.training and recompute.inside_checkpoint()):
                self._recomputable.add(module)
        elif module not in self._recomputable and any(module in other._recomputable for other in _attached(module)):
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

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[Self]:
        """Call ``probe`` with every attention event inside the block."""
        self.probes.append(probe)
        try:
            yield self
        finally:
            self.probes.remove(probe)


def _configs_of(sites: dict[nn.Module, families.AttentionSite], owners: list[Any]) -> dict[int, Any]:
    """The configs that steer these attention modules and their masks: their own, and those of the models that hold them.

    A config with sub-configs of its own (vision-language models, encoder-decoder pairs) steers other towers too and is left
    alone unless an attention module reads it directly.
    """
    used = {id(m.config): m.config for m in sites if getattr(m, "config", None) is not None}
    for owner in owners:
        if not getattr(owner.config, "sub_configs", None) and any(m in sites for m in owner.modules()):
            used[id(owner.config)] = owner.config
    return used


def attach(
    model: nn.Module,
    policy: Policy | Pattern,
    *,
    impl: str = "auto",
    measure: bool = False,
    probes: Sequence[Probe] = (),
) -> Handle:
    """Run a transformers model with another attention, without changing the model.

    Args:
        model: any ``PreTrainedModel`` whose attention goes through transformers' interface: decoders, encoders,
            encoder-decoders (cross-attention stays dense), vision transformers, or the text stack of a larger model.
        policy: a :class:`foveal.Policy`, or one pattern for every layer.
        impl: kernel implementation; an explicit name never falls back.
        measure: count what is kept (``handle.density()``); costs a pass over the kept tiles.
        probes: functions called with an :class:`AttentionEvent` after every attention.

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
    handle = Handle(model, chosen, impl, measure, probes)
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    if chosen.dtype and dtype and chosen.dtype != dtype:
        warnings.warn(
            f"foveal: the policy was measured in {chosen.dtype} and the model runs in {dtype}; its figures may not hold.",
            stacklevel=2,
        )
    return handle._enter()
