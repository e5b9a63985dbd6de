// Attention, version 1: one thread for each query, three passes over the keys.
//
//     s_m = scale q . k_m                        (Vaswani et al. 2017, eq. 1)
//     pass 1   top = max_m s_m
//     pass 2   sum = sum_m exp(s_m - top)
//     pass 3   y   = sum_m exp(s_m - top) / sum  v_m             lse = top + log(sum)
//
// The scores are never stored: each pass computes them again.  So only q, k, v and y need memory, and no N x M matrix.
// exp(s - top) is at most 1, so nothing overflows.
//
// Which thread does what
//
//          q, y  (N, d)            k, v  (M, d)
//     n   +-------------+         +-------------+
//     0   | thread 0    |         | key 0       |   every thread reads all of k three times,
//     1   | thread 1    |         | key 1       |   and v once, at its own pace
//     .   |  ...        |         |  ...        |
//     63  | thread 63   |         | key M-1     |
//         +-------------+         +-------------+
//     64  | the next block        a block is 64 queries of one head of one image
//
// Bytes and operations, for each head of each image
//     must be moved       (N d + M d + M e + N e) sizeof(T)
//     read from caches    3 N M 2 d + N M e numbers: q and k for each multiply-add of a score
//     must be computed    2 N M d + 2 N M e
//     is computed         3 x 2 N M d + 2 N M e, and 2 N M exponentials
//     128 images, 4 heads, N = M = 196, d = e = 64, float32: 103 MB to be moved, 5.0 GFLOP must be computed, 10.1 GFLOP
//     are.  The N x M matrix, written and read back, would be 157 MB more.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: each multiply-add of a score waits for two loads.  The 32 threads of a warp read the same number of
// k, which is one access for all; but each reads its own row of q, d numbers apart, which takes 32 accesses.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int TILE_N = 64;                                  // queries of a block, one for each thread
constexpr int THREADS = 64;

__device__ __forceinline__ Acc dot(const T* q, const T* k, int d) {
    Acc sum = 0;
    for (int c = 0; c < d; c++) sum += wide(q[c]) * wide(k[c]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    const T* q, const T* k, const T* v, const bool* mask, T* y, Acc* lse, int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int y_b, int y_h, int y_n,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int bh = blockIdx.x / tiles, b = bh / h, head = bh % h;
    const int n = blockIdx.x % tiles * TILE_N + threadIdx.x;
    if (n >= N) return;
    q += b * q_b + head * q_h + n * q_n;
    k += b * k_b + head * k_h;
    v += b * v_b + head * v_h;
    y += b * y_b + head * y_h + n * y_n;
    if (mask) mask += b * mask_b + head * mask_h + n * mask_n;
    const int end = causal ? min(M, n + 1) : M;             // one past the last key of this query

    Acc top = NEG_INF;
    for (int m = 0; m < end; m++)
        if (!mask || mask[m * mask_m]) top = max(top, scale * dot(q, k + m * k_m, d));

    Acc sum = 0;
    for (int m = 0; m < end; m++)
        if (!mask || mask[m * mask_m]) sum += exp_(scale * dot(q, k + m * k_m, d) - top);

    Acc y_row[HEAD_DIM] = {};
    for (int m = 0; m < end; m++) {
        if (mask && !mask[m * mask_m]) continue;
        const Acc p = exp_(scale * dot(q, k + m * k_m, d) - top) / sum;
        #pragma unroll
        for (int c = 0; c < HEAD_DIM; c++)                  // its length is constant, so y_row is in registers
            if (c < e) y_row[c] += p * wide(v[m * v_m + c]);
    }

    #pragma unroll
    for (int c = 0; c < HEAD_DIM; c++)
        if (c < e) y[c] = narrow(y_row[c]);
    lse[bh * N + n] = sum == 0 ? Acc(POS_INF) : top + log_(sum);    // a query without keys: y = 0
}
