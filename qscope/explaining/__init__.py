"""What a feature means in words: its contexts, a sentence made of them by rule or by a model, and how far it holds.

sources    token codes of a feature store, or of texts in memory
contexts   what a feature fires on: strongest passages, and passages set aside to test an explanation on
prompts    what a model is asked, and how its answers are read
judges     who says whether an explanation fits a passage: keywords, or a model
scores     detection and fuzzing (Paulo et al. 2024) as balanced accuracy and AUROC, with intervals
sentences  the explanation itself
journal    explanations on disk, a JSON object a line
"""
