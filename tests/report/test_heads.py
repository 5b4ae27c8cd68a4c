"""`tedfx verify` builds any head of a Hugging Face type and gives it the labels that it is trained on."""

import pytest

from tedfx.errors import ConfigError
from tedfx.verification.batches import make_batch
from tedfx.verification.heads import HEADS, auto_class, heads_of
from tedfx.verification.models import ByType, factory
from tedfx.verification.verify import verify
from tests.marks import slow_but

pytest.importorskip("transformers")

TASKS = {
    "token-classification": "mixtral",
    "sequence-classification": "mixtral",
    "question-answering": "mixtral",
    "masked-lm": "modernbert",
    "seq2seq-lm": "t5",
    "image-classification": "vit",
    "backbone": "vitpose_backbone",
}


def test_heads_are_read_from_the_tables_of_names():
    from transformers import MixtralConfig, NllbMoeConfig

    assert heads_of(MixtralConfig) == [
        *("causal-lm", "token-classification", "sequence-classification", "question-answering", "none")
    ]
    assert heads_of(NllbMoeConfig)[0] == "seq2seq-lm"
    assert set(heads_of(MixtralConfig)) <= set(HEADS)
    with pytest.raises(ConfigError, match=r"^MixtralConfig has no head 'masked-lm'; it has causal-lm, "):
        auto_class(MixtralConfig, "masked-lm")


@pytest.mark.parametrize("name", ["nllb-moe", "nllb_moe", "NLLB_MoE"])
def test_a_type_is_found_however_its_name_is_joined(name):
    assert type(ByType(name, {"vocab_size": 48}).config()).__name__ == "NllbMoeConfig"


def test_labels_of_an_answer():
    batch = make_batch(factory("mixtral", head="question-answering")(), 4, 12, 0)
    start, end = batch["start_positions"], batch["end_positions"]
    assert start.shape == end.shape == (4,) and bool((start <= end).all())
    assert start[-1] == end[-1] == 12 and bool((end[:-1] < 12).all())  # one row that does not count


@pytest.mark.parametrize("head", slow_but([], TASKS), ids=str)
def test_on_a_mesh(head):
    made = ByType(TASKS[head], head=head)
    result = verify(made, "dp=2,tp=2", steps=2, device="cpu")
    assert result.ok, result


@pytest.mark.slow
def test_float32_parts_in_float64():
    result = verify(ByType("mixtral"), "ep=2,tp=2", steps=2, device="cpu", widen=True)
    assert result.ok and max(row.error for row in result.rows) < 1e-12, result
    with pytest.raises(ConfigError, match="^verify: widen is for a float64 model"):
        verify(ByType("mixtral"), "ep=2", precision="bf16", widen=True)
