// Attention's backward pass, version 3, with tiles in registers: a thread computes 4 x 4 pairs (i, j) at once.
//
//     S = scale q k^T         P = exp(S - lse)                                     (N, M), never in memory
//     dV = P^T dY             dP = dY V^T
//     dS = P (dP - delta)     delta_i = sum_j P_ij dP_ij = sum_c dY_ic Y_ic
//     dQ = scale dS K         dK = scale dS^T Q
//
// Version 2 reads two numbers from shared memory for each multiply-add. A thread that has 4 rows and 4 columns reads 8
// numbers for 16 products, and reads four at a time (Four: one instruction of 16 bytes). The tile grows to 64 x 64, and
// so does the work between two barriers. The 16 threads of a row are in one warp, and only they exchange the scores of
// the row. So they wait for that warp only: __syncwarp, not __syncthreads.
//
// Which thread does what (dq; in dkv rows and columns are swapped, so the tile is S^T):
//
//               keys j ->  64 at a time                            columns c of dQ ->
//     4 queries [ t0  t1 .. t15 | t0  t1 .. t15 | .. ]    then     t0, t1, .. t15, each EACH columns of each row,
//     4 queries [ t16 .. t31    | t16 ..        | .. ]             one, two or four neighbours at a time
//     ..          ^ one warp: 8 rows
//     HEAD_DIM > 64, or float64: tiles of 32 x 32, and 4 x 2 pairs per thread.
//
// delta: 8 threads per row, which add their sums in 3 steps of __shfl_xor_sync: distance 4, 2, 1.
//
// Operations: dq 3 products of 2 N M d, dkv 4: 14 N M d.              N = M = 1024, d = e = 64: 0.94 GFLOP per head.
// Bytes: from memory 16 N M d / 64: 17 MB per head, a quarter of version 2. From shared memory half a number for each
//     multiply-add, in reads of 16 bytes: 16 threads read 16 rows, 4 banks each, and the pad of 16 bytes shifts each
//     row by 4 banks, so 8 rows cover all 32.
// measured  not yet (benchmarks/kernels.py)
// What limits it: the multiply-adds, and almost as much shared memory. A block takes 85 KiB at HEAD_DIM 64: two blocks
//     fit on a multiprocessor of an H100, one on an A100. Nothing is fetched while a block computes; only another block
//     hides that. Rows or columns beyond the end are computed and discarded: 49 tokens cost as much as 64.
// takes   float32, float64, float16, bfloat16
// needs   sm_80
#include "element.cuh"

constexpr int ROWS_NARROW = 64;                             // of the result, for each block
constexpr int COLUMNS_NARROW = 64;                          // of the scores at a time: rows of the other operand
constexpr int ROWS_WIDE = 32;                               // the same if HEAD_DIM > 64, and for float64
constexpr int COLUMNS_WIDE = 32;
constexpr bool WIDE = HEAD_DIM > 64 || sizeof(Acc) == 8;
constexpr int ROWS = WIDE ? ROWS_WIDE : ROWS_NARROW;
constexpr int COLUMNS = WIDE ? COLUMNS_WIDE : COLUMNS_NARROW;
constexpr int R = 4;                                        // rows of a thread
constexpr int C = COLUMNS / 16;                             // columns of the scores of a thread
constexpr int THREADS_NARROW = 256;
constexpr int THREADS_WIDE = 128;
constexpr int THREADS = WIDE ? THREADS_WIDE : THREADS_NARROW;
constexpr int BLOCKS = WIDE ? 1 : 2;                        // that should fit on a multiprocessor
constexpr int PAD_BYTES = 16;
constexpr int PITCH = HEAD_DIM + PAD_BYTES / sizeof(Acc);           // distance between rows of a tile
constexpr int SCORE_PITCH = COLUMNS + PAD_BYTES / sizeof(Acc);
constexpr int EACH = HEAD_DIM / 16;                                 // columns of the result of a thread ..
constexpr int SIDE = EACH % 4 == 0 ? 4 : EACH % 2 == 0 ? 2 : 1;     // .. and how many of them are adjacent
static_assert(HEAD_DIM % 16 == 0 && ROWS / R * 16 == THREADS, "");

struct alignas(16) Quad { Acc at[4]; };
struct alignas(SIDE * sizeof(Acc) > 16 ? 16 : SIDE * sizeof(Acc)) Neighbours { Acc at[SIDE]; };

// Whether rows of T can be read four elements at a time.
__device__ bool by_fours(const T* from, int columns, int step) {
    return (columns | step) % 4 == 0 && (unsigned long long)from % alignof(Four) == 0;
}

