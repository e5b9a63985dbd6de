// Attention's backward pass, version 5: asynchronous copies.  One tile is in transit while the other is used.
//
//     S = scale q k^T         P = exp(S - lse)                                     (N, M), never in memory
//     dV = P^T dY             dP = dY V^T
//     dS = P (dP - delta)     delta_i = sum_j P_ij dP_ij = sum_c dY_ic Y_ic
//     dQ = scale dS K         dK = scale dS^T Q
//
// In version 4 a block waits for two tiles, then uses them, then waits again.  But no product uses both.  Here dP comes
// first, so each tile is free during a part of the round, and in that time cp.async, which copies to shared memory by
// itself (conv_5), brings the next one.  There are no more tiles than before, and so no more shared memory.
//
//     dq       | dP = dY V^T |   S = q k^T, P, dS, dQ += dS K   |        a | is a barrier: the copies before it are
//     v tile      used       |  the next one arrives ---------->         complete, and all threads are done with the
//     k tile   arrives ----> |       used                       |        tile that is copied next
//
//     dkv      | dP = V dY^T |   S = k q^T, P, dV += P dY, dS   | dK += dS Q |           all of it transposed
//     dy tile     used                used                      | next one -->
//     q tile   arrives ----> |       used                              used  |
//
// Which thread does what (dq; in dkv rows and columns are swapped, so the tile is S^T), as in version 4:
//
//               keys j ->  64 at a time, 8 a tile                columns c of dQ ->
//     warp 0    [ 16 x 8 | 16 x 8 | .. ]     then, over these    [ 16 x 8 | 16 x 8 | .. ]
//     warp 1    [ 16 x 8 | ..          ]     64 keys             [ 16 x 8 | ..          ]
//     warps 2, 3                                                 in a tile, of thread t:
//                                                                (row t / 4, columns 2 (t % 4) and + 1), (row + 8, ..)
//     HEAD_DIM > 64: 32 keys at a time, since the sums already take half of the registers.
//
// What is rounded: as in version 4.  But a copy does not go through registers, so float32 is rounded to TF32 in the
//     fragments, by each warp: 2 to 3 more instructions for each mma.
//
// Operations and bytes: as version 4.
// measured  not yet (benchmarks/kernels.py)
// What limits it: shared memory, as in version 4; and a copy must be done within one or two products.  For d = 64, half
//     precision, dK of a block is 128 mma, whose fragments take about 300 cycles of an H100 to read (estimated): enough for the latency of L2, and
//     half of that of memory.  Two other blocks on the multiprocessor cover the rest.  dkv has three barriers a round,
//     not two.
// What was counted and not done: 5 products in place of 7.  The kernel that sums dK and dV could also form dS K, but
//     then each of its M / 64 blocks has a part of every row of dQ.  If a second pass adds the parts, the bits are the
//     same each time.  But the parts are float32, written and read: N M d / 8 bytes, which take 37 fs at 3.35 TB/s for
//     each of the N M d.  The two products are 4 N M d operations, 10 fs at 400 TFLOP/s (estimated).  And with N = M =
//     4096 and d = 64 the parts of one head have 67 MB.  Atomics in L2 would move half as much, in an order that is not
//     the same each time.  Blocks of 128 keys would halve both, and need the registers of 32 rows for each warp.
// takes   tf32, float16, bfloat16
// needs   sm_80
#include "element.cuh"

