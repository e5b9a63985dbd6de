"""Exercise 23: a CUDA kernel, on the CPU.  45 minutes, chapter docs/course/10_engine.md.

Write a matrix product c = a b in CUDA C++, with tiles in shared memory.  You need no GPU, but the compiler g++, and a
checkout of minidiff: its tests have an emulator that runs the threads of a block one after another.

    a (M, K), b (K, N), c (M, N): all rows lie one after the other, so a's number (i, k) is a[i * K + k]

A block has 16 x 16 threads, threadIdx.x and threadIdx.y of 0..15, and computes 16 x 16 numbers of c.  blockIdx.x
counts the blocks along a row of c, and blockIdx.y those along a column: the grid has ceil(N / 16) x ceil(M / 16)
blocks.  M, K and N need not be multiples of 16.

In a loop over pieces of 16 numbers k, each thread copies one number of a and one of b to shared memory, and then each
adds 16 products that it reads from there.  __syncthreads() lets a thread wait for all others of its block.

Each number that a block needs is read from a and b once, and nothing outside of a, b and c is read or written.  The
types In and Out are const float* and float*; the emulator counts what they read.

    minidiff check ex23
"""

SOURCE = r"""
extern "C" __global__ void matmul(In a, In b, Out c, int M, int K, int N) {
    __shared__ float tile_a[16][16], tile_b[16][16];
    const int row = threadIdx.y, column = threadIdx.x;      // in the tile
    const int i = blockIdx.y * 16 + row, j = blockIdx.x * 16 + column;      // in c

    // your code here
}
"""


def matmul_kernel() -> str:
    """The source of the kernel.  Complete SOURCE, and return it."""
    raise NotImplementedError("your code here")
