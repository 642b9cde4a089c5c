"""The bugs that `mutants.py` plants, by kind."""

from __future__ import annotations

from typing import NamedTuple

INTERPRETED = "test_triton_interpreter.py::test_interpreted"
ATTENTION = f"{INTERPRETED}[attention]"
KEYS_63 = f"{INTERPRETED}[63 keys]"
STRIDES = f"{INTERPRETED}[strides]"
LISTS = f"{INTERPRETED}[lists]"
SELECTION = f"{INTERPRETED}[selection]"
STATES = f"{INTERPRETED}[states]"
SLA = f"{INTERPRETED}[sla softmax]"
SLA_ELU = f"{INTERPRETED}[sla elu, no projection]"
SLA_ALL = f"{INTERPRETED}[sla relu, all]"
SLA_PADDING = f"{INTERPRETED}[sla padding keys]"
SELECTING = f"{INTERPRETED}[selecting]"
SELECTING_PADDING = f"{INTERPRETED}[selecting, padding keys]"
WAYS = f"{INTERPRETED}[ways]"
VSA_63 = "test_vsa_triton.py::test_interpreted[63 tokens]"
VSA_STRIDES = "test_vsa_triton.py::test_interpreted[strides]"
VSA_CUBES = "test_vsa_triton.py::test_interpreted[cubes]"
VSA_TEXT = "test_vsa_triton.py::test_interpreted[text]"
DEVICE = "test_triton_launch.py::test_launches_are_where_their_tensors_are"
TORCH = "test_block_sparse.py"
TORCH_SLA = "test_sla.py"

FORWARD = "kernels/triton/forward.py"
BACKWARD = "kernels/triton/backward.py"
LINEAR = "kernels/triton/linear.py"
MASKED_SUM = "kernels/triton/masked_sum.py"
LINEAR_BACKWARD = "kernels/triton/linear_backward.py"
CUBES = "kernels/triton/cubes.py"
CUBE_GRADIENTS = "kernels/triton/cube_gradients.py"
POOLED = "kernels/triton/pooled.py"
PICKING = "kernels/triton/picking.py"
POOLING = "kernels/triton/pooling.py"
SELECT = "kernels/triton/select.py"
ROW_LISTS = "kernels/triton/lists.py"
SPARSE = "kernels/sparse.py"
OPERATOR = "kernels/operator.py"
CPU = "kernels/cpu.py"
SLA_GPU = "methods/sla/gpu.py"
SLA_FORWARD = "methods/sla/gpu_forward.py"
SLA_BACKWARD = "methods/sla/gpu_backward.py"
SLA_LINEAR = "methods/sla/linear.py"
VSA_GPU = "methods/vsa/gpu.py"


class Mutant(NamedTuple):
    """One bug.

    file: in `src/foveal`.
    old, new: what is replaced by what; the only place in the file, or the first behind the only `after`.
    tests: those that should notice, the likeliest first.
    """

    title: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    after: str = ""


def strides(title: str, file: str, name: str, wrong: str, after: str, *tests: str) -> Mutant:
    """A launch that takes the strides of `wrong` for those of a kernel's `name`."""
    return Mutant(
        title, file, f"{name}_strides=row_strides({name})", f"{name}_strides=row_strides({wrong})", tests, after
    )


def table_strides(title: str, file: str, name: str, wrong: str, after: str, *tests: str) -> Mutant:
    """The same where a launch's arguments stand in a dict."""
    old, new = f'"{name}_strides": row_strides({name})', f'"{name}_strides": row_strides({wrong})'
    return Mutant(title, file, old, new, tests, after)


def unguarded(title: str, file: str, tensor: str) -> Mutant:
    """Launches on whatever device is the current one."""
    return Mutant(title, file, f"with on_device_of({tensor}):", "if True:", (DEVICE,))


