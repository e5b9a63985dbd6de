// Attention, version 5: a pipeline.  The next scores are computed beside this tile's weights, while tiles arrive.
//
// In version 4 a block reads a tile, waits for it, and only then computes; and a warp computes no products while it
// computes exponentials.  Two things run ahead.  cp.async copies tiles into shared memory by itself, as in conv_5,
// while the tiles before are used.  And the scores are one tile ahead of the weights (FlashAttention-3: Shah et al.
// 2024, section 3.2):
//
//     round    in transit    on tensor cores                  beside them
//       0        k1, v0      S0 = q k0^T                                       One barrier before each round: all
//       1        k2, v1      S1 = q k1^T,  y += P0 v0        P0 = exp(S0)      copies of the last round are there,
//       2        k3, v2      S2 = q k2^T,  y += P1 v1        P1 = exp(S1)      and nobody uses the two tiles that
//       3        k4, v3      S3 = q k3^T,  y += P2 v2        P2 = exp(S2)      are overwritten now.
//
// The two sets of scores need no more registers than one.  A round takes 16 keys at a time: their weights are computed
// and packed into the left side of a product, and the scores of the next tile's 16 keys take their place.  S needs no
// exponential of this round, so these products run while exponentials are computed; so do those of other warps.
//
//     16 keys of this tile      s[2g], s[2g+1]  --exp-->  P  --pack-->  p_part  --(p_part, v)-->  y
//     16 keys of the next       s[2g], s[2g+1]  <------------------(q, k)
//
// Which thread does what: as in version 4, 128 threads, 64 queries, 16 for each warp, whose rows stay with it.
//
//     k_tiles (2, 32, d), shared           v_tiles (2, 32, e), shared
//              |  ldmatrix                           |  ldmatrix.trans (TF32: plain reads)
//     q ->  S (16, 32)  -> top, P, sum ->  P  ->  y (16, e)              each warp, rows 16w .. 16w+15
//
// A tile has 32 keys, not 64.  So two of k and two of v take the shared memory that one of each took, as many blocks
// fit on a multiprocessor as before, and also the 49 keys of a small network make two tiles.  In return y is multiplied
// by `shrink` for every 32 keys.
//
// The copies do not go through registers, so float32 is rounded to TF32 in the fragments: each warp does it for itself,
// with 2 instructions for each mma.
//
// Bytes and operations, for each head of each image: as version 4, but a warp computes the scores of a tile for all of
// its 32 keys.  For the example of version 4, 5.7 GFLOP become 5.9.  With d = e = 64, float16, a block has 8 KiB in
// transit.  Four blocks on each of 132 multiprocessors have 4.3 MB; 3.35 TB/s times 0.8 us, 2.7 MB, would be enough to
// keep an H100's memory busy.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it (estimated, for an H100, d = 64, float16, one round of one block): the 128 mma take 128 cycles of a
// multiprocessor at its peak, and about 190 by mma.sync; the 2048 exponentials 128; reading fragments 256, since each
// of the four warps reads both tiles, 32 KiB at 128 bytes a cycle.  So shared memory is the limit.  Warps of 32 rows
// would halve it, and need 64 more registers.  wgmma, as in conv_6, would read a tile once for all four warps.
// cp.async copies 16 bytes, so rows that do not begin at a multiple of 16 bytes go through registers, number by number,
// and the threads wait for them.
//
// takes   tf32, float16, bfloat16
// needs   sm_80
#include "element.cuh"

constexpr int TILE_N = 64;                                  // queries of a block, 16 for each warp
constexpr int TILE_M = 32;                                  // keys of a tile
constexpr int STAGES = 2;                                   // tiles of k, and of v, in shared memory
constexpr int THREADS = 128;
constexpr int BLOCKS = HEAD_DIM > 64 ? 2 : sizeof(T) == 2 ? 4 : 3;                       // on a multiprocessor

constexpr int WORD = 4 / sizeof(T);                         // numbers in a word
constexpr int PER = 16 / sizeof(T);                         // numbers in 16 bytes
constexpr int ROW = HEAD_DIM / WORD + 4;                    // words of a row of a tile
constexpr int TILE = TILE_M * ROW;                          // words of a tile
constexpr int STEPS = HEAD_DIM / WORD / 8;                  // mma instructions along d
struct alignas(16) Piece { T at[PER]; };

constexpr float LN_2 = 0.69314718055994531f;
constexpr float LOWEST = -3.40282347e38f;                   // no score is lower; finite, which avoids inf - inf

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

// Words of a tile, as the tensor cores require: the copies did not round float32.
__device__ __forceinline__ unsigned to_tensor(unsigned x) { return WORD == 1 ? to_tf32(__uint_as_float(x)) : x; }

