// Attention's backward pass, version 1: one thread computes one row of a gradient.
//
// The forward pass kept no N x M matrix, only lse_i = log sum_j exp(S_ij), one number for each query. From it any P_ij
// can be computed again, independently of the others:
//
//     S = scale q k^T         P = exp(S - lse)                                     (N, M), never in memory
//     dV = P^T dY             dP = dY V^T
//     dS = P (dP - delta)     delta_i = sum_j P_ij dP_ij = sum_c dY_ic Y_ic
//     dQ = scale dS K         dK = scale dS^T Q
//
// The second form of delta makes this possible: it is a sum over a row of P, and does not need P.
// A query without keys has lse = +inf, so P = exp(finite - inf) = 0, and it has no gradient.
// dQ sums along rows of dS, dK and dV along its columns. There is one kernel for each direction: then every sum belongs
// to one thread, needs no atomics and is the same, bit for bit, each time. In return S and dP are computed twice, which
// makes 7 matrix products instead of 5.
//
// Which thread does what (dq; in dkv rows and columns are swapped):
//
//               keys j ->
//     query i   [ . . . . . . . . . ]  thread 0: along its row, from left to right
//               [ . . . . . . . . . ]  thread 1
//               [ . . . . . . . . . ]  thread 2        under a causal mask it stops at the diagonal
//
// Operations: dq 3 products of 2 N M d, dkv 4: 14 N M d.              N = M = 1024, d = e = 64: 0.94 GFLOP per head.
// Bytes: dq reads 5 rows of d for each pair (i, j), dkv 6: 44 N M d of float32: 3.0 GB per head, for 2.1 MB of data.
//     Nearly all of it comes from a cache, but each multiply-add still waits for its two loads.
// measured  not yet (benchmarks/kernels.py)
// What limits it: loads, 11 for every 7 multiply-adds, and few threads: 1024 rows of a head are 1024 threads, and an
//     H100 can run 270,000. A row of sums is kept in registers, and spills to memory if it is wide.
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int ROWS = 128;                                   // of the result, for each block
constexpr int THREADS = 128;

// dQ = scale dS K, and delta, which attention_dkv reads                          grid (B h, N / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS) attention_dq(
    const T* q, const T* k, const T* v, const T* dy, const T* y, const bool* mask, const Acc* lse, Acc* delta, T* dq,
    int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int dy_b, int dy_h, int dy_n,
    int y_b, int y_h, int y_n, int dq_b, int dq_h, int dq_n, int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    const int b = blockIdx.x / h, head = blockIdx.x % h;
    const int i = blockIdx.y * ROWS + threadIdx.x;
    if (i >= N) return;
    q  += b * q_b  + head * q_h  + i * q_n;                                         // (d,)
    dy += b * dy_b + head * dy_h + i * dy_n;                                        // (e,)
    dq += b * dq_b + head * dq_h + i * dq_n;                                        // (d,)
    k  += b * k_b  + head * k_h;                                                    // (M, d)
    v  += b * v_b  + head * v_h;                                                    // (M, e)
    if (mask) mask += b * mask_b + head * mask_h + i * mask_n;                      // (M,)
    y  += b * y_b  + head * y_h  + i * y_n;                                         // (e,)
    const Acc lse_i = lse[blockIdx.x * N + i];
    Acc delta_i = 0;
    for (int c = 0; c < e; c++) delta_i += wide(dy[c]) * wide(y[c]);
    delta[blockIdx.x * N + i] = delta_i;

    Acc sum[HEAD_DIM] = {};
    const int end = causal ? min(M, i + 1) : M;
    for (int j = 0; j < end; j++) {
        if (mask && !mask[j * mask_m]) continue;                                    // P = 0
        const T* k_j = k + j * k_m;
        const T* v_j = v + j * v_m;
        Acc S = 0, dP = 0;
        for (int c = 0; c < d; c++) S  += wide(q[c]) * wide(k_j[c]);
        for (int c = 0; c < e; c++) dP += wide(dy[c]) * wide(v_j[c]);
        const Acc P = exp_(scale * S - lse_i);
        const Acc dS = P * (dP - delta_i);
        #pragma unroll                                      // constant indices keep an array in registers
        for (int c = 0; c < HEAD_DIM; c++) if (c < d) sum[c] += dS * wide(k_j[c]);
    }
    #pragma unroll
    for (int c = 0; c < HEAD_DIM; c++) if (c < d) dq[c] = narrow(scale * sum[c]);
}

// dV = P^T dY, dK = scale dS^T Q                                                 grid (B h, M / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS) attention_dkv(
    const T* q, const T* k, const T* v, const T* dy, const bool* mask, const Acc* lse, const Acc* delta, T* dk, T* dv,
    int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int dy_b, int dy_h, int dy_n,
    int dk_b, int dk_h, int dk_m, int dv_b, int dv_h, int dv_m,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    const int b = blockIdx.x / h, head = blockIdx.x % h;
    const int j = blockIdx.y * ROWS + threadIdx.x;
    if (j >= M) return;
    k  += b * k_b  + head * k_h  + j * k_m;                                         // (d,)
    v  += b * v_b  + head * v_h  + j * v_m;                                         // (e,)
    dk += b * dk_b + head * dk_h + j * dk_m;                                        // (d,)
    dv += b * dv_b + head * dv_h + j * dv_m;                                        // (e,)
    q  += b * q_b  + head * q_h;                                                    // (N, d)
    dy += b * dy_b + head * dy_h;                                                   // (N, e)
    if (mask) mask += b * mask_b + head * mask_h + j * mask_m;                      // (N,)
    lse += blockIdx.x * N;
    delta += blockIdx.x * N;

    Acc dk_sum[HEAD_DIM] = {}, dv_sum[HEAD_DIM] = {};
    for (int i = causal ? j : 0; i < N; i++) {
        if (mask && !mask[i * mask_n]) continue;                                    // P = 0
        const T* q_i = q + i * q_n;
        const T* dy_i = dy + i * dy_n;
        Acc S = 0, dP = 0;
        for (int c = 0; c < d; c++) S  += wide(q_i[c]) * wide(k[c]);
        for (int c = 0; c < e; c++) dP += wide(dy_i[c]) * wide(v[c]);
        const Acc P = exp_(scale * S - lse[i]);
        const Acc dS = P * (dP - delta[i]);
        #pragma unroll
        for (int c = 0; c < HEAD_DIM; c++) {
            if (c < e) dv_sum[c] += P * wide(dy_i[c]);
            if (c < d) dk_sum[c] += dS * wide(q_i[c]);
        }
    }
    #pragma unroll
    for (int c = 0; c < HEAD_DIM; c++) {
        if (c < d) dk[c] = narrow(scale * dk_sum[c]);
        if (c < e) dv[c] = narrow(dv_sum[c]);
    }
}
