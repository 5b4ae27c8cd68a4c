"""Which class of transformers builds a model of a config: the head of a task on it.

A type that has several is built with the first of `HEADS` that it has, unless one is named.
"""

from __future__ import annotations

import importlib

from tedfx.errors import ConfigError

# name on the command line -> (the auto class, its table of model types)
HEADS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "token-classification": (
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    ),
    "image-classification": (
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "backbone": ("AutoBackbone", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    "none": ("AutoModel", "MODEL_MAPPING_NAMES"),
}


def heads_of(config_class: type) -> list[str]:
    """The heads that models of such a config have, in the order of HEADS.

    Read from the tables of names: looking a class up in the tables of classes would load every model.
    """
    from transformers.models.auto import modeling_auto

    config_types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    own = getattr(config_class, "model_type", "")
    # Several types may share a config class; a class that is not transformers' own is known by its type.
    types = {name for name, made in config_types.items() if made == config_class.__name__} or {own}
    return [name for name, (_, table) in HEADS.items() if types & set(getattr(modeling_auto, table))]


def auto_class(config_class: type, head: str | None = None):
    """The auto class that builds a model of such a config.

    head: a key of HEADS, or None for the first that this type has. ConfigError where there is none.
    """
    import transformers

    has = heads_of(config_class)
    if head is None and has:
        head = has[0]
    if head not in has:
        what = "no class" if head is None else f"no head {head!r}"
        raise ConfigError(
            f"{config_class.__name__} has {what}" + (f"; it has {', '.join(has)}" if has else "")
        )
    return getattr(transformers, HEADS[head][0])
