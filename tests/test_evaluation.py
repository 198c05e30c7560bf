"""The one evaluation: every value against the same value worked out by hand from raw logits."""

import json
import math

import pytest
import torch

from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.zsre import ZsRE
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.evaluation.measures import PROTOCOLS, CaseResult
from corrigenda.modules.evaluation.module import Conditions, EditingModule
from corrigenda.modules.model.delta import Delta, LowRank
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.structure import sizes

EDIT = Edit("{} was made in", "The Tin Owl", "Paris", "seven")


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


@pytest.fixture
def cases(data_files):
    """CounterFact's, with one or two paraphrases and two or three neighbours."""
    return CounterFact(data_files.counterfact).read(data_files.counterfact)


def update(lm, scale=0.3, seed=0):
    """A delta of the last block's projection that changes many answers."""
    name = lm.structure.out_name(1)
    inner, outer = sizes(lm.net.get_submodule(name))
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator) for s in ((outer, 2), (2, inner)))
    return Delta({f"{name}.weight": LowRank(scale * left, right)})


@torch.no_grad()
def by_hand(lm, prompt, target):
    """Logits that predict the target's tokens, and these tokens, without padding or anything of ours."""
    alone, joint = (lm.tokenizer(text).input_ids for text in (prompt, f"{prompt} {target}"))
    assert joint[: len(alone)] == alone
    logits = lm.net(torch.tensor([joint])).logits[0].float()
    return logits[len(alone) - 1 : -1].log_softmax(-1), torch.tensor(joint[len(alone) :])


def answers(lm, cases):
    """(before or after) ``{(prompt, text): (logprobs, tokens)}`` of everything that is scored."""
    return {
        (probe.prompt, text): by_hand(lm, probe.prompt, text)
        for case in cases for probes in case.probes.values() for probe in probes
        for text in (probe.target, probe.rival) if text
    }  # fmt: skip


def expected(case, before, after):
    """What every measure of one case should be: means over its probes."""
    values = {}
    for criterion, probes in case.probes.items():
        for probe in probes:
            now, tokens = after[probe.prompt, probe.target]
            then, _ = before[probe.prompt, probe.target]
            hits, hits_then = now.argmax(-1) == tokens, then.argmax(-1) == tokens
            measured = {"accuracy": hits.float().mean(), "exact": hits.all().float()}
            chosen = now.gather(1, tokens[:, None]).mean()
            if probe.rival:
                rival_now, rival_tokens = after[probe.prompt, probe.rival]
                other = rival_now.gather(1, rival_tokens[:, None]).mean()
                measured["preference"] = (chosen > other).float()
                measured["margin"] = chosen.exp() - other.exp()
            if criterion == "efficacy":
                measured["known_before"] = hits_then.all().float()
            if criterion == "locality":
                measured["agreement"] = (now.argmax(-1) == then.argmax(-1)).float().mean()
                measured["kl"] = (then.exp() * (then - now)).sum(-1).mean()
                measured["drawdown"] = hits_then.all().float() - measured["exact"]
            for name, value in measured.items():
                values.setdefault(f"{criterion}/{name}", []).append(float(value))
    return {name: sum(v) / len(v) for name, v in values.items()}


