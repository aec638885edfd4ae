"""Compiles every Triton kernel of the sparse step, as it would be launched, for GPUs that need not be there.

    python tests/triton_compile.py [D] [E] [architectures, e.g. 80,90]

Prints a line for each: its registers, the bytes of its stack (what did not fit into registers), its shared memory.
Launches are recorded and not made, so the numbers that kernels would have left are zeros.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mistudio.sae.code import select
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


def compile_launch(kernel, args, named, arch):
    """The compiled kernel of one launch: arguments by their types, as divisible by 16 where they are."""
    options = {name: named.pop(name) for name in list(named) if name in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate([*zip(kernel.arg_names, args, strict=False), *named.items()]):
        if name in named:
            signature[name], constants[(kernel.arg_names.index(name),)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled):
    """(registers, stack bytes, shared bytes), by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def launches(D, E):
    """(kernel, arguments, named arguments) of everything that a step launches, each kind of launch once."""
    found = {}

    def record(self, *args, grid, warmup, **named):
        kinds = [a.dtype if isinstance(a, torch.Tensor) else isinstance(a, float) or a % 16 for a in args]
        found[self.__name__, str(kinds), str(named)] = (self, args, named)

    JITFunction.run = record
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    from mistudio.train import cuda, cuda_screen

    B, F = 304, 64
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(B, D, generator=generator), torch.randn(B, E, generator=generator)
    W_enc, W_dec = torch.randn(F, D, generator=generator), torch.randn(F, E, generator=generator)
    parameters = {"W_enc": W_enc.T, "W_dec": W_dec, "b_dec": torch.zeros(D)}
    b_enc, price = torch.zeros(F), torch.zeros(B)
    for dtype in (torch.float16, torch.float32):
        cuda_screen.Screen(torch.zeros_like(W_enc), dtype).select(x, b_enc, parameters["b_dec"], b_enc, 0.1)
    code = select(x, W_enc.T, b_enc, b_enc - torch.inf, 0.1)
    adam, rest = Adam(parameters, 0.999, 1e-8), (b_enc, price, 0.1, D == E, 0.5, 0.0)
    cuda.reconstruct(code, y, W_dec, b_enc)
    cuda.visit(Work(code, x, y, parameters, *rest), adam, 1e-3)
    *_, features, g_enc, g_dec = cuda.row_gradients(Work(code, x, y, parameters, *rest))
    cuda.apply_rows(features, g_enc, g_dec, parameters, adam, 1e-3)
    return list(found.values())


def main():
    """Compiles and prints."""
    D, E = (int(sys.argv[i]) if len(sys.argv) > i else 2304 for i in (1, 2))
    for kernel, args, named in launches(D, E):
        if "WIDE" in named:
            named["WIDE"] = False  # for the interpreter only
        for arch in sys.argv[3].split(",") if len(sys.argv) > 3 else ["90"]:
            registers, stack, shared = resources(compile_launch(kernel, args, dict(named), int(arch)))
            dtype = str(args[0].dtype).replace("torch.", "")
            print(f"{kernel.__name__} {dtype} sm_{arch}: {registers} registers, {stack} stack, {shared} shared")


if __name__ == "__main__":
    main()
