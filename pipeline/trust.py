"""What files and options of strangers may say: data of bounded size, and classes from places that are known.

What is promised is in SECURITY.md.
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
from typing import Any

import yaml

import corrigenda
from corrigenda.pipeline.errors import UserError

MAX_CHARACTERS = 1_000_000  # of a file or an option
MAX_DEPTH = 50
MAX_VALUES = 100_000  # aliases count as what they stand for

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
OURS = ("corrigenda",)
OLD_CLASS_PATH = re.compile(r"(modules|datamodules|pipeline)(\.[a-z_]+)+\.[A-Z]\w*")
REFUSED = ("LambdaCallback",)  # a class that only calls functions that it is given
ONLY_KNOWN = (
    "is not accepted here: only classes of Corrigenda, Lightning, torch.optim, torchmetrics and of modules "
    "named with --plugin on the command line are"
)


# YAML


def read_yaml(path: Path) -> Any:  # noqa: ANN401
    """The content of a YAML file; one line for everything that is wrong with it.

    Raises:
        UserError: the file cannot be read, is not YAML, or is larger or nested deeper than any of ours.
    """
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):
            raise UserError(f"{path} is not a file")
        if status.st_size > MAX_CHARACTERS:
            raise UserError(
                f"{path} has {status.st_size:,} bytes, and at most {MAX_CHARACTERS:,} are read"
            )
        return load_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def load_yaml(text: str) -> Any:  # noqa: ANN401
    """``yaml.safe_load`` within limits, with ``~/`` expanded at the beginning of texts.

    Raises:
        UserError: the text is too long, nested too deeply, refers to itself or multiplies by aliases.
        yaml.YAMLError, ValueError: it is not YAML.
    """
    check_yaml(text)
    _require_keys_once(yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return at_home(yaml.safe_load(text))


def check_yaml(text: str) -> None:
    """Reads through YAML without building anything; raises UserError beyond the limits, see above."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    sizes: dict[str | None, int] = {}
    begun: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if name in [anchor for anchor, _ in begun]:
                raise UserError(f"*{name} refers to a value from inside it")
            count += sizes.get(name, 1)  # an unknown one is told by the loader
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, count - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if len(begun) > MAX_DEPTH:
            raise UserError(f"nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} values, aliases written out")


def _require_keys_once(node: Any) -> None:  # noqa: ANN401
    """Of a key that is given twice the loader would take the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise UserError(f"the key {twice[0]!r} is given twice")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _require_keys_once(part)


def at_home(value: Any) -> Any:  # noqa: ANN401
    """``value`` with every text in it that begins with ``~/`` made a path in the user's home folder.

    Class paths of version 0.1, before everything was imported as ``corrigenda``, become short names.
    """
    if isinstance(value, str):
        if OLD_CLASS_PATH.fullmatch(value):
            return value.rpartition(".")[2]
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, list):
        return [at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    return value


# Classes

_allowed: set[str] = set()  # jsonargparse only ever adds to what it knows


def restrict_parsing(known: Mapping[str, type] | None = None, plugins: Sequence[str] = ()) -> None:
    """Makes jsonargparse import only what is known, and read only local YAML within the limits.

    Names are checked before anything is imported. To be called after ``lightning.pytorch.cli`` is imported, which
    lets configuration files be URLs.

    Args:
        known: classes that may be named; their members may not.
        plugins: modules whose content may be named, too.
    """
    from jsonargparse import get_loader, set_loader, set_parsing_settings

    new = {path: cls for path, cls in (known or {}).items() if path not in _allowed}
    members = [f"{path}.{name}" for path, cls in new.items() for name in dir(cls)]
    # It logs every one of them, which takes longer than all the rest.
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
        return at_home(plain(text))

    set_loader("yaml", load, (yaml.YAMLError, ValueError))


def known_classes() -> dict[str, type]:
    """Classes that YAML may name, by every name that they have; of ours those that have been imported."""
    known: dict[str, type] = {}
    for name in (*KNOWN_CLASSES, *(n for n in sys.modules if n.partition(".")[0] in OURS)):
        module, package = importlib.import_module(name), name.partition(".")[0]
        for short, cls in vars(module).items():
            if not inspect.isclass(cls) or cls.__module__.partition(".")[0] != package:
                continue
            if cls.__name__ not in REFUSED and not short.startswith("_"):
                known[f"{name}.{short}"] = known[f"{cls.__module__}.{cls.__qualname__}"] = cls
    ours = {cls.__name__: cls for cls in known.values() if cls.__module__.startswith("corrigenda.")}
    return known | {f"corrigenda.{name}": ours[name] for name in dir(corrigenda) if name in ours}


def take_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules that ``--plugin`` names, and the other words of the command line.

    Nothing but the command line is looked at, so that no configuration file can name a plugin.
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
    """Imports modules named on the command line, also from the current folder."""
    if names:
        sys.path.append(str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--plugin {name}: {error}") from error