FULL_TILES = [
    Mutant("forward: counts full tiles", FORWARD, "+ keys // TILE_K,", "+ (keys + 1) // TILE_K,", (KEYS_63,)),
    Mutant(
        "forward: one key past the end", FORWARD, "valid = key < key_length", "valid = key <= key_length", (KEYS_63,)
    ),
    Mutant(
        "forward: one key past a block's size", FORWARD, "valid &= key < block", "valid &= key <= block", (KEYS_63,)
    ),
    Mutant("lists: full blocks first", ROW_LISTS, "== block_k).to", ">= block_k - 1).to", (LISTS,)),
    Mutant(
        "key states: valid keys",
        LINEAR,
        "+ tl.arange(0, TILE) < size",
        "+ tl.arange(0, TILE) < size + (size % TILE == TILE - 1)",
        (STATES,),
    ),
    Mutant(
        "key states: pooled keys",
        LINEAR,
        "block_mean(total, size)",
        "block_mean(total, size + (size == 63))",
        (STATES,),
    ),
    Mutant(
        "pooling: the mean", POOLING, "block_mean(total, size))", "block_mean(total, size + (size == 63)))", (STATES,)
    ),
    Mutant("VSA: the mean", CUBES, "total / size.to(", "total / (size + (size == 63)).to(", (VSA_63,)),
    Mutant("VSA: shares of the mean", CUBE_GRADIENTS, "share = 1.0 / tl", "share = 63 / 64 / tl", (VSA_63,)),
    Mutant(
        "VSA: cubes without sizes", "kernels/backend.py", "self.uniform == self.slot", "self.uniform >= 63", (VSA_63,)
    ),
    Mutant("torch: full blocks", CPU, "(per_block == block_k)", "(per_block >= block_k - 1)", (TORCH,)),
    Mutant(
        "torch: size of the last block", CPU, "sizes[-1] = key.shape[0] -", "sizes[-1] = key.shape[0] + 1 -", (TORCH,)
    ),
]

GROUPS = [
    Mutant("SLA backward: norm", SLA_BACKWARD, "norm=term.norm[group]", "norm=term.norm", (SLA,)),
    Mutant("SLA backward: state", SLA_BACKWARD, "state=term.state[group]", "state=term.state", (SLA,)),
    Mutant(
        "SLA backward: pairs",
        SLA_BACKWARD,
        "(side._replace(term=part), members)",
        "(side._replace(term=part), range(len(members)))",
        (SLA,),
    ),
    Mutant("SLA backward: G", SLA_BACKWARD, "key_state[group]", "key_state[: group.stop - group.start]", (SLA,)),
    Mutant("SLA backward: mask", SLA_BACKWARD, "mask[group]", "mask[: group.stop - group.start]", (SLA,)),
    Mutant(
        "query side: heads",
        LINEAR_BACKWARD,
        "(first_pair + pair) // heads, (first_pair + pair) % heads",
        "pair // heads, pair % heads",
        (SLA,),
    ),
    Mutant("query side: dZ", LINEAR_BACKWARD, "grad_norm_ptr + (all_pairs *", "grad_norm_ptr + (pair *", (SLA,)),
    Mutant("query side: delta", LINEAR_BACKWARD, "delta_ptr + all_pairs *", "delta_ptr + pair *", (SLA,)),
    Mutant("query side: O^l", LINEAR_BACKWARD, "(all_pairs * length + rows)", "(pair * length + rows)", (SLA,)),
    Mutant("forward: heads", FORWARD, "pair = first_pair + tl.program_id(1)", "pair = tl.program_id(1)", (SLA,)),
    Mutant(
        "key states: heads",
        LINEAR,
        "(first_pair + pair) // heads, (first_pair + pair) % heads",
        "pair // heads, pair % heads",
        (SLA,),
        "def _key_state_kernel(",
    ),
    Mutant("SLA forward: norm", SLA_FORWARD, "state[part], norm[part]", "state[part], norm[:count]", (SLA,)),
    Mutant("SLA forward: state", SLA_FORWARD, "state[part], norm[part]", "state[:count], norm[part]", (SLA,)),
    *(
        Mutant(
            f"SLA {name}: mask",
            SLA_FORWARD,
            "group_z = mask_of_pairs[part],",
            "group_z = mask_of_pairs[:count],",
            (test,),
        )
        for name, test in (("forward", SLA), ("inference", SELECTING_PADDING))
    ),
    Mutant("SLA forward: choice", SLA_FORWARD, "pairs.start, self.lists", "0, self.lists", (SELECTING,)),
    Mutant(
        "SLA forward: pooled queries",
        SLA_FORWARD,
        "else self.query[pairs.start : pairs.stop]",
        "else self.query[: len(pairs)]",
        (SELECTING,),
    ),
    Mutant(
        "lists: sizes",
        ROW_LISTS,
        "(pair // heads) * size_stride",
        "(tl.program_id(1) // heads) * size_stride",
        (SLA_PADDING,),
    ),
    Mutant(
        "selection: groups of scores", PICKING, "first_pair=first_pair + start", "first_pair=first_pair", (SELECTION,)
    ),
    Mutant(
        "selection: queries of a group",
        PICKING,
        "(query[start:], key[start:]) if start",
        "(query, key[start:]) if start",
        (SELECTION,),
    ),
]

