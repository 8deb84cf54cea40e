"""Small models that were pickled name this module; the layers live in `stratavit.elastic.plain`."""

from stratavit.elastic.plain import Constant as Constant
from stratavit.elastic.plain import SplitAttention as SplitAttention
