"""Classifying texts by a few SAE features: the rule, how it is fitted, and what it is compared with.

Codes are those of `qscope.finding.pooled`; nothing here runs a model.
"""

from qscope.classification.rule import FeatureRule as FeatureRule
from qscope.classification.rule import MulticlassRule as MulticlassRule
from qscope.classification.rule_file import load_rule as load_rule
from qscope.classification.rule_file import save_rule as save_rule
from qscope.classification.rule_module import RuleModule as RuleModule
from qscope.classification.split import Split as Split
from qscope.classification.split import make_split as make_split
