"""One entry per op and way of calling it, by the files of tedfx/rules/."""

from tests.rules.cases.complexes import COMPLEXES
from tests.rules.cases.contractions import CONTRACTIONS
from tests.rules.cases.convolutions import CONVOLUTIONS
from tests.rules.cases.draws import DRAWS
from tests.rules.cases.experts import EXPERTS
from tests.rules.cases.indexing import CREATION, INDEXING
from tests.rules.cases.pointwise import POINTWISE
from tests.rules.cases.views import VIEWS

CASES = CONTRACTIONS + CONVOLUTIONS + POINTWISE + VIEWS + INDEXING + CREATION + DRAWS + COMPLEXES + EXPERTS
