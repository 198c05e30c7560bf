"""Where blocks, MLP projections, norms and the head of a causal LM are, found by shape and position.

Nothing here compares model names. Blocks are the one ``ModuleList`` of the decoder that is as long as the
model is deep; inside a block a four-token forward shows which linear layers run, and their shapes say what they
are: the MLP output projection goes from the inner width F back to the residual width D, the input projections
from D to F (or 2F where gate and up are fused). A probe then checks that a change of the projection's output
reaches the block's output as it should.

Shapes: B rows, T tokens, D residual width, F inner width of the MLP, O x I a weight as [out, in].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corrigenda.modules.model import placement
from corrigenda.modules.model.hooks import Hook, first, hooked


class UnsupportedModel(ValueError):  # noqa: N818
    """The model's parts could not be found; the message says what was found."""


@dataclass(frozen=True)
class Structure:
    """The roles found in one network; ``{layer}`` names are built from them.

    Attributes:
        blocks: path of the block list, e.g. ``model.layers``.
        num_layers: how many blocks.
        width: D, the residual width.
        inner_width: F, the input width of the MLP output projection (the size of a key).
        out_proj: path of the MLP output projection inside a block, e.g. ``mlp.down_proj``.
        in_projs: paths of the MLP input projections inside a block (two where the MLP is gated).
        attention: path of the attention module inside a block, or None.
        final_norm: path of the norm between the last block and the head, or None.
        head: path of the output embedding.
        tied: whether input and output embeddings share their weight.
        gated: whether a key is ``act(gate) * up``.
        tuple_output: length of the tuple a block returns, 0 where it returns a tensor.
        residual_scale: c where the block adds ``c * (W k)`` to the residual stream; None where the MLP output
            is normalised before it is added (values at the block output cannot be written there).
    """

    blocks: str
    num_layers: int
    width: int
    inner_width: int
    out_proj: str
    in_projs: tuple[str, ...]
    attention: str | None
    final_norm: str | None
    head: str
    tied: bool
    gated: bool
    tuple_output: int
    residual_scale: float | None

    def block_name(self, layer: int) -> str:
        """Path of block ``layer`` (0-based); raises ValueError outside the model."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer {layer} does not exist: the model has {self.num_layers} blocks, "
                f"0 to {self.num_layers - 1}"
            )
        return f"{self.blocks}.{layer}"

    def out_name(self, layer: int) -> str:
        """Path of block ``layer``'s MLP output projection."""
        return f"{self.block_name(layer)}.{self.out_proj}"

    def in_name(self, layer: int) -> str:
        """Path of block ``layer``'s MLP input projection; raises ValueError where there are two."""
        if len(self.in_projs) != 1:
            raise ValueError(
                f"the MLP of this model has {len(self.in_projs)} input projections "
                f"({', '.join(self.in_projs)}): choose its output projection"
            )
        return f"{self.block_name(layer)}.{self.in_projs[0]}"

    def projection_name(self, layer: int, which: Literal["in", "out"]) -> str:
        """Path of block ``layer``'s MLP input or output projection."""
        return self.in_name(layer) if which == "in" else self.out_name(layer)

    def mlp_names(self, layer: int) -> tuple[str, ...]:
        """Paths of all MLP projections of block ``layer``, input ones first."""
        return tuple(f"{self.block_name(layer)}.{name}" for name in (*self.in_projs, self.out_proj))

    def layer_of(self, name: str) -> int:
        """The block that a module or parameter belongs to; 0 for what is outside the blocks."""
        found = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", name + ".")
        return int(found.group(1)) if found else 0


