// Attention, version 3: both products in register tiles, eight threads for each row.
//
// A thread that keeps a 4 x 8 tile of the scores reads 4 + 8 numbers for 32 multiply-adds; version 2 reads 32.  So a
// row of scores is now spread over eight threads: warp shuffles compute its maximum and sum, and its weights P go
// through shared memory once, as the left side of the second product.  The recurrence is that of version 2, but for
// tiles of 64 keys, so the sums are scaled down once for each tile:
//
//     S    = q_tile k_tile^T                                     (64, 64)
//     top' = max(top, max_m s_m)         shrink = exp(top - top')
//     P    = exp(scale S - top')
//     sum' = sum shrink + sum_m P_m
//     y'   = y   shrink + P v_tile                               (64, e)
//
// The machine's exponential is a power of 2: exp(x) = 2^(x log2 e).  The factor log2 e goes into the scale, where it
// costs nothing (not in float64, which computes either power by a polynomial).
//
// Which thread does what: 128 threads, 64 queries.  Lanes 8g .. 8g+7 of a warp have rows g, g+4, g+8, g+12 of its 16:
//
//                          keys of a tile                              columns of y
//                  0  1  2 .. 7   8  9 .. 15  ..  63          0,1  2,3 ..  14,15   16,17 ..
//     row 0      | l0 l1 l2   l7  l0 l1   l7      l7 |       | l0   l1       l7      l0      |
//         1      | l8 l9      l15 l8 l9   l15    l15 |       | l8   l9       l15     l8      |
//         2      | l16 ..                            |       | l16 ..                        |
//         3      | l24 ..                            |       | l24 ..                        |
//         4      | l0 l1 ..    as row 0              |       | l0   l1 ..                    |
//
// Neighbouring lanes take neighbouring keys, and a row in shared memory is 16 bytes longer than HEAD_DIM, so eight
// lanes that read 16 bytes of eight rows use all 32 banks.  k_tile and v_tile use the same memory, one after the other;
// other blocks run while one waits for that, and for d = 64 four blocks fit on a multiprocessor of an H100.
//
// Bytes and operations, for each head of each image
//     moved       as version 2:  N (d + e) + (M d + M e) ceil(N / 64) numbers, 16 bytes at a time
//     computed    2 N M d + 2 N M e, and N M exponentials, on tiles that are padded with zeros
//     shared      first product: 12 reads of 16 bytes for 128 multiply-adds; second, for four keys: 4 of 16 bytes and
//                 e / 4 of 8 bytes for 2 e, which is the same if e = 64
//     128 images, 4 heads, N = M = 196, d = e = 64, float32: 257 MB from L2, 103 MB from memory; 5.0 GFLOP, which
//     become 8.6 in tiles of 64 (196 is 3.06 tiles).
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: still shared memory, but less.  A warp's 16-byte read takes as long as 16 multiply-adds of a
// multiprocessor, so 12 of them take 192, and the products 128.  Tiles of 8 x 8 would need 16 reads for 256 products,
// but then a thread has 64 scores and 8 HEAD_DIM / 8 numbers of y, and the registers do not suffice above HEAD_DIM 64.
// Sequences a little longer than a multiple of 64 fill the last tile with zeros, which cost as much as numbers.  In
// float64 a number takes two registers: above HEAD_DIM 128, y and the scores take 224 of the 255, and some spill.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int TILE_N = 64;                                  // queries of a block
constexpr int TILE_M = 64;                                  // keys in shared memory
constexpr int THREADS = 128;
constexpr int LANES = 8;                                    // threads that share a row
constexpr int ROWS = TILE_N * LANES / THREADS;              // rows of a thread: 4
constexpr int KEYS = TILE_M / LANES;                        // its keys of a tile: 8
constexpr int PAIRS = HEAD_DIM / (2 * LANES);               // its pairs of columns of y

