// CUDA on a CPU: compiles a .cu file with the host's C++ compiler and runs its threads one after another.
//
// Each thread of a block is a fibre: it has its own stack, and our code switches between fibres.  A fibre runs until it
// must wait for others (__syncthreads, a shuffle), and then the next one continues.  So a block needs one core, its
// threads can be stepped through in a debugger, and every run is the same.  Blocks run one after another.
//
//     run(kernel)  for each block:  shared memory <- NaN;  a fibre for each thread
//                  while fibres live:  resume each that is not waiting, in the requested order
//                                      all wait at a barrier -> release;  none can continue -> deadlock, with its lines
//
// It detects errors that a GPU would hide: shared memory that is read before it is written (the result is NaN), threads
// that wait at different barriers, shuffles in which a lane does not take part, and, by running the threads in reverse,
// results that depend on their order.  Compiled with a sanitizer (-DSANITIZED) it also names out-of-bounds accesses and
// races by line.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <utility>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define UNWATCHED
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// --- the language CUDA C++ --------------------------------------------------------------------------------

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#ifdef SANITIZED                    // a sanitizer watches statics better; Python takes `extern` from dynamic ones
#define __shared__ static
#else
#define __shared__ thread_local     // in a function this implies static, and `extern __shared__ X x[]` stays a declaration
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
constexpr int warpSize = 32;

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct int3 { int x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline void sincospif(float x, float* s, float* c) { *s = float(sin(M_PI * x)), *c = float(cos(M_PI * x)); }
inline void sincospi(double x, double* s, double* c) { *s = sin(M_PI * x), *c = cos(M_PI * x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)(((unsigned __int128)x * y) >> 64);
}
template <class X> X __ldg(const X* x) { return *x; }
template <class X> X __ldcs(const X* x) { return *x; }
template <class X> void __stcs(X* to, X x) { *to = x; }
#define BOTH(X) \
    inline X min(X a, X b) { return b < a ? b : a; } \
    inline X max(X a, X b) { return a < b ? b : a; }
BOTH(int) BOTH(unsigned) BOTH(long long) BOTH(unsigned long long) BOTH(float) BOTH(double)
#undef BOTH
template <class X> X atomicAdd(X* at, X x) { X old = *at; *at = old + x; return old; }
template <class X> X atomicMax(X* at, X x) { X old = *at; *at = max(old, x); return old; }
template <class X> X atomicMin(X* at, X x) { X old = *at; *at = min(old, x); return old; }
template <class X> X atomicExch(X* at, X x) { X old = *at; *at = x; return old; }
template <class X> X atomicCAS(X* at, X is, X x) { X old = *at; if (old == is) *at = x; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- fibres -----------------------------------------------------------------------------------------------

namespace cuda_on_cpu {

constexpr int MOST = 1024;                                  // threads of a block
#ifdef SANITIZED
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr uint64_t CANARY = 0x5afe57ac6b0770a1u;            // at a stack's end; an overflow overwrites it

enum State { READY, AT_BARRIER, IN_WARP, AT_COUNT, DONE };

struct Fibre {
    void* stack;                                            // its lower end
    size_t size;
    State state;
    int line;                                               // the line where it waits
    struct Round* round;                                    // the warp's exchange in which it takes part
    uint3 thread;
    int barriers;                                           // the number that it has reached
    const unsigned short* phase;                            // for ptx.cuh: AT_COUNT it waits until the parity of this
    unsigned parity;                                        // is no longer that
    int queued;                                             // for ptx.cuh: whether asynchronous copies are in transit
    void* tsan;
    void* fake_stack;
#if defined(__x86_64__)
    void* sp;
#else
    ucontext_t context;
#endif
};

struct Launch {
    unsigned grid[3], block[3], shared;
    int order;                                              // 0 forward, 1 reverse, otherwise a shuffle's seed (and
                                                            // blocks in reverse unless 0)
};

static Fibre fibres[MOST], scheduler;
static char* stacks;                                        // MOST * STACK bytes; all programs of a process share them
static int count, now;                                      // of this block's threads; the running one
static char failure[512];
static void (*body)(void*);
static void* body_arguments;

#if defined(__x86_64__)
// What a function must preserve: six registers and the stack pointer.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.pushsection .text
.local cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");
UNWATCHED inline void switch_stacks(Fibre& from, Fibre& to) { cuda_on_cpu_switch(&from.sp, to.sp); }
#else
inline void switch_stacks(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }
#endif

UNWATCHED inline void change(Fibre& from, Fibre& to, bool first) {
    (void)first;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan, first ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.state == DONE ? nullptr : &from.fake_stack, to.stack, to.size);
    switch_stacks(from, to);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
    switch_stacks(from, to);
#endif
}

UNWATCHED inline void wait(State state, int line) {
    Fibre& me = fibres[now];
    me.state = state, me.line = line;
    change(me, scheduler, false);
}

UNWATCHED static void start() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    body(body_arguments);
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&body);
#endif
    wait(DONE, 0);
}