constexpr int ROWS = 64;                                    // of the result, for each block: 16 for each warp
constexpr int COLUMNS_NARROW = 64;                          // of the scores at a time: rows of the other operand
constexpr int COLUMNS_WIDE = 32;                            // the same if HEAD_DIM > 64
constexpr bool WIDE = HEAD_DIM > 64;
constexpr int COLUMNS = WIDE ? COLUMNS_WIDE : COLUMNS_NARROW;
constexpr int THREADS = 128;
constexpr int BLOCKS = WIDE ? 2 : 3;                        // that should fit on a multiprocessor
constexpr int PAD_BYTES = 16;                               // 8 rows then start 4 banks apart, and use all 32
constexpr int PITCH = HEAD_DIM + PAD_BYTES / sizeof(T);     // distance between rows of a tile
constexpr int DEPTH = 32 / sizeof(T);                       // of A and B: 8 of TF32, 16 of half precision
constexpr int PER = 16 / sizeof(T);                         // numbers in 16 bytes
static_assert(HEAD_DIM % 16 == 0, "");
struct alignas(16) Piece { T at[PER]; };

// --- one instruction -------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma(float (&D)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float*) {
    mma_m16n8k8_tf32(D, a, b);
}
__device__ __forceinline__ void mma(float (&D)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float16*) {
    mma_m16n8k16_f16(D, a, b);
}
__device__ __forceinline__ void mma(float (&D)[4], const unsigned (&a)[4], const unsigned (&b)[2], const bfloat16*) {
    mma_m16n8k16_bf16(D, a, b);
}

// What ldmatrix has read, as the tensor cores require: float32 becomes TF32.
__device__ __forceinline__ void to_tensor(unsigned (&fragment)[4]) {
    if (sizeof(T) == 4)
        #pragma unroll
        for (int i = 0; i < 4; i++) fragment[i] = to_tf32(__uint_as_float(fragment[i]));
}

// A: rows 0..15 of a tile in shared memory, 32 bytes of each.
__device__ __forceinline__ void load_a(unsigned (&a)[4], const T* tile) {
    const int lane = threadIdx.x % 32;                      // lane l gives the address of a row of 16 bytes
    ldmatrix_x4(a, tile + lane % 16 * PITCH + lane / 16 * (DEPTH / 2));
    to_tensor(a);
}

// B for two tiles side by side: B's columns are rows 0..15 of a tile in shared memory, 32 bytes of each.
__device__ __forceinline__ void load_b(unsigned (&b)[2][2], const T* tile) {
    const int lane = threadIdx.x % 32;
    unsigned four[4];
    ldmatrix_x4(four, tile + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * (DEPTH / 2));
    to_tensor(four);
    b[0][0] = four[0], b[0][1] = four[1], b[1][0] = four[2], b[1][1] = four[3];
}

// B for two tiles side by side: DEPTH rows of a tile in shared memory, 16 columns of it.
template <typename Half> __device__ __forceinline__ void load_b_across(unsigned (&b)[2][2], const Half* tile) {
    const int lane = threadIdx.x % 32;
    unsigned four[4];
    ldmatrix_x4_trans(four, tile + lane % 16 * PITCH + lane / 16 * 8);
    b[0][0] = four[0], b[0][1] = four[1], b[1][0] = four[2], b[1][1] = four[3];
}
__device__ __forceinline__ void load_b_across(unsigned (&b)[2][2], const float* tile) {
    const int lane = threadIdx.x % 32;                      // ldmatrix transposes numbers of 2 bytes, not of 4
    tile += lane % 4 * 2 * PITCH + lane / 4;                // slots t and t + 4: rows 2t and 2t + 1
    #pragma unroll
    for (int n = 0; n < 2; n++)
        #pragma unroll
        for (int u = 0; u < 2; u++) b[n][u] = to_tf32(tile[u * PITCH + 8 * n]);
}

// A: the tiles of sums from `tile` on, rounded: one tile of 8 columns for TF32, two for half precision.
__device__ __forceinline__ void as_a(unsigned (&a)[4], const float (*tile)[4], const float*) {
    #pragma unroll
    for (int n = 0; n < 4; n++) a[n] = to_tf32(tile[0][n / 2 + n % 2 * 2]);         // 0, 2, 1, 3
}
__device__ __forceinline__ void as_a(unsigned (&a)[4], const float (*tile)[4], const float16*) {
    #pragma unroll
    for (int n = 0; n < 4; n++) a[n] = pack_f16(tile[n / 2][n % 2 * 2], tile[n / 2][n % 2 * 2 + 1]);
}
__device__ __forceinline__ void as_a(unsigned (&a)[4], const float (*tile)[4], const bfloat16*) {
    #pragma unroll
    for (int n = 0; n < 4; n++) a[n] = pack_bf16(tile[n / 2][n % 2 * 2], tile[n / 2][n % 2 * 2 + 1]);
}

