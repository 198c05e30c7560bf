"""A Hugging Face causal language model and its tokenizer: text goes in, numbers or text come out.

:class:`LanguageModel` is made of parts that can be read on their own: :mod:`tokens` (text to ids),
:mod:`active_edits` (the network and its edits), :mod:`reuse` (what is computed once), :mod:`scoring` and
:mod:`generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, Self

import torch
from torch import nn

from corrigenda.datamodules.records import Separator
from corrigenda.modules import checks
from corrigenda.modules.model import placement
from corrigenda.modules.model.active_edits import ActiveEdits
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.generation import Generator
from corrigenda.modules.model.handle import EditHandle, GenerationRequest, ScoreRequest
from corrigenda.modules.model.loading import ModelError, load_model
from corrigenda.modules.model.placement import DeviceMap
from corrigenda.modules.model.reuse import Limits, Reuse
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.model.scoring import Scorer
from corrigenda.modules.model.structure import Structure
from corrigenda.modules.model.tokens import Tokens

LOOKS_AHEAD = 1e-4  # most that a token may move earlier logits, relative to how it moves its own
PLAIN_TEXT = "The capital of France is Paris, and the capital of Italy is Rome."


class LanguageModel(nn.Module):
    """One causal LM and its tokenizer, frozen, always in eval mode.

    Args:
        name: a hub id (``gpt2-xl``), a local folder, or ``smollm2``, which comes as a Python package.
        dtype: of the weights; editing is exact in float32.
        device: where to put the model; a Lightning Trainer moves it anyway.
        device_map: where the parts of a model are that is larger than one device, for good: ``auto`` fills all
            GPUs, then the CPU's memory; or the place of each module: a device, ``cpu``, or ``disk`` (read from the
            model's file whenever it runs). Edits and numbers are those of one device.
        quantization: load the linear layers in 4 or 8 bit with bitsandbytes.
        requantize: quantise the edited layers of a quantised model again, which loses part of the update (the
            edit's metadata says how much) and means that independent edits are evaluated one after the
            other. Otherwise edited layers stay in ``dtype``.
        separator: text between a prompt and its target. ``auto``: a space, or nothing in scripts that put no
            spaces between words, such as Chinese, Japanese or Thai.
        revision: commit or branch of a hub model.
        chat: put every prompt into the tokenizer's chat template, as a user's words, in editing, evaluation and
            generation. Answers end with the turn and leave out thinking parts; a date in the template is fixed.
        reuse_prefix: run the blocks below the lowest edited one once and reuse their output. False
            recomputes everything: the reference path.
        cache_memory_gib: most memory for outputs of the lower blocks, which learned editors store by text.
        cache_disk_gib: most disk space for the same, in the cache folder; 0 stores nothing there.

    Attributes:
        net: the network.
        tokens: its tokenizer, with the model's limits.
        edits: its active edits.
        reuse: what is computed once.
    """

    def __init__(
        self,
        name: str = "smollm2",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        quantization: Literal["nf4", "fp4", "int8"] | None = None,
        revision: str | None = None,
        reuse_prefix: bool = True,
        requantize: bool = False,
        cache_memory_gib: float = 2.0,
        cache_disk_gib: float = 8.0,
        separator: Separator = "auto",
        device_map: DeviceMap | None = None,
        chat: bool = False,
    ) -> None:
        checks.at_least(0, cache_memory_gib=cache_memory_gib, cache_disk_gib=cache_disk_gib)
        if device_map is not None:
            placement.check_map(device_map, device, quantization is not None)
        net, tokenizer = self._load(name, getattr(torch, dtype), quantization, revision, device_map)
        super().__init__()
        self.net = net.requires_grad_(False)
        self.eval()
        self.name, self.requantize = name, requantize
        self.tokens = Tokens(tokenizer, net, name, separator, chat)
        self.edits = ActiveEdits(net)
        limits = Limits(cache_memory_gib, cache_disk_gib, depends_on_batch=quantization == "int8")
        self.reuse = Reuse(self.edits, reuse_prefix, limits)
        self._scorer = Scorer(self.tokens, self.edits, self.reuse, self.refuse_not_finite)
        self._generator = Generator(self.tokens, self.edits, self.reuse)
        if device is not None:
            self.net.to(device)
        self._require_causal()

    def _load(
        self,
        name: str,
        dtype: torch.dtype,
        quantization: str | None,
        revision: str | None,
        device_map: DeviceMap | None,
    ) -> tuple[Any, Any]:
        """The network and its tokenizer."""
        return load_model(name, dtype, quantization, revision, device_map)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: dropout would change keys, values and scores."""
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """What moves modules (a Trainer does) leaves a placed network where it is."""
        return self if placement.is_placed(self.net) else super()._apply(*args, **kwargs)

    # ------------------------------------------------------------------ parts and properties

    @property
    def device(self) -> torch.device:
        return self.edits.device

    @property
    def structure(self) -> Structure:
        return self.edits.structure

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401
        return self.tokens.tokenizer

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have; None if the model sets no limit."""
        return self.tokens.max_length

    @property
    def weights_hash(self) -> str:
        """Hash of every unedited weight: the identity of the base model."""
        return self.edits.weights_hash

    @property
    def chat_note(self) -> dict[str, str]:
        """What files say of a model that is used in a chat: a hash of its template. Nothing for any other."""
        template = self.tokens.template
        return {} if template is None else {"chat": template.form}

    @property
    def handles(self) -> list[EditHandle]:
        """The active edits, oldest first."""
        return self.edits.handles

    def pristine(self) -> AbstractContextManager:
        """Inside, no edit is active; afterwards all are again, bit-exactly. Nesting has no effect."""
        return self.edits.pristine()

    @torch.no_grad()
    def _require_causal(self) -> None:
        """Raises ModelError unless ordinary text has finite logits that depend on no later token."""
        row = self.tokens.encode([PLAIN_TEXT])[0][: self.max_length]
        if len(row) < 2:
            raise ModelError(
                f"the tokenizer of {self.name!r} finds no tokens in ordinary text: its files are missing or "
                "damaged"
            )
        other = [*row[:-1], next(token for token in range(3) if token != row[-1])]
        one_TV, other_TV = (
            self.net(ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
            .logits[0]
            .float()
            for ids_1T in torch.tensor([row, other], device=self.device)[:, None]
        )
        if one_TV.isnan().any():
            self.refuse_not_finite()
        moved_T = (one_TV - other_TV).abs().nan_to_num(0.0).amax(1)
        looks_ahead = moved_T[:-1].max() > LOOKS_AHEAD * moved_T[-1]
        if looks_ahead and not self.reuse.limits.depends_on_batch:
            raise ModelError(
                f"the model {self.name!r} looks at the tokens that follow, as encoders like BERT do: only models "
                "that write text from left to right can be edited"
            )

    def refuse_not_finite(self) -> NoReturn:
        """Raises ModelError for an unedited model whose logits are NaN."""
        dtype = str(self.net.dtype).removeprefix("torch.")
        raise ModelError(
            f"the model {self.name!r} in {dtype} gives logits that are not finite for ordinary text: load it with "
            "another dtype (--model.lm.dtype float32), or its weights are damaged"
        )

    # ------------------------------------------------------------------ scores and text

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        deltas: Sequence[Delta] | None = None,
        owners: Sequence[int] | None = None,
        full: bool = False,
    ) -> TargetScores:
        """Teacher-forced scores of each target after its prompt, under the active edits.

        Args:
            prompts: B texts.
            targets: B continuations, see :meth:`Tokens.join`.
            deltas: further updates, side by side; row b uses ``deltas[owners[b]]``. A single one is for all rows.
            owners: for each row the index of its delta.
            full: also return log-probabilities of the whole vocabulary.

        Raises ModelError if scores of the unedited model are NaN; those of an edited model are returned.
        """
        return self.score_request(
            ScoreRequest(prompts=prompts, targets=targets, deltas=deltas, owners=owners, full=full)
        )

    @torch.no_grad()
    def score_request(self, request: ScoreRequest) -> TargetScores:
        """See :meth:`score`."""
        self.tokens.require_readable([*request.prompts, *request.targets])
        if edit := self.edits.answering:
            with edit.set_aside():
                return edit.score(request)
        return self._scorer.score(request)

    @torch.no_grad()
    def perplexity(
        self, texts: Iterable[str], max_tokens: int, delta: Delta | None = None
    ) -> float:
        """exp of the mean NLL of plain text, over all tokens but each text's first; inf if it is not finite.

        Edits of weights and modules are active; in-context edits are not, because there is no question.

        Args:
            texts: each is cut at 512 tokens and at the model's limit.
            max_tokens: total number of tokens.
            delta: a further update.
        """
        return self._scorer.perplexity(texts, max_tokens, delta)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        deltas: Sequence[Delta] | None = None,
        owners: Sequence[int] | None = None,
        top_k: int | None = None,
        batch_size: int = 32,
        stop: Sequence[str] = (),
        num_beams: int = 1,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The continuation of each prompt, greedy or sampled from the ``top_k`` most likely tokens.

        A continuation ends before the first of the texts in ``stop``. With ``num_beams`` it is the most likely
        that a beam search of that width finds. The continuation of a single prompt is also given to ``on_text``,
        piece by piece as it grows.
        """
        return self.generate_request(
            GenerationRequest(
                prompts=prompts,
                max_new_tokens=max_new_tokens,
                deltas=deltas,
                owners=owners,
                top_k=top_k,
                batch_size=batch_size,
                stop=stop,
                num_beams=num_beams,
                on_text=on_text,
            )
        )

    @torch.no_grad()
    def generate_request(self, request: GenerationRequest) -> list[str]:
        """See :meth:`generate`."""
        self.tokens.require_readable(request.prompts)
        if edit := self.edits.answering:
            with edit.set_aside():
                return edit.generate(request)
        return self._generator.generate(request)
