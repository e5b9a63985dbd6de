// The sum of the rows of a matrix, (M, C) -> (C): the gradient of a bias, in one launch.
//
//     y[c] = sum_m x[m, c]
//
// Each block sums a part of the rows of 32 columns, and writes it to memory.  The block that finishes last adds the
// parts, from the first to the last.  So the order of the additions is fixed, and the result is the same, bit for bit,
// every time, whichever block is last.
//
//     Which thread does what: a warp reads one row of 32 neighbouring columns, 8 warps read 8 rows.
//
//     columns    0 .. 31 | 32 .. 63 |             blocks (x, y); in a block, warp w takes every 8th row, lane l one
//     part 0     0, 0    |  1, 0    |             column; then the warps' sums are added in shared memory
//     part 1     0, 1    |  1, 1    |
//     ...
//
// `done` counts the finished blocks of each group of columns (last_block.cuh).  It is 0 before and after every launch.
//
// Bytes    x once, M C elements.  392 rows of 128 columns in float32: 200 KB, from the L2 cache.
// Work     one addition an element.  Limited by the launch, or by memory.
// Speed    measured  not yet
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "last_block.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8;
constexpr int COLUMNS = 32;                                 // of a block

// found (parts, C), done (gridDim.x) zeros.  rows: of a part.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_rows(const T* x, Acc* found, unsigned int* done, T* y, int M, int C, int rows) {
    __shared__ Acc sums[WARPS][COLUMNS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * COLUMNS + lane;
    const int from = blockIdx.y * rows, to = min(M, from + rows);
    Acc sum = 0;
    if (c < C)
        for (int m = from + warp; m < to; m += WARPS) sum += wide(x[m * C + c]);
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < C) {
        for (int w = 1; w < WARPS; ++w) sum += sums[w][lane];
        if (gridDim.y == 1) y[c] = narrow(sum);
        else found[blockIdx.y * C + c] = sum;
    }
    if (gridDim.y == 1 || !is_last(done + blockIdx.x, gridDim.y) || warp > 0 || c >= C) return;
    sum = 0;
    for (int part = 0; part < int(gridDim.y); ++part) sum += *(volatile Acc*)(found + part * C + c);
    y[c] = narrow(sum);
}