// --- whole products --------------------------------------------------------------------------------------------

// S = own other^T: a warp's 16 rows of `own`, COLUMNS rows of `other`.  Only `count` of those exist: groups of 16
// beyond them are skipped and stay 0 (all groups, for a warp whose rows do not exist).
__device__ __forceinline__ void products(float (&S)[COLUMNS / 8][4], const T* own, const T* other, int count) {
    #pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
        #pragma unroll
        for (int u = 0; u < 4; u++) S[n][u] = 0;
    #pragma unroll 1
    for (int c = 0; c < HEAD_DIM; c += DEPTH) {
        unsigned a[4], b[2][2];
        load_a(a, own + c);
        #pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            if (8 * n >= count) break;
            load_b(b, other + 8 * n * PITCH + c);
            mma(S[n], a, b[0], own);
            mma(S[n + 1], a, b[1], own);
        }
    }
}

// sum += scores other: a warp's 16 rows of scores, COLUMNS rows of `other`, `count` as above
__device__ __forceinline__ void accumulate(float (&sum)[HEAD_DIM / 8][4], const float (&scores)[COLUMNS / 8][4],
                                           const T* other, int count) {
    #pragma unroll
    for (int j = 0; j < COLUMNS; j += DEPTH) {
        if (j / 16 * 16 >= count) break;
        unsigned a[4], b[2][2];
        as_a(a, scores + j / 8, other);
        #pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 2) {
            load_b_across(b, other + j * PITCH + 8 * n);
            mma(sum[n], a, b[0], other);
            mma(sum[n + 1], a, b[1], other);
        }
    }
}

// --- between memory and tiles ----------------------------------------------------------------------------------

// Whether rows of T can be read four elements at a time.
__device__ bool by_fours(const T* from, int columns, int step) {
    return (columns | step) % 4 == 0 && (unsigned long long)from % alignof(Four) == 0;
}

// Starts to copy rows 0..count-1 of `from`, whose rows are `step` apart, into a tile; the rest becomes zeros.
__device__ __forceinline__ void copy_tile(T* tile, int count, const T* from, int rows, int columns, int step) {
    const bool pieces = columns % PER == 0 && step % PER == 0 && (unsigned long long)from % sizeof(Piece) == 0;
    for (int at = threadIdx.x; at < count * (HEAD_DIM / PER); at += THREADS) {
        const int r = at / (HEAD_DIM / PER), c = at % (HEAD_DIM / PER) * PER;
        if (pieces) {
            const bool inside = r < rows && c < columns;
            copy_async_16(tile + r * PITCH + c, from + (inside ? r * step + c : 0), inside);
        } else {
            Piece piece = {};
            for (int u = 0; u < PER; u++)
                if (r < rows && c + u < columns) piece.at[u] = from[r * step + c + u];
            *(Piece*)(tile + r * PITCH + c) = piece;
        }
    }
}