// Whether rows can be copied 16 bytes at a time.
__device__ __forceinline__ bool in_pieces(const T* rows, int stride, int columns) {
    return (unsigned long long)rows % sizeof(Piece) == 0 && stride % PER == 0 && columns % PER == 0;
}

// Starts to copy (rows, columns) from memory into a tile (TILE_M, HEAD_DIM), and fills the rest with zeros.
__device__ __forceinline__ void copy_tile(unsigned* tile, const T* from, int stride, int rows, int columns, bool pieces)
{
    for (int i = threadIdx.x; i < TILE_M * HEAD_DIM / PER; i += THREADS) {
        const int row = i / (HEAD_DIM / PER), c = i % (HEAD_DIM / PER) * PER;
        unsigned* to = tile + row * ROW + c / WORD;
        if (pieces) {
            const bool inside = row < rows && c < columns;
            copy_async_16(to, from + (inside ? row * stride + c : 0), inside);
        } else {
            Piece piece = {};
            for (int u = 0; u < PER; u++)
                if (row < rows && c + u < columns) piece.at[u] = from[row * stride + c + u];
            *(Piece*)to = piece;
        }
    }
}

// S = q k^T, for 16 keys: each ldmatrix reads the right fragments of both groups of 8.
__device__ __forceinline__ void scores(float (&s)[4], float (&s1)[4], const unsigned (&q_part)[STEPS][4],
                                       const unsigned* k_rows) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int u = 0; u < 4; u++) s[u] = s1[u] = 0;
    #pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned r[4];
        ldmatrix_x4(r, k_rows + (lane / 16 * 8 + lane % 8) * ROW + 8 * step + lane / 8 % 2 * 4);
        mma(s,  q_part[step], to_tensor(r[0]), to_tensor(r[1]), T());
        mma(s1, q_part[step], to_tensor(r[2]), to_tensor(r[3]), T());
    }
}

// y += P v, for 16 keys; p_part are the left fragments of P, two of TF32 or one of half precision.
__device__ __forceinline__ void add_values(float (&y_part)[HEAD_DIM / 8][4], const unsigned (&p_part)[3 - WORD][4],
                                           const unsigned* v_rows) {
    const int lane = threadIdx.x % 32;
    if constexpr (WORD == 2) {
        #pragma unroll
        for (int j = 0; j < HEAD_DIM / 16; j++) {
            unsigned r[4];
            ldmatrix_x4_trans(r, v_rows + lane % 16 * ROW + (16 * j + lane / 16 * 8) / WORD);
            mma(y_part[2 * j],     p_part[0], r[0], r[1], T());
            mma(y_part[2 * j + 1], p_part[0], r[2], r[3], T());
        }
    } else {
        #pragma unroll
        for (int step = 0; step < 2; step++) {              // column t of the left side is key 2t, column t+4 key 2t+1
            const unsigned* at = v_rows + (8 * step + lane % 4 * 2) * ROW + lane / 4;
            #pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
                mma(y_part[j], p_part[step], to_tensor(at[8 * j]), to_tensor(at[ROW + 8 * j]), T());
        }
    }
}

