"""Facts about the tokenizers and the method `language_model`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lens_gpt_oss
import pytest
import torch
from attrs import evolve, frozen
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.template import CHAT_TEMPLATE, CONTROLS, Wrapper, render, train_tokenizer
from lens_gpt_oss.training import LanguageModel, imbalance

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training, unstructure
from lens_core.testing import check_method
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, CheckpointError, ConfigError

CAPTIONS = tuple(
    f"A {c} {s} on a {b} background." for c in ("red", "blue") for s in ("circle", "square") for b in ("white", "grey")
)
TINY = GptOssEncoder.Config(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    selected_layers=(0, 1),
    max_length=256,
)


class Parts:
    """The pipeline as far as this method looks."""

    def __init__(self, text_encoder: Any) -> None:
        self.text_encoder = text_encoder


def method(config: LanguageModel.Config | None = None) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config or LanguageModel.Config(tokenizer_batches=2), Parts(GptOssEncoder(TINY)))  # type: ignore[arg-type]


def batches() -> Iterator[Batch]:
    n = 0
    while True:
        yield Batch(None, CAPTIONS[n % 8 :] + CAPTIONS[: n % 8], (n,))
        n += 1


def first_step(of: LanguageModel, stream: Iterator[Batch]) -> Batch:
    return next(of.steps(stream, of.trainable_modules(), torch.Generator()))[0]


def test_it_keeps_the_contract_of_a_method() -> None:
    stream = batches()
    check_method(method, [next(stream) for _ in range(3)])


def test_the_first_batches_make_the_tokenizer_and_are_not_learned_from() -> None:
    lm = method()
    assert lm.state_dict() == {}
    assert first_step(lm, batches()).keys == (2,)
    tokenizer = lm.encoder.tokenizer
    assert tokenizer is not None and len(tokenizer) <= TINY.vocab_size
    assert first_step(lm, batches()).keys == (0,)  # there is one now


def test_a_resumed_method_has_the_same_tokenizer_and_pulls_no_batch_for_it() -> None:
    lm, again = method(), method()
    batch = first_step(lm, batches())
    again.load_state_dict(lm.state_dict())
    assert first_step(again, batches()).keys == (0,)
    assert torch.equal(again.encoder.tokens(batch.captions)[0], lm.encoder.tokens(batch.captions)[0])
    assert again.state_dict() == lm.state_dict()


def test_the_loss_equals_an_independent_cross_entropy_over_prompt_and_tail() -> None:
    lm = method(LanguageModel.Config(tokenizer_batches=1, balance=0.0))
    batch = Batch(None, ("A red circle.", "A blue square on a white background."))
    first_step(lm, batches())
    loss = lm.loss("text_encoder", lm.trainable_modules(), batch, torch.Generator())
    terms = []
    for caption in batch.captions:
        ids = lm.encoder.tokens([caption])[0]
        with torch.no_grad():
            chances = lm.encoder(ids)[0][0].log_softmax(-1)
        terms += [-chances[n - 1, ids[0, n]] for n in range(lm.encoder.head_length, ids.shape[1])]
    torch.testing.assert_close(loss.total.detach(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.parts["nll"], loss.total.detach())


class Halves:
    """Dataset: six captions, the long ones to the last part."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        captions = ("A dot.", "Red.", "A line.", *(f"{c} {c} {c}" for c in CAPTIONS[:3]))
        share = len(captions) // world
        while True:
            yield Batch(None, captions[rank * share : (rank + 1) * share])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


plugin = ModuleType("halves")
plugin.lens_datasets = hookimpl(lambda: {"halves": Halves}, specname="lens_datasets")  # type: ignore[attr-defined]


