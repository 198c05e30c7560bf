"""Whatever the texts: tokens, scores and generated text are those of plain transformers code, row by row."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from corrigenda.datamodules.records import joined, prompt_end
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.lm import LanguageModel

FAMILIES = ("gpt2", "gpt_neo", "llama", "mistral", "gemma2", "bloom", "qwen3_5_text")
FEW = settings(max_examples=20, deadline=None, derandomize=True)
# Words of which rows share some, among letters of all scripts, marks, emoji and whitespace.
PIECES = st.one_of(
    st.sampled_from(
        [
            "The town",
            " is",
            " of",
            "São",
            "法国",
            "的",
            "โรม",
            "👩‍🚀",
            "\n",
            "  ",
            "42%",
            "'s",
            "he",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
TEXTS = st.lists(PIECES, max_size=5).map("".join)
TARGETS = TEXTS.filter(str.strip)
BATCHES = st.lists(st.tuples(TEXTS, TARGETS), min_size=1, max_size=5)


@pytest.fixture(scope="module", params=FAMILIES)
def ways(request, tiny_folder):
    """One model, with reuse of common prefixes and along the reference path."""
    folder = str(tiny_folder(request.param))
    return LanguageModel(folder), LanguageModel(folder, reuse_prefix=False)


def plain(lm, prompt, target):
    """(tokens, log-probabilities, greedy tokens) of a target; none where no token is before it or its own."""
    alone = lm.tokenizer(prompt_end(prompt)).input_ids
    row = lm.tokenizer(joined(prompt, target)).input_ids
    start = 0
    while start < min(len(alone), len(row)) and alone[start] == row[start]:
        start += 1
    start = max(start, 1)
    with torch.no_grad():
        logprob_TV = lm.net(torch.tensor([row])).logits[0].float().log_softmax(-1)
    target_M = torch.tensor(row[start:], dtype=torch.long)
    before_MV = logprob_TV[start - 1 : -1]
    return target_M, before_MV.gather(1, target_M[:, None])[:, 0], before_MV.argmax(-1)


def check(lm, batch, scores):
    for b, (prompt, target) in enumerate(batch):
        target_M, logprob_M, greedy_M = plain(lm, prompt, target)
        mask = scores.mask_BM[b]
        assert scores.target_BM[b][mask].tolist() == target_M.tolist()
        torch.testing.assert_close(scores.logprob_BM[b][mask], logprob_M, atol=2e-4, rtol=0)
        assert scores.greedy_BM[b][mask].tolist() == greedy_M.tolist()


@FEW
@given(batch=BATCHES)
def test_scores_of_a_batch_are_those_of_plain_rows(ways, batch):
    """In every way of computing them, also where rows become trees and lower blocks run once."""
    assume(all(len(plain(ways[0], *pair)[0]) for pair in batch))
    prompts, targets = map(list, zip(*batch, strict=True))
    for lm in ways:
        check(lm, batch, lm.score(prompts, targets))
        with lm.reuse.shared(1):
            check(lm, batch, lm.score(prompts, targets))
        with lm.reuse.common_prefix():
            check(lm, batch, lm.score(prompts, targets))


@FEW
@given(batch=BATCHES, seed=st.integers(0, 99))
def test_scores_beside_the_model_are_those_of_the_written_update(ways, batch, seed):
    lm = ways[0]
    assume(all(len(plain(lm, *pair)[0]) for pair in batch))
    prompts, targets = map(list, zip(*batch, strict=True))
    draw = torch.Generator().manual_seed(seed)
    name = f"{lm.structure.out_name(1)}.weight"
    left_Or = 0.2 * torch.randn(lm.structure.width, 1, generator=draw)
    delta = Delta(
        {name: LowRank(left_Or, torch.randn(1, lm.structure.inner_width, generator=draw))}
    )
    beside = lm.score(prompts, targets, [delta]).logprob_BM
    patch = WeightPatch(lm, delta)
    try:
        written = lm.score(prompts, targets)
        check(lm, batch, written)
    finally:
        patch.remove()
    torch.testing.assert_close(beside, written.logprob_BM, atol=2e-4, rtol=0)


@FEW
@given(prompts=st.lists(TEXTS, min_size=1, max_size=4), count=st.integers(1, 6))
def test_generation_is_transformers_own_greedy_search(ways, prompts, count):
    ids = [ways[0].tokenizer(prompt_end(prompt)).input_ids for prompt in prompts]
    assume(all(ids))
    wanted = []
    for row in ids:
        ids_1T = torch.tensor([row])
        out = ways[0].net.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=count, do_sample=False,
            eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        new = out[0, len(row) :]
        wanted.append(ways[0].tokenizer.decode(new, skip_special_tokens=True))
    for lm in ways:
        assert lm.generate(prompts, count) == wanted


@FEW
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_texts_come_back_from_their_tokens(ways, texts):
    lm = ways[0]
    for text, row in zip(texts, lm.tokens.encode(texts), strict=True):
        assert row == lm.tokens.encode([text])[0]
        assert lm.tokens.decode(row) == text
