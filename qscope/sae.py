"""The sparse autoencoder as a module: load, encode, decode, save.

pre   = W_enc x + b_enc          no subtraction of b_dec (Qwen-Scope)
acts  = ReLU(TopK(pre))          value descending, then lowest feature
x_hat = W_dec^T acts + b_dec     W_dec kept as rows per feature
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from qscope import checkpoints, ops
from qscope.checkpoints import SAECard
from qscope.checkpoints._weights import CHUNK, DTYPES, NAMES, Weights, check_k, dtype_name
from qscope.errors import InputError

__all__ = ["SAE", "CertifiedOutput", "EncoderOutput", "SAECard"]


class EncoderOutput(NamedTuple):
    """The active features of each token."""

    top_acts: Tensor
    """[.., K] values, descending, >= 0; float32 for precision "exact", bfloat16 for "bf16" """
    top_indices: Tensor
    """[.., K] feature ids, int32"""


class CertifiedOutput(NamedTuple):
    """The active features of each token and the figures of the proof (docs/exact.md)."""

    top_acts: Tensor
    """[.., K] values, descending, >= 0, float32"""
    top_indices: Tensor
    """[.., K] feature ids, int32"""
    candidates: Tensor
    """[..] int32: how many features were scored exactly; d_sae where the bound could not exclude enough"""
    margin: Tensor
    """[..] float32: the k-th score exceeds that of every other feature by at least this; infinite if all were scored"""


class SAE(nn.Module):
    """A TopK sparse autoencoder on a residual stream.

    W_enc, W_dec: [F, D], row f belongs to feature f; b_enc: [F]; b_dec: [D]; all of them float32,
        bfloat16 or float16, on one device. Contiguous tensors are used as they are, without a copy.
    k: active features per token, 1..F.
    While W_enc and b_enc are frozen, encode_topk packs them on its first exact call (`pack`), which takes F D bytes
        more on a CPU with AVX512-VNNI and 2 F D on a GPU. Writing to them makes it pack again, except for writes that
        torch does not count, through `.data` or numpy: call `unpack` after those.
    card: what is known about the SAE; its k, sizes and dtype are set from the other arguments.

    Raises InputError for anything that does not fit.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, card: SAECard | None = None
    ) -> None:
        super().__init__()
        tensors = dict(zip(NAMES, (W_enc, W_dec, b_enc, b_dec), strict=True))
        _check_tensors(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().contiguous()))
        self.d_sae, self.d_in = W_enc.shape
        self.k = check_k(k, self.d_sae, "SAE", InputError)
        self.card = replace(card or SAECard(), k=k, d_in=self.d_in, d_sae=self.d_sae, dtype=dtype_name(W_enc.dtype))
        self._packed: ops.PackedEncoder | None = None
        self._packed_of: tuple[Any, ...] = ()
        self._compile_packed = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        layer: int | None = None,
        k: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "SAE":
        """Loads a checked SAE, in eval mode and frozen; `requires_grad_()` makes it trainable.

        name_or_path: a folder in qscope's format, a folder with files `layer{n}.sae.pt`, one such file or a
            .safetensors file, or a Hub repository such as "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50".
        layer: decoder layer from 0; needed where there are several, checked where the checkpoint states it.
        k: only where the checkpoint and its name do not state it; checked otherwise.
        dtype: of the weights in memory; None means float32, whatever is stored.

        Raises CheckpointError for the checkpoint (UnsafeCheckpointError if its pickle names code) and
        InputError for device or dtype.
        """
        sae = cls(*checkpoints.load(name_or_path, layer=layer, k=k, device=device, dtype=dtype))
        return sae.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def extra_repr(self) -> str:
        place = f", model={self.card.model!r}, hook_point={self.card.hook_point!r}" if self.card.model else ""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}, dtype={dtype_name(self.dtype)}{place}"

    def _rows(self, tensor: Tensor, width: int, what: str) -> Tensor:
        """`tensor` as [N, width], checked against this SAE."""
        if tensor.dim() == 0 or tensor.shape[-1] != width:
            raise InputError(
                f"{what} has the shape {list(tensor.shape)}, but its last dimension must be {width} for this "
                f"SAE (d_in={self.d_in}, d_sae={self.d_sae}, k={self.k})."
            )
        if tensor.device != self.device:
            raise InputError(
                f"{what} is on {tensor.device}, the SAE on {self.device}. Move one of them; qscope moves "
                "nothing by itself."
            )
        return tensor.reshape(math.prod(tensor.shape[:-1]), width)

    @overload
    def encode_topk(
        self, x: Tensor, precision: str = "exact", return_certificate: Literal[False] = False
    ) -> EncoderOutput: ...

    @overload
    def encode_topk(self, x: Tensor, precision: str, return_certificate: Literal[True]) -> CertifiedOutput: ...

    @overload
    def encode_topk(
        self, x: Tensor, precision: str = "exact", *, return_certificate: Literal[True]
    ) -> CertifiedOutput: ...

    def encode_topk(
        self, x: Tensor, precision: str = "exact", return_certificate: bool = False
    ) -> EncoderOutput | CertifiedOutput:
        """The k strongest features of each token.

        x: [.., D], float32, bfloat16 or float16, on the SAE's device.
        precision: "exact" gives the top-k of the float64 scores rounded to float32 (docs/exact.md), "bf16" that of a
            bf16 product.
        return_certificate: with "exact", return a CertifiedOutput, which has no gradient.

        Differentiable in x, W_enc and b_enc through the active entries. Raises InputError for a wrong width,
        device, dtype or precision, and for a certificate of "bf16".
        """
        rows = self._rows(x, self.d_in, "x")
        if dtype_name(x.dtype) not in DTYPES:
            raise InputError(f"x has dtype {dtype_name(x.dtype)}; accepted are {', '.join(DTYPES)}.")
        if precision not in ("exact", "bf16"):
            raise InputError(f"precision {precision!r} was asked for; accepted are 'exact' and 'bf16'.")
        leading, shape = x.shape[:-1], (*x.shape[:-1], self.k)
        if return_certificate and precision != "exact":
            raise InputError("A certificate was asked for with precision 'bf16'; only 'exact' has one.")
        packed = self._packed_now(rows) if precision == "exact" else None
        if packed is not None:
            acts, indices, *figures = ops.topk_encode_packed(rows, packed, self.k)
        elif return_certificate:
            acts, indices, *figures = ops.topk_encode_certified(
                rows.detach(), self.W_enc.detach(), self.b_enc.detach(), self.k
            )
        else:
            acts, indices = ops.topk_encode(rows, self.W_enc, self.b_enc, self.k, precision)
        if return_certificate:
            return CertifiedOutput(acts.reshape(shape), indices.reshape(shape), *(t.reshape(leading) for t in figures))
        return EncoderOutput(acts.reshape(shape), indices.reshape(shape))

    def pack(self) -> "SAE":
        """Packs the encoder for exact encoding (`qscope.ops.pack_encoder`); returns the SAE.

        Without torch.compile there is no need to call it. Compiled code uses packed weights only after this call, and
        those of the last one: call it again when the weights have changed.

        Raises InputError for a trainable encoder, whose packed weights would be out of date after a step.
        """
        if self.W_enc.requires_grad or self.b_enc.requires_grad:
            raise InputError("W_enc or b_enc requires gradients. Freeze the SAE first: sae.requires_grad_(False).")
        self._pack()
        self._compile_packed = True
        return self

    def unpack(self) -> "SAE":
        """Forgets what was packed; the next exact call packs again. Returns the SAE."""
        self._packed, self._packed_of, self._compile_packed = None, (), False
        return self

    def _pack(self) -> None:
        self._packed = None  # before its successor is made
        self._packed_of = self._weights_now()
        self._packed = ops.pack_encoder(self.W_enc, self.b_enc, self.b_dec)

    def _weights_now(self) -> tuple[Any, ...]:
        """What changes when torch writes to the encoder or replaces it."""
        return tuple(x for t in (self.W_enc, self.b_enc) for x in (id(t), t.data_ptr(), t._version))

    def _packed_now(self, rows: Tensor) -> ops.PackedEncoder | None:
        """The packed encoder, packed anew where due; None where a gradient is wanted or it could go stale unseen."""
        encoder = (self.W_enc, self.b_enc)
        if any(t.requires_grad for t in encoder) or (rows.requires_grad and torch.is_grad_enabled()):
            return None
        if torch.compiler.is_compiling():
            return self._packed if self._compile_packed else None
        # Fake tensors and those of torch.func have no data; tensors of inference mode do not count their versions.
        if any(type(t) not in (Tensor, nn.Parameter) or is_functorch_wrapped_tensor(t) for t in (rows, *encoder)):
            return None
        if any(t.is_inference() for t in encoder):
            return None
        if self._packed is None or self._packed_of != self._weights_now():
            self._pack()
        return self._packed if self._packed is not None and self._packed.codes else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SAE":
        """Moved or cast weights are packed anew."""
        self.unpack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack for themselves."""
        return {**self.__dict__, "_packed": None, "_packed_of": (), "_compile_packed": False}

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [.., F] in the SAE's dtype, as callers of SAELens and SAEBench expect.

        x as in `encode_topk`, which needs about F / (2 k) times less memory.
        """
        acts, indices = self.encode_topk(x)
        dense = torch.zeros(*x.shape[:-1], self.d_sae, dtype=self.dtype, device=self.device)
        return dense.scatter_(-1, indices.long(), acts.to(self.dtype))

    def decode(self, acts: Tensor, top_indices: Tensor | None = None) -> Tensor:
        """Reconstruction [.., D] in the SAE's dtype, b_dec included.

        Either decode(top_acts [.., K], top_indices [.., K] int32 or int64), any K, or decode(dense [.., F]).
        Differentiable in the activations, W_dec and b_dec. Raises InputError for shapes that do not fit.
        """
        if top_indices is None:
            dense = self._rows(acts, self.d_sae, "the dense activation tensor").to(self.dtype)
            return torch.addmm(self.b_dec, dense, self.W_dec).reshape(*acts.shape[:-1], self.d_in)
        if acts.shape != top_indices.shape or acts.dim() == 0:
            raise InputError(
                f"top_acts has the shape {list(acts.shape)} and top_indices {list(top_indices.shape)}; they "
                "must be equal."
            )
        if top_indices.dtype not in (torch.int32, torch.int64):
            raise InputError(f"top_indices has dtype {dtype_name(top_indices.dtype)}; accepted are int32 and int64.")
        slots = acts.shape[-1]
        values = self._rows(acts, slots, "top_acts")
        x_hat = ops.sparse_decode(values, self._rows(top_indices, slots, "top_indices"), self.W_dec, self.b_dec)
        return x_hat.reshape(*acts.shape[:-1], self.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, [.., D], in x's dtype."""
        return self.decode(*self.encode_topk(x)).to(x.dtype)

    def weight_hash(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the tensors and k: the same on every device.

        It belongs to the weights as they are in memory: the same SAE in another dtype has another hash.
        """
        digest = hashlib.sha256()
        for name in NAMES:
            tensor = getattr(self, name).detach()
            digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
            for part in tensor.reshape(-1).split(CHUNK):
                digest.update(part.cpu().view(torch.uint8).numpy())
        digest.update(f"k {self.k}\n".encode())
        return digest.hexdigest()

    def save(self, path: str | Path, format: str = "qscope") -> Path:
        """Writes the SAE atomically, in its present dtype, and returns the folder or file.

        format: "qscope" (a folder: sae.safetensors and sae.json) or "qwen_scope" (a .pt file, or a folder
            that gets layer{n}.sae.pt; it stores no k, so name the folder SAE-Res-{model}-W{N}K-L0_{k}).

        Raises CheckpointError for weights that cannot be saved, StorageError when the disk refuses.
        """
        card = replace(self.card, k=self.k, d_in=self.d_in, d_sae=self.d_sae, dtype=dtype_name(self.dtype))
        return checkpoints.save(Weights(self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.k, card), path, format)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    W_enc = tensors["W_enc"]
    if W_enc.dim() != 2 or 0 in W_enc.shape:
        raise InputError(f"W_enc has the shape {list(W_enc.shape)}; expected [d_sae, d_in], one row per feature.")
    features, width = W_enc.shape
    for name, shape in (("W_dec", (features, width)), ("b_enc", (features,)), ("b_dec", (width,))):
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{name} has the shape {list(tensors[name].shape)}; with W_enc [{features}, {width}] (one "
                f"row per feature) expected {list(shape)}."
            )
    dtypes = {dtype_name(tensor.dtype) for tensor in tensors.values()}
    devices = {str(tensor.device) for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise InputError(
            f"the tensors have dtypes {', '.join(sorted(dtypes))}; expected a single one of {', '.join(DTYPES)}."
        )
    if len(devices) > 1:
        raise InputError(f"the tensors are on {', '.join(sorted(devices))}; expected one device.")
