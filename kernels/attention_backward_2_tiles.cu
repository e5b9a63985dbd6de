// Attention's backward pass, version 2, with tiles in shared memory: a block takes 16 x 16 pairs (i, j), one a thread.
//
//     S = scale q k^T         P = exp(S - lse)                                     (N, M), never in memory
//     dV = P^T dY             dP = dY V^T
//     dS = P (dP - delta)     delta_i = sum_j P_ij dP_ij = sum_c dY_ic Y_ic
//     dQ = scale dS K         dK = scale dS^T Q
//
// In version 1 one thread computes a row and reads all numbers itself. Here a block keeps its 16 rows (Q and dY in dq,
// K and V in dkv) and copies the other operand 16 rows at a time, so every copied number is used 16 times. The scores
// go through shared memory too, since the thread that needs dS_ij is not the one that computes it.
//
// Which thread does what (dq; in dkv rows and columns are swapped, so the tile is S^T):
//
//               keys j ->  16 at a time                            columns c of dQ ->
//     query i   [ t0  t1  ..  t15 ]     then, over the same     t0: 0, 16, 32, ..   t1: 1, 17, 33, ..
//     16 rows   [ t16 ..          ]     16 keys, the sums of    t16: row 1, columns 0, 16, 32, ..
//               [ ..         t255 ]     dS_ij K_jc
//
// Operations: dq 3 products of 2 N M d, dkv 4: 14 N M d.              N = M = 1024, d = e = 64: 0.94 GFLOP per head.
// Bytes: from memory N/16 tiles read all of K and V, and M/16 all of Q and dY: 16 N M d / 16: 67 MB per head, 44 times
//     less than version 1. From shared memory 2 numbers for each multiply-add of the scores, and a little over one
//     for those of the gradients, since one dS_ij serves the HEAD_DIM / 16 columns of a thread.
// measured  not yet (benchmarks/kernels.py)
// What limits it: shared memory, which serves a warp 32 numbers a cycle, and each multiply-add needs nearly two.
//     There are three barriers for each tile in dq and five in dkv, and little work between them. In float64 a HEAD_DIM
//     of 128 or more needs more than 64 KiB of shared memory, which sm_75 does not have.
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int ROWS = 16;                                    // of the result, for each block
constexpr int COLUMNS = 16;                                 // of the scores at a time: rows of the other operand
constexpr int THREADS = 256;
constexpr int PAD_BYTES = 8;                                // at the end of a row: 16 rows then start in 16 banks
constexpr int PITCH = HEAD_DIM + PAD_BYTES / sizeof(Acc);           // distance between rows of a tile
constexpr int SCORE_PITCH = COLUMNS + PAD_BYTES / sizeof(Acc);
constexpr int EACH = HEAD_DIM / 16;                                 // columns of the result of a thread
static_assert(ROWS == COLUMNS && HEAD_DIM % 16 == 0, "");

// Copies rows 0..15 of `from`, whose rows are `step` apart, into a tile; fills the rest with zeros.
__device__ void load_tile(Acc* tile, const T* from, int rows, int columns, int step) {
    for (int at = threadIdx.x; at < ROWS * HEAD_DIM; at += THREADS) {
        const int r = at / HEAD_DIM, c = at % HEAD_DIM;
        tile[r * PITCH + c] = r < rows && c < columns ? wide(from[r * step + c]) : Acc(0);
    }
}

// sum_c a_c b_c
__device__ Acc dot(const Acc* a, const Acc* b) {
    Acc sum = 0;
    for (int c = 0; c < HEAD_DIM; c++) sum += a[c] * b[c];
    return sum;
}

// sum_c += sum_j scores_j other_jc, for every 16th column c, beginning with the thread's own
__device__ void accumulate(Acc (&sum)[EACH], const Acc* scores, const Acc* other, int first) {
    for (int j = 0; j < COLUMNS; j++)
        #pragma unroll
        for (int n = 0; n < EACH; n++) sum[n] += scores[j] * other[j * PITCH + first + 16 * n];
}

