"""Fine-tuning with the adapters of peft (Mangrulkar et al., 2022): DoRA, PiSSA, LoHa, VeRA, OFT, OSF and others.

Adapters of peft take the place of a network's linear layers. Here they do so as an active edit, so that the
unedited model is available bit-exactly wherever something is compared with it. They are built on a copy of the
network: initialisations that change the weights that they adapt (PiSSA, OLoRA) leave the network's own alone.
Afterwards equal weights share memory; while they are built the model is in memory twice.

What an adapter needs besides gradients is not done: OSF's decomposition is that of the base in all tasks.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from corrigenda.modules import checks
from corrigenda.modules.interrupts import uninterrupted
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.corpus import Corpus
from corrigenda.modules.training.gradient_editor import GradientEditor
from corrigenda.modules.training.target_rows import Loss
from corrigenda.modules.training.tuning import FineTune

UNSUITED = {
    "XLORA": "loads further adapters by name",
    "ADALORA": "needs its ranks reallocated after every step, which is not done here",
}


class AdapterPatch(EditHandle):
    """Modules that take the place of the network's own.

    Args:
        lm: the language model.
        modules: by path in the network.
    """

    def __init__(self, lm: LanguageModel, modules: Mapping[str, nn.Module]) -> None:
        self.lm, self._spare = lm, dict(modules)
        self.lowest_layer = min(map(lm.structure.layer_of, modules))
        super().__init__(lm)

    def swap(self) -> None:
        with uninterrupted():
            for name, spare in self._spare.items():
                parent, _, child = name.rpartition(".")
                self._spare[name] = self.lm.net.get_submodule(name)
                setattr(self.lm.net.get_submodule(parent), child, spare.to(self.lm.device))


class _Inside(GradientEditor):
    """Learns nothing beside the network: the parameters are inside."""

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.0, loss: Loss = "target") -> None:
        super().__init__(1, lr, 0.0, weight_decay, loss)
        self.layer = 0

    def lowest_layer(self, lm: LanguageModel) -> int:
        return self.layer

    def start(self, lm: LanguageModel, count: int, task: int = 0) -> dict[str, Tensor]:
        return {}

    def deltas(self, lm: LanguageModel, leaves: Mapping[str, Tensor]) -> list[Delta]:
        return [Delta({})]


class PeftFineTune(FineTune):
    """Trains adapters of peft with ``fit``.

    A checkpoint holds what is trained; the rest of an adapter is made again from the seed.

    Args:
        lm: the language model.
        adapter: ``peft_type`` (LORA, LOHA, OFT, VERA, OSF, ...) and the arguments of its configuration class, such
            as ``r``, ``target_modules``, ``use_dora`` or ``init_lora_weights``.
        lr: Adam's learning rate.
        weight_decay: L2 decay of the trained numbers towards zero.
        loss: see :class:`GradientEditor`.
        seed: of the adapter's initialisation.
        optimizer: by default Adam.
        generate_tokens: length of freely generated answers; 0 leaves them out.
        scheduler: changes the learning rate after every step; by default it is constant.
        perplexity: plain text whose perplexity is computed in every evaluation.
    """

    replaces_layers = True
    num_steps: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        adapter: dict[str, Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        loss: Loss = "target",
        seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        generate_tokens: int = 0,
        scheduler: LRSchedulerCallable | None = None,
        perplexity: Corpus | None = None,
    ) -> None:
        checks.seeds(seed=seed)
        inside = _Inside(lr, weight_decay, loss)
        super().__init__(lm, inside, optimizer, generate_tokens, scheduler, perplexity)
        self.adapter = adapter
        self._modules_of_peft = _injected(lm, adapter, seed)
        inside.layer = min(map(lm.structure.layer_of, self._modules_of_peft))
        trained = {
            f"{path}.{name}".replace(".", "/"): parameter
            for path, module in self._modules_of_peft.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.learned = nn.ParameterDict(trained)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self._patch: AdapterPatch | None = None

    @property
    def method_name(self) -> str:
        return f"peft {self.adapter['peft_type']}"

    @property
    def trained(self) -> bool:
        return bool(self.num_steps > 0)

    def edit(self) -> AdapterPatch:
        """Activates the adapters as they are now; they are active by themselves while a Trainer runs."""
        return AdapterPatch(self.lm, self._modules_of_peft)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self._patch is None:
            self._patch = self.edit()

    def teardown(self, stage: str) -> None:
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().optimizer_step(*args, **kwargs)
        self.num_steps += 1


def _injected(lm: LanguageModel, adapter: Mapping[str, Any], seed: int) -> dict[str, nn.Module]:
    """The modules that peft puts in the place of the network's, by path; the network stays as it is."""
    config = _configuration(adapter)
    from peft import inject_adapter_in_model

    with lm.pristine():
        twin = copy.deepcopy(lm.net)
    before = {id(module) for module in twin.modules()}
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of CUDA extensions that some adapters could use
            torch.manual_seed(seed)
            inject_adapter_in_model(config, twin)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"peft cannot adapt {lm.name!r} by {dict(adapter)}: {reason}") from None
    found: dict[str, nn.Module] = {}
    for name, module in twin.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if id(module) not in before and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"peft finds nothing to adapt in {lm.name!r} by {dict(adapter)}: name the target_modules"
        )
    for name, module in found.items():
        _share_memory(module, lm.net.get_submodule(name))
    return found


def _share_memory(adapted: nn.Module, original: nn.Module) -> None:
    """Lets the frozen weights of an adapted layer that peft has not changed use the memory of the original's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = adapted.get_base_layer() if isinstance(adapted, BaseTunerLayer) else adapted
    for name, other in original.named_parameters():
        own = dict(base.named_parameters()).get(name)
        if own is not None and not own.requires_grad and torch.equal(own, other):
            own.data = other.data


def _configuration(adapter: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """peft's configuration; raises ValueError if it does not know such an adapter."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("this needs peft: pip install 'corrigenda[peft]'")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = dict(adapter)
    kind = str(given.pop("peft_type", None)).upper()
    if kind in UNSUITED:
        raise ValueError(f"peft_type {kind} {UNSUITED[kind]}: choose another, such as LORA")
    if kind not in kinds:
        raise ValueError(
            f"adapter must have a peft_type that peft knows ({', '.join(sorted(kinds))}), got {dict(adapter)!r}"
        )
    try:
        return kinds[kind](**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"adapter {dict(adapter)!r}: {' '.join(str(error).split())}") from None
