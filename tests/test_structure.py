"""Finding the parts of a network: the table of families, probes, hooks, and one view of weights."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from corrigenda.modules.model.hooks import (
    capture,
    first,
    hooked,
    replace_first,
    stop_forward,
    until_stopped,
)
from corrigenda.modules.model.structure import (
    UnsupportedModel,
    find_structure,
    is_linear,
    is_quantised,
    probe_ids,
    sizes,
    to_storage,
)

GPT = ("transformer.h", "transformer.ln_f")
MODEL = ("model.layers", "model.norm")
GATED = (*MODEL, "mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"))
DENSE_4H = ("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",))
# blocks, final norm, output projection, input projections | F, tied, gated, tuple, residual scale
TABLE = {
    "gpt2": (*GPT, "mlp.c_proj", ("mlp.c_fc",), 128, True, False, 0, 1),
    "gptj": (*GPT, "mlp.fc_out", ("mlp.fc_in",), 128, False, False, 2, 1),
    "gpt_neo": (*GPT, "mlp.c_proj", ("mlp.c_fc",), 80, True, False, 2, 1),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", *DENSE_4H, 80, False, False, 0, 1),
    "opt": (
        *("model.decoder.layers", "model.decoder.final_layer_norm", "fc2", ("fc1",)),
        *(80, True, False, 0, 1),
    ),
    "bloom": (*GPT, *DENSE_4H, 128, True, False, 2, 1),
    "falcon": (*GPT, *DENSE_4H, 128, True, False, 2, 1),
    "llama": (*GATED, 80, False, True, 0, 1),
    "mistral": (*GATED, 80, False, True, 0, 1),
    "qwen2": (*GATED, 80, False, True, 0, 1),
    "qwen3": (*GATED, 80, False, True, 0, 1),
    "qwen3_5_text": (*GATED, 80, False, True, 0, 1),
    "gemma2": (*GATED, 80, True, True, 0, None),
    "gemma3_text": (*GATED, 80, True, True, 0, None),
    "phi": (
        "model.layers",
        "model.final_layernorm",
        "mlp.fc2",
        ("mlp.fc1",),
        80,
        False,
        False,
        0,
        1,
    ),
    "phi3": (*MODEL, "mlp.down_proj", ("mlp.gate_up_proj",), 80, False, True, 0, 1),
    "olmo2": (*GATED, 80, False, True, 0, None),
    "granite": (*GATED, 80, False, True, 0, 0.22),
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    # looks dense where one looks first: in block 0, and because of an expert that always runs
    "qwen3_moe dense first": {
        "mlp_only_layers": [0],
        "num_experts": 8,
        "moe_intermediate_size": 16,
    },
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def nets(tiny_net):
    """Every family's network, built once."""
    made = {}
    return lambda family: made.setdefault(family, tiny_net(family))


def test_roles_are_those_of_the_table(family, nets):
    net = nets(family)
    found = find_structure(net)
    blocks, norm, out_proj, in_projs, width, tied, gated, length, scale = TABLE[family]
    assert (found.blocks, found.final_norm) == (blocks, norm)
    assert (found.out_proj, found.in_projs, found.head) == (out_proj, in_projs, "lm_head")
    assert (found.num_layers, found.width, found.inner_width) == (2, 32, width)
    assert (found.tied, found.gated, found.tuple_output) == (tied, gated, length)
    assert found.residual_scale == (pytest.approx(scale, abs=1e-6) if scale else None)
    assert sizes(net.get_submodule(found.out_name(1))) == (width, 32)
    assert found.mlp_names(1) == tuple(f"{blocks}.1.{name}" for name in (*in_projs, out_proj))
    assert not any(module._forward_hooks for module in net.modules())


def test_attention_is_found(family, nets):
    found = find_structure(nets(family))
    if family == "qwen3_5_text":
        assert found.attention is None  # its first block has none
    else:
        attention = nets(family).get_submodule(f"{found.block_name(0)}.{found.attention}")
        assert "Attention" in type(attention).__name__


def test_names_of_layers(nets):
    found = find_structure(nets("gpt2"))
    assert found.layer_of("transformer.h.1.mlp.c_proj.weight") == 1
    assert found.layer_of("lm_head.weight") == found.layer_of("transformer.wte.weight") == 0
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist.* 0 to 1"):
            found.out_name(layer)