# ---------------------------------------------------------------------------- one view of a weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, a quantised or wrapped one, or GPT-2's Conv1D."""
    return isinstance(module, Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; not taken from the weight, whose shape differs if it is quantised."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def is_quantised(module: nn.Module) -> bool:
    """Whether the stored weight is quantised (integers), so that nothing can be added to it."""
    return not cast(Tensor, module.weight).is_floating_point()


def to_storage(module: nn.Module, update: Tensor) -> Tensor:
    """An [out, in] update (or a bias) as this module stores it, which depends on its type, not on shapes."""
    return update.T if isinstance(module, Conv1D) and update.dim() == 2 else update


def read_weight(module: nn.Module) -> Tensor:
    """W_OI in floating point, however the module stores it: transposed, quantised or plain."""
    weight = cast(nn.Parameter, module.weight)
    if not is_quantised(module):
        return to_storage(module, placement.read(module, "weight"))  # its own inverse
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if not (hasattr(weight, "quant_state") or hasattr(weight, "SCB")):
        raise UnsupportedModel(
            f"{type(module).__name__} stores its weight in an unknown format, and only that of bitsandbytes "
            "is known: load the model without quantisation, or leave this module out of the edit"
        )
    return dequantize_bnb_weight(weight, getattr(module, "state", None))


def read_parameter(net: nn.Module, name: str) -> Tensor:
    """A weight as [out, in] (:func:`read_weight`), or another parameter, such as a bias, as it is."""
    module_name, _, kind = name.rpartition(".")
    module = net.get_submodule(module_name)
    return read_weight(module) if kind == "weight" else placement.read(module, kind)


def with_weight(module: nn.Module, weight_OI: Tensor, requantize: bool) -> nn.Module:
    """A linear layer to replace a quantised one, with another weight and the same bias.

    Args:
        module: a quantised linear layer, which is not changed.
        weight_OI: the weight, in the type that it should have if it is not quantised.
        requantize: quantise it as ``module`` is; otherwise the layer is a plain ``nn.Linear``.
    """
    inputs, outputs = sizes(module)
    if requantize:
        other = _quantised_like(module, weight_OI)
    else:
        other = nn.Linear(inputs, outputs, bias=False, device="meta")
        other.weight = nn.Parameter(weight_OI, requires_grad=False)
    other.bias = cast(nn.Parameter, module.bias)  # or None
    return placement.beside(module, other.eval())


def _quantised_like(module: nn.Module, weight_OI: Tensor) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    old, (inputs, outputs) = cast(Any, module.weight), sizes(module)
    other: nn.Linear
    how: dict[str, Any]
    if isinstance(module, Linear4bit):
        how = {"compress_statistics": old.compress_statistics, "quant_type": old.quant_type,
               "quant_storage": old.quant_storage}  # fmt: skip
        compute = module.compute_dtype
        other = Linear4bit(inputs, outputs, False, compute_dtype=compute, device="meta", **how)
        other.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu
        how |= {"blocksize": old.blocksize, "module": other}
    else:
        threshold, how = cast(Any, module).state.threshold, {"has_fp16_weights": False}
        other = Linear8bitLt(inputs, outputs, False, threshold=threshold, device="meta", **how)
    # bitsandbytes quantises a weight when it is moved to a device.
    other.weight = type(old)(weight_OI.cpu(), requires_grad=False, **how).to(old.device)
    return other


def exchange(net: nn.Module, name: str, other: Tensor | nn.Module) -> Tensor | nn.Module:
    """Replaces a parameter's data, or the module that the parameter belongs to.

    Returns what was replaced, unchanged: exchanging it back is exact.
    """
    if isinstance(other, nn.Module):
        parent, _, child = name.rpartition(".")[0].rpartition(".")
        current = net.get_submodule(f"{parent}.{child}" if parent else child)
        setattr(net.get_submodule(parent), child, other.to(cast(Tensor, current.weight).device))
        return current
    module, _, kind = name.rpartition(".")
    return placement.replace(net.get_submodule(module), kind, other)


# ---------------------------------------------------------------------------- finding


def find_structure(net: PreTrainedModel) -> Structure:
    """The structure of a Hugging Face causal LM; raises :class:`UnsupportedModel` with what was found."""
    config = net.config.get_text_config(decoder=True)
    kind, depth, width = config.model_type, config.num_hidden_layers, config.hidden_size
    if not depth:
        raise UnsupportedModel(f"{kind}: the model has no layers")
    core = net.get_decoder()
    stack_name, stack = _blocks(kind, core, depth)
    _refuse_experts(kind, stack)
    block = stack[0]
    attention = _attention(block)
    inside_attention = {id(m) for m in attention[1].modules()} if attention else set()
    linear = {
        name: module
        for name, module in block.named_modules()
        if is_linear(module) and id(module) not in inside_attention
    }
    order, output = _watch(net, block, linear)
    out_proj = _out_projection(
        kind, linear, order, width, getattr(config, "intermediate_size", None)
    )
    inner = sizes(linear[out_proj])[0]
    in_projs = tuple(
        name
        for name in order
        if name != out_proj
        and sizes(linear[name])[0] == width
        and sizes(linear[name])[1] in (inner, 2 * inner)
    )
    if not in_projs:
        seen = {name: sizes(linear[name]) for name in order}
        raise UnsupportedModel(f"{kind}: no MLP input projection {width} -> {inner} among {seen}")
    prefix = _name_of(net, core)
    head = _name_of(net, net.get_output_embeddings()).rstrip(".")
    embedding = _name_of(net, net.get_input_embeddings())
    first = placement.first_names(net)
    return Structure(
        blocks=f"{prefix}{stack_name}",
        num_layers=depth,
        width=width,
        inner_width=inner,
        out_proj=out_proj,
        in_projs=in_projs,
        attention=attention[0] if attention else None,
        final_norm=_final_norm(core, stack_name, prefix),
        head=head,
        tied=first[f"{head}.weight"] == first[f"{embedding}weight"],
        gated=len(in_projs) == 2 or sizes(linear[in_projs[0]])[1] == 2 * inner,
        tuple_output=len(output) if isinstance(output, tuple) else 0,
        residual_scale=_residual_scale(net, block, linear[out_proj], width),
    )


def _blocks(kind: str, core: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """(name, module) of the decoder's list of blocks."""
    stacks = [
        (name, module)
        for name, module in core.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        names = [name for name, _ in stacks] or "none"
        raise UnsupportedModel(
            f"{kind}: expected one list of {depth} blocks in the decoder, found {names}"
        )
    return stacks[0]


def probe_ids(net: PreTrainedModel, length: int = 4) -> Tensor:
    """A few ordinary token ids on the embedding's device, for a forward pass that shows the structure."""
    embedding = cast(nn.Embedding, net.get_input_embeddings())
    start = min(5, embedding.weight.shape[0] - length)
    device = placement.device_of(embedding)
    return torch.arange(start, start + length, device=device)[None]


def _refuse_experts(kind: str, stack: nn.ModuleList) -> None:
    """Refuses mixtures of experts, some of which have a dense first block or a shared expert."""
    for name, module in stack.named_modules():
        if "expert" in f"{name} {type(module).__name__}".lower():
            raise UnsupportedModel(
                f"{kind}: block part {name!r} holds experts; sparse mixtures of experts are not supported, "
                "choose a dense model"
            )


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in block.named_modules():
        if "attention" in type(module).__name__.lower() and any(map(is_linear, module.modules())):
            return name, module
    return None


def _watch(
    net: PreTrainedModel, block: nn.Module, linear: dict[str, nn.Module]
) -> tuple[list[str], object]:
    """Names of the linear modules that ran, in order, and what the block returned."""
    order: list[str] = []
    returned: list[object] = []

    def note(name: str) -> Hook:
        return lambda *_: order.append(name) if name not in order else None

    pairs = [(module, note(name)) for name, module in linear.items()]
    with (
        hooked(pairs),
        hooked([(block, lambda _m, _i, out: returned.append(out))]),
        torch.no_grad(),
    ):
        net(probe_ids(net), use_cache=False)
    return order, returned[0]


def _out_projection(
    kind: str, linear: dict[str, nn.Module], order: list[str], width: int, inner: int | None
) -> str:
    found = [name for name in order if sizes(linear[name])[1] == width]
    if len(found) > 1:
        found = [name for name in found if sizes(linear[name])[0] == inner] or found
    if len(found) != 1:
        seen = {name: sizes(linear[name]) for name in order} or "no linear layer outside attention"
        raise UnsupportedModel(
            f"{kind}: cannot tell which linear layer writes the MLP output (width {width}) from {seen}"
        )
    return found[0]


def _name_of(net: PreTrainedModel, module: nn.Module) -> str:
    for name, candidate in net.named_modules():
        if candidate is module:
            return f"{name}." if name else ""
    raise UnsupportedModel(f"{type(module).__name__} is not a part of {type(net).__name__}")


def _final_norm(core: nn.Module, stack_name: str, prefix: str) -> str | None:
    parent = stack_name.rpartition(".")[0]
    owner = core.get_submodule(parent)
    names = [n for n, m in owner.named_children() if "norm" in type(m).__name__.lower()]
    return f"{prefix}{parent + '.' if parent else ''}{names[-1]}" if names else None


def _residual_scale(
    net: PreTrainedModel, block: nn.Module, out_proj: nn.Module, width: int
) -> float | None:
    """c if a change r of the projection's output changes the block's output by c * r, else None."""
    ids = probe_ids(net)
    outputs: list[Tensor] = []

    def keep(_m: nn.Module, _i: object, out: object) -> None:
        outputs.append(first(out).detach().double())

    with torch.no_grad(), hooked([(block, keep)]):
        net(ids, use_cache=False)
        scale = outputs[0].std().item()
        noise = torch.randn(width, generator=torch.Generator().manual_seed(0)) * max(scale, 1e-3)
        with hooked([(out_proj, lambda _m, _i, out: out + noise.to(out))]):
            net(ids, use_cache=False)
    moved = (outputs[1] - outputs[0]).reshape(-1, width)
    wanted = noise.to(moved).expand_as(moved)
    c = ((moved * wanted).sum() / (wanted * wanted).sum()).item()
    error = ((moved - c * wanted).norm() / wanted.norm()).item()
    tolerance = (
        1e-4
        if outputs[0].abs().max() < 1e4 and next(net.parameters()).dtype == torch.float32
        else 5e-2
    )
    if error > tolerance:
        return None
    return 1.0 if abs(c - 1) < tolerance else c
