// Attention, version 4: both products on the tensor cores; the weights never leave the registers.
//
// A warp multiplies a 16 x k fragment of q by k x 8 fragments of k^T in one instruction (mma, see ptx.cuh), which takes
// k multiply-adds of each thread in version 3.  The factors are float16, bfloat16 or TF32 (float32 rounded to 11
// significant bits), and the sums are float32.
//
// A warp keeps its rows in both products, so warps exchange nothing (FlashAttention-2: Dao 2023, section 3.3).  The
// result of the first product is the left side of the second, and in these fragments each thread already has its
// numbers.  For float16 and bfloat16, the scores of keys 16j .. 16j+15, two result fragments, are one left fragment:
//
//     result, keys 16j..        thread t of a group        left side, 16 keys
//        keys  2t,2t+1   8+2t,8+2t+1                          keys  2t,2t+1   8+2t,8+2t+1
//     row g   | d0 d1  |  d0' d1'                          row g     | a0    |  a2
//     row g+8 | d2 d3  |  d2' d3'                          row g+8   | a1    |  a3
//
// For TF32 the left side takes keys t and t+4, and the thread has 2t and 2t+1.  But the order of the terms of a sum is
// free: let column t of the left side be key 2t and column t+4 be key 2t+1, read the rows of v in the same order, and
// no number has to move.
//
// Which thread does what: 128 threads, 64 queries, 16 for each warp.  A warp computes the recurrence of version 3 for
// its rows by itself; a row of scores is spread over the four lanes of a group, so two shuffles compute its maximum.
//
//                  k_tile (64, d), shared                 v_tile (64, e), shared
//                         |  ldmatrix                            |  ldmatrix.trans (TF32: plain reads)
//     q, in        +------v-----+                         +------v------+
//     registers -> | S (16, 64) | -> top, P, sum ->  P -> | y (16, e)   |      each warp, rows 16w .. 16w+15
//                  +------------+    in registers         +-------------+
//
// Shared memory is counted in words of 4 bytes: one TF32 number or two of half precision.  A row is 4 words longer than
// necessary, so eight rows begin in eight different groups of four banks.
//
// Bytes and operations, for each head of each image
//     moved       as version 2:  N (d + e) + (M d + M e) ceil(N / 64) numbers
//     computed    2 N M d + 2 N M e on tensor cores, N M exponentials and about 6 N M other operations off them
//     128 images, 4 heads, N = M = 196, d = e = 64, float16: 128 MB from L2, 51 MB from memory; 5.0 GFLOP, which
//     become 5.7 in groups of sixteen queries and keys; 20 million exponentials, which become 22 million.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: with d = 64 each score takes 256 operations of a tensor core and one exponential.  In a cycle, each
// quarter of an H100's multiprocessor does 1024 operations (dense float16) and 4 exponentials, so the exponentials take
// as long as the products.  mma waits for its operands in registers, and reaches about two thirds of the speed of
// Hopper's wgmma.  The block waits for each tile; only other blocks hide that.
//
// takes   tf32, float16, bfloat16
// needs   sm_80
#include "element.cuh"

constexpr int TILE_N = 64;                                  // queries of a block, 16 for each warp
constexpr int TILE_M = 64;                                  // keys in shared memory
constexpr int THREADS = 128;
constexpr int BLOCKS = HEAD_DIM > 64 ? 2 : sizeof(T) == 2 ? 4 : 3;                       // on a multiprocessor

constexpr int WORD = 4 / sizeof(T);                         // numbers in a word
constexpr int ROW = HEAD_DIM / WORD + 4;                    // words of a row of k_tile and v_tile
constexpr int STEPS = HEAD_DIM / WORD / 8;                  // mma instructions along d
struct alignas(16 / WORD) PackedFour { unsigned at[4 / WORD]; };                    // four numbers as words

constexpr float LN_2 = 0.69314718055994531f;

// Numbers of memory in a word, as the tensor cores require; TF32 does not use the second.
__device__ __forceinline__ unsigned word(float x, float)          { return to_tf32(x); }
__device__ __forceinline__ unsigned word(float16 x, float16 x1)   { return x.bits | unsigned(x1.bits) << 16; }
__device__ __forceinline__ unsigned word(bfloat16 x, bfloat16 x1) { return x.bits | unsigned(x1.bits) << 16; }

// Sums rounded into a word.  The last argument, here and below, only selects the type T.
__device__ __forceinline__ unsigned pack(float x, float,    float)    { return to_tf32(x); }
__device__ __forceinline__ unsigned pack(float x, float x1, float16)  { return pack_f16(x, x1); }
__device__ __forceinline__ unsigned pack(float x, float x1, bfloat16) { return pack_bf16(x, x1); }