SPARSE_FORWARD, BOTH_BACKWARD = "def prepare(self", "def backward("
QUERY_SIDE, PROJECTION, KEY_SIDE = "def query_gradients(", "def projection_gradients(", "def add_key_gradients("
STRIDED = [
    *(
        table_strides(f"forward: {name} as contiguous", FORWARD, name, f"{name}.contiguous()", SPARSE_FORWARD, STRIDES)
        for name in ("query", "key", "value")
    ),
    table_strides("forward: O like Q", FORWARD, "output", "query", SPARSE_FORWARD, STRIDES),
    *(
        table_strides(f"backward: {name} as contiguous", BACKWARD, name, f"{name}.contiguous()", BOTH_BACKWARD, STRIDES)
        for name in ("query", "key", "value")
    ),
    table_strides("backward: dO like Q", BACKWARD, "grad", "query", BOTH_BACKWARD, STRIDES),
    strides("backward: dQ like Q", BACKWARD, "grad_query", "query", BOTH_BACKWARD, STRIDES),
    strides("backward: dK like K", BACKWARD, "grad_key", "key", BOTH_BACKWARD, STRIDES),
    strides("backward: dV like V", BACKWARD, "grad_value", "value", BOTH_BACKWARD, STRIDES),
    strides("delta: dO like O", BACKWARD, "grad", "output", "def output_delta(", STRIDES),
    strides("delta: O like dO", BACKWARD, "output", "grad", "def output_delta(", STRIDES),
    Mutant("delta: dLSE as contiguous", BACKWARD, "grad_lse.contiguous()", "grad_lse", (STRIDES,)),
    Mutant(
        "descriptors: as contiguous",
        "kernels/triton/tiles.py",
        "tma_strides(x), [1",
        "tma_strides(x.contiguous()), [1",
        (STRIDES,),
    ),
    Mutant(
        "pooling: as contiguous", POOLING, "strides=row_strides(x)", "strides=row_strides(x.contiguous())", (STATES,)
    ),
    strides("key states: K as contiguous", LINEAR, "key", "key.contiguous()", "def _run_key_states(", STATES),
    strides("key states: V as contiguous", LINEAR, "value", "value.contiguous()", "def _run_key_states(", STATES),
    strides("key states: V like K", LINEAR, "value", "key", "def _run_key_states(", STATES),
    strides("query side: Q as contiguous", LINEAR_BACKWARD, "query", "query.contiguous()", QUERY_SIDE, SLA),
    strides("query side: dO like O", LINEAR_BACKWARD, "grad", "output", QUERY_SIDE, SLA),
    strides("query side: O like Q", LINEAR_BACKWARD, "output", "query", QUERY_SIDE, SLA),
    strides("query side: dQ like Q", LINEAR_BACKWARD, "grad_query", "query", QUERY_SIDE, SLA),
    strides("projection: dO like O^l", LINEAR_BACKWARD, "grad", "linear", PROJECTION, SLA),
    *(
        strides(f"key side: {name} as contiguous", LINEAR_BACKWARD, name, f"{name}.contiguous()", KEY_SIDE, SLA)
        for name in ("key", "value", "grad_key", "grad_value")
    ),
    *(
        strides(f"VSA: {name} as contiguous", CUBES, name, f"{name}.contiguous()", "def pool_cubes(", VSA_STRIDES)
        for name in ("query", "key")
    ),
    Mutant("VSA: value like key", CUBES, "else row_strides(value)", "else row_strides(key)", (VSA_STRIDES,)),
    strides("VSA: O as contiguous", CUBES, "output", "output.contiguous()", "def combine(", VSA_STRIDES),
    strides("VSA: dO like O", CUBE_GRADIENTS, "grad", "attended", "def split_gradient(", VSA_STRIDES),
    strides("VSA: O like dO", CUBE_GRADIENTS, "attended", "grad", "def split_gradient(", VSA_STRIDES),
    *(
        Mutant(
            f"VSA: grad_{name} as contiguous",
            CUBE_GRADIENTS,
            f"row_strides(grad_{name})",
            f"row_strides(grad_{name}.contiguous())",
            (VSA_STRIDES,),
        )
        for name in ("query", "key", "value")
    ),
    Mutant(
        "VSA: gates as contiguous", CUBES, "(gate, gate.stride())", "(gate, gate.contiguous().stride())", (VSA_STRIDES,)
    ),
    *(
        Mutant(f"{name}: dO with any last stride", file, "grad.stride(-1) == 1", "True", (WAYS,))
        for name, file in (("sparse", SPARSE), ("SLA", SLA_GPU), ("VSA", VSA_GPU))
    ),
    Mutant(
        "sparse: lists as contiguous",
        SPARSE,
        "call.selection.with_contiguous_lists()",
        "call.selection",
        (STRIDES,),
        "def _forward(",
    ),
    Mutant(
        "sparse backward: lists as contiguous",
        SPARSE,
        "call.selection.with_contiguous_lists()",
        "call.selection",
        (STRIDES,),
        "def _backward(",
    ),
    Mutant("SLA: lists as contiguous", SLA_GPU, "choice.with_contiguous_lists()", "choice", (SLA,), "def _forward("),
    Mutant(
        "SLA backward: lists as contiguous",
        SLA_GPU,
        "choice.with_contiguous_lists()",
        "choice",
        (SLA,),
        "def used_selection(",
    ),
    Mutant(
        "VSA: lists as contiguous",
        VSA_GPU,
        "choice.critical.contiguous()",
        "choice.critical",
        (VSA_STRIDES,),
        "def lists_of(",
    ),
    Mutant("sizes: one sample's for all", "kernels/values.py", "else sizes.stride(0)", "else 0", (KEYS_63,)),
]

