"""Limits on untrusted files and options: their size, and the classes that they may name.

SECURITY.md states the guarantees.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import stat
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import corrigenda
from corrigenda.pipeline.errors import UserError

MAX_CHARACTERS = 1_000_000  # per file or option
MAX_DEPTH = 50
MAX_VALUES = 100_000  # with aliases expanded

KNOWN_CLASSES = (
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.plugins.environments",
    "lightning.pytorch.plugins.io",
    "lightning.pytorch.plugins.precision",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torchmetrics",
)
NAMED_CLASSES = ("bitsandbytes.optim",)  # imported only by runs that name them: it takes seconds
OURS = ("corrigenda",)
OLD_CLASS_PATH = re.compile(r"(modules|datamodules|pipeline)(\.[a-z_]+)+\.[A-Z]\w*")
REFUSED = ("LambdaCallback",)  # which calls arbitrary functions
ONLY_KNOWN = (
    "is not accepted here: only classes of Corrigenda, Lightning, torch.optim, bitsandbytes.optim, torchmetrics "
    "and of modules named with --plugin on the command line are"
)


# YAML


def read_yaml(path: Path) -> Any:  # noqa: ANN401
    """The content of a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or exceeds the limits on size and nesting.
    """
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):
            raise UserError(f"{path} is not a file")
        if status.st_size > MAX_CHARACTERS:
            raise UserError(f"{path} has {status.st_size:,} bytes; the limit is {MAX_CHARACTERS:,}")
        return load_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def load_yaml(text: str) -> Any:  # noqa: ANN401
    """``yaml.safe_load`` within limits, with ``~/`` expanded at the start of strings.

    Raises:
        UserError: the text is too long, nested too deeply, refers to itself, grows too large through aliases, or
            gives a key twice.
        yaml.YAMLError, ValueError: it is not YAML.
    """
    check_yaml(text)
    _require_keys_once(yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return expand_paths(yaml.safe_load(text))


def check_yaml(text: str) -> None:
    """Checks the limits of :func:`load_yaml` without constructing any value; raises UserError beyond them."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{len(text):,} characters; the limit is {MAX_CHARACTERS:,}")
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if name in [anchor for anchor, _ in open_nodes]:
                raise UserError(f"*{name} refers to a value that contains it")
            count += sizes.get(name, 1)  # the loader reports an unknown anchor
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if len(open_nodes) > MAX_DEPTH:
            raise UserError(f"nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} values, with aliases expanded")


def _require_keys_once(node: Any) -> None:  # noqa: ANN401
    """Raises UserError for a duplicate key, of which the loader would silently use the last."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise UserError(f"the key {twice[0]!r} is given twice")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _require_keys_once(part)


def expand_paths(value: Any) -> Any:  # noqa: ANN401
    """``value`` with ``~/`` expanded to the user's home folder at the start of every string in it.

    Class paths of version 0.1, from before the package was named ``corrigenda``, become short names.
    """
    if isinstance(value, str):
        if OLD_CLASS_PATH.fullmatch(value):
            return value.rpartition(".")[2]
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, list):
        return [expand_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: expand_paths(item) for key, item in value.items()}
    return value


# Classes

_allowed: set[str] = set()  # what jsonargparse has been given, as it only adds to its list


def restrict_parsing(known: Mapping[str, type] | None = None, plugins: Sequence[str] = ()) -> None:
    """Restricts jsonargparse to importing known classes and reading local YAML within the limits.

    Names are checked before anything is imported. Must be called after importing ``lightning.pytorch.cli``, which
    allows configuration files to be URLs.

    Args:
        known: classes that may be named, but not their members.
        plugins: modules whose classes may be named as well.
    """
    from jsonargparse import get_loader, set_loader, set_parsing_settings

    new = {path: cls for path, cls in (known or {}).items() if path not in _allowed}
    members = [f"{path}.{name}" for path, cls in new.items() for name in dir(cls)]
    # jsonargparse logs every one of them, which takes longer than everything else.
    logging.getLogger("jsonargparse_null_logger").setLevel(logging.WARNING)
    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,
        config_read_mode_urls_enabled=False,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*", *members],
        import_path_allowlist=[*new, *plugins],
    )
    _allowed.update(new)
    plain = get_loader("yaml")
    if plain.__module__ == __name__:
        return

    def load(text: str) -> Any:  # noqa: ANN401
        check_yaml(text)
        return expand_paths(plain(text))

    set_loader("yaml", load, (yaml.YAMLError, ValueError))


def known_classes(words: Sequence[str] = ()) -> dict[str, type]:
    """Classes that YAML may name, by all of their names; of this project those that have been imported.

    Args:
        words: options and contents of configuration files, which say whether :data:`NAMED_CLASSES` are needed.

    Raises:
        UserError: one of those is named and its library is not installed.
    """
    known: dict[str, type] = {}
    named = [name for name in NAMED_CLASSES if any(name in word for word in words)]
    ours = [name for name in sys.modules if name.partition(".")[0] in OURS]
    for name in (*KNOWN_CLASSES, *named, *ours):
        module, package = _module(name), name.partition(".")[0]
        for short, cls in vars(module).items():
            if not inspect.isclass(cls) or cls.__module__.partition(".")[0] != package:
                continue
            if cls.__name__ not in REFUSED and not short.startswith("_"):
                known[f"{name}.{short}"] = known[f"{cls.__module__}.{cls.__qualname__}"] = cls
    short_names = {c.__name__: c for c in known.values() if c.__module__.startswith("corrigenda.")}
    public = {name: short_names[name] for name in dir(corrigenda) if name in short_names}
    return known | {f"corrigenda.{name}": cls for name, cls in public.items()}


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise UserError(f"{name} needs {library}, which is not installed ({error})") from None


def take_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(modules named by ``--plugin``, the other arguments of the command line).

    Only the command line is read, so no configuration file can name a plugin.
    """
    plugins, others, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--plugin":
            plugins.append(value if equals else next(rest, ""))
        else:
            others.append(word)
    for plugin in plugins:
        if not all(part.isidentifier() for part in plugin.split(".")):
            raise UserError(
                f"--plugin needs the name of a module, such as my_editors, got {plugin!r}"
            )
    return plugins, others


def import_plugins(names: Sequence[str]) -> None:
    """Imports the modules named by ``--plugin``, also from the current folder."""
    if names:
        sys.path.append(str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--plugin {name}: {error}") from error
