"""Slots whose experts every token weighs for itself, by how far it lies along their directions.

All experts stand side by side in A and in B. What a token has of each in the hidden columns tells
its score; they are weighted before B, by a softmax over the best scores and by 0 elsewhere. An
expert's direction lies in the span of its A, v = A c, so that x . v = (x A) . c: the hidden columns
are the only product of x that scores need.

Shape letters: M tokens, I in features, O out features, E experts, K of them, R rank,
Y = E * R columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhr_scale.adapters.row_map import RowMap
from mhr_scale.errors import AdapterError
from mhr_scale.families.fused import is_on_cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """What one linear has of every expert: b_YO, scaled, and c_ER, its direction by its A."""

    b_YO: Tensor
    c_ER: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSlots:
    """Slots of a linear or of siblings: the A's of all experts, and what is each sibling's own.

    `a_IY` has the columns of the adapted siblings one behind the other. A sibling that is not
    adapted has None, and no columns.
    """

    a_IY: Tensor
    experts: tuple[Experts | None, ...]
    rows: RowMap
    top_k: int
    temperature: float

    @torch.no_grad()
    def apply(self, x: Tensor, bases: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return W x + sum_e w_e (x A_e) B_e of every base, w being each token's own, of x (..., I)

        Raises `AdapterError` for an x that has a gradient.
        """
        if x.requires_grad:
            raise AdapterError(NOT_TRAINED)
        ys = [base(x) for base in bases]
        with torch.autocast(x.device.type, enabled=False):
            h_MY = x.reshape(-1, x.shape[-1]).to(self.a_IY.dtype) @ self.a_IY
            n_own = sum(own is not None for own in self.experts)
            parts = iter(h_MY.chunk(n_own, -1))
            return tuple(
                y if own is None else self._add(y, next(parts), own)
                for y, own in zip(ys, self.experts, strict=True)
            )

    def _add(self, y: Tensor, h_MY: Tensor, own: Experts) -> Tensor:
        h_MER = h_MY.unflatten(-1, own.c_ER.shape)
        rank = h_MER.shape[-1]
        best = (h_MER.float() * own.c_ER).sum(-1).abs().topk(self.top_k, -1)
        w_MK = torch.softmax(best.values / self.temperature, -1)
        chosen_MKR = best.indices[..., None].expand(-1, -1, rank)
        weighted_MKR = h_MER.gather(1, chosen_MKR) * w_MK[..., None].to(h_MER.dtype)
        y = y.contiguous()
        y_MO = y.view(-1, y.shape[-1])
        if is_on_cpu(y):  # a sum of few rows of B is faster than a product with all of them
            columns_MKR = chosen_MKR * rank + torch.arange(rank)
            y_MO += F.embedding_bag(
                columns_MKR.flatten(1),
                own.b_YO,
                per_sample_weights=weighted_MKR.flatten(1),
                mode="sum",
            )
        else:
            wide_MER = torch.zeros_like(h_MER).scatter_(1, chosen_MKR, weighted_MKR)
            y_MO.addmm_(wide_MER.flatten(1), own.b_YO)
        return y


#: What training meets.
NOT_TRAINED = (
    "weights of single tokens are not trained: call the model under torch.no_grad(), or leave out "
    "the routing by tokens"
)


def first_directions(a_EIR: Tensor, b_ERO: Tensor) -> Tensor:
    """The c_ER of which A c is the first right singular vector of every update, of length 1.

    They are eigenvectors of (B B^T) (A^T A), which is of size R: found in float64, as those of the
    symmetric S (A^T A) S, S being the root of B B^T. An expert without an update has zeros.
    """
    a, b = a_EIR.double(), b_ERO.double()
    gram_a, gram_b = a.mT @ a, b @ b.mT
    values, vectors = torch.linalg.eigh(gram_b)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    squares, sides = torch.linalg.eigh(root @ gram_a @ root)
    c_ER = (root @ sides[..., -1:])[..., 0]
    length = squares[:, -1:].clamp(min=0).sqrt()
    return torch.where(length > 0, c_ER / length, 0.0).float()
