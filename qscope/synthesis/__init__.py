"""Examples for the features that a data set lacks (Qwen-Scope, arXiv 2605.11887, section 6).

targets      which features an example is wanted for, and what is known of them
coverage     which of them a data set fires, and how fast that grows with its size
templates    what a generator is asked, by role
sources      who writes: a chat model, a plain continuation, the model steered with the feature, a function
minhash      near-duplicates by text; by fired features in `duplicates`
duplicates   what is too like an example that is kept
journal      what a run has finished so far
"""
