// Group norm, version 3: one block reads a slab of whole groups once, keeps it in shared memory, and writes it once.
//
// Three passes over the same numbers (mean, variance, result) do not require three passes over memory: a few groups of
// one image fit in the shared memory of a multiprocessor, and the later passes read them there.  If they do not fit, as
// many pixels are kept as possible, and the others are read again.
//
// A slab is `slab` neighbouring groups, W = slab C/G channels: as many as fill whole sectors of 32 bytes, the smallest
// transfer from memory (10 channels of float32 are 40 bytes, so a slab has 4 groups; engine/cuda/norm.py chooses).
//
// Which thread does what.  Each takes 4 neighbouring channels, read by one instruction, of every `rows`-th pixel.  The
// channels of a thread stay the same, so their gamma, beta, mean and rstd stay in its registers.  Neighbouring threads
// read neighbours, and a slab's row fills whole sectors if possible: the reads are coalesced.
//
//     channels    0..3      4..7      ..        W-1
//     pixel 0     thread 0  thread 1  ..  thread lanes-1          lanes = W/4,  rows = threads / lanes
//     pixel 1     lanes     lanes+1   ..
//     ...
//     pixel rows  thread 0  thread 1  ..
//
// A channel's sum is then spread over the `rows` threads of its column.  They add in shared memory, the upper half to
// the lower half until one row is left; then a warp adds the channels of each group by shuffles.  If C or W is not a
// multiple of 4, a thread takes 1 channel at a time.
//
//     shared memory     Acc  partial[..]         a row of 4 (forward) or 8 (backward) sums for each thread
//                       Acc  channel[2][W]       sums of the channels
//                       Acc  group[4][slab]      two numbers for each group (4: the tile begins at 16 bytes)
//                       T    tile[kept][W]       x;  backward, also dy
//
// Bytes    forward: x read once, y written once, 2 B N C elements; backward: x and dy once, dx once, 3.  This is
//          the least possible.  128 images of 14 x 14 x 64 in float32: 13 and 19 MB, 1024 blocks of 8 channels (6.3
//          KB). 2 images of 32 x 32 x 640, groups of 20: 32 blocks, whose 164 KB of x fit in the 227 KB of a block.
// Work     as version 1; the integer division by C/G is gone from the inner loops.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  There are only as many blocks as slabs.  A few large images (2 of 64 x 64 x 320 make 16 slabs) leave
// most of 132 multiprocessors idle, and only a third of a slab of 655 KB can be kept; version 4 is for these.  A block
// that fills the shared memory is alone on its multiprocessor, so nothing is read while it sums.  The sums of a small
// slab take 2 log2(rows) barriers, about as long as reading it.  4 numbers of half precision are 8 bytes, half of what
// a thread can read at once.
//
// row      numbers from one image's gamma (and beta) to the next: C or more, or 0 if all images share them
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

// The most threads of a block; fewer may be launched, in whole warps.  The 1 next to it below (blocks that must fit on
// a multiprocessor) allows each thread 128 registers.  Without it, NVRTC 13.5 stops at 64 for float64's forward kernel
// on sm_90, and spills 16 bytes; with it, that kernel has 80 registers and no spill.
constexpr int MOST_THREADS = 512;

__device__ __forceinline__ Acc warp_sum(Acc x) {
    for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

// V neighbouring elements, read or written by one instruction.
template <int V> struct alignas(V == 4 ? alignof(Four) : alignof(T)) Piece { T at[V]; };

template <int V> __device__ __forceinline__ Piece<V> read(const T* from) {
    return *reinterpret_cast<const Piece<V>*>(from);
}

template <int V> __device__ __forceinline__ void write(T* to, const Piece<V>& piece) {
    *reinterpret_cast<Piece<V>*>(to) = piece;
}

// A thread's place in the picture above.  The spare threads at the end of a block have row == rows.
struct Place {
    int lanes, rows, lane, row;
    __device__ __forceinline__ Place(int pieces) {
        lanes = min(pieces, int(blockDim.x));
        rows = int(blockDim.x) / lanes;
        lane = int(threadIdx.x) % lanes;
        row = int(threadIdx.x) / lanes;
    }
};

// Adds the sums of each column, K for each thread; the threads of row 0 then hold the sums of the columns.
template <int K> __device__ __forceinline__ void add_rows(Acc (&sum)[K], Acc* partial, const Place& at) {
    Acc* own = partial + threadIdx.x;
    for (int k = 0; k < K; k++) own[k * blockDim.x] = sum[k];
    __syncthreads();
    for (int left = at.rows; left > 1;) {
        const int half = (left + 1) / 2;
        if (at.row + half < left)
            for (int k = 0; k < K; k++) own[k * blockDim.x] += own[k * blockDim.x + half * at.lanes];
        __syncthreads();
        left = half;
    }
    for (int k = 0; k < K; k++) sum[k] = own[k * blockDim.x];       // all threads have read what they need
}

// group[g] = sum of the channels of group g: one warp for each group.
__device__ __forceinline__ void add_channels(const Acc* channel, Acc* group, int slab, int size) {
    for (int g = threadIdx.x / 32; g < slab; g += blockDim.x / 32) {
        Acc sum = 0;
        for (int c = threadIdx.x % 32; c < size; c += 32) sum += channel[g * size + c];
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) group[g] = sum;
    }
    __syncthreads();
}