def near(actual, wanted):
    assert set(actual) == set(wanted)
    for name, value in wanted.items():
        assert actual[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("way", ["written", "side by side", "one by one"])
@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_every_value_is_what_the_logits_say(tiny_folder, cases, way, reuse_prefix):
    lm = LanguageModel(str(tiny_folder("gpt2")), reuse_prefix=reuse_prefix)
    module = EditingModule(lm)
    deltas = [update(lm, seed=i if way == "side by side" else 0) for i in range(len(cases))]
    before, wanted = answers(lm, cases), []
    for case, delta in zip(cases, deltas, strict=True):
        handle = WeightPatch(lm, delta)
        wanted.append(expected(case, before, answers(lm, [case])))
        handle.remove()
    if way == "side by side":
        module.conditions = Conditions(case_deltas=deltas)
        results = module.evaluate(cases)
    else:
        handle = WeightPatch(lm, deltas[0])
        if way == "written":
            results = module.evaluate(cases)
        else:
            results = [result for case in cases for result in module.evaluate([case])]
        handle.remove()
    for result, values in zip(results, wanted, strict=True):
        near(result.metrics, values)
        assert len(result.probes) == sum(map(len, result.case.probes.values()))
    # From probes to cases, and from cases to the data set: a case with many probes counts once.
    means = module.compute_means()
    for name in wanted[0]:
        share = sum(values[name] for values in wanted) / len(wanted)
        assert means[name] == pytest.approx(share, abs=2e-5), name
    parts = [means[f"{name}/preference"] for name in ("efficacy", "generality", "locality")]
    harmonic = 3 / sum(1 / part for part in parts) if all(parts) else 0
    assert means["all/score"] == pytest.approx(harmonic)
    assert {name.rpartition("/")[2] for name in means} <= set(PROTOCOLS)


def test_what_a_probe_lacks_is_not_measured(lm, data_files):
    case, *_ = ZsRE(data_files.zsre).read(data_files.zsre)
    (result,) = EditingModule(lm).evaluate([case])
    assert not any(name.endswith(("preference", "margin")) for name in result.metrics)
    only_efficacy = EditCase(
        "1", (EDIT,), {"efficacy": (Probe(EDIT.text, "Paris"), Probe("no target"))}
    )
    module = EditingModule(lm)
    (result,) = module.evaluate([only_efficacy])
    assert set(result.metrics) == {"efficacy/accuracy", "efficacy/exact", "efficacy/known_before"}
    assert "all/score" not in module.compute_means() and len(result.probes) == 1
    assert module.evaluate([EditCase("2", (EDIT,), {})])[0].metrics == {}
    assert module.evaluate([]) == []


def test_without_an_edit_nothing_has_moved(lm, cases):
    module = EditingModule(lm)
    for result in module.evaluate(cases):
        assert result.metrics["locality/agreement"] == 1
        assert result.metrics["locality/drawdown"] == 0
        assert result.metrics["locality/kl"] == pytest.approx(0, abs=1e-6)
        assert result.metrics["efficacy/known_before"] == result.metrics["efficacy/exact"]


def test_results_do_not_depend_on_the_batch(lm, cases):
    """Neither the other cases in a batch nor the padding that they cause change a value."""
    WeightPatch(lm, update(lm))
    together = EditingModule(lm).evaluate(cases)
    alone = [EditingModule(lm).evaluate([case])[0] for case in reversed(cases)][::-1]
    for a, b in zip(together, alone, strict=True):
        near(a.metrics, b.metrics)
        assert [p["prediction"] for p in a.probes] == [p["prediction"] for p in b.probes]


def test_a_collapsed_model_fails_without_an_error(lm, cases):
    """NaN logits of an edited model count as failures."""
    name = lm.structure.out_name(1)
    inner, outer = sizes(lm.net.get_submodule(name))
    WeightPatch(lm, Delta({f"{name}.weight": torch.full((outer, inner), torch.nan)}))
    module = EditingModule(lm, generate_tokens=2)
    for result in module.evaluate(cases):
        for metric, value in result.metrics.items():
            wanted = {"kl": math.inf, "known_before": value, "drawdown": value}
            assert value == wanted.get(metric.rpartition("/")[2], 0.0), metric
        row = json.loads(json.dumps(result.row()))
        assert all(p["kl"] is None for p in row["probes"] if p["criterion"] == "locality")
    means = module.compute_means()
    assert means["all/score"] == 0 and means["locality/kl"] == math.inf


def test_evaluating_twice_gives_equal_results(lm, cases):
    """Evaluation has no state that affects the next one."""
    handle = WeightPatch(lm, update(lm))
    module = EditingModule(lm, generate_tokens=3)
    kept = {name: p.detach().clone() for name, p in lm.net.named_parameters()}
    runs = []
    for _ in range(2):
        module.on_validation_epoch_start()
        runs.append((module.evaluate(cases), module.compute_means()))
    assert runs[0] == runs[1]
    assert all(torch.equal(p, kept[name]) for name, p in lm.net.named_parameters())
    assert lm.handles == [handle] and module.lm is lm


def test_free_answers_are_compared_with_all_that_is_acceptable(lm, monkeypatch):
    case = EditCase("1", (EDIT,), {
        "efficacy": (Probe("a", "Paris"),),
        "generality": (Probe("b", "Lutetia", aliases=("the city of Paris",)), Probe("c", "London")),
        "locality": (Probe("d", "red"), Probe("e", "blue")),
    })  # fmt: skip
    edited = {"a": " Paris. It is", "b": " The city of Paris\nNext", "c": " London Bridge",
              "d": " red", "e": " blue"}  # fmt: skip
    base = edited | {"e": " green"}

    weight = f"{lm.structure.out_name(1)}.weight"
    unedited = lm.net.get_parameter(weight).clone()

    def generate(prompts, tokens, *_, stop):
        assert tokens == 7 and "\n" in stop
        said = base if torch.equal(lm.net.get_parameter(weight), unedited) else edited
        return [said[prompt] for prompt in prompts]

    WeightPatch(lm, update(lm))
    monkeypatch.setattr(lm, "generate", generate)
    (result,) = EditingModule(lm, generate_tokens=7).evaluate([case])
    wild = {n: v for n, v in result.metrics.items() if "wild" in n and not n.endswith("f1")}
    assert wild == {
        "efficacy/wild_exact": 1, "efficacy/wild_contains": 1, "efficacy/wild_prefix": 1,
        "generality/wild_exact": 0.5, "generality/wild_contains": 1, "generality/wild_prefix": 1,
        "locality/wild_exact": 1, "locality/wild_contains": 1, "locality/wild_prefix": 1,
        "locality/wild_same": 0.5,
    }  # fmt: skip
    assert result.metrics["generality/wild_f1"] == pytest.approx((1 + 2 / 3) / 2)
    row = result.row()
    noted = {p["prompt"]: (p["answer"], p.get("answer_before")) for p in row["probes"]}
    assert noted["a"] == ("Paris. It is", "Paris. It is")
    assert noted["b"] == ("The city of Paris\nNext", None)  # not compared with the unedited model
    assert noted["e"] == ("blue", "green")
    by_prompt = {p["prompt"]: p for p in row["probes"]}
    assert by_prompt["e"]["wild_same"] == 0 and by_prompt["e"]["wild_prefix"] == 1
    assert by_prompt["a"]["target_tokens"] == len(lm.tokens.encode([" Paris"])[0])
    assert row["edits"][0]["relation"] == EDIT.relation


def test_free_answers_see_their_own_case(lm, cases):
    """Every case's own update, generated side by side, is the model it was written into."""
    deltas = [update(lm, seed=i, scale=1.0) for i in range(len(cases))]
    module, said = EditingModule(lm, generate_tokens=4), []
    generate = lm.generate

    def noted(*args, **kwargs):
        said.append(generate(*args, **kwargs))
        return said[-1]

    lm.generate = noted
    module.conditions = Conditions(case_deltas=deltas)
    module.evaluate(cases)
    beside, before, rest = said  # efficacy and locality, these without an edit, generality
    alone = []
    for case, delta in zip(cases, deltas, strict=True):
        handle = WeightPatch(lm, delta)
        prompts = [p.prompt for name in ("efficacy", "locality") for p in case.probes[name]]
        alone += generate(prompts, 4)
        handle.remove()
    assert beside == alone and len(before) == len(beside)
    assert len(rest) == sum(len(case.probes["generality"]) for case in cases)


def test_only_the_given_cases_are_evaluated(lm, cases):
    module = EditingModule(lm)
    assert len(module.validation_step(cases, 0)["results"]) == len(cases)
    module.conditions = Conditions(only_cases={cases[1].case_id})
    (result,) = module.validation_step(cases, 0)["results"]
    assert result.case is cases[1]
    module.conditions = Conditions(only_cases=set())
    assert module.validation_step(cases, 0) == {"results": []}


def test_locality_probes_that_are_edited_are_left_out(lm, cases):
    module = EditingModule(lm)
    case = cases[0]
    kept = [probe.prompt for probe in case.probes["locality"]]
    module.conditions = Conditions(edited={kept[0], case.edits[0].text})

    def scored(criterion):
        (result,) = module.evaluate([case])
        return [p["prompt"] for p in result.probes if p["criterion"] == criterion]

    assert scored("locality") == kept[1:] and scored("efficacy") == [case.edits[0].text]
    module.conditions = Conditions(edited=set(kept))
    assert not scored("locality") and "locality/agreement" not in module.evaluate([case])[0].metrics


def test_known_is_what_the_unedited_model_answers(lm):
    learned = FT([0, 1], steps=80, lr=1e-2, stop_loss=1e-3).edit(
        lm, [Edit(EDIT.prompt, EDIT.subject, "seven")]
    )
    lm.handles.remove(learned)  # from here on this is the base model
    module = EditingModule(lm)
    other = Edit("{} was made in", "Zembla", "Paris", "a house of glass")
    cases = [EditCase("1", (EDIT,)), EditCase("2", (other,)), EditCase("3", (EDIT, other))]
    assert module.known(cases) == [True, False, False]
    handle = FT([0, 1], steps=80, lr=1e-2).edit(lm, [EDIT])  # now it would say Paris
    assert not lm.score([EDIT.text], ["seven"]).exact_B
    assert module.known(cases) == [True, False, False]
    handle.remove()
    with pytest.raises(ValueError, match="known_only needs edits with a true answer"):
        module.known([EditCase("4", (Edit("{} is", "Ada", "red"),))])


def test_a_row_can_be_read_back(lm, cases):
    (result,) = EditingModule(lm).evaluate(cases[:1])
    row = json.loads(json.dumps(result.row()))
    assert row["case_id"] == cases[0].case_id and row["fingerprint"] == cases[0].fingerprint
    edit = cases[0].edits[0]
    assert row["edits"] == [
        {"text": edit.text, "target_new": edit.target_new, "relation": edit.relation}
    ]
    first = row["probes"][0]
    assert first["criterion"] == "efficacy" and first["rival"] == cases[0].edits[0].target_true
    assert {"accuracy", "exact", "preference", "margin", "prediction"} <= set(first)
    assert CaseResult(cases[0]).row()["metrics"] == {}


@torch.no_grad()
def text_by_hand(lm, texts, limit):
    """exp of the mean NLL of all tokens but the first, from plain forward passes."""
    nll = []
    for text in texts:
        ids = lm.tokenizer(text).input_ids[:limit]
        limit -= len(ids) * (len(ids) > 1)
        logprob = lm.net(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        nll += (-logprob.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).tolist()
        if limit < 2:
            break
    return math.exp(sum(nll) / len(nll))


def test_perplexity_is_what_the_logits_say(lm, monkeypatch):
    texts = [
        "The town is on the ice.",
        "He",
        "a",
        "A story of the year 1984",
        "São Paulo said that",
    ]
    monkeypatch.setattr("corrigenda.modules.model.rows.BATCH_TOKENS", 160)  # in several batches
    for limit in (10_000, 23):
        assert lm.perplexity(texts, limit) == pytest.approx(
            text_by_hand(lm, texts, limit), rel=1e-5
        )
    delta = update(lm)
    beside = lm.perplexity(texts, 10_000, delta)
    patch = WeightPatch(lm, delta)
    written = text_by_hand(lm, texts, 10_000)
    assert beside == pytest.approx(written, rel=1e-4) == lm.perplexity(texts, 10_000)
    patch.remove()
    assert abs(written / lm.perplexity(texts, 10_000) - 1) > 5e-3
    for text, limit in (("a", 1), ("", 9)):
        with pytest.raises(ValueError, match="at least two tokens"):
            lm.perplexity([text], limit)


def test_texts_are_cut_and_read_until_there_is_enough(tiny_lm, monkeypatch):
    """At the model's positions or at 512 tokens; what follows is not even fetched."""
    lm, long = tiny_lm("gpt2", max_position_embeddings=16), "The town is on the ice. " * 20

    def texts():
        yield from ("", long)
        raise AssertionError("more text than needed is read")

    assert lm.perplexity(["", long], 1000) == pytest.approx(text_by_hand(lm, [long], 16), rel=1e-5)
    for limit in (15, 16, 17):  # one token is left of the last, which predicts nothing
        by_hand = text_by_hand(lm, [long], min(limit, 16))
        assert lm.perplexity(texts(), limit) == pytest.approx(by_hand, rel=1e-5)
    monkeypatch.setattr("corrigenda.modules.model.scoring.TEXT_TOKENS", 8)
    assert lm.perplexity([long], 1000) == pytest.approx(text_by_hand(lm, [long], 8), rel=1e-5)


def test_a_collapsed_model_has_infinite_perplexity(lm):
    lm.net.get_input_embeddings().weight.data.fill_(float("nan"))
    assert lm.perplexity(["The town is on the ice."], 100) == math.inf


def test_what_was_measured_before_counts_as_it_did_then(tiny_lm):
    """Also a verdict over several wordings, whose metric further cases are added to."""
    lm = tiny_lm("gpt2")
    probes = (Probe("Where is Ada?", "at sea"), Probe("Ada is", "at home"))
    cases = [
        EditCase(str(i), (Edit("{} is", f"Ada {i}", "here"),), {"multihop": probes[i:]})
        for i in (0, 1)
    ]
    whole, parts = EditingModule(lm), EditingModule(lm)
    first, _ = whole.evaluate(cases)
    parts.measured = {cases[0].fingerprint: first.metrics}
    (left,) = parts.validation_step(cases, 0)["results"]
    assert left.case is cases[1] and "multihop/any_exact" in first.metrics
    assert parts.compute_means() == whole.compute_means()
    assert {name: type(m) for name, m in parts._running.metrics.items()} == {
        name: type(m) for name, m in whole._running.metrics.items()
    }