// dQ = scale dS K, and delta, which attention_dkv reads                          grid (B h, N / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS) attention_dq(
    const T* q, const T* k, const T* v, const T* dy, const T* y, const bool* mask, const Acc* lse, Acc* delta, T* dq,
    int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int dy_b, int dy_h, int dy_n,
    int y_b, int y_h, int y_n, int dq_b, int dq_h, int dq_n, int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    extern __shared__ float4 dynamic_shared[];
    Acc* q_tile  = (Acc*)dynamic_shared;                                            // (ROWS, HEAD_DIM)
    Acc* dy_tile = q_tile + ROWS * PITCH;
    Acc* k_tile  = dy_tile + ROWS * PITCH;                                          // (COLUMNS, HEAD_DIM)
    Acc* v_tile  = k_tile + COLUMNS * PITCH;
    Acc* scores  = v_tile + COLUMNS * PITCH;                                        // (ROWS, COLUMNS)

    const int b = blockIdx.x / h, head = blockIdx.x % h;
    const int i0 = blockIdx.y * ROWS, row = threadIdx.x / 16, column = threadIdx.x % 16, i = i0 + row;
    q  += b * q_b  + head * q_h  + i0 * q_n;
    dy += b * dy_b + head * dy_h + i0 * dy_n;
    y  += b * y_b  + head * y_h  + i0 * y_n;
    k  += b * k_b  + head * k_h;
    v  += b * v_b  + head * v_h;
    if (mask) mask += b * mask_b + head * mask_h;
    const Acc lse_i   = i < N ? lse[blockIdx.x * N + i] : Acc(POS_INF);             // row beyond the end: P = 0
    Acc delta_i = 0;                                        // each of a row's 16 threads computes it
    for (int c = 0; c < e && i < N; c++) delta_i += wide(dy[row * dy_n + c]) * wide(y[row * y_n + c]);
    if (i < N && column == 0) delta[blockIdx.x * N + i] = delta_i;
    load_tile(q_tile, q, N - i0, d, q_n);
    load_tile(dy_tile, dy, N - i0, e, dy_n);

    Acc sum[EACH] = {};
    const int end = causal ? min(M, i0 + ROWS) : M;
    for (int j0 = 0; j0 < end; j0 += COLUMNS) {
        load_tile(k_tile, k + j0 * k_m, M - j0, d, k_m);
        load_tile(v_tile, v + j0 * v_m, M - j0, e, v_m);
        __syncthreads();                                    // the tiles are whole
        const int j = j0 + column;
        const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
        const Acc S  = dot(q_tile + row * PITCH, k_tile + column * PITCH);
        const Acc dP = dot(dy_tile + row * PITCH, v_tile + column * PITCH);
        const Acc P  = may_look ? exp_(scale * S - lse_i) : Acc(0);
        scores[row * SCORE_PITCH + column] = P * (dP - delta_i);                    // dS
        __syncthreads();                                    // the scores are whole
        accumulate(sum, scores + row * SCORE_PITCH, k_tile, column);
        __syncthreads();                                    // nobody reads the tiles any more
    }
    if (i < N)
        #pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int c = column + 16 * n;
            if (c < d) dq[b * dq_b + head * dq_h + i * dq_n + c] = narrow(scale * sum[n]);
        }
}

// dV = P^T dY, dK = scale dS^T Q                                                 grid (B h, M / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS) attention_dkv(
    const T* q, const T* k, const T* v, const T* dy, const bool* mask, const Acc* lse, const Acc* delta, T* dk, T* dv,
    int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int dy_b, int dy_h, int dy_n,
    int dk_b, int dk_h, int dk_m, int dv_b, int dv_h, int dv_m,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    extern __shared__ float4 dynamic_shared[];
    Acc* k_tile  = (Acc*)dynamic_shared;                                            // (ROWS, HEAD_DIM)
    Acc* v_tile  = k_tile + ROWS * PITCH;
    Acc* q_tile  = v_tile + ROWS * PITCH;                                           // (COLUMNS, HEAD_DIM)
    Acc* dy_tile = q_tile + COLUMNS * PITCH;
    Acc* scores  = dy_tile + COLUMNS * PITCH;                                       // (ROWS, COLUMNS)

    const int b = blockIdx.x / h, head = blockIdx.x % h;
    const int j0 = blockIdx.y * ROWS, row = threadIdx.x / 16, column = threadIdx.x % 16, j = j0 + row;
    k  += b * k_b  + head * k_h  + j0 * k_m;
    v  += b * v_b  + head * v_h  + j0 * v_m;
    q  += b * q_b  + head * q_h;
    dy += b * dy_b + head * dy_h;
    if (mask) mask += b * mask_b + head * mask_h;
    lse += blockIdx.x * N;
    delta += blockIdx.x * N;
    load_tile(k_tile, k, M - j0, d, k_m);
    load_tile(v_tile, v, M - j0, e, v_m);

    Acc dk_sum[EACH] = {}, dv_sum[EACH] = {};
    for (int i0 = causal ? j0 : 0; i0 < N; i0 += COLUMNS) {                         // j0 is a multiple of 16
        load_tile(q_tile, q + i0 * q_n, N - i0, d, q_n);
        load_tile(dy_tile, dy + i0 * dy_n, N - i0, e, dy_n);
        __syncthreads();                                    // the tiles are whole
        const int i = i0 + column;
        const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
        const Acc S  = dot(k_tile + row * PITCH, q_tile + column * PITCH);
        const Acc dP = dot(v_tile + row * PITCH, dy_tile + column * PITCH);
        const Acc P  = may_look ? exp_(scale * S - lse[i]) : Acc(0);
        scores[row * SCORE_PITCH + column] = P;
        __syncthreads();                                    // the scores are whole
        accumulate(dv_sum, scores + row * SCORE_PITCH, dy_tile, column);
        __syncthreads();                                    // nobody reads P any more
        scores[row * SCORE_PITCH + column] = may_look ? P * (dP - delta[i]) : Acc(0);       // dS
        __syncthreads();
        accumulate(dk_sum, scores + row * SCORE_PITCH, q_tile, column);
        __syncthreads();                                    // nobody reads the tiles any more
    }
    if (j < M)
        #pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int c = column + 16 * n;
            if (c < d) dk[b * dk_b + head * dk_h + j * dk_m + c] = narrow(scale * dk_sum[n]);
            if (c < e) dv[b * dv_b + head * dv_h + j * dv_m + c] = narrow(dv_sum[n]);
        }
}