// Writes a warp's 16 rows of sums, times `scale`, to memory.
__device__ __forceinline__ void store_rows(T* to, const float (&sum)[HEAD_DIM / 8][4], int rows, int columns, int step,
                                           float scale) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
        #pragma unroll
        for (int u = 0; u < 4; u++) {
            const int r = lane / 4 + u / 2 * 8, c = 8 * n + lane % 4 * 2 + u % 2;
            if (r < rows && c < columns) to[r * step + c] = narrow(scale * sum[n][u]);
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
    T* q_tile  = (T*)dynamic_shared;                                                // (ROWS, HEAD_DIM)
    T* dy_tile = q_tile + ROWS * PITCH;
    T* k_tile  = dy_tile + ROWS * PITCH;                                            // (COLUMNS, HEAD_DIM)
    T* v_tile  = k_tile + COLUMNS * PITCH;

    const int b = blockIdx.x / h, head = blockIdx.x % h, lane = threadIdx.x % 32;
    const int i0 = blockIdx.y * ROWS, row = threadIdx.x / 32 * 16;                  // the block's and the warp's first
    q  += b * q_b  + head * q_h  + i0 * q_n;
    dy += b * dy_b + head * dy_h + i0 * dy_n;
    k  += b * k_b  + head * k_h;
    v  += b * v_b  + head * v_h;
    if (mask) mask += b * mask_b + head * mask_h;
    copy_tile(q_tile, ROWS, q, N - i0, d, q_n);
    copy_tile(dy_tile, ROWS, dy, N - i0, e, dy_n);
    copy_tile(v_tile, COLUMNS, v, M, e, v_m);
    copy_async_commit();
    write_deltas(dy, y + b * y_b + head * y_h + i0 * y_n, delta + blockIdx.x * N + i0, N - i0, e, dy_n, y_n);
    copy_async_wait<0>();
    __syncthreads();                                        // the tiles are whole, and the block's deltas in memory
    float lse_i[2], delta_i[2];                             // of the thread's two rows
    #pragma unroll
    for (int u = 0; u < 2; u++) {
        const int i = i0 + row + lane / 4 + 8 * u;
        lse_i[u]   = i < N ? lse[blockIdx.x * N + i] : POS_INF;                     // row beyond the end: P = 0
        delta_i[u] = i < N ? delta[blockIdx.x * N + i] : 0;
    }

    float sum[HEAD_DIM / 8][4] = {};
    const int end = causal ? min(M, i0 + ROWS) : M;
    const int warp_end = i0 + row >= N ? 0 : causal ? min(M, i0 + row + 16) : M;    // the end of the keys it attends to
    for (int j0 = 0; j0 < end; j0 += COLUMNS) {
        copy_tile(k_tile, COLUMNS, k + j0 * k_m, M - j0, d, k_m);
        copy_async_commit();
        float S[COLUMNS / 8][4], dP[COLUMNS / 8][4];
        products(dP, dy_tile + row * PITCH, v_tile, warp_end - j0);
        copy_async_wait<0>();
        __syncthreads();                                    // the k tile is whole, and nobody reads v any more
        const int next = j0 + COLUMNS;
        if (next < end) copy_tile(v_tile, COLUMNS, v + next * v_m, M - next, e, v_m);
        copy_async_commit();
        products(S, q_tile + row * PITCH, k_tile, warp_end - j0);
        #pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (n / 2 * 16 >= warp_end - j0) continue;
            #pragma unroll
            for (int u = 0; u < 4; u++) {
                const int i = i0 + row + lane / 4 + u / 2 * 8, j = j0 + 8 * n + lane % 4 * 2 + u % 2;
                const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
                const float P = may_look ? exp_(scale * S[n][u] - lse_i[u / 2]) : 0;
                S[n][u] = P * (dP[n][u] - delta_i[u / 2]);                          // dS
            }
        }
        accumulate(sum, S, k_tile, warp_end - j0);
        copy_async_wait<0>();
        __syncthreads();                                    // the next v tile is whole, and nobody reads k any more
    }
    dq += b * dq_b + head * dq_h + (i0 + row) * dq_n;       // here, since the loop has no spare registers
    store_rows(dq, sum, N - i0 - row, d, dq_n, scale);
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
    T* k_tile  = (T*)dynamic_shared;                                                // (ROWS, HEAD_DIM)
    T* v_tile  = k_tile + ROWS * PITCH;
    T* q_tile  = v_tile + ROWS * PITCH;                                             // (COLUMNS, HEAD_DIM)
    T* dy_tile = q_tile + COLUMNS * PITCH;
    float* lse_tile   = (float*)(dy_tile + COLUMNS * PITCH);                        // (COLUMNS,)
    float* delta_tile = lse_tile + COLUMNS;

    const int b = blockIdx.x / h, head = blockIdx.x % h, lane = threadIdx.x % 32;
    const int j0 = blockIdx.y * ROWS, row = threadIdx.x / 32 * 16;                  // the block's and the warp's first
    // the addresses of q, dy, dk and dv are computed only where they are used: the loop has no spare registers
    k  += b * k_b  + head * k_h  + j0 * k_m;
    v  += b * v_b  + head * v_h  + j0 * v_m;
    if (mask) mask += b * mask_b + head * mask_h;
    lse += blockIdx.x * N;
    delta += blockIdx.x * N;
    const auto copy_dy = [&](int i0) {                      // and lse and delta of these queries
        copy_tile(dy_tile, COLUMNS, dy + b * dy_b + head * dy_h + i0 * dy_n, N - i0, e, dy_n);
        for (int n = threadIdx.x; n < COLUMNS; n += THREADS) {
            copy_async_4(lse_tile + n, lse + (i0 + n < N ? i0 + n : 0), i0 + n < N);
            copy_async_4(delta_tile + n, delta + (i0 + n < N ? i0 + n : 0), i0 + n < N);
        }
    };
    const int first = causal ? j0 : 0;                      // of the queries that see these keys
    if (first < N) {
        copy_tile(k_tile, ROWS, k, M - j0, d, k_m);
        copy_tile(v_tile, ROWS, v, M - j0, e, v_m);
        copy_dy(first);
    }
    copy_async_commit();

    float dk_sum[HEAD_DIM / 8][4] = {}, dv_sum[HEAD_DIM / 8][4] = {};
    const int warp_end = j0 + row < M ? N : 0;              // the end of the queries it needs
    for (int i0 = first; i0 < N; i0 += COLUMNS) {
        copy_async_wait<0>();
        __syncthreads();                                    // the dy tile is whole, and nobody reads q any more
        copy_tile(q_tile, COLUMNS, q + b * q_b + head * q_h + i0 * q_n, N - i0, d, q_n);
        copy_async_commit();
        float S[COLUMNS / 8][4], dP[COLUMNS / 8][4];
        products(dP, v_tile + row * PITCH, dy_tile, warp_end - i0);
        copy_async_wait<0>();
        __syncthreads();                                    // the q tile is whole
        products(S, k_tile + row * PITCH, q_tile, warp_end - i0);
        #pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            if (n / 2 * 16 >= warp_end - i0) continue;
            #pragma unroll
            for (int u = 0; u < 4; u++) {
                const int at = 8 * n + lane % 4 * 2 + u % 2, i = i0 + at, j = j0 + row + lane / 4 + u / 2 * 8;
                const bool may_look = i < N && j < M && (!causal || j <= i) && (!mask || mask[i * mask_n + j * mask_m]);
                S[n][u] = may_look ? exp_(scale * S[n][u] - lse_tile[at]) : 0;      // P
            }
        }
        accumulate(dv_sum, S, dy_tile, warp_end - i0);
        #pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
            #pragma unroll
            for (int u = 0; u < 4; u++) S[n][u] *= dP[n][u] - delta_tile[8 * n + lane % 4 * 2 + u % 2];     // dS
        __syncthreads();                                    // nobody reads dy any more
        if (i0 + COLUMNS < N) copy_dy(i0 + COLUMNS);
        copy_async_commit();
        accumulate(dk_sum, S, q_tile, warp_end - i0);
    }
    dk += b * dk_b + head * dk_h + (j0 + row) * dk_m;
    dv += b * dv_b + head * dv_h + (j0 + row) * dv_m;
    store_rows(dk, dk_sum, M - j0 - row, d, dk_m, scale);
    store_rows(dv, dv_sum, M - j0 - row, e, dv_m, 1);
}
