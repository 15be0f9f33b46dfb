"""Products by mma.sync; the other tile mathematics is that of `lla.kernels.mosaic_gpu.tile`.

A program instance is one warpgroup. Its ``[64, C]`` float32 arrays lie in the registers as wgmma
would leave them (`WGMMA`), which is also how mma.sync wants and leaves sums, so that masks,
softmax and conjugate gradients are those of the Hopper kernels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu

from lla.kernels.mosaic_gpu.tile import ROW_BLOCK, WGMMA, Arithmetic, full


def tile_transforms(head_dim: int) -> tuple:
    """Layout in shared memory of 16-bit tiles with 32 columns, or a multiple of 64."""
    columns = min(64, head_dim)
    return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))


@dataclasses.dataclass(frozen=True)
class WarpArithmetic(Arithmetic):
    """Products by mma.sync; interpreted ones are those of `Arithmetic`.

    The interpreter knows no mma.sync: interpreted kernels show everything but the way from shared
    memory to its operands.
    """

    hold_sums: bool = False

    def load(self, ref, layout=WGMMA):
        if isinstance(ref, jax.Array):
            return ref
        if self.interpreted:
            return ref[...]
        return plgpu.load(ref, layout=layout, optimized=False)

    def with_products(self, columns: int, use, *sums):
        if self.interpreted:
            return super().with_products(columns, use, *sums)

        def read(pairs):
            total = full((ROW_BLOCK, columns), 0, WGMMA)
            for a, b in pairs:
                total = _multiply(total, a, b.transpose((1, 0)))
            return total

        return use(*(functools.partial(read, pairs) for pairs in sums))

    def accumulate(self, totals, *sums):
        if self.interpreted:
            return super().accumulate(totals, *sums)
        results = []
        for total, pairs in zip(totals, sums, strict=True):
            for a, b in pairs:
                total = _multiply(total, a, b)
            results.append(total)
        return tuple(results)


def _multiply(total, a, b):
    """``total + a @ b``: a ``[64, n]`` in shared memory or in registers, b ``[n, c]`` in shared."""
    left = plgpu.Layout.MMA_LHS(a.dtype)
    a = _as_left_operand(a) if isinstance(a, jax.Array) else plgpu.load(a, layout=left)
    return plgpu.mma(total, a, plgpu.load(b, layout=plgpu.Layout.MMA_RHS(b.dtype)))


def _as_left_operand(array):
    """A 16-bit `WGMMA` as a left operand: the same registers by another name."""
    left = plgpu.Layout.MMA_LHS(array.dtype)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=left),
    )
    def relabel(_, given):
        layout = left.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=given.registers.reshape(layout.registers_shape(given.shape)),
            _layout=layout,
            _is_signed=given.is_signed,
        )

    return relabel(plgpu.layout_cast(array, WGMMA))


def store(ref, array) -> None:
    """Writes an array to global memory from the registers."""
    if hasattr(plgpu, "store"):  # JAX 0.12
        plgpu.store(ref, array, optimized=False)
    else:
        ref[...] = array
