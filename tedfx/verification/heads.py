"""Which class of transformers builds a model of a config: the head of a task on it.

A type that has several is built with the first of `HEADS` that it has, unless one is named.
"""

from __future__ import annotations

from tedfx.errors import ConfigError

# name on the command line -> (the auto class, its table of config types in transformers)
HEADS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ),
    "question-answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "backbone": ("AutoBackbone", "MODEL_FOR_BACKBONE_MAPPING"),
    "none": ("AutoModel", "MODEL_MAPPING"),
}


def auto_class(config_class: type, head: str | None = None):
    """The auto class that builds a model of such a config.

    head: a key of HEADS, or None for the first that this type has. ConfigError where there is none.
    """
    import transformers

    has = [name for name, (_, table) in HEADS.items() if config_class in getattr(transformers, table)]
    if head is None and has:
        head = has[0]
    if head not in has:
        what = "no class" if head is None else f"no head {head!r}"
        raise ConfigError(
            f"{config_class.__name__} has {what}" + (f"; it has {', '.join(has)}" if has else "")
        )
    return getattr(transformers, HEADS[head][0])