// --- barriers and warps -----------------------------------------------------------------------------------

constexpr size_t WIDEST = 64;                               // most bytes that a lane gives to an exchange

// One exchange among lanes of a warp: each gives a value, and when all have arrived, each may read all values.
struct Round {
    unsigned mask, come, left;                              // lanes: required, arrived, not yet continued
    int line;
    size_t size;
    alignas(16) unsigned char values[32 * WIDEST];          // packed: lane i's at i * size
};
constexpr int ROUNDS = 66;                                  // each of 32 lanes reads one and waits for another
static Round rounds[MOST / 32][ROUNDS];
static int rounds_used[MOST / 32];

inline int linear() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)); }
UNWATCHED inline void leave(Fibre& fibre, int lane) {
    if (fibre.round) fibre.round->left &= ~(1u << lane);
    fibre.round = nullptr;
}

// The values of the warp's 32 lanes, after every lane of `mask` has arrived; valid until this lane's next exchange.
UNWATCHED inline const void* exchange(unsigned mask, const void* mine, size_t size, int line) {
    const int warp = now / 32, lane = now % 32;
    if (count - warp * 32 < 32) mask &= (1u << (count - warp * 32)) - 1;         // the last warp may have fewer
    Fibre& me = fibres[now];
    leave(me, lane);
    Round *mine_in = nullptr, *empty = nullptr;
    for (int i = 0; i < rounds_used[warp] && !mine_in; i++) {
        Round& round = rounds[warp][i];
        if (round.left == 0) { if (!empty) empty = &round; }
        else if (round.mask == mask && round.come != round.mask) mine_in = &round;
    }
    if (!mine_in) {
        mine_in = empty ? empty : &rounds[warp][rounds_used[warp]++];
        mine_in->mask = mine_in->left = mask, mine_in->come = 0, mine_in->line = line, mine_in->size = size;
    }
    if (!(mask >> lane & 1) || mine_in->size != size) {
        snprintf(failure, sizeof failure, "line %d: lane %d joins an exchange of the mask %08x begun in line %d that is "
                 "not for it", line, lane, mask, mine_in->line);
        me.round = nullptr;
        mine_in->left = 0;
        wait(DONE, line);
    }
    for (size_t i = 0; i < size; i++) mine_in->values[lane * size + i] = static_cast<const unsigned char*>(mine)[i];
    mine_in->come |= 1u << lane;
    me.round = mine_in;
#if defined(__SANITIZE_THREAD__)
    __tsan_release(mine_in);
#endif
    if (mine_in->come != mask) wait(IN_WARP, line);
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(mine_in);
#endif
    return mine_in->values;
}

// The same with types: an array of the 32 lanes' values.
template <class X> const X* warp_gather(unsigned mask, const X& mine, int line = __builtin_LINE()) {
    static_assert(sizeof(X) <= WIDEST, "a lane brings too much");
    return static_cast<const X*>(exchange(mask, &mine, sizeof(X), line));
}
inline int lane_of() { return now % 32; }

// Tells the sanitizer that whatever was done before a barrier is visible after it.  Successive barriers use different
// marks, since a thread that leaves late would otherwise also see what the others did after the barrier.
UNWATCHED inline void barrier(int line) {
#if defined(__SANITIZE_THREAD__)
    static char marks[2];
    char* mark = &marks[fibres[now].barriers++ % 2];
    __tsan_release(mark);
    wait(AT_BARRIER, line);
    __tsan_acquire(mark);
#else
    wait(AT_BARRIER, line);
#endif
}

