"""Defines the linearization of a layer that is not linear: the Jacobian of its outputs by its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.operators.base import Operator
from ess_monitor.ess.operators.fields import Tokens, check_floating
from ess_monitor.ess.products import Function, JacobianProducts
from ess_monitor.ess.range_finder import Found, singular_values_by_products

if TYPE_CHECKING:
    from typing_extensions import Self

_PROBES = 16


@dataclass(frozen=True, eq=False)
class JacobianOperator(Operator):
    """Linearizes a layer y = f(u) at one input: H_i = d y[i:] / d u[:i], all channels together.

    It is what the layer does to a small change of its input, for any differentiable layer (LSTM, GRU, ...), and not an
    operator T that the layer applies. Where f is linear in u with fixed q, k and decays, it is T, once a channel.

    H_i is never formed: its singular values above `tolerance` come from products with J and J^T, as many as it takes
    to find all of them (`ess_monitor.ess.range_finder`), and the others are 0 or lower bounds. How the state realizes
    H_i is not known, so TSS at position i is that of the trivial realization, D i.

    Args:
        inputs: (batch, 1, length, D), the input to linearize at; float64 where f runs in it.
        function: f, (batch, length, D) -> (batch, length, E). Differentiable, causal, samples apart; it is called
            during `singular_values`.
        tolerance: tau, above which all singular values are to be found.
        largest: how many singular values are looked for at most.
        is_divisible: whether f takes fewer samples and tokens than `inputs` has. If not, as with other arguments for
            each of them, those not selected keep their inputs: H_i is a block of the whole Jacobian.

    Raises:
        OperatorError: `inputs` has another shape or dtype, or `largest` is below 1. In `singular_values`: f cannot be
            linearized, with the reason.

    Examples:
        >>> gru = torch.nn.GRU(4, 3, batch_first=True).double()
        >>> operator = JacobianOperator(torch.randn(2, 1, 12, 4).double(), lambda u: gru(u)[0])
        >>> (operator.singular_values([6]) > 1e-3).sum(-1).flatten().tolist()  # three numbers are carried on
        [3, 3]
        >>> operator.found[6].at_most(1e-3).tolist()
        [3.0, 3.0]
    """

    inputs: Tensor
    function: Function
    tolerance: float = 1e-3
    largest: int = 256
    is_divisible: bool = True
    unit_rows: bool = field(default=False, init=False)
    found: dict[int, Found] = field(default_factory=dict, init=False, repr=False)
    """By position: what the last call of `singular_values` found, and how certain it is."""
    products: list[JacobianProducts] = field(default_factory=list, init=False, repr=False)
    """The products of that call."""

    def __post_init__(self) -> None:
        validation.flag("is_divisible", self.is_divisible)
        check_floating("inputs", self.inputs, "(batch, 1, length, D)", 4)
        if self.inputs.is_meta:
            raise OperatorError("inputs is on the device meta, without values; a layer is linearized at real ones.")
        if self.inputs.shape[1] != 1 or self.inputs.dtype not in (torch.float32, torch.float64):
            raise OperatorError(
                f"inputs has shape {tuple(self.inputs.shape)} and dtype {self.inputs.dtype}; expected "
                "(batch, 1, length, D) in float64 or float32."
            )
        validation.function("function", self.function, hint="(batch, length, D) -> outputs", error=OperatorError)
        validation.real("tolerance", self.tolerance, low=0, error=OperatorError)
        validation.whole("largest", self.largest, 1, error=OperatorError)
        self._check_segments()

    @property
    def length(self) -> int:
        return self.inputs.shape[2]

    @property
    def block_size(self) -> int:  # type: ignore[override]
        """Inputs per token, D."""
        return self.inputs.shape[3]

    @property
    def capacity_grows(self) -> bool:
        return True

    def _capacity_at(self, position: int) -> int:
        return self.block_size * position

    def _narrow(self, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None) -> Self:
        few = super()._narrow(samples, heads, tokens)
        if self.is_divisible or (samples is None and tokens is None):
            return few
        if isinstance(tokens, Tensor):
            raise OperatorError("f takes all tokens of inputs at once, so it cannot be cut at tokens of a device.")
        return replace(few, function=_part(self.function, self.inputs[:, 0], samples, tokens or slice(None)))

    def _materialize(self) -> Tensor:
        """Return J: (batch, 1, E L, D L). Costs E L products."""
        products = JacobianProducts(self.function, self.inputs[:, 0])
        batch, length, channels = products.outputs.shape
        units = torch.eye(length * channels, device="cpu").to(self.inputs).reshape(-1, 1, length, channels)
        rows = products.backward(units.expand(-1, batch, -1, -1).contiguous())
        return rows.flatten(2).transpose(0, 1)[:, None]

    def _unit_rows(self) -> JacobianOperator:
        """Return the operator that divides by the norms of tokens' rows, as estimated from `_PROBES` products.

        What it finds is in `found` of this one, too.
        """
        divided = replace(self)
        for name, value in {"unit_rows": True, "found": self.found, "products": self.products}.items():
            object.__setattr__(divided, name, value)
        return divided

    def _row_squares(self, position: int, start: int) -> tuple[Tensor, Tensor]:
        raise OperatorError("The rows of a Jacobian are not formed; there is no far share of a layer without operator.")

    def _raw_singular_values(self, positions: Sequence[int], tolerance: float | None = None) -> Tensor:
        products = JacobianProducts(self.function, self.inputs[:, 0])
        self.products[:] = [products]
        self.found.clear()
        scale = self._scale(products) if self.unit_rows else torch.ones_like(products.outputs[..., :1])
        for position in positions:
            self.found[position] = self._at(products, position, scale)
        rank = max(each.values.shape[1] for each in self.found.values())
        columns = [torch.nn.functional.pad(f.values, (0, rank - f.values.shape[1])) for f in self.found.values()]
        return torch.stack([columns[list(self.found).index(i)] for i in positions], dim=1)[:, None].double()

    def _at(self, products: JacobianProducts, position: int, scale: Tensor) -> Found:
        batch, length, outputs = products.outputs.shape
        inputs = self.block_size
        shape = (batch, (length - position) * outputs, position * inputs)

        def product(vectors: Tensor) -> Tensor:
            tangents = vectors.new_zeros((len(vectors), batch, length, inputs))
            tangents[:, :, :position] = vectors.unflatten(2, (position, inputs))  # type: ignore[no-untyped-call]
            return (products.forward(tangents) * scale)[:, :, position:].flatten(2)

        def transposed(vectors: Tensor) -> Tensor:
            cotangents = vectors.new_zeros((len(vectors), batch, length, outputs))
            cotangents[:, :, position:] = vectors.unflatten(2, (-1, outputs))  # type: ignore[no-untyped-call]
            return products.backward(cotangents * scale)[:, :, :position].flatten(2)

        largest = min(self.largest, shape[1], shape[2])
        return singular_values_by_products(product, transposed, shape, self.inputs, self.tolerance, largest)

    def _scale(self, products: JacobianProducts) -> Tensor:
        """Return what divides each token's rows: E ||J v||^2 = ||rows||^2 for Gaussian v."""
        generator = torch.Generator().manual_seed(2)
        shape = (_PROBES, *self.inputs[:, 0].shape)
        images = products.forward(
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.inputs)
        )
        squares = images.square().mean((0, 3)).unsqueeze(-1)
        return squares.rsqrt().masked_fill_(squares == 0, 0.0)


def _part(function: Function, whole: Tensor, samples: Sequence[int] | None, tokens: slice) -> Function:
    """Return `function` as one of some samples and neighboring tokens; the others stay as they are in `whole`."""
    rows = torch.tensor(range(len(whole)) if samples is None else list(samples), device="cpu")
    rows = rows.to(whole.device)
    start, stop, _ = tokens.indices(whole.shape[1])

    def part(inputs: Tensor) -> Tensor:
        filled = torch.cat((whole[rows, :start], inputs, whole[rows, stop:]), 1)
        return function(whole.index_copy(0, rows, filled))[rows, start:stop]

    return part