// Copies rows 0..count-1 of `from`, whose rows are `step` apart, into a tile; fills the rest with zeros.
__device__ void load_tile(Acc* tile, int count, const T* from, int rows, int columns, int step) {
    if (by_fours(from, columns, step)) {
        for (int at = threadIdx.x; at < count * (HEAD_DIM / 4); at += THREADS) {
            const int r = at / (HEAD_DIM / 4), c = at % (HEAD_DIM / 4) * 4;
            Quad to = {};
            if (r < rows && c < columns) {
                const Four four = *(const Four*)(from + r * step + c);
                for (int u = 0; u < 4; u++) to.at[u] = wide(four.at[u]);
            }
            *(Quad*)(tile + r * PITCH + c) = to;
        }
    } else {
        for (int at = threadIdx.x; at < count * HEAD_DIM; at += THREADS) {
            const int r = at / HEAD_DIM, c = at % HEAD_DIM;
            tile[r * PITCH + c] = r < rows && c < columns ? wide(from[r * step + c]) : Acc(0);
        }
    }
}

// S_rs = sum_c own_rc other_sc: 4 rows, beginning at `own`, and every 16th row of `other`
__device__ __forceinline__ void products(Acc (&S)[R][C], const Acc* own, const Acc* other) {
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int s = 0; s < C; s++) S[r][s] = 0;
    #pragma unroll 1
    for (int c = 0; c < HEAD_DIM; c += 4) {
        Quad a[R], b[C];
        #pragma unroll
        for (int r = 0; r < R; r++) a[r] = *(const Quad*)(own + r * PITCH + c);
        #pragma unroll
        for (int s = 0; s < C; s++) b[s] = *(const Quad*)(other + 16 * s * PITCH + c);
        #pragma unroll
        for (int u = 0; u < 4; u++)
            #pragma unroll
            for (int r = 0; r < R; r++)
                #pragma unroll
                for (int s = 0; s < C; s++) S[r][s] += a[r].at[u] * b[s].at[u];
    }
}

// sum_rc += sum_j scores_rj other_jc: 4 rows, and EACH columns, SIDE neighbours in every 16 SIDE
__device__ __forceinline__ void accumulate(Acc (&sum)[R][EACH], const Acc* scores, const Acc* other) {
    #pragma unroll 1
    for (int j = 0; j < COLUMNS; j += 4) {
        Quad a[R];
        #pragma unroll
        for (int r = 0; r < R; r++) a[r] = *(const Quad*)(scores + r * SCORE_PITCH + j);
        #pragma unroll
        for (int u = 0; u < 4; u++)
            #pragma unroll
            for (int n = 0; n < EACH; n += SIDE) {
                const Neighbours b = *(const Neighbours*)(other + (j + u) * PITCH + 16 * n);
                #pragma unroll
                for (int r = 0; r < R; r++)
                    #pragma unroll
                    for (int w = 0; w < SIDE; w++) sum[r][n + w] += a[r].at[u] * b.at[w];
            }
    }
}

// Gives the scores to the 16 threads of their rows, all of which are in this warp.
__device__ __forceinline__ void pass_on(Acc* scores, const Acc (&S)[R][C], int column) {
    __syncwarp();                                           // nobody reads the last ones any more
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int s = 0; s < C; s++) scores[r * SCORE_PITCH + column + 16 * s] = S[r][s];
    __syncwarp();                                           // these are whole
}

// Writes the columns of a row that this thread summed, times `scale`, to memory.
__device__ __forceinline__ void store_row(T* to, const Acc (&sum)[EACH], int column, int columns, Acc scale) {
    #pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int c = SIDE * column + n / SIDE * SIDE * 16 + n % SIDE;
        if (c < columns) to[c] = narrow(scale * sum[n]);
    }
}

// delta_i = sum_c dY_ic Y_ic of the block's `rows` rows, the first at dy, y and delta: 8 threads for each.
__device__ void write_deltas(const T* dy, const T* y, Acc* delta, int rows, int e, int dy_n, int y_n) {
    const bool fours = by_fours(dy, e, dy_n) && by_fours(y, e, y_n);
    const int lane = threadIdx.x % 8;
    for (int row = threadIdx.x / 8; row < ROWS; row += THREADS / 8) {
        const int i = min(row, rows - 1);                   // every thread of the warp must take part in a shuffle
        const T *dy_i = dy + i * dy_n, *y_i = y + i * y_n;
        Acc sum = 0;
        if (fours) {
            for (int c = 4 * lane; c < e; c += 32) {
                const Four dy_c = *(const Four*)(dy_i + c), y_c = *(const Four*)(y_i + c);
                for (int u = 0; u < 4; u++) sum += wide(dy_c.at[u]) * wide(y_c.at[u]);
            }
        } else {
            for (int c = lane; c < e; c += 8) sum += wide(dy_i[c]) * wide(y_i[c]);
        }
        for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0 && row < rows) delta[row] = sum;
    }
}