// --- a block, and a grid of them --------------------------------------------------------------------------

UNWATCHED static void prepare(Fibre& fibre, char* stack) {
    fibre.stack = stack, fibre.size = STACK;
    *reinterpret_cast<uint64_t*>(stack) = CANARY;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(static_cast<char*>(fibre.stack) + STACK) - 1;
    top[0] = nullptr;                                       // start() never returns
    *--top = reinterpret_cast<void*>(start);
    top -= 6;                                               // the six registers
    for (int i = 0; i < 6; i++) top[i] = nullptr;
    fibre.sp = top;
#else
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack, fibre.context.uc_stack.ss_size = STACK;
    makecontext(&fibre.context, start, 0);
#endif
    fibre.state = READY, fibre.round = nullptr, fibre.fake_stack = nullptr;
    fibre.line = fibre.queued = fibre.barriers = 0;
#if defined(__SANITIZE_THREAD__)
    if (!fibre.tsan) fibre.tsan = __tsan_create_fiber(0);
#endif
}

// The place of a permutation at which thread i runs: i, its mirror image, or a shuffle's.
UNWATCHED static void shuffle(int* order, int n, int kind, unsigned block) {
    for (int i = 0; i < n; i++) order[i] = kind == 1 ? n - 1 - i : i;
    if (kind < 2) return;
    uint64_t state = uint64_t(kind) * 0x9e3779b97f4a7c15u + block;
    for (int i = n - 1; i > 0; i--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const int j = int((state >> 33) % unsigned(i + 1)), held = order[i];
        order[i] = order[j], order[j] = held;
    }
}

UNWATCHED static void describe_deadlock() {
    int printed = snprintf(failure, sizeof failure, "deadlock in block (%u, %u, %u):", blockIdx.x, blockIdx.y, blockIdx.z);
    int last_line = -1, last_state = -1;
    for (int i = 0; i < count && printed < int(sizeof failure) - 100; i++) {
        const Fibre& f = fibres[i];
        if (f.line == last_line && f.state == last_state) continue;
        last_line = f.line, last_state = f.state;
        printed += snprintf(failure + printed, sizeof failure - printed, " thread (%u, %u, %u) %s%.0d;", f.thread.x,
                            f.thread.y, f.thread.z, f.state == DONE ? "has ended" : f.state == AT_BARRIER ?
                            "waits for the block in line " : f.state == AT_COUNT ?
                            "waits at a counting barrier in line " : "waits for its warp in line ",
                            f.state == DONE ? 0 : f.line);
    }
}

// All live threads have reached a barrier: it must be the same barrier.
UNWATCHED static bool release_barrier() {
    int line = 0;
    for (int i = 0; i < count; i++) {
        if (fibres[i].state != AT_BARRIER) continue;
        if (line && fibres[i].line != line) {
            snprintf(failure, sizeof failure, "threads of one block wait in different __syncthreads(), in lines %d and %d",
                     line, fibres[i].line);
            return false;
        }
        line = fibres[i].line;
        fibres[i].state = READY;
    }
    return true;
}

UNWATCHED static bool run_block(const Launch& launch) {
    static int order[MOST];
    count = int(launch.block[0] * launch.block[1] * launch.block[2]);
    for (int i = 0; i < count; i++) {
        prepare(fibres[i], stacks + i * STACK);
        const unsigned u = unsigned(i), x = launch.block[0], y = launch.block[1];
        fibres[i].thread = {u % x, u / x % y, u / (x * y)};
    }
    for (int warp = 0; warp < MOST / 32; warp++)
        for (int i = 0; i < rounds_used[warp]; i++) rounds[warp][i].left = 0;
    shuffle(order, count, launch.order, blockIdx.x + 7919 * (blockIdx.y + 7919 * blockIdx.z));
    bool first = true;
    for (int alive = count; alive;) {
        bool moved = false;
        int waiting = 0;
        for (int k = 0; k < count; k++) {
            Fibre& fibre = fibres[order[k]];
            if (fibre.state == IN_WARP && fibre.round->come == fibre.round->mask) fibre.state = READY;
            if (fibre.state == AT_COUNT && *fibre.phase % 2 != fibre.parity) fibre.state = READY;
            if (fibre.state == READY) {
                now = order[k], threadIdx = fibre.thread;
                change(scheduler, fibre, first);
                moved = true;
                if (failure[0]) return false;
                if (fibre.state == DONE) { leave(fibre, now % 32); alive--; }
            }
            waiting += fibre.state == AT_BARRIER;
        }
        first = false;
        if (alive && waiting == alive) {
            if (!release_barrier()) return false;
        } else if (alive && !moved) {
            describe_deadlock();
            return false;
        }
    }
    for (int i = 0; i < count; i++) {
        if (*static_cast<uint64_t*>(fibres[i].stack) == CANARY) continue;
        snprintf(failure, sizeof failure, "a thread needs more than %zu bytes of stack", STACK);
        return false;
    }
    return true;
}