// tile = the first `kept` pixels of x.  Each thread copies what only it will read, so no barrier is needed.
template <int V> __device__ __forceinline__ void stage(
        const T* x, T* tile, int C, int W, int kept, const Place& at) {
    constexpr int AT_ONCE = 4;                              // loads in transit at once, to hide the latency of memory
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V)
        for (int p = at.row; p < kept; p += AT_ONCE * at.rows) {
            Piece<V> piece[AT_ONCE];
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (p + i * at.rows < kept) piece[i] = read<V>(x + (p + i * at.rows) * C + c);
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (p + i * at.rows < kept) write<V>(tile + (p + i * at.rows) * W + c, piece[i]);
        }
}

template <int V> __device__ __forceinline__ void add(Acc (&sum)[V], const Piece<V>& x, const Acc (&first)[V]) {
    for (int k = 0; k < V; k++) sum[k] += wide(x.at[k]) - first[k];
}

template <int V> __device__ __forceinline__ void add_squares(Acc (&sum)[V], const Piece<V>& x, const Acc (&mean)[V]) {
    for (int k = 0; k < V; k++) sum[k] += (wide(x.at[k]) - mean[k]) * (wide(x.at[k]) - mean[k]);
}

// A thread's numbers of its V channels.
template <int V> struct Channels {
    Acc mean[V], rstd[V], a[V], shift[V];                   // z = a (x - mean) + shift
    __device__ __forceinline__ Channels(const Acc* mean_, const Acc* rstd_, const T* gamma, const T* beta,
                                        int c, int size) {
        for (int k = 0; k < V; k++) {
            mean[k] = mean_[(c + k) / size];
            rstd[k] = rstd_[(c + k) / size];
            a[k] = wide(gamma[c + k]) * rstd[k];
            shift[k] = wide(beta[c + k]);
        }
    }
};

template <int V> __device__ __forceinline__ Piece<V> normalised(Piece<V> x, const Channels<V>& of, int with_silu) {
    for (int k = 0; k < V; k++) {
        const Acc z = of.a[k] * (wide(x.at[k]) - of.mean[k]) + of.shift[k];
        x.at[k] = narrow(with_silu ? silu(z) : z);
    }
    return x;
}

