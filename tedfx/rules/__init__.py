"""Rules per op family, in factors; see `tedfx.rules.base.Relation`."""

from torch import fx

from tedfx.rules import complexes, contractions, creation, experts, indexing, pointwise, views  # noqa: F401  (they register)
from tedfx.rules.base import RULES, Annotator, Relation, is_tensor, op_name, operands, whole_everywhere


def rule_for(node: fx.Node):
    """The rule of a node; pointwise by torch's own tag; `whole_everywhere` where there is none."""
    fn = RULES.get(op_name(node))
    if fn is None and pointwise.is_pointwise(node):
        fn = pointwise.pointwise
    return fn or whole_everywhere
