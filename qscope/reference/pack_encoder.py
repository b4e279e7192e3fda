from torch import Tensor


def pack_encoder(W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, pair: bool) -> list[Tensor]:
    """Nothing to keep: the plain meaning reads W_enc itself."""
    return []