// x and y point to the block's slab, gamma and beta to its channels, mean and rstd to its groups.
template <int V> __device__ __forceinline__ void forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd,
        int N, int C, int size, int slab, int kept, int with_silu, Acc eps, Acc* partial) {
    const int W = slab * size;
    const Acc n = Acc(N) * size;
    Acc* channel = partial + 4 * blockDim.x;
    Acc *mean_of = channel + 2 * W, *rstd_of = mean_of + slab;
    T* tile = reinterpret_cast<T*>(mean_of + 4 * slab);     // (kept, W)
    const Place at(W / V);
    stage<V>(x, tile, C, W, kept, at);

    // mean = first + sum (x - first) / n
    for (int base = 0; base < W; base += at.lanes * V) {    // one iteration, unless W > V threads
        const int c = base + at.lane * V;
        const bool busy = c < W && at.row < at.rows;
        Acc sum[V] = {}, first[V];
        for (int k = 0; k < V && busy; k++) first[k] = wide(x[(c + k) / size * size]);
        int p = busy ? at.row : N;
        for (; p < kept; p += at.rows) add<V>(sum, read<V>(tile + p * W + c), first);
        for (; p < N; p += at.rows) add<V>(sum, read<V>(x + p * C + c), first);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) channel[c + k] = sum[k];
    }
    __syncthreads();
    add_channels(channel, mean_of, slab, size);
    for (int g = threadIdx.x; g < slab; g += blockDim.x) mean[g] = mean_of[g] = wide(x[g * size]) + mean_of[g] / n;
    __syncthreads();

    // rstd = 1 / sqrt(sum (x - mean)^2 / n + eps)
    for (int base = 0; base < W; base += at.lanes * V) {
        const int c = base + at.lane * V;
        const bool busy = c < W && at.row < at.rows;
        Acc sum[V] = {}, m[V];
        for (int k = 0; k < V && busy; k++) m[k] = mean_of[(c + k) / size];
        int p = busy ? at.row : N;
        for (; p < kept; p += at.rows) add_squares<V>(sum, read<V>(tile + p * W + c), m);
        for (; p < N; p += at.rows) add_squares<V>(sum, read<V>(x + p * C + c), m);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) channel[c + k] = sum[k];
    }
    __syncthreads();
    add_channels(channel, rstd_of, slab, size);
    for (int g = threadIdx.x; g < slab; g += blockDim.x) {
        rstd[g] = rstd_of[g] = rstd_of_variance(rstd_of[g] / n + eps);
    }
    __syncthreads();

    // y = gamma rstd (x - mean) + beta
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V) {
        const Channels<V> of(mean_of, rstd_of, gamma, beta, c, size);
        int p = at.row;
        for (; p < kept; p += at.rows)
            write<V>(y + p * C + c, normalised<V>(read<V>(tile + p * W + c), of, with_silu));
        for (; p < N; p += at.rows)
            write<V>(y + p * C + c, normalised<V>(read<V>(x + p * C + c), of, with_silu));
    }
}

// Whether a slab can be read and written four elements at a time.
__device__ __forceinline__ bool in_fours(const T* x, const T* y, int C, int W) {
    return C % 4 == 0 && W % 4 == 0 && (reinterpret_cast<unsigned long long>(x) % alignof(Four) == 0)
                                    && (reinterpret_cast<unsigned long long>(y) % alignof(Four) == 0);
}

// slab    groups of a block, which divides `groups`           grid (B groups / slab)
// kept    pixels of a slab that stay in shared memory, 0 .. N
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd,
        int B, int N, int C, int groups, int row, int with_silu, Acc eps, int slab, int kept) {
    extern __shared__ float4 dynamic_shared[];
    Acc* partial = reinterpret_cast<Acc*>(dynamic_shared);
    const int slabs = groups / slab, b = blockIdx.x / slabs, g = blockIdx.x % slabs * slab, size = C / groups;
    x += b * N * C + g * size;                              // (N, W), rows C apart
    y += b * N * C + g * size;
    gamma += b * row + g * size;                           // (W)
    beta  += b * row + g * size;
    mean += b * groups + g;                                 // (slab)
    rstd += b * groups + g;
    if (in_fours(x, y, C, slab * size))
        forward<4>(x, gamma, beta, y, mean, rstd, N, C, size, slab, kept, with_silu, eps, partial);
    else
        forward<1>(x, gamma, beta, y, mean, rstd, N, C, size, slab, kept, with_silu, eps, partial);
}

// dz, from dy:  d silu(z) / dz = s (1 + z (1 - s)),  s = sigmoid(z)
__device__ __forceinline__ Acc before_silu(Acc dy, Acc z) {
    const Acc s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
}

// sum += (dz, dz (x - mean))
template <int V> __device__ __forceinline__ void add_products(
        Acc (&sum)[2 * V], const Piece<V>& x, const Piece<V>& dy, const Channels<V>& of, int with_silu) {
    for (int k = 0; k < V; k++) {
        const Acc centred = wide(x.at[k]) - of.mean[k];
        Acc dz = wide(dy.at[k]);
        if (with_silu) dz = before_silu(dz, of.a[k] * centred + of.shift[k]);
        sum[k] += dz;
        sum[V + k] += dz * centred;
    }
}

// dx = a dz - m0 - m1 (x - mean), plus what `plus` points to, unless it is null
template <int V> __device__ __forceinline__ Piece<V> gradient(
        const Piece<V>& x, Piece<V> dy, const Channels<V>& of, const Acc (&m0)[V], const Acc (&m1)[V], int with_silu,
        const T* plus) {
    Piece<V> more = {};
    if (plus) more = read<V>(plus);
    for (int k = 0; k < V; k++) {
        const Acc centred = wide(x.at[k]) - of.mean[k];
        Acc dz = wide(dy.at[k]);
        if (with_silu) dz = before_silu(dz, of.a[k] * centred + of.shift[k]);
        dy.at[k] = narrow(of.a[k] * dz - m0[k] - m1[k] * centred + wide(more.at[k]));
    }
    return dy;
}

