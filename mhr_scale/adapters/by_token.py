"""Slots whose experts every token weighs for itself, by how far it lies along their directions.

All experts stand side by side in A and in B; what a token has of each in the hidden columns tells
its score, and is weighted by it before B. An expert's direction lies in the span of its A, v = A c,
so that x . v = (x A) . c: the hidden columns are the only product that scores need.

Shape letters: M tokens, I in features, O out features, E experts, R rank, Y = E * R columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhr_scale.adapters.row_map import RowMap
from mhr_scale.errors import AdapterError


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
        scores_ME = (h_MER.float() * own.c_ER).sum(-1).abs()
        w_ME = token_weights(scores_ME, top_k=self.top_k, temperature=self.temperature)
        weighted_MY = (h_MER * w_ME[..., None].to(h_MER.dtype)).flatten(1)
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(weighted_MY, own.b_YO)
        return y


NOT_TRAINED = (
    "weights of single tokens are not trained: call the model under torch.no_grad(), or leave out "
    "the routing by tokens"
)


def token_weights(scores_ME: Tensor, *, top_k: int, temperature: float) -> Tensor:
    """Weights of the experts: a softmax over the `top_k` best scores, 0 for the others."""
    best = scores_ME.topk(top_k, -1)
    weights = torch.softmax(best.values / temperature, -1)
    return torch.zeros_like(scores_ME).scatter_(-1, best.indices, weights)


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