static void fill_shared_memory(unsigned dynamic_bytes);     // program.h has it, beside the memory
static bool wrote_past_shared_memory(unsigned dynamic_bytes);

// Runs a grid; returns what went wrong, or nullptr.
template <class F> UNWATCHED const char* run(const Launch& launch, F& call) {
    failure[0] = 0;
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    if (launch.block[0] * launch.block[1] * launch.block[2] > unsigned(MOST)) return "a block has at most 1024 threads";
    body = [](void* f) { (*static_cast<F*>(f))(); };
    body_arguments = &call;
#if defined(__SANITIZE_THREAD__)
    scheduler.tsan = __tsan_get_current_fiber();
#endif
    pthread_attr_t attributes;                              // a sanitizer must know the stack that it comes back to
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &scheduler.stack, &scheduler.size);
    pthread_attr_destroy(&attributes);
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    for (unsigned n = 0; n < blocks; n++) {
        const unsigned i = launch.order == 0 ? n : blocks - 1 - n;
        blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / (gridDim.x * gridDim.y)};
        fill_shared_memory(launch.shared);
        if (!run_block(launch)) return failure;
        if (wrote_past_shared_memory(launch.shared))
            return "a thread wrote past the dynamic shared memory that the launch asked for";
#if defined(__SANITIZE_THREAD__)
        __tsan_acquire(&body);                              // the next block has the same shared memory
#endif
    }
    return nullptr;
}

// Calls kernel(*args[0], *args[1], ...), each of the type that the kernel's signature says: as cudaLaunchKernel does.
template <class... P, size_t... I>
const char* launch(const Launch& how, void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    auto call = [=] { kernel(*static_cast<P*>(args[I])...); };
    return run(how, call);
}
template <class... P> const char* launch(const Launch& how, void (*kernel)(P...), void** args) {
    return launch(how, kernel, args, std::index_sequence_for<P...>());
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::warp_gather;

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    const int nothing = 0;
    cuda_on_cpu::warp_gather(mask, nothing, line);
}
template <class X> X __shfl_sync(unsigned mask, X x, int from, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_on_cpu::lane_of(), base = lane & ~(width - 1);
    return cuda_on_cpu::warp_gather(mask, x, line)[base + (from & (width - 1))];
}
template <class X> X __shfl_xor_sync(unsigned mask, X x, int flip, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_on_cpu::lane_of(), from = lane ^ flip;
    return cuda_on_cpu::warp_gather(mask, x, line)[(from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from];
}
template <class X> X __shfl_down_sync(unsigned mask, X x, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_on_cpu::lane_of(), from = (lane & (width - 1)) + int(by);
    return cuda_on_cpu::warp_gather(mask, x, line)[from < width ? lane + int(by) : lane];
}
template <class X> X __shfl_up_sync(unsigned mask, X x, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_on_cpu::lane_of(), from = (lane & (width - 1)) - int(by);
    return cuda_on_cpu::warp_gather(mask, x, line)[from >= 0 ? lane - int(by) : lane];
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    const int* votes = cuda_on_cpu::warp_gather(mask, vote, line);
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) if ((mask >> lane & 1) && votes[lane]) all |= 1u << lane;
    return all;
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, vote, line) != 0; }
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) { return __ballot_sync(mask, vote, line) == mask; }