template <int V> __device__ __forceinline__ void backward(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd,
        const T* plus, T* dx, Acc* dgamma, Acc* dbeta, int N, int C, int size, int slab, int kept, int with_silu,
        Acc* partial) {
    const int W = slab * size;
    const Acc n = Acc(N) * size;
    Acc* channel = partial + 8 * blockDim.x;
    Acc *m0_of = channel + 2 * W, *m1_of = m0_of + slab;
    T* tile = reinterpret_cast<T*>(m0_of + 4 * slab);       // (kept, W)
    T* tile_dy = tile + kept * W;                           // (kept, W)
    const Place at(W / V);
    stage<V>(x, tile, C, W, kept, at);
    stage<V>(dy, tile_dy, C, W, kept, at);

    // dbeta = sum dz,   dgamma = sum dz x_hat
    for (int base = 0; base < W; base += at.lanes * V) {    // one iteration, unless W > V threads
        const int c = base + at.lane * V;
        const Channels<V> of(mean, rstd, gamma, beta, min(c, W - V), size);
        Acc sum[2 * V] = {};
        int p = c < W && at.row < at.rows ? at.row : N;
        for (; p < kept; p += at.rows)
            add_products<V>(sum, read<V>(tile + p * W + c), read<V>(tile_dy + p * W + c), of, with_silu);
        for (; p < N; p += at.rows)
            add_products<V>(sum, read<V>(x + p * C + c), read<V>(dy + p * C + c), of, with_silu);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) {
            dbeta[c + k] = sum[k];
            dgamma[c + k] = sum[V + k] * of.rstd[k];
            channel[c + k] = of.a[k] * sum[k];
            channel[W + c + k] = of.a[k] * sum[V + k] * of.rstd[k] * of.rstd[k];
        }
    }
    __syncthreads();
    // these are n m0 and n m1:  m0 = rstd mean(gamma dz),   m1 = rstd^2 mean(gamma dz x_hat)
    add_channels(channel, m0_of, slab, size);
    add_channels(channel + W, m1_of, slab, size);

    // dx = gamma rstd dz - m0 - m1 (x - mean)
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V) {
        const Channels<V> of(mean, rstd, gamma, beta, c, size);
        Acc m0[V], m1[V];
        for (int k = 0; k < V; k++) {
            m0[k] = m0_of[(c + k) / size] / n;
            m1[k] = m1_of[(c + k) / size] / n;
        }
        int p = at.row;
        for (; p < kept; p += at.rows)
            write<V>(dx + p * C + c, gradient<V>(read<V>(tile + p * W + c), read<V>(tile_dy + p * W + c),
                                                 of, m0, m1, with_silu, plus ? plus + p * C + c : nullptr));
        for (; p < N; p += at.rows)
            write<V>(dx + p * C + c, gradient<V>(read<V>(x + p * C + c), read<V>(dy + p * C + c),
                                                 of, m0, m1, with_silu, plus ? plus + p * C + c : nullptr));
    }
}

// dgamma and dbeta are halves of an array (B, 2, C): one row of both for each image.  plus: null, or an array of
// x's shape, which is added to dx.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_backward(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd,
        const T* plus, T* dx, Acc* dgamma, Acc* dbeta, int B, int N, int C, int groups, int row, int with_silu,
        int slab, int kept) {
    extern __shared__ float4 dynamic_shared[];
    Acc* partial = reinterpret_cast<Acc*>(dynamic_shared);
    const int slabs = groups / slab, b = blockIdx.x / slabs, g = blockIdx.x % slabs * slab, size = C / groups;
    x  += b * N * C + g * size;                             // (N, W), rows C apart
    dy += b * N * C + g * size;
    dx += b * N * C + g * size;
    if (plus) plus += b * N * C + g * size;
    gamma += b * row + g * size;                           // (W)
    beta  += b * row + g * size;
    mean += b * groups + g;                                 // (slab)
    rstd += b * groups + g;
    dgamma += b * 2 * C + g * size;
    dbeta  += b * 2 * C + g * size;
    if (in_fours(x, dy, C, slab * size) && in_fours(plus, dx, C, slab * size))              // null is in fours
        backward<4>(x, dy, gamma, beta, mean, rstd, plus, dx, dgamma, dbeta, N, C, size, slab, kept, with_silu,
                    partial);
    else
        backward<1>(x, dy, gamma, beta, mean, rstd, plus, dx, dgamma, dbeta, N, C, size, slab, kept, with_silu,
                    partial);
}