constexpr int WIDE = 16 / sizeof(Acc);                      // numbers in 16 bytes
struct alignas(16) Wide16 { Acc at[WIDE]; };
struct alignas(2 * sizeof(Acc)) Pair { Acc at[2]; };
constexpr int ROW = HEAD_DIM + WIDE;                        // of q_tile and kv_tile in shared memory
constexpr int P_ROW = TILE_M + WIDE;

constexpr int BLOCKS = HEAD_DIM <= 64 && sizeof(Acc) == 4 ? 4 : HEAD_DIM <= 128 ? 2 : 1;      // on a multiprocessor
constexpr bool BASE_2 = sizeof(Acc) == 4;
constexpr Acc LN_BASE = BASE_2 ? 0.69314718055994531 : 1;
__device__ __forceinline__ float  power(float x)  { return exp2f(x); }
__device__ __forceinline__ double power(double x) { return exp(x); }

// Whether rows can be read four numbers at a time.
__device__ __forceinline__ bool in_fours(const T* rows, int stride, int columns) {
    return (unsigned long long)rows % alignof(Four) == 0 && stride % 4 == 0 && columns % 4 == 0;
}

// Copies (rows, columns) from memory into a tile (64, HEAD_DIM), and fills the rest with zeros.
__device__ __forceinline__ void load_tile(Acc* tile, const T* from, int stride, int rows, int columns, bool fours) {
    #pragma unroll 4
    for (int step = 0; step < 64 * HEAD_DIM / 4 / THREADS; step++) {
        const int i = step * THREADS + threadIdx.x, row = i / (HEAD_DIM / 4), c = i % (HEAD_DIM / 4) * 4;
        Four x = {};
        if (row < rows && fours && c < columns) x = *(const Four*)(from + row * stride + c);
        if (row < rows && !fours)
            for (int u = 0; u < 4; u++)
                if (c + u < columns) x.at[u] = from[row * stride + c + u];
        #pragma unroll
        for (int u = 0; u < 4; u += WIDE) {
            Wide16 wide_x;
            for (int w = 0; w < WIDE; w++) wide_x.at[w] = wide(x.at[u + w]);
            *(Wide16*)(tile + row * ROW + c + u) = wide_x;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward(
    const T* q, const T* k, const T* v, const bool* mask, T* y, Acc* lse, int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int y_b, int y_h, int y_n,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    extern __shared__ float4 dynamic_shared[];
    Acc* q_tile = (Acc*)dynamic_shared;                     // (TILE_N, ROW)
    Acc* kv_tile = q_tile + TILE_N * ROW;                   // (TILE_M, ROW)
    Acc* p_tile = kv_tile + TILE_M * ROW;                   // (TILE_N, P_ROW)

    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int bh = blockIdx.x / tiles, b = bh / h, head = bh % h;
    const int n0 = blockIdx.x % tiles * TILE_N;
    q += b * q_b + head * q_h + n0 * q_n;
    k += b * k_b + head * k_h;
    v += b * v_b + head * v_h;
    y += b * y_b + head * y_h + n0 * y_n;
    if (mask) mask += b * mask_b + head * mask_h + n0 * mask_n;
    const int tile_end = causal ? min(M, n0 + TILE_N) : M;  // one past the last key of any of these
    const bool fours_k = in_fours(k, k_m, d) , fours_v = in_fours(v, v_m, e);

    const int lane = threadIdx.x % LANES;
    const int row0 = threadIdx.x / 32 * (4 * ROWS) + threadIdx.x % 32 / LANES;     // this thread's rows: row0 + 4 i
    Acc y_rows[ROWS][PAIRS][2] = {}, top[ROWS], sum[ROWS];  // sum: of this thread's keys only, until the end
    for (int i = 0; i < ROWS; i++) top[i] = NEG_INF, sum[i] = 0;
    scale /= LN_BASE;                                       // then top is in the same unit

    load_tile(q_tile, q, q_n, N - n0, d, in_fours(q, q_n, d));
    for (int m0 = 0; m0 < tile_end; m0 += TILE_M) {
        __syncthreads();                                    // all have read v_tile
        load_tile(kv_tile, k + m0 * k_m, k_m, M - m0, d, fours_k);
        __syncthreads();

        // S = q k^T
        Acc s[ROWS][KEYS] = {};
        #pragma unroll 1
        for (int c = 0; c < HEAD_DIM; c += WIDE) {
            Wide16 k_wide[KEYS];
            #pragma unroll
            for (int j = 0; j < KEYS; j++) k_wide[j] = *(const Wide16*)(kv_tile + (lane + LANES * j) * ROW + c);
            #pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const Wide16 q_wide = *(const Wide16*)(q_tile + (row0 + 4 * i) * ROW + c);
                #pragma unroll
                for (int j = 0; j < KEYS; j++)
                    #pragma unroll
                    for (int u = 0; u < WIDE; u++) s[i][j] += q_wide.at[u] * k_wide[j].at[u];
            }
        }

        // P = exp(scale S - top)
        const bool all_seen = !mask && m0 + TILE_M <= M && !(causal && m0 + TILE_M > n0 + 1);
        #pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = row0 + 4 * i, n = n0 + row;
            Acc largest = NEG_INF;
            #pragma unroll
            for (int j = 0; j < KEYS; j++) {
                const int m = m0 + lane + LANES * j;
                const bool seen = all_seen || (n < N && m < (causal ? min(M, n + 1) : M)
                                               && (!mask || mask[row * mask_n + m * mask_m]));
                s[i][j] = seen ? s[i][j] : Acc(NEG_INF);
                largest = max(largest, s[i][j]);
            }
            #pragma unroll
            for (int other = 1; other < LANES; other *= 2)
                largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
            const Acc next = max(top[i], scale * largest), base = next == NEG_INF ? Acc(0) : next;  // avoids inf - inf
            const Acc shrink = power(top[i] - base);
            top[i] = next;
            sum[i] *= shrink;
            #pragma unroll
            for (int j = 0; j < PAIRS; j++) y_rows[i][j][0] *= shrink, y_rows[i][j][1] *= shrink;
            #pragma unroll
            for (int j = 0; j < KEYS; j++) {
                const Acc p = power(scale * s[i][j] - base);
                sum[i] += p;
                p_tile[row * P_ROW + lane + LANES * j] = p;
            }
        }

        __syncthreads();                                    // all have read k_tile
        load_tile(kv_tile, v + m0 * v_m, v_m, M - m0, e, fours_v);
        __syncthreads();

        // y += P v
        const int keys = min(TILE_M, tile_end - m0);
        for (int m = 0; m < keys; m += WIDE) {               // beyond the last key, P is 0
            Wide16 p[ROWS];
            #pragma unroll
            for (int i = 0; i < ROWS; i++) p[i] = *(const Wide16*)(p_tile + (row0 + 4 * i) * P_ROW + m);
            #pragma unroll
            for (int u = 0; u < WIDE; u++)
                #pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    const Pair v_pair = *(const Pair*)(kv_tile + (m + u) * ROW + 2 * (lane + LANES * j));
                    #pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        y_rows[i][j][0] += p[i].at[u] * v_pair.at[0];
                        y_rows[i][j][1] += p[i].at[u] * v_pair.at[1];
                    }
                }
        }
    }

    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        #pragma unroll
        for (int other = 1; other < LANES; other *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], other);
        const int row = row0 + 4 * i;
        if (n0 + row >= N) continue;
        const Acc weight = sum[i] == 0 ? Acc(0) : 1 / sum[i];       // a query without keys: y = 0
        #pragma unroll
        for (int j = 0; j < PAIRS; j++)
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                const int c = 2 * (lane + LANES * j) + u;
                if (c < e) y[row * y_n + c] = narrow(weight * y_rows[i][j][u]);
            }
        if (lane == 0) lse[bh * N + n0 + row] = sum[i] == 0 ? Acc(POS_INF) : top[i] * LN_BASE + log_(sum[i]);
    }
}
