"""How good an SAE is, from tensors alone: each file measures one thing, batch by batch, in bounded memory.

`moments`: mean, scatter and PCA of residuals. `fidelity`: reconstruction error, sparsity, densities. `splice`:
next-token loss with a block's output replaced. `dictionary`: cosines inside one decoder and between two.
`exactness`: recall of the encoder's precisions.
"""