DEVICES = [
    unguarded("operators forward", OPERATOR, "tensors[0]"),
    unguarded("operators backward", OPERATOR, "call[0]"),
    unguarded("selection", SELECT, "query"),
    unguarded("VSA selection", VSA_GPU, "query"),
]

PRECISION = [
    Mutant(
        "epsilon of 1e-2",
        "kernels/triton/feature_maps.py",
        "constexpr(1e-5)",
        "constexpr(1e-2)",
        (SLA, SLA_ELU, SLA_ALL),
    ),
    Mutant("masked sum: only the high part", MASKED_SUM, "(term - high.to(tl.float32))", "(high - high)", (STATES,)),
    Mutant("coarse stage: only the high part", POOLED, "(x - high.to(tl.float32))", "(x - x)", (VSA_CUBES, VSA_TEXT)),
    Mutant(
        "key states: 8 bits of V",
        LINEAR,
        "tl.dot(tl.trans(phi), v, state)",
        "tl.dot(tl.trans(phi), v * 0.99, state)",
        (STATES,),
    ),
    Mutant(
        "forward: phi(Q) off by a percent",
        FORWARD,
        "(phi * inverse[:, None])",
        "(phi * (1.01 * inverse)[:, None])",
        (SLA, SLA_ELU, SLA_ALL),
    ),
    Mutant(
        "query side: bias left in delta",
        LINEAR_BACKWARD,
        "- tl.load(bias_ptr + feature)[None, :]), 1)",
        "), 1)",
        (SLA,),
    ),
    Mutant(
        "query side: O^l left in delta",
        LINEAR_BACKWARD,
        "linear_dot = grad_dot_linear + share",
        "linear_dot = share",
        (SLA,),
    ),
    Mutant("query side: n taken without Z", LINEAR_BACKWARD, "grad_norm -= tl.sum(", "grad_norm += tl.sum(", (SLA,)),
    Mutant(
        "key side: z left out",
        LINEAR_BACKWARD,
        "tl.trans(grad_state)) + grad_norm[None, :]",
        "tl.trans(grad_state))",
        (SLA,),
    ),
    Mutant(
        "elu: slope 1 below zero", "kernels/triton/feature_maps.py", "> 0.0, 1.0, phi)", "> 0.0, 1.0, 1.0)", (SLA_ELU,)
    ),
    Mutant("dQ: scale forgotten", BACKWARD, "    acc *= scale\n", "", (KEYS_63,)),
    Mutant("dQ: of the linear branch forgotten", BACKWARD, "    if ADD:\n", "    if False:\n", (SLA,)),
    Mutant("dK: scale forgotten", BACKWARD, "acc_k * scale", "acc_k", (KEYS_63,)),
    Mutant(
        "coarse stage: keys past the end",
        POOLED,
        "(column < length)[None, :], scores",
        "(column < length + 1)[None, :], scores",
        (VSA_CUBES,),
    ),
    Mutant("torch: dK without scale", CPU, "[: key.shape[2]] * scale", "[: key.shape[2]]", (TORCH,)),
    Mutant("torch: rows without keys", CPU, "lse.masked_fill(lse == -math.inf, math.inf)", "lse", (TORCH,)),
    Mutant(
        "torch SLA: O^l in dZ", SLA_LINEAR, "torch.cat((g, -g_dot_o), -1)", "torch.cat((g, g_dot_o), -1)", (TORCH_SLA,)
    ),
    Mutant(
        "torch SLA: Z in dphi(Q)",
        SLA_LINEAR,
        "g_dot_o * head.norm_state.transpose(1, 2)).div_",
        "g_dot_o).div_",
        (TORCH_SLA,),
    ),
]

KINDS = {
    "63 keys of 64": FULL_TILES,
    "groups of heads": GROUPS,
    "strides": STRIDED,
    "device": DEVICES,
    "precision and terms": PRECISION,
}
