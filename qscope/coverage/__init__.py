"""Benchmarks seen through features: what they cover, how much they repeat themselves, how far they overlap.

Items are sets of feature ids (`Footprints`); benchmarks are counts of items per feature (`FootprintCounts`). Measures
are closed forms of these counts. NumPy alone; scipy.stats and scipy.cluster where statistics are asked for.
"""

from qscope.coverage.footprints import FootprintCounts as FootprintCounts
from qscope.coverage.footprints import Footprints as Footprints
from qscope.coverage.subset import Cover as Cover
from qscope.coverage.subset import smallest_cover as smallest_cover
from qscope.coverage.suite import Suite as Suite
