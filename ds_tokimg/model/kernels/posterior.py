"""Softmax over a whole vocabulary at every token, in pieces that stay in the cache.

What a noisy pixel says about V candidates takes V numbers a token, and the network's answer V more: for 4,096
candidates 64 MB an image, several times over. Both follow from a few numbers a token (`evidence` and the token's
embedding), so the V numbers are made piece by piece, used and dropped, forward and backward. The gradient of the
cross-entropy needs nothing from behind it but a factor, so it is computed beside the loss, as long as the logits are
at hand.

Both layers are modules with weights of their own: ZeRO-3 gathers parameters when a module is called.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of a piece: on a CPU it should stay in the second-level cache, on a GPU it should fill the machine.
_PIECE_ON_CPU, _PIECE_ELSEWHERE = 1 << 18, 1 << 26
# Logits this far below the highest count as this far: exp() of less is far below rounding, and denormal numbers are
# several times slower.
_IMPOSSIBLE = -60.0


class TokenInput(nn.Linear):
    """Probabilities of the candidates -> features [..., width]; see `forward`."""

    def forward(self, x: Tensor, book: Tensor | None = None) -> Tensor:
        """x: evidence [..., E], and a `book` [V, E] with which it gives the probabilities (the softmax of their
        product); or, without one, ids [...] int64 of tokens that are certain."""
        if book is None:
            return F.embedding(x, self.weight.T)
        return _EmbedEvidence.apply(x.flatten(0, -2), self.weight, book).view(*x.shape[:-1], -1)


class TokenOutput(nn.Linear):
    """Embeddings of tokens -> what the context adds to the log-likelihood of every candidate; see `forward`."""

    def forward(self, tokens: Tensor, loss_of: tuple[Tensor, Tensor, Tensor, Tensor] | None = None):
        """tokens [..., W] -> logits [..., V], or, with `loss_of`, the summed cross-entropy in nats, float32, and that
        of each token [...], without gradient.

        loss_of: (evidence [..., E], book [V, E], ids [...], mask [...]): the candidates' log-likelihoods are
        evidence @ book.T, and tokens whose mask is False do not count.
        """
        if loss_of is None:
            return super().forward(tokens)
        evidence, book, ids, mask = loss_of
        flat = (evidence.flatten(0, -2), book, ids.flatten(), mask.flatten())
        parameters = (self.weight, self.bias)
        total, losses = _CrossEntropy.apply(tokens.flatten(0, -2), *parameters, flat, torch.is_grad_enabled())
        return total, losses.view(ids.shape)


def _pieces(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    size = max(32, (_PIECE_ON_CPU if device.type == "cpu" else _PIECE_ELSEWHERE) // width)
    return (slice(first, first + size) for first in range(0, rows, size))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """That of the matrix products: half precision under autocast, else as the tensor."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _EmbedEvidence(torch.autograd.Function):
    """softmax(evidence @ book.T) @ weight.T, the softmax in float32; the evidence is data and gets no gradient."""

    @staticmethod
    def forward(ctx, evidence: Tensor, weight: Tensor, book: Tensor) -> Tensor:
        ctx.save_for_backward(evidence, weight, book)
        ctx.dtype = _compute_dtype(weight)
        matrix = weight.to(ctx.dtype).T  # [V, W]
        result = torch.empty(len(evidence), len(weight), dtype=ctx.dtype, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            for piece in _pieces(len(evidence), len(book), weight.device):
                seen = _softmax_(evidence[piece] @ book.T)  # [n, V]
                torch.mm(seen.to(ctx.dtype), matrix, out=result[piece])
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        evidence, weight, book = ctx.saved_tensors
        total = torch.zeros(weight.shape, device=weight.device)  # [W, V]
        with torch.autocast(weight.device.type, enabled=False):
            for piece in _pieces(len(evidence), len(book), weight.device):
                seen = _softmax_(evidence[piece] @ book.T)
                _add_product(total, gradient[piece].to(ctx.dtype).T, seen.to(ctx.dtype))
        return None, total.to(weight.dtype), None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(tokens @ weight.T + bias + evidence @ book.T)[ids], float32 logits: the sum over the masked rows,
    and each row's without gradient."""

    @staticmethod
    def forward(ctx, tokens, weight, bias, loss_of: tuple, with_gradient: bool) -> tuple[Tensor, Tensor]:
        evidence, book, ids, mask = loss_of  # data: no gradient
        dtype, mask = _compute_dtype(weight), mask.float()
        x, matrix = tokens.to(dtype), weight.to(dtype)
        # The bias as one more column: adding it to the product would be another pass over all candidates.
        evidence, table = F.pad(evidence, (0, 1), value=1.0), torch.cat([book, bias.float()[:, None]], 1)
        losses = torch.zeros(len(x), device=weight.device)
        d_tokens = torch.empty(tokens.shape, device=weight.device)
        d_weight = torch.zeros(weight.T.shape, device=weight.device)  # [W, V]: faster to add to than its transpose
        d_bias = torch.zeros(bias.shape, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            for piece in _pieces(len(x), len(book), weight.device):
                logits = evidence[piece] @ table.T  # [n, V]
                _add_product(logits, x[piece], matrix.T)
                chosen, keep = ids[piece, None], mask[piece, None]
                score = logits.gather(1, chosen)
                highest = logits.amax(1, keepdim=True)
                posterior = _softmax_(logits, highest)
                # The largest probability never underflows: its logarithm tells that of the sum of exp(logits).
                losses[piece] = ((highest - posterior.amax(1, keepdim=True).log() - score) * keep)[:, 0]
                if with_gradient:
                    # d loss / d logits but for the mask, which goes to the narrow factors of the products.
                    error = posterior.scatter_add_(1, chosen, -torch.ones_like(keep))
                    d_bias += keep[:, 0] @ error
                    error = error.to(dtype)
                    d_tokens[piece] = (error @ matrix).float() * keep
                    _add_product(d_weight, (x[piece] * keep.to(dtype)).T, error)
        if with_gradient:
            ctx.save_for_backward(d_tokens, d_weight.T, d_bias)
            ctx.dtypes = (tokens.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, gradient: Tensor, _):
        d_tokens, d_weight, d_bias = (
            (gradient * value).to(dtype) for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_tokens, d_weight, d_bias, None, None


def _softmax_(logits: Tensor, highest: Tensor | None = None) -> Tensor:
    """softmax over the last dimension of [n, V], whose values are overwritten; `highest`: their maximum [n, 1]."""
    highest = logits.amax(1, keepdim=True) if highest is None else highest
    return logits.sub_(highest).clamp_(min=_IMPOSSIBLE).softmax(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; float32 factors are multiplied into the sum, others in their own precision."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
