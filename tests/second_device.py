"""A second device for machines that have a CPU alone: ``twin:0``.

Its tensors compute on the CPU, so numbers are those of the CPU bit-exactly, but they mix with tensors of the CPU
as little as those of a GPU would: only scalars, indices and copies may come from elsewhere. Importing this file
changes the whole process, so tests do it in one of their own.
"""

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "twin"
aten = torch.ops.aten
# What reads from or writes to another device on real ones, too.
MAY_MIX = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default,
    aten.index_put_.default, aten._unsafe_index.Tensor, aten._index_put_impl_.default,
    aten._pack_padded_sequence.default,
}  # fmt: skip


class Twin(torch.Tensor):
    """A tensor of the second device.

    Args:
        inner: its values, on the CPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        if inner.is_meta or isinstance(inner, Twin):  # accelerate moves a parameter by its class
            return torch.nn.Parameter(inner, requires_grad)
        twin = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        twin.inner = inner
        return twin

    def __repr__(self):
        return f"Twin({self.inner})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.inner = other.inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mixed = {t.device.type for t in tensors if t.dim()}
        if len(mixed) > 1 and func not in MAY_MIX:
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {mixed}")
        if func in MAY_MIX:
            _check_indices(func, args)
        to = torch.device(kwargs.get("device") or NAME)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu") if to.type == NAME else to
        found = func(*_inner(args), **_inner(kwargs))
        if func is aten.copy_.default or to.type != NAME:
            return args[0] if func is aten.copy_.default else found
        if func is aten._pack_padded_sequence.default:  # whose sizes are always on the CPU
            return Twin(found[0]), found[1]
        twins = tree_map_only(torch.Tensor, Twin, found)
        return return_and_correct_aliasing(func, args, kwargs, twins)


def _inner(values):
    return tree_map_only(Twin, lambda twin: twin.inner, values)


def _check_indices(func, args):
    """Indices may come from the CPU; indexed tensors of the CPU take no indices of a device."""
    if not func.__name__.startswith(("index", "_index", "_unsafe_index")):
        return
    indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
    if not isinstance(args[0], Twin) and any(isinstance(t, Twin) for t in indices):
        raise RuntimeError(f"{func}: indices should be on the CPU, as the indexed tensor is")
    values = [t for t in args[2:3] if isinstance(t, torch.Tensor) and t.dim()]
    if any(isinstance(t, Twin) != isinstance(args[0], Twin) for t in values):
        raise RuntimeError(f"{func}: expected values on the device of the indexed tensor")


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=0):
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=0):
        pass


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_operators = library.Library("aten", "IMPL")


def _like(make):
    def kernel(*args, device=None, layout=None, pin_memory=None, memory_format=None, **kwargs):
        return Twin(make(*args, **kwargs))

    return kernel


for name, make in {
    "empty_strided": torch.empty_strided, "empty.memory_format": torch.empty, "arange": torch.arange,
    "arange.start": torch.arange, "arange.start_step": torch.arange, "eye": torch.eye, "eye.m": torch.eye,
}.items():  # fmt: skip
    _operators.impl(name, _like(make), "PrivateUse1")


def _copy_from(source, target, non_blocking=False):
    target.inner.copy_(_inner(source))
    return target


_operators.impl("_copy_from", _copy_from, "PrivateUse1")


# Composed of other operations on devices without a kernel of it, whose last bits would differ.
_operators.impl("silu_backward", lambda *_: NotImplemented, "PrivateUse1")
