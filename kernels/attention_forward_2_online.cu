// Attention, version 2: one pass over the keys, in tiles that a block shares.
//
// The largest score need not be known in advance: when a larger one comes, the sums so far are scaled down
// (Milakov & Gimelshein 2018; for attention, FlashAttention: Dao et al. 2022).  For each key m,
//
//     top' = max(top, s_m)
//     sum' = sum exp(top - top') + exp(s_m - top')
//     y'   = y   exp(top - top') + exp(s_m - top') v_m           and at the end  y / sum,  lse = top + log(sum)
//
// so that  sum = sum_m exp(s_m - top)  and  y = sum_m exp(s_m - top) v_m  always hold for the keys so far.
//
// Which thread does what
//
//        registers of thread n           shared by the block
//     +----------+----------+          +-------------------+      1. the 64 threads copy 16 keys and values
//     | q_row    | y_row    |          | k_tile  (16, d)   |      2. each uses them one by one
//     | d        | e        |          | v_tile  (16, e)   |      3. all wait; then the next 16
//     +----------+----------+          +-------------------+
//
// Bytes and operations, for each head of each image
//     moved       N (d + e) + (M d + M e) ceil(N / 64) numbers: k and v are read once for each tile of queries
//     computed    2 N M d + 2 N M e, and N M exponentials; M steps for each thread, each a sum of d terms
//     shared      one number read for each multiply-add, the same for a whole warp
//     128 images, 4 heads, N = M = 196, d = e = 64, float32: 257 MB read from the L2 cache, 103 MB of them from
//     memory; 5.0 GFLOP.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: a load from shared memory for every multiply-add; the machine can do four multiply-adds in the time
// of one load.  And a thread that keeps a whole row of q and of y needs 2 HEAD_DIM registers: above a head dimension of
// about 96 (48 in float64) there are too few, and the rows spill to memory.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int TILE_N = 64;                                  // queries of a block, one for each thread
constexpr int TILE_M = 16;                                  // keys in shared memory
constexpr int THREADS = 64;

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    const T* q, const T* k, const T* v, const bool* mask, T* y, Acc* lse, int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int y_b, int y_h, int y_n,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    __shared__ Acc k_tile[TILE_M][HEAD_DIM], v_tile[TILE_M][HEAD_DIM];

    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int bh = blockIdx.x / tiles, b = bh / h, head = bh % h;
    const int n0 = blockIdx.x % tiles * TILE_N, n = n0 + threadIdx.x;
    q += b * q_b + head * q_h + n * q_n;
    k += b * k_b + head * k_h;
    v += b * v_b + head * v_h;
    y += b * y_b + head * y_h + n * y_n;
    if (mask) mask += b * mask_b + head * mask_h + n * mask_n;
    const int end = n >= N ? 0 : causal ? min(M, n + 1) : M;        // one past the last key for this query
    const int tile_end = causal ? min(M, n0 + TILE_N) : M;          // and for all of this block

    Acc q_row[HEAD_DIM], y_row[HEAD_DIM], top = NEG_INF, sum = 0;
    #pragma unroll
    for (int c = 0; c < HEAD_DIM; c++) {
        q_row[c] = n < N && c < d ? scale * wide(q[c]) : Acc(0);
        y_row[c] = 0;
    }

    for (int m0 = 0; m0 < tile_end; m0 += TILE_M) {
        __syncthreads();                                    // all have read the tiles before
        for (int i = threadIdx.x; i < TILE_M * HEAD_DIM; i += THREADS) {
            const int m = i / HEAD_DIM, c = i % HEAD_DIM;
            k_tile[m][c] = m0 + m < M && c < d ? wide(k[(m0 + m) * k_m + c]) : Acc(0);
            v_tile[m][c] = m0 + m < M && c < e ? wide(v[(m0 + m) * v_m + c]) : Acc(0);
        }
        __syncthreads();

        for (int m = 0; m < min(TILE_M, end - m0); m++) {
            if (mask && !mask[(m0 + m) * mask_m]) continue;
            Acc s = 0;
            #pragma unroll
            for (int c = 0; c < HEAD_DIM; c++) s += q_row[c] * k_tile[m][c];

            if (s > top) {
                const Acc shrink = exp_(top - s);           // the first time, exp(-inf) = 0
                sum *= shrink;
                #pragma unroll
                for (int c = 0; c < HEAD_DIM; c++) y_row[c] *= shrink;
                top = s;
            }
            const Acc p = exp_(s - top);
            sum += p;
            #pragma unroll
            for (int c = 0; c < HEAD_DIM; c++) y_row[c] += p * v_tile[m][c];
        }
    }

    if (n >= N) return;
    #pragma unroll
    for (int c = 0; c < HEAD_DIM; c++)
        if (c < e) y[c] = narrow(sum == 0 ? Acc(0) : y_row[c] / sum);       // a query without keys: y = 0
    lse[bh * N + n] = sum == 0 ? Acc(POS_INF) : top + log_(sum);
}