// dQ = scale dS K, and delta, which attention_dkv reads                          grid (B h, N / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_dq(
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
    const int i0 = blockIdx.y * ROWS, row = threadIdx.x / 16 * R, column = threadIdx.x % 16;
    q  += b * q_b  + head * q_h  + i0 * q_n;
    dy += b * dy_b + head * dy_h + i0 * dy_n;
    k  += b * k_b  + head * k_h;
    v  += b * v_b  + head * v_h;
    if (mask) mask += b * mask_b + head * mask_h;
    write_deltas(dy, y + b * y_b + head * y_h + i0 * y_n, delta + blockIdx.x * N + i0, N - i0, e, dy_n, y_n);
    load_tile(q_tile, ROWS, q, N - i0, d, q_n);
    load_tile(dy_tile, ROWS, dy, N - i0, e, dy_n);
    __syncthreads();                                        // the block's deltas are in memory
    Acc lse_i[R], delta_i[R];
    #pragma unroll
    for (int r = 0; r < R; r++) {
        const int i = i0 + row + r;
        lse_i[r]   = i < N ? lse[blockIdx.x * N + i] : Acc(POS_INF);                // row beyond the end: P = 0
        delta_i[r] = i < N ? delta[blockIdx.x * N + i] : Acc(0);
    }

    Acc sum[R][EACH] = {};
    const int end = causal ? min(M, i0 + ROWS) : M;
    for (int j0 = 0; j0 < end; j0 += COLUMNS) {
        load_tile(k_tile, COLUMNS, k + j0 * k_m, M - j0, d, k_m);
        load_tile(v_tile, COLUMNS, v + j0 * v_m, M - j0, e, v_m);
        __syncthreads();                                    // the tiles are whole
        Acc S[R][C], dP[R][C];
        products(S, q_tile + row * PITCH, k_tile + column * PITCH);
        products(dP, dy_tile + row * PITCH, v_tile + column * PITCH);
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int s = 0; s < C; s++) {
                const int i = i0 + row + r, j = j0 + column + 16 * s;
                const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
                const Acc P = may_look ? exp_(scale * S[r][s] - lse_i[r]) : Acc(0);
                S[r][s] = P * (dP[r][s] - delta_i[r]);                              // dS
            }
        pass_on(scores + row * SCORE_PITCH, S, column);
        accumulate(sum, scores + row * SCORE_PITCH, k_tile + SIDE * column);
        __syncthreads();                                    // nobody reads the tiles any more
    }
    #pragma unroll
    for (int r = 0; r < R; r++) {
        const int i = i0 + row + r;
        if (i < N) store_row(dq + b * dq_b + head * dq_h + i * dq_n, sum[r], column, d, scale);
    }
}

// dV = P^T dY, dK = scale dS^T Q                                                 grid (B h, M / ROWS)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_dkv(
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
    const int j0 = blockIdx.y * ROWS, row = threadIdx.x / 16 * R, column = threadIdx.x % 16;
    k  += b * k_b  + head * k_h  + j0 * k_m;
    v  += b * v_b  + head * v_h  + j0 * v_m;
    q  += b * q_b  + head * q_h;
    dy += b * dy_b + head * dy_h;
    if (mask) mask += b * mask_b + head * mask_h;
    lse += blockIdx.x * N;
    delta += blockIdx.x * N;
    load_tile(k_tile, ROWS, k, M - j0, d, k_m);
    load_tile(v_tile, ROWS, v, M - j0, e, v_m);

    Acc dk_sum[R][EACH] = {}, dv_sum[R][EACH] = {};
    for (int i0 = causal ? j0 / COLUMNS * COLUMNS : 0; i0 < N; i0 += COLUMNS) {
        load_tile(q_tile, COLUMNS, q + i0 * q_n, N - i0, d, q_n);
        load_tile(dy_tile, COLUMNS, dy + i0 * dy_n, N - i0, e, dy_n);
        Acc lse_i[C], delta_i[C];
        #pragma unroll
        for (int s = 0; s < C; s++) {
            const int i = i0 + column + 16 * s;
            lse_i[s]   = i < N ? lse[i] : Acc(POS_INF);                             // query beyond the end: P = 0
            delta_i[s] = i < N ? delta[i] : Acc(0);
        }
        __syncthreads();                                    // the tiles are whole
        Acc S[R][C], dP[R][C];
        products(S, k_tile + row * PITCH, q_tile + column * PITCH);
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int s = 0; s < C; s++) {
                const int i = i0 + column + 16 * s, j = j0 + row + r;
                const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
                S[r][s] = may_look ? exp_(scale * S[r][s] - lse_i[s]) : Acc(0);     // P
            }
        pass_on(scores + row * SCORE_PITCH, S, column);
        accumulate(dv_sum, scores + row * SCORE_PITCH, dy_tile + SIDE * column);
        products(dP, v_tile + row * PITCH, dy_tile + column * PITCH);
        #pragma unroll
        for (int r = 0; r < R; r++)
            #pragma unroll
            for (int s = 0; s < C; s++) S[r][s] *= dP[r][s] - delta_i[s];           // dS
        pass_on(scores + row * SCORE_PITCH, S, column);
        accumulate(dk_sum, scores + row * SCORE_PITCH, q_tile + SIDE * column);
        __syncthreads();                                    // nobody reads the tiles any more
    }
    #pragma unroll
    for (int r = 0; r < R; r++) {
        const int j = j0 + row + r;
        if (j < M) {
            store_row(dk + b * dk_b + head * dk_h + j * dk_m, dk_sum[r], column, d, scale);
            store_row(dv + b * dv_b + head * dv_h + j * dv_m, dv_sum[r], column, e, Acc(1));
        }
    }
}