// P = 2^(scale S - top) and y += P v, for the `count` keys of a tile.  With NEXT, the scores of the next tile take the
// place of S; then this tile is full, and the code has no branch, so the compiler can mix products and exponentials.
template <bool NEXT>
__device__ __forceinline__ void weigh(float (&s)[TILE_M / 8][4], float (&y_part)[HEAD_DIM / 8][4], float (&sum)[2],
                                      const float (&top)[2], float scale, const unsigned (&q_part)[STEPS][4],
                                      const unsigned* k_next, const unsigned* v_tile, int count) {
    #pragma unroll
    for (int group = 0; group < TILE_M / 16; group++) {
        if (!NEXT && 16 * group >= count) continue;
        float (&p)[4] = s[2 * group], (&p1)[4] = s[2 * group + 1];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[i / 2] += p[i]  = exp2f(scale * p[i]  - top[i / 2]);
            sum[i / 2] += p1[i] = exp2f(scale * p1[i] - top[i / 2]);
        }
        unsigned p_part[3 - WORD][4];
        #pragma unroll
        for (int i = 0; i < 2; i++)
            if constexpr (WORD == 2) {
                p_part[0][i]     = pack(p[2 * i],  p[2 * i + 1],  T());
                p_part[0][2 + i] = pack(p1[2 * i], p1[2 * i + 1], T());
            } else {
                p_part[0][i] = to_tf32(p[2 * i]),  p_part[0][2 + i] = to_tf32(p[2 * i + 1]);
                p_part[1][i] = to_tf32(p1[2 * i]), p_part[1][2 + i] = to_tf32(p1[2 * i + 1]);
            }
        if (NEXT) scores(p, p1, q_part, k_next + 16 * group * ROW);
        add_values(y_part, p_part, v_tile + 16 * group * ROW);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_forward(
    const T* q, const T* k, const T* v, const bool* mask, T* y, Acc* lse, int B, int h, int N, int M, int d, int e,
    int q_b, int q_h, int q_n, int k_b, int k_h, int k_m, int v_b, int v_h, int v_m, int y_b, int y_h, int y_n,
    int mask_b, int mask_h, int mask_n, int mask_m, int causal, Acc scale)
{
    extern __shared__ float4 dynamic_shared[];
    unsigned* k_tiles = (unsigned*)dynamic_shared;          // (STAGES, TILE_M, ROW)
    unsigned* v_tiles = k_tiles + STAGES * TILE;            // (STAGES, TILE_M, ROW)

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
    const bool pieces = in_pieces(k, k_m, d) && in_pieces(v, v_m, e);
    const int count = (tile_end + TILE_M - 1) / TILE_M;     // tiles of keys

    unsigned q_part[STEPS][4];                              // left fragments, kept for the whole kernel
    #pragma unroll
    for (int step = 0; step < STEPS; step++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = row0 + i % 2 * 8;
            q_part[step][i] = word_of(q + row * q_n, 8 * step + t + i / 2 * 4, d, n0 + row < N);
        }
    float y_part[HEAD_DIM / 8][4] = {}, top[2] = {LOWEST, LOWEST}, sum[2] = {};      // sum: of this thread's keys
    scale /= LN_2;                                          // exp(x) = 2^(x / ln 2)

    float s[TILE_M / 8][4];
    if (count > 0) copy_tile(k_tiles, k, k_m, M, d, pieces);
    copy_async_commit();
    for (int tile = 0; tile <= count; tile++) {             // round `tile`: S of this tile, P of the one before
        copy_async_wait<0>();                               // this thread's copies of the last round are complete,
        __syncthreads();                                    // everyone's are; and nobody uses the round's two tiles
        unsigned* k_tile = k_tiles + tile % STAGES * TILE;
        unsigned* v_tile = v_tiles + tile % STAGES * TILE;
        const int m_next = (tile + 1) * TILE_M, m0 = m_next - 2 * TILE_M;           // m0: of the tile before
        if (tile + 1 < count)
            copy_tile(k_tiles + (tile + 1) % STAGES * TILE, k + m_next * k_m, k_m, M - m_next, d, pieces);
        if (tile < count)
            copy_tile(v_tile, v + (m0 + TILE_M) * v_m, v_m, M - m0 - TILE_M, e, pieces);
        copy_async_commit();

        const bool more = m0 + TILE_M < warp_end;           // the warp attends to keys of this tile
        if (tile == 0 && more)
            #pragma unroll
            for (int j = 0; j < TILE_M / 8; j += 2) scores(s[j], s[j + 1], q_part, k_tile + 8 * j * ROW);
        if (tile == 0 || m0 >= warp_end) continue;

        // top, and everything so far relative to it
        const bool all_seen = !mask && m0 + TILE_M <= M && !(causal && m0 + TILE_M > n0 + 1);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = row0 + 8 * i, n = n0 + row;
            float largest = NEG_INF;
            #pragma unroll
            for (int j = 0; j < TILE_M / 8; j++)
                #pragma unroll
                for (int u = 0; u < 2; u++) {
                    const int m = m0 + 8 * j + 2 * t + u;
                    const bool seen = all_seen || (n < N && m < (causal ? min(M, n + 1) : M)
                                                   && (!mask || mask[row * mask_n + m * mask_m]));
                    s[j][2 * i + u] = seen ? s[j][2 * i + u] : NEG_INF;
                    largest = max(largest, s[j][2 * i + u]);
                }
            #pragma unroll
            for (int other = 1; other < 4; other *= 2)
                largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
            const float next = max(top[i], scale * largest), shrink = exp2f(top[i] - next);
            top[i] = next;
            sum[i] *= shrink;
            #pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++) y_part[j][2 * i] *= shrink, y_part[j][2 * i + 1] *= shrink;
        }
        const unsigned* v_before = v_tiles + (tile - 1) % STAGES * TILE;
        if (more) weigh<true>(s, y_part, sum, top, scale, q_part, k_tile, v_before, TILE_M);
        else weigh<false>(s, y_part, sum, top, scale, q_part, k_tile, v_before, warp_end - m0);
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
