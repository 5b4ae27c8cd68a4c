"""Rules per op family, in factors; see `tedfx.rules.base.Relation`."""

from torch import fx

from tedfx.ops.function import kept_of
from tedfx.rules import complexes, contractions, creation, experts, functions, indexing, pointwise, views  # noqa: F401  (they register)
from tedfx.rules.base import RULES, Annotator, Relation, is_tensor, op_name, operands, whole_everywhere


def rule_for(node: fx.Node):
    """The rule of a node; pointwise by torch's own tag; `whole_everywhere` where there is none."""
    if kept_of(node.target) is not None:
        return functions.function
    fn = RULES.get(op_name(node))
    if fn is None and pointwise.is_pointwise(node):
        fn = pointwise.pointwise
    return fn or whole_everywhere
