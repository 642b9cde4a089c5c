"""Kernels interpreted by Triton, without a GPU: what the tests of their numerics share.

Triton decides when it is imported whether kernels are interpreted, so such cases run in a process of their own: the
test's file, started as a script with the names of its cases.
"""

import dataclasses
import os
import subprocess
import sys

import torch


def run_interpreted(file: str, names: list[str]) -> None:
    """Starts `file` with these names and asserts that it succeeds."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, file, *names], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def mend_interpreter() -> None:
    """Mends what Triton's interpreter gets wrong."""
    import numpy
    from triton import language
    from triton.runtime import interpreter

    # NumPy 2.4 refuses int() of an array with one entry and one axis, which is what the interpreter's scalars are.
    patch = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index

    # It also cuts float32 off to bfloat16 where GPUs round, which doubles every error, and multiplies the bits of
    # bfloat16 numbers as if they were integers.
    builder = interpreter.InterpreterBuilder
    cast, multiply = builder.cast_impl, builder.create_dot

    def to_float32(x):
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), language.float32)

    def to_bfloat16(x):
        bits = x.data.view("uint32")
        rounded = numpy.where(numpy.isnan(x.data), bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return interpreter.TensorHandle((rounded >> 16).astype("uint16"), language.bfloat16)

    def rounding_cast(self, x, to):
        kinds = x.dtype.scalar, to.scalar
        if kinds == (language.float32, language.bfloat16):
            return to_bfloat16(x)
        return to_float32(x) if kinds == (language.bfloat16, language.float32) else cast(self, x, to)

    def dot(self, *arguments):
        a, b = (to_float32(x) if x.dtype.scalar == language.bfloat16 else x for x in arguments[:2])
        return multiply(self, a, b, *arguments[2:])

    builder.cast_impl, builder.create_dot = rounding_cast, dot


def pretend_to_be_on(chip: str, shared_memory: int = 227 * 1024) -> None:
    """The launch code chooses tiles as on this chip, "sm_90" say, with so many bytes of shared memory a program."""
    from foveal.kernels import chips

    chips.chip_of = lambda device: chips.Chip(chip, shared_memory)


def strided(x, order: str, spare: int = 0):
    """The values of x [B, H, L, D] (or [B, H, L]) in memory of another order.

    Args:
        order: the axes but the last of four, slowest first: "BLH" is how transformers hold heads.
        spare: NaNs between rows of D entries, a multiple of 8 where TMA is to read them.
    """
    axes = ["BHL".index(axis) for axis in order]
    if x.dim() == 3:
        return x.permute(axes).contiguous().permute([axes.index(i) for i in range(3)])
    rows = x.permute(*axes, 3)
    memory = rows.new_full((*rows.shape[:3], rows.shape[3] + spare), float("nan"))
    memory[..., : rows.shape[3]] = rows
    return memory[..., : rows.shape[3]].permute(*(axes.index(i) for i in range(3)), 3)


def all_strided(query, key, value, *others) -> tuple:
    """Query, key, value and others, each with strides of its own."""
    layouts = (("BLH", 8), ("LBH", 16), ("LHB", 24), ("HLB", 8), ("HBL", 16))
    inputs = query, key, value, *others
    return tuple(strided(x, *layout) for x, layout in zip(inputs, layouts[: len(inputs)], strict=True))


def with_strided_lists(selection):
    """The selection with lists that are not contiguous, where it has several heads and rows."""
    lists = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (selection.critical, selection.critical_count))
    return dataclasses.replace(selection, **dict(zip(("critical", "critical_count"), lists, strict=True)))


def with_strided_gradients(function):
    """`function`, whose outputs meet gradients with strides unlike those of any tensor that comes in or goes out."""

    def call(*inputs):
        outputs = function(*inputs)
        for output in (outputs,) if isinstance(outputs, torch.Tensor) else outputs:
            output.register_hook(lambda grad: strided(grad, "LHB", 40 if grad.dim() == 4 else 0))
        return outputs

    return call