// d += a b; b are the two words of a lane.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
    const unsigned b[2] = {b0, b1};
    mma_m16n8k8_tf32(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float16) {
    const unsigned b[2] = {b0, b1};
    mma_m16n8k16_f16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bfloat16) {
    const unsigned b[2] = {b0, b1};
    mma_m16n8k16_bf16(d, a, b);
}

// Word w of a row in memory; zeros beyond its end, and if there is no such row.
__device__ __forceinline__ unsigned word_of(const T* row, int w, int columns, bool inside) {
    const int c = w * WORD, c1 = c + WORD - 1;
    return word(inside && c < columns ? row[c] : T(), inside && c1 < columns ? row[c1] : T());
}

// Whether rows can be read four numbers at a time.
__device__ __forceinline__ bool in_fours(const T* rows, int stride, int columns) {
    return (unsigned long long)rows % alignof(Four) == 0 && stride % 4 == 0 && columns % 4 == 0;
}

// Copies (rows, columns) from memory into a tile (64, HEAD_DIM), and fills the rest with zeros.
__device__ __forceinline__ void load_tile(unsigned* tile, const T* from, int stride, int rows, int columns, bool fours)
{
    #pragma unroll (2 * WORD)                               // 32 bytes in transit at once
    for (int step = 0; step < 64 * HEAD_DIM / 4 / THREADS; step++) {
        const int i = step * THREADS + threadIdx.x, row = i / (HEAD_DIM / 4), c = i % (HEAD_DIM / 4) * 4;
        Four x = {};
        if (row < rows && fours && c < columns) x = *(const Four*)(from + row * stride + c);
        if (row < rows && !fours)
            for (int u = 0; u < 4; u++)
                if (c + u < columns) x.at[u] = from[row * stride + c + u];
        PackedFour words;
        #pragma unroll
        for (int u = 0; u < 4; u += WORD) words.at[u / WORD] = word(x.at[u], x.at[u + WORD - 1]);
        *(PackedFour*)(tile + row * ROW + c / WORD) = words;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward(
    const T* q, const T* k, const T* v, const bool* mask, T* y, Acc* lse, int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int y_b, int y_h, int y_n,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    extern __shared__ float4 dynamic_shared[];
    unsigned* k_tile = (unsigned*)dynamic_shared;           // (TILE_M, ROW)
    unsigned* v_tile = k_tile + TILE_M * ROW;               // (TILE_M, ROW)

    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int bh = blockIdx.x / tiles, b = bh / h, head = bh % h;
    const int n0 = blockIdx.x % tiles * TILE_N;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row0 = threadIdx.x / 32 * 16 + g;             // this thread's rows: row0 and row0 + 8
    q += b * q_b + head * q_h + n0 * q_n;
    k += b * k_b + head * k_h;
    v += b * v_b + head * v_h;
    if (mask) mask += b * mask_b + head * mask_h + n0 * mask_n;
    const int tile_end = causal ? min(M, n0 + TILE_N) : M;  // one past the last key of any of these
    const int first = n0 + threadIdx.x / 32 * 16;           // of this warp's queries
    const int warp_end = first >= N ? 0 : causal ? min(M, first + 16) : M;          // the same for the warp
    const bool fours_k = in_fours(k, k_m, d), fours_v = in_fours(v, v_m, e);

    unsigned q_part[STEPS][4];                              // left fragments, kept for the whole kernel
    #pragma unroll
    for (int step = 0; step < STEPS; step++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = row0 + i % 2 * 8;
            q_part[step][i] = word_of(q + row * q_n, 8 * step + t + i / 2 * 4, d, n0 + row < N);
        }
    float y_part[HEAD_DIM / 8][4] = {}, top[2] = {NEG_INF, NEG_INF}, sum[2] = {};      // sum: of this thread's keys
    scale /= LN_2;                                          // exp(x) = 2^(x / ln 2)

    for (int m0 = 0; m0 < tile_end; m0 += TILE_M) {
        __syncthreads();                                    // all have read the tiles before
        load_tile(k_tile, k + m0 * k_m, k_m, M - m0, d, fours_k);
        load_tile(v_tile, v + m0 * v_m, v_m, M - m0, e, fours_v);
        __syncthreads();

        const int count = warp_end - m0;                    // keys of the warp; later groups of 16 are skipped
        if (count <= 0) continue;

        // S = q k^T: each ldmatrix reads the right fragments of 16 keys
        float s[TILE_M / 8][4] = {};
        #pragma unroll
        for (int step = 0; step < STEPS; step++)
            #pragma unroll
            for (int j = 0; j < TILE_M / 16; j++) {
                if (16 * j >= count) continue;
                unsigned r[4];
                ldmatrix_x4(r, k_tile + (16 * j + lane / 16 * 8 + lane % 8) * ROW + 8 * step + lane / 8 % 2 * 4);
                mma(s[2 * j],     q_part[step], r[0], r[1], T());
                mma(s[2 * j + 1], q_part[step], r[2], r[3], T());
            }

        // P = 2^(scale S - top), in place of S
        const bool all_seen = !mask && m0 + TILE_M <= M && !(causal && m0 + TILE_M > n0 + 1);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = row0 + 8 * i, n = n0 + row;
            float largest = NEG_INF;
            #pragma unroll
            for (int j = 0; j < TILE_M / 8; j++) {
                if (j / 2 * 16 >= count) continue;          // scores and weights stay 0
                #pragma unroll
                for (int u = 0; u < 2; u++) {
                    const int m = m0 + 8 * j + 2 * t + u;
                    const bool seen = all_seen || (n < N && m < (causal ? min(M, n + 1) : M)
                                                   && (!mask || mask[row * mask_n + m * mask_m]));
                    s[j][2 * i + u] = seen ? s[j][2 * i + u] : NEG_INF;
                    largest = max(largest, s[j][2 * i + u]);
                }
            }
            #pragma unroll
            for (int other = 1; other < 4; other *= 2)
                largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
            const float next = max(top[i], scale * largest), base = next == NEG_INF ? 0.f : next;   // avoids inf - inf
            const float shrink = exp2f(top[i] - base);
            top[i] = next;
            sum[i] *= shrink;
            #pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++) y_part[j][2 * i] *= shrink, y_part[j][2 * i + 1] *= shrink;
            #pragma unroll
            for (int j = 0; j < TILE_M / 8; j++)
                if (j / 2 * 16 < count)
                    #pragma unroll
                    for (int u = 0; u < 2; u++) sum[i] += s[j][2 * i + u] = exp2f(scale * s[j][2 * i + u] - base);
        }

        // y += P v
        if constexpr (WORD == 2) {
            #pragma unroll
            for (int step = 0; step < TILE_M / 16; step++) {
                if (16 * step >= count) continue;
                const float (&p)[4] = s[2 * step], (&p1)[4] = s[2 * step + 1];
                const unsigned p_part[4] = {pack(p[0], p[1], T()), pack(p[2], p[3], T()),
                                            pack(p1[0], p1[1], T()), pack(p1[2], p1[3], T())};
                #pragma unroll
                for (int j = 0; j < HEAD_DIM / 16; j++) {
                    unsigned r[4];
                    ldmatrix_x4_trans(r, v_tile + (16 * step + lane % 16) * ROW + (16 * j + lane / 16 * 8) / WORD);
                    mma(y_part[2 * j],     p_part, r[0], r[1], T());
                    mma(y_part[2 * j + 1], p_part, r[2], r[3], T());
                }
            }
        } else {
            #pragma unroll
            for (int step = 0; step < TILE_M / 8; step++) {
                if (step / 2 * 16 >= count) continue;
                const float (&p)[4] = s[step];              // column t of the left side is key 2t, column t+4 key 2t+1
                const unsigned p_part[4] = {to_tf32(p[0]), to_tf32(p[2]), to_tf32(p[1]), to_tf32(p[3])};
                const unsigned* v_rows = v_tile + (8 * step + 2 * t) * ROW + g;
                #pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; j++)
                    mma(y_part[j], p_part, v_rows[8 * j], v_rows[ROW + 8 * j], T());
            }
        }
    }

    y += b * y_b + head * y_h + n0 * y_n;                   // only now, since the loop has no spare registers
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        #pragma unroll
        for (int other = 1; other < 4; other *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], other);
        const int row = row0 + 8 * i;
        if (n0 + row >= N) continue;
        const float weight = sum[i] == 0 ? 0.f : 1 / sum[i];        // a query without keys: y = 0
        #pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j++)
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                const int c = 8 * j + 2 * t + u;
                if (c < e) y[row * y_n + c] = narrow(weight * y_part[j][2 * i + u]);
            }
        if (t == 0) lse[bh * N + n0 + row] = sum[i] == 0 ? float(POS_INF) : top[i] * LN_2 + logf(sum[i]);
    }
}
