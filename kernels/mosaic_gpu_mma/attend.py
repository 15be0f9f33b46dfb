"""The output: `lla.kernels.mosaic_gpu.attend` with products by mma.sync."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lla.kernels.mosaic_gpu import attend as hopper
from lla.kernels.mosaic_gpu.attend import Attended, Solved
from lla.kernels.mosaic_gpu.launch import Masking, Shape, query_program_index, run_by_tile
from lla.kernels.mosaic_gpu.tile import ROW_BLOCK, WGMMA_COL, WGMMA_ROW, MaskSpec
from lla.kernels.mosaic_gpu_mma.launch import (
    Config,
    Ring,
    RowTiles,
    environment,
    key_sources,
    launch,
    load_operands,
    operand_scratch,
    ring_scratch,
)
from lla.kernels.mosaic_gpu_mma.tile import store


@functools.partial(jax.jit, static_argnames=("shape", "mask", "config", "bf16x2", "interpret"))
def attend(
    shape: Shape,
    mask: MaskSpec,
    config: Config,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    masking: Masking,
    probe: jax.Array | None = None,
    solved: Solved | None = None,
    *,
    bf16x2: bool = False,
    interpret: Any = None,
) -> Attended:
    """See `lla.kernels.mosaic_gpu.attend.attend`."""
    env = environment(shape, mask, config, interpret)
    outputs = {"out": shape.queries()}
    if solved is None:
        outputs["log_sum_exp"] = shape.rows()
        if probe is not None:
            outputs["shift"] = shape.rows()
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "scale": scale,
        "masking": masking.operands(),
        "probe": probe,
        "solved": solved,
    }
    inputs = [name for name in ("query", "probe") if operands[name] is not None]
    if solved is not None and solved.low is not None:
        inputs.append("low")
    scratch = {
        "ring": ring_scratch(shape, config, 2),
        "rows": plgpu.SMEM((1, 2, ROW_BLOCK), jnp.float32),
        **operand_scratch(shape, config, len(inputs)),
    }
    body = functools.partial(_body, env, inputs, bf16x2)
    results = launch(
        body, outputs, scratch, operands,
        programs=env.query_programs, config=config, interpret=interpret,
    )  # fmt: skip
    return Attended(**results)


def _body(env, inputs: list[str], bf16x2: bool, given, out, scratch):
    program = query_program_index(env.shape, ROW_BLOCK)
    tiles = env.key_tiles(given["masking"], program)
    sources = key_sources(env, program, tiles, (given["key"], given["value"]))
    ring = Ring(env.config, scratch["ring"]["tiles"], scratch["ring"].get("filled"), sources)

    def run(bf16x2):
        AttendRows(env, given, out, scratch, program, tiles, 0, ring, bf16x2).run(inputs)

    marked = given["solved"].marked if bf16x2 else None
    run_by_tile(marked, program, 0, run, bf16x2 and marked is None, True)


@dataclasses.dataclass
class AttendRows(RowTiles, hopper.AttendRows):
    """The output of 64 rows."""

    def first_key(self):
        first = jnp.minimum(self.tiles.low * self.env.config.block, self.env.shape.num_keys - 1)
        head_dim = self.env.shape.head_dim
        columns = pl.ds(self.program.kv_head * head_dim, head_dim)
        return self.env.arithmetic.load(
            self.given["key"].at[self.program.b, first, columns], WGMMA_COL
        )

    def run(self, inputs: list[str]):
        arrays = [
            self.given["solved"].low if name == "low" else self.given[name] for name in inputs
        ]
        self.ring.start()
        sources = [self.row_tile(array) for array in arrays]
        query, *self.parts = load_operands(self.env, self.scratch, sources)
        if self.given["solved"] is not None:
            out = self.solved(query)
        elif self.parts:
            out = self.probed(query)
        else:
            out = self.softmax(query)
        self.ring.finish(self.tiles.high - self.tiles.low)
        store(self.row_tile(self.out["out"]), out.astype(self.env.shape.dtype))
        for index, name in enumerate(("log_sum_exp", "shift")):
            if name in self.out:
                row = self.env.arithmetic.load(self.scratch["rows"].at[0, index], WGMMA_ROW)
                store(self.row_slice(self.out[name]), row)
