// The end of a training step in three launches: clipping, AdamW and the moving average, for all parameters at once.
//
//     g = g~ / S,   g <- g min(1, clip / |g|)                                    S: the loss scale; |g| over all
//     m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) g^2               Kingma & Ba 2015, algorithm 1
//     w <- w - lr (m^ / (sqrt(v^) + eps) + decay w)                              Loshchilov & Hutter 2019
//     average <- average + (1 - d)(w - average)
//
// A network has hundreds of parameters, most of them small: one launch for each and each line above would be thousands
// a step, of a few microseconds each.  Here the parameters stand in a table of pointers, and are cut into chunks, a
// block each; a bias of 64 numbers takes a block, and a matrix of a million takes many.
//
// And no number comes to the host in between: whether the gradient is finite, how it is clipped and what becomes of S
// is decided on the device, by one thread.  A step that is left out is a launch that changes nothing.
//
// Which thread does what:
//
//     square_sums       block c: the squares of chunk c            partial[c]
//                       each thread every 256th number of the chunk, then a tree in shared memory
//     decide            one block: |g| from the partial sums, in an order that never changes; thread 0 writes
//                       state  what a run remembers: S, good steps, steps left out, and the step that failed
//                       step   what this step does: whether, and the factors that all numbers share
//     adamw             block c: chunk c of all five arrays
//
//         table     w_0 w_1 ... | g_0 g_1 ... | m | v | average           pointers, `count` of each
//         chunks    (0, 0) (1, 0) (1, 4096) (1, 8192) (2, 0) ...          parameter, first number
//
// Bytes    square_sums: 4 read for each number; adamw: 20 read and 16 written.  2.2 million parameters: 88 MB.
// Work     2 and about 20 operations a number, a root and a division among them.  Bound by memory, or, for a model as
//          small as ours, by its three launches.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  Each number is read by itself, 4 bytes a thread; a parameter may start anywhere, so 16 at a time
// would need a careful beginning and end.  A bias of 64 numbers leaves 192 threads of its block idle.
//
// takes   float32, float64
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;

// The state, and what a step does.
constexpr int SCALE = 0, GOOD = 1, SKIPPED = 2, FAILED = 3, NORM = 4;
constexpr int GO = 0, FACTOR = 1, RATE = 2, V_SCALE = 3, TOWARDS = 4;

__device__ __forceinline__ bool is_finite(Acc x) { return x - x == 0; }

// The sum of all threads' x, for thread 0; in the same order every time.
__device__ __forceinline__ Acc block_sum(Acc x, Acc* sums) {
    const int t = threadIdx.x;
    sums[t] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) sums[t] += sums[t + half];
    }
    return sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) square_sums(
        const unsigned long long* table, const int* lengths, const int* chunks, Acc* partial, int count) {
    __shared__ Acc sums[THREADS];
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = min(first + CHUNK, lengths[p]);
    const T* g = reinterpret_cast<const T*>(table[count + p]);
    Acc sum = 0;
    for (int i = first + threadIdx.x; i < last; i += THREADS) sum += g[i] * g[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// number: of this step, the first is 1.  patience: good steps before S is doubled, 0 where S stays as it is.
extern "C" __global__ void __launch_bounds__(THREADS) decide(
        const Acc* loss, const Acc* partial, Acc* state, Acc* step, int blocks, int number, int patience,
        double clip, double lr, double b1, double b2, double ema) {
    __shared__ Acc sums[THREADS];
    Acc sum = 0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x > 0) return;

    step[GO] = 0;
    if (state[FAILED] > 0) return;                          // a step before it failed, and the host does not know yet
    const Acc scale = state[SCALE], norm = sqrt(sum) / scale;
    const bool good = is_finite(norm);
    if (!is_finite(*loss) || (!good && scale <= 1)) {          // no smaller scale would help
        state[FAILED] = number;
        state[NORM] = norm;
        return;
    }
    if (patience > 0) {
        const bool grows = good && state[GOOD] + 1 == patience;
        state[GOOD] = good && !grows ? state[GOOD] + 1 : Acc(0);
        state[SCALE] = grows ? 2 * scale : good ? scale : scale / 2;
        if (!good) state[SKIPPED] += 1;
    }
    if (!good) return;
    const double n = number - double(state[SKIPPED]);       // of AdamW and of the average: those that were made
    const double d = (1 + (n - 1)) / (10 + (n - 1));
    step[GO] = 1;
    step[FACTOR] = (norm > Acc(clip) ? Acc(clip) / norm : Acc(1)) / scale;
    step[RATE] = Acc(lr / (1 - pow(b1, n)));
    step[V_SCALE] = Acc(1 / (1 - pow(b2, n)));
    step[TOWARDS] = Acc(1 - (d < ema ? d : ema));
}

// decays: by what a parameter is multiplied before its update, 1 - lr decay or 1;  c1 = 1 - b1, c2 = 1 - b2.
extern "C" __global__ void __launch_bounds__(THREADS) adamw(
        const unsigned long long* table, const int* lengths, const int* chunks, const unsigned char* decays,
        const Acc* step, int count, Acc b1, Acc c1, Acc b2, Acc c2, Acc eps, Acc shrink) {
    if (step[GO] == 0) return;
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = min(first + CHUNK, lengths[p]);
    T* w = reinterpret_cast<T*>(table[p]);
    const T* g = reinterpret_cast<const T*>(table[count + p]);
    T* m = reinterpret_cast<T*>(table[2 * count + p]);
    T* v = reinterpret_cast<T*>(table[3 * count + p]);
    T* average = reinterpret_cast<T*>(table[4 * count + p]);
    const Acc keep = decays[p] ? shrink : Acc(1);
    const Acc factor = step[FACTOR], rate = step[RATE], v_scale = step[V_SCALE], towards = step[TOWARDS];
    for (int i = first + threadIdx.x; i < last; i += THREADS) {
        const Acc gi = g[i] * factor;
        const Acc mi = b1 * m[i] + c1 * gi;
        const Acc vi = b2 * v[i] + c2 * gi * gi;
        const Acc wi = keep * w[i] - rate * mi / (sqrt(vi * v_scale) + eps);
        m[i] = mi, v[i] = vi, w[i] = wi;
        average[i] += towards * (wi - average[i]);
    }
}
