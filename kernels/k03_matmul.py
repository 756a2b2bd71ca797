"""Lesson 3: a tiled fp16 matmul. NEW: tl.dot and the tensor cores, a loop over K, a launch order kind to the cache.

Run it:  python -m kernels.k03_matmul --check     (against float64; needs no GPU)
         python -m kernels.k03_matmul --bench     (on a GPU)

THE IDEA. out = x @ w^T, with x [M, K] the activations of M tokens and w [N, K] a linear layer's weight. A program
makes one tile [BLOCK_M, BLOCK_N] of the output. It walks along K in steps of BLOCK_K: load a tile of x and a tile of
w, multiply them on the tensor cores (`tl.dot`), add to an fp32 accumulator; at the end round to fp16 and store, once.

THE PRICE, before any code. 2 M N K operations and, at best, each input read once: at M = 2048 and 8192 x 8192 that is
275 GFLOP, 0.35 ms at the 780 TFLOP/s that an H200 gives on random data, against 0.05 ms for the bytes: arithmetic
decides. At M = 1 it is 0.13 GFLOP but the same 134 MB of weight, 32 microseconds at 4.2 TB/s: bytes decide. That is
why int4 weights are about few tokens at a time, and why generating text is where they pay.

WHO READS WHAT.
                       K                       each program's tile of x is read by all N / BLOCK_N programs in its
                 +-----------+ w^T             row, each tile of w by all M / BLOCK_M in its column: bigger tiles
                 |   ####    |                 mean fewer reads, until registers and shared memory run out
           K     +-----------+
         +-----+ +-----------+
       M |#####| |   tile    | out [M, N]
         +-----+ +-----------+

THE LAUNCH ORDER. Programs that run at the same time should share inputs, so that the L2 cache serves them. Walking
the output row by row would stream all of w for each row of tiles; walking it in bands GROUP_M tiles tall, column by
column, lets a band's programs share a few tiles of w and of x. (GROUP_M has nothing to do with quantization groups.)

MEASURED on an H200 (results/k03_matmul.json: command, versions, date; 8192 x 8192): M = 1 takes 36 microseconds, a
little less than torch's matmul; M = 16 is 0.94x of it, M = 128 0.68x, M = 512 0.57x, M = 2048 0.73x. Predicted: near
1x where bytes decide, and 0.7x where arithmetic does, for the vendor's kernels use Hopper's copy engine and
warps with roles, and this one does not.
  A surprise: at M = 1 fifteen of the sixteen rows of each tile are padding, and it does not matter at all. Tensor
cores that wait for memory can as well multiply zeros.

NEXT. Lesson 4 replaces the loads of w by packed int4. EXERCISE. Set GROUP_M to 1 for M = 2048. What does the L2 cache
do then, and what if N is 512?
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import common


@triton.jit
def matmul_kernel(
    x_ptr,  # fp16 or bf16 [M, K]
    w_ptr,  # fp16 or bf16 [N, K]
    out_ptr,  # fp16 or bf16 [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Makes a tile [BLOCK_M, BLOCK_N] of x @ w^T."""
    # NEW: the launch order. Bands of GROUP_M tiles, walked column by column.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_band * GROUP_M
    band_height = tl.minimum(tiles_m - first_m, GROUP_M)  # the last band may be lower
    pid_m = first_m + pid % tiles_in_band % band_height
    pid_n = pid % tiles_in_band // band_height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]  # [BLOCK_K, BLOCK_N], w transposed

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # Past the end of K zeros are loaded: they add nothing to the sum.
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K - k)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_k < K - k)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc)  # NEW: tensor cores; products of 16-bit numbers, summed in fp32
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def launch_options(m: int) -> dict[str, int]:
    """Block sizes, warps and pipeline stages: tall tiles for many tokens, the lowest a tensor core takes for few."""
    if m <= 32:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 4}
    if m <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w^T, accumulated in float32.

    Args:
        x: float16 or bfloat16 [..., K].
        w: [N, K], in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: naming the shape or dtype that does not fit.
    """
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, its last dimension must be the weight's in_features {k}")
    if x.dtype not in (torch.float16, torch.bfloat16) or w.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}, both must be float16 or both bfloat16")
    x_2d = x.reshape(-1, k).contiguous()
    m = x_2d.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    options = launch_options(m)
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]),)
    matmul_kernel[grid](x_2d, w.contiguous(), out, m, n, k, **options)
    return out.view(*x.shape[:-1], n)


def check() -> Iterator[common.Check]:
    """The kernel's product against float64."""
    for m, n, k in [(1, 40, 256), (17, 33, 100), (70, 130, 64)]:
        for dtype in common.ACTIVATION_DTYPES:
            x, w = common.random_tensor(m, k, dtype=dtype, seed=1), common.random_tensor(n, k, dtype=dtype, seed=2)
            error = common.relative_error(matmul(x, w), x.double() @ w.double().t())
            yield f"{m} x {n} x {k}, {dtype}, relative error {error:.1e}", error < common.tolerance(dtype)


def bench() -> list[common.Row]:
    """Times the shapes of a square 8192-wide layer beside torch's own fp16 matmul."""
    n = k = 8192
    weights = [common.random_tensor(n, k, seed=seed) for seed in range(3)]
    rows = []
    for m in (1, 16, 128, 512, 2048):
        x = common.random_tensor(m, k, seed=9)
        time = common.microseconds(matmul, [(x, w) for w in weights])
        fp16 = common.microseconds(torch.nn.functional.linear, [(x, w) for w in weights])
        rows.append(common.matmul_row({"m": m, "n": n, "k": k}, weights[0].nbytes, time, fp16))
    return rows


if __name__ == "__main__":
    common.run_lesson(check, bench)
