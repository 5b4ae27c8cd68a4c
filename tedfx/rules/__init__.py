"""Rules per op family, in factors; see `tedfx.rules.base.Relation`."""

from torch import fx

from tedfx.graph.nodes import is_elementwise, op_name
from tedfx.ops.function import kept_of
from tedfx.rules import (
    complexes,
    contractions,
    convolutions,
    creation,
    draws,
    experts,
    functions,
    indexing,
    pointwise,
    views,
)
from tedfx.rules.base import RULES, Annotator, Relation, Rule, whole_everywhere

__all__ = ["RULES", "Annotator", "FAMILIES", "Relation", "Rule", "rule_for", "whole_everywhere"]

FAMILIES = (complexes, contractions, convolutions, creation, draws, experts, indexing, pointwise, views)
"""Their rules are registered by importing them."""


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node; pointwise by torch's own tag; `whole_everywhere` where there is none."""
    if kept_of(node.target) is not None:
        return functions.function
    fn = RULES.get(op_name(node))
    if fn is None and is_elementwise(node):
        fn = pointwise.pointwise
    return fn or whole_everywhere