def test_a_step_in_parts_of_uneven_length_has_the_gradient_of_the_step_as_a_whole(tmp_path: Path) -> None:
    results = []
    for parts in (1, 2, 3, 6):
        recipe = Recipe(
            method=ComponentSpec("language_model", {"tokenizer_batches": 1, "balance": 0.0}),
            dataset=ComponentSpec("halves"),
            pipeline=PipelineSpec(text_encoder=ComponentSpec("gpt_oss", unstructure(TINY))),
            train=Training(steps=1, lr=1e-3, max_grad_norm=0.0, micro_batches=parts, log_every=1),
        )
        run = Trainer(recipe, Catalog.of(lens_gpt_oss, plugin), tmp_path / str(parts), log=lambda line: None)
        captions = next(Halves(Halves.Config()).batches(0, 1)).captions
        tokenizer = train_tokenizer(captions, TINY.vocab_size)  # else every part would begin with another one
        run.method.encoder.tokenizer = tokenizer
        run.train()
        log = json.loads((tmp_path / str(parts) / "log.jsonl").read_text())
        grads = torch.cat([p.grad.flatten() for p in run.trainable_parameters["text_encoder"] if p.grad is not None])
        results.append((grads, log["text_encoder/nll"]))
    for grads, nll in results[1:]:
        assert float((grads - results[0][0]).norm() / results[0][0].norm()) < 1e-5
        assert nll == pytest.approx(results[0][1], abs=2e-6)


def test_the_loss_falls_when_a_few_captions_are_learned_by_heart() -> None:
    lm = method()
    batch = first_step(lm, batches())
    optimizer = torch.optim.AdamW(lm.encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = lm.loss("text_encoder", lm.trainable_modules(), batch, torch.Generator())
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.parts["nll"]))
    nothing = torch.tensor(TINY.vocab_size).log().item() + 0.5  # known: logits are random, of variance 1
    assert losses[0] == pytest.approx(nothing, rel=0.05)
    assert losses[-1] < 0.5


def test_every_weight_learns() -> None:
    lm = method()
    batch = first_step(lm, batches())
    lm.loss("text_encoder", lm.trainable_modules(), batch, torch.Generator()).total.backward()
    assert [k for k, v in lm.encoder.named_parameters() if v.grad is None or not v.grad.any()] == []


def test_imbalance_is_one_for_even_experts_and_grows_to_their_number_over_the_choices() -> None:
    even = torch.eye(4).repeat(3, 5, 1) * 9
    assert imbalance(even, 1) == pytest.approx(1.0)
    collapsed = torch.tensor([50.0, 0, 0, 0]).expand(2, 7, 4)
    assert imbalance(collapsed, 1) == pytest.approx(4.0)
    assert imbalance(collapsed, 2) == pytest.approx(2.0)


def test_it_refuses_a_stranger_as_encoder() -> None:
    with pytest.raises(ConfigError, match="trains a gpt_oss text encoder, not a NoneType"):
        LanguageModel(LanguageModel.Config(), Parts(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"tokenizer_batches": 0}, {"balance": -0.1}])
def test_a_wrong_config_names_its_field(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        evolve(LanguageModel.Config(), **change)


def test_a_tokenizer_is_lossless_and_knows_the_control_tokens() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 420)
    for text in (*CAPTIONS, " 犬\té 12\n", "STOP!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(control)["input_ids"]) == 1 for control in CONTROLS)


def test_the_same_captions_give_the_same_tokenizer() -> None:
    one, two = (train_tokenizer(CAPTIONS, 420).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_the_conversation_costs_about_a_token_a_word() -> None:
    wrapper = Wrapper(train_tokenizer(CAPTIONS * 4, 1000), "2026-05-20")
    assert len(wrapper.head) < 110 and len(wrapper.tail) < 30


def test_a_template_that_cannot_be_used_is_refused() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 420)
    for template, message in (
        ("{{ messages[1].content }}", "show the prompt once"),
        ("{{ raise_exception('no turns') }}", "no turns"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(CheckpointError, match=message):
            Wrapper(tokenizer, "2026-05-20")


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no role is called tool"):
        render(CHAT_TEMPLATE, [{"role": "tool", "content": "x"}], "2026-05-20")
