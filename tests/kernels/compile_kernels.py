"""Compiles the lessons' kernels ahead of time, for GPUs that are not here, and prints what the compiler made of them.

Run by test_compile.py as a program of its own, because the interpreter, in which the other tests run the kernels,
is chosen for a whole process. Prints a JSON list: kernel, arch, options, registers and stack a thread, bytes of shared
memory, tensor-core instructions.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import k01_quantize, k02_dequantize, k03_matmul, k04_w4a16


def compile_for(target, kernel, dtypes, integers, options, floats=()):
    """Compiles `kernel` with pointer arguments of `dtypes`, int32 arguments `integers` and constexpr `options`.

    `floats` are fp32 arguments.
    """
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    signature = {**{name: f"*{dtype}" for name, dtype in dtypes.items()}, **dict.fromkeys(integers, "i32")}
    signature.update({**dict.fromkeys(floats, "fp32"), **dict.fromkeys(constants, "constexpr")})
    signature = {name: signature[name] for name in kernel.arg_names}
    # As at run time: pointers and sizes that are multiples of 16 are known to be, and loads get wide.
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*dtypes, *integers)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    launch = {k: v for k, v in options.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=target, options=launch)


def tile_type(name, dtype, shape):
    """How a Gluon kernel's signature writes a tile that the copy engine reads: x's swizzled, others in order."""
    element = {"fp16": gl.float16, "bf16": gl.bfloat16, "i8": gl.int8, "i16": gl.int16, "i32": gl.int32}[dtype]
    if name == "x_desc":
        layout = gl.NVMMASharedLayout.get_default_for(shape, element)
    else:
        bits = element.primitive_bitwidth
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(shape))
    return f"tensordesc<{dtype}{shape},{layout!r}>"


def compile_gluon(kernel, tiles, dtypes, integers, options):
    """Compiles a Gluon kernel for Hopper; `tiles` are what the copy engine reads, (dtype, shape) each; else as above.

    Of the integers only N is known to be a multiple of 16.
    """
    types = {name: tile_type(name, *tile) for name, tile in tiles.items()}
    types |= {name: f"*{dtype}" for name, dtype in dtypes.items()}
    types |= dict.fromkeys(integers, "i32") | dict.fromkeys(options, "constexpr")
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*dtypes, "N")}
    signature = {name: types[name] for name in kernel.arg_names}
    constants = {name: option for name, option in options.items() if name in kernel.arg_names}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    launch = {name: options[name] for name in ("num_warps", "maxnreg") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)


def compile_kernel(kernel, dtypes, integers, options, arch):
    """Compiles `kernel` for an NVIDIA GPU: what it takes, and which tensor-core instructions it has."""
    compiled = compile_for(GPUTarget("cuda", arch, 32), kernel, dtypes, integers, options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "options": options,
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": bool(re.search(r"wgmma\.mma_async", ptx)),
        "mma": bool(re.search(r"\bmma\.sync", ptx)),
    }


def disassemble(cubin, what):
    """What `cuobjdump` prints about machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, what, file.name], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin):
    """Registers and stack bytes a thread, as the assembler reports them; spilled registers lie on the stack."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", disassemble(cubin, "-res-usage")).groups()
    return {"registers": int(registers), "stack": int(stack)}


def machine_code(cubin):
    """The instructions, one a line."""
    return disassemble(cubin, "-sass")


def variants():
    """The kernels with the dtypes, sizes and options that their launchers use."""
    packed = {"qweight_ptr": "i32", "scales_ptr": "fp16", "qzeros_ptr": "i32"}
    for dtype, group_size in (("fp16", 16), ("fp16", 128), ("fp16", 4096), ("bf16", 64), ("fp32", 1600)):
        for symmetric, steps in ((True, 1), (False, 32)):
            options = k01_quantize.launch_options(group_size)
            options |= {"GROUP_SIZE": group_size, "SYMMETRIC": symmetric, "SEARCH_STEPS": steps}
            options["enable_fp_fusion"] = False
            yield k01_quantize.quantize_kernel, {"w_ptr": dtype, **packed}, ("N", "K"), options
        options = {"GROUP_SIZE": group_size, **k02_dequantize.launch_options(group_size)}
        yield k02_dequantize.dequantize_kernel, {**packed, "w_ptr": dtype}, ("N", "K"), options
    for dtype in ("fp16", "bf16"):
        for m in (1, 128, 2048):
            pointers = {"x_ptr": dtype, "w_ptr": dtype, "out_ptr": dtype}
            yield k03_matmul.matmul_kernel, pointers, ("M", "N", "K"), k03_matmul.launch_options(m)
            options = {"GROUP_SIZE": 64, **k04_w4a16.launch_options(m, 64)}
            yield k04_w4a16.w4a16_kernel, {"x_ptr": dtype, **packed, "out_ptr": dtype}, ("M", "N", "K"), options


if __name__ == "__main__":
    arches = [int(arch) for arch in sys.argv[1:]] or [80, 90]
    print(json.dumps([compile_kernel(*variant, arch) for variant in variants() for arch in arches]))
