"""A planted source: 40 documents of word tokens on which features fire by known rules."""

import numpy as np

from qscope.explaining.sources import MemoryCodes, TokenCodes

WORDS = ["the", " king", " King", " queen", " sat", " on", " a", " mat", " of", " rope", "\n", " <<", " not", " here"]
KING, CAPITAL, QUEEN, ROPE, NOT = 1, 2, 3, 9, 12
SAE = "5" * 64
DOCUMENTS, LENGTH = 40, 60
KINGS, QUEENS, BESIDE, SILENT = 7, 2, 5, 4
"""Feature 7 fires on both kings, 2 on queen; 5 on rope, but not right after not; 4 never"""


def decode(tokens) -> str:
    return "".join(WORDS[token] for token in tokens)


def source(documents: int = DOCUMENTS, seed: int = 0) -> MemoryCodes:
    rng = np.random.default_rng(seed)
    token = rng.integers(4, len(WORDS), documents * LENGTH)
    rare = rng.random(len(token))
    token[rare < 0.02] = KING
    token[(rare >= 0.02) & (rare < 0.03)] = CAPITAL
    token[(rare >= 0.03) & (rare < 0.06)] = QUEEN
    document = np.repeat(np.arange(documents), LENGTH)
    position = np.tile(np.arange(LENGTH), documents)
    values, indices = np.zeros((len(token), 2), np.float32), np.zeros((len(token), 2), np.int32)
    strength = rng.uniform(1, 9, len(token)).astype(np.float32)
    before = np.concatenate([[0], token[:-1]])
    fires = [(KINGS, np.isin(token, [KING, CAPITAL])), (QUEENS, token == QUEEN)]
    fires += [(BESIDE, (token == ROPE) & (before != NOT))]
    for feature, where in fires:
        values[where, 0], indices[where, 0] = strength[where], feature
    keep = position > 0
    values[~keep, 0], indices[~keep, 0] = 99.0, KINGS  # sinks, which do not count
    return MemoryCodes(document, position, token, {3: TokenCodes(values, indices, keep)}, {3: (SAE, 16)})