@pytest.mark.parametrize(
    "kind, changes, scale",
    [
        ("opt", {"do_layer_norm_before": False}, None),  # norms after the sum
        ("opt", {"word_embed_proj_dim": 16}, 1),
        ("gpt_neox", {"use_parallel_residual": False}, 1),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 1),
        ("granite", {"residual_multiplier": 1.0}, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verdict_on_the_residual_stream(kind, changes, scale, dtype, tiny_net):
    assert find_structure(tiny_net(kind, **changes).to(dtype)).residual_scale == scale


@pytest.mark.parametrize("case", EXPERTS)
def test_mixtures_of_experts_are_refused(case, tiny_net):
    net = tiny_net(case.split()[0], **EXPERTS[case])
    with pytest.raises(UnsupportedModel, match="experts are not supported, choose a dense model"):
        find_structure(net)


def test_a_model_without_a_list_of_blocks_is_refused(nets, monkeypatch):
    net = nets("gpt2")
    monkeypatch.setattr(net.config, "n_layer", 3)
    with pytest.raises(UnsupportedModel, match=r"gpt2: expected one list of 3 blocks.*none"):
        find_structure(net)


# --- keys and values ---


def test_key_times_weight_is_the_output(family, nets):
    """FAM-5: what is captured at the output projection is k and W k + b."""
    net = nets(family)
    found = find_structure(net)
    modules = {name: net.get_submodule(name) for name in found.mlp_names(1)}
    with torch.no_grad(), capture(modules, stop=True) as seen:  # Falcon then adds to it in place
        net(probe_ids(net))
    module = modules[found.out_name(1)]
    key, value = seen[found.out_name(1)]
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    bias = module.bias if module.bias is not None else 0
    assert torch.allclose(key @ weight.T + bias, value, atol=1e-5)
    assert key.shape[-1] == found.inner_width
    if found.gated:
        outputs = torch.cat([seen[name][1] for name in found.mlp_names(1)[:-1]], -1)
        gate, up = outputs.chunk(2, -1)
        config = net.config
        act = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]
        assert torch.allclose(act(gate) * up, key, atol=1e-5)


def test_writing_into_the_projection_reaches_the_block(family, nets):
    """FAM-2, FAM-9: a change of W changes the block's output, and no other parameter."""
    net = nets(family)
    found = find_structure(net)
    module = net.get_submodule(found.out_name(0))
    before = {name: p.clone() for name, p in net.named_parameters()}
    block = {"block": net.get_submodule(found.block_name(0))}
    outputs = []
    update = 0.1 * torch.randn(32, found.inner_width)
    for _ in range(2):
        with torch.no_grad(), capture(block, stop=True) as seen:
            net(probe_ids(net))
        outputs.append(first(seen["block"][1]))
        module.weight.data = module.weight.data + to_storage(module, update)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    changed = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [f"{found.out_name(0)}.weight"]
    module.weight.data = before[changed[0]]


# --- one view of a weight ---


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)], ids=["oblong", "square"])
@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["Linear", "Conv1D"])
def test_updates_are_out_by_in(kind, shape):
    """Adding an [out, in] update in storage form changes the output by x update'."""
    module = kind(*shape).double()
    assert is_linear(module) and not is_quantised(module) and sizes(module) == shape
    update, x = torch.randn(shape[1], shape[0]).double(), torch.randn(3, shape[0]).double()
    before = module(x)
    module.weight.data += to_storage(module, update)
    assert torch.allclose(module(x) - before, x @ update.T, atol=1e-12)
    bias = torch.randn(shape[1])
    assert to_storage(module, bias) is bias


def test_quantised_weights_have_the_sizes_of_their_layer():
    quantised = nn.Linear(6, 4)
    quantised.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert is_quantised(quantised) and sizes(quantised) == (6, 4)
    assert not is_linear(nn.LayerNorm(4))


# --- hooks ---


def test_hooks_go_with_their_block():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.randn(1, 2)
    plain = layers(x)
    with (
        pytest.raises(RuntimeError, match="inside"),
        hooked([(layers[0], lambda *_: torch.zeros(1, 2))]),
    ):
        assert torch.equal(layers(x), layers[1](torch.zeros(1, 2)))
        raise RuntimeError("inside")
    assert torch.equal(layers(x), plain)


def test_capture_can_end_the_forward():
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    ran = []
    x = torch.randn(1, 2)
    with hooked([(layers[2], lambda *_: ran.append(2))]):
        with capture({"a": layers[0], "b": layers[1]}, stop=True) as seen:
            layers(x)
        with until_stopped(), hooked([(layers[0], stop_forward)]):
            layers(x)
        assert not ran
        with capture({"a": layers[0]}):
            layers(x)
    assert ran == [2]
    assert seen["a"][0] is x and torch.equal(layers[1](seen["a"][1]), seen["b"][1])


def test_block_outputs_keep_their_kind():
    hidden, new = torch.zeros(2), torch.ones(2)
    assert first(hidden) is hidden and first((hidden, "rest")) is hidden
    assert replace_first(hidden, new) is new
    assert replace_first((hidden, "rest"), new) == (new, "rest")
