"""Muon: momentum whose singular values are all made one.

For a matrix W of m rows and n columns with gradient G (Jordan et al., "Muon: An optimizer for hidden layers", 2024):

    M <- mu M + (1 - mu) G                 momentum
    U <- (1 - mu) G + mu M                 Nesterov's look ahead
    O <- NewtonSchulz(U / |U|)             close to the nearest orthogonal matrix
    W <- W (1 - lr decay) - lr sqrt(max(1, m / n)) O

Newton-Schulz repeats X <- a X + (b A + c A A) X with A = X X^T, whose coefficients push every singular value into
0.7 .. 1.2 in five steps. Matrices of equal shape go through it together, as many as memory bears. bf16 is enough: the
products forget errors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from pocketlm.distributed import Shared
from pocketlm.optim.clip import clipped

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BATCH_VALUES = 2**23
"""Values that go through it together; each takes some 26 bytes meanwhile."""


class Muon:
    """The update of some named matrices, and their momentum."""

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
        *,
        num_steps: int,
        weight_decay: float,
        shared: Shared | None = None,
    ) -> None:
        """
        Args:
            copies: of some matrices, by name, in their shape; written after each update.
            shared: where several ranks share the rows of each matrix: momentum stays with the rows, and the matrix is
                put together for Newton-Schulz, which is of the whole or is not orthogonal.
        """
        self.matrices = dict(matrices)
        self.shared = shared
        self.copies = {name: copies[name] for name in matrices if name in copies}
        self.momentum = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
        self.num_steps = num_steps
        self.weight_decay = weight_decay
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, matrix in matrices.items():
            by_shape[shared.shapes[name] if shared else matrix.shape].append(name)
        self._batches: list[tuple[torch.Size, list[str]]] = []
        for shape, names in by_shape.items():
            most = max(1, BATCH_VALUES // shape.numel())
            self._batches += [(shape, names[i : i + most]) for i in range(0, len(names), most)]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, mu: float, clip: Tensor | None, skip: Tensor) -> None:
        """Updates every matrix in place; where `skip`, () bool, is true nothing changes.

        Args:
            gradients: in any float dtype; left as they are.
            clip: () fp32, multiplies them all.
        """
        for (rows, columns), names in self._batches:
            own = clipped((gradients[name] for name in names), clip)
            momenta = [self.momentum[name] for name in names]
            moved = torch._foreach_lerp(momenta, own, 1 - mu)
            ahead = torch._foreach_lerp(own, moved, mu)
            update = self._orthogonalized(torch.stack(ahead), rows)  # (matrices, m, n), of a share its own rows
            scale = max(1, rows / columns) ** 0.5
            for name, new, direction in zip(names, moved, update.unbind(), strict=True):
                matrix, momentum = self.matrices[name], self.momentum[name]
                updated = (matrix * (1 - lr * self.weight_decay)).sub_(direction, alpha=lr * scale)
                torch.where(skip, matrix, updated, out=matrix)
                torch.where(skip, momentum, new, out=momentum)
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), [self.matrices[name] for name in self.copies])

    def _orthogonalized(self, matrices: Tensor, rows: int) -> Tensor:
        """Of a share: its rows of what the whole matrices, (B, rows, n), become."""
        if self.shared is None:
            return orthogonalize(matrices, self.num_steps)
        whole = self.shared.whole(matrices.transpose(0, 1), rows).transpose(0, 1)
        own = self.shared.own(rows)
        return orthogonalize(whole, self.num_steps)[:, own.start : own.stop]


def orthogonalize(matrices: Tensor, num_steps: int) -> Tensor:
    """Pushes the singular values of each matrix towards one. matrices: (B, m, n); returns fp32 of that shape."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        # baddbmm adds before it rounds to bf16: half the error of separate sums
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()
