"""Which features stand for a property of text: scores on sparse codes, how stable they are, what they do to the output.

Nothing here reads files or runs more of the model than `output_score` says; `qscope.workflows.steer_find` puts it
together. Codes stay sparse: no array of texts x features is made.
"""

from qscope.finding.pooled import PooledCodes as PooledCodes
from qscope.finding.pooled import pool as pool
from qscope.finding.scores import METRICS as METRICS
from qscope.finding.scores import Sample as Sample
from qscope.finding.scores import ranking as ranking
